"""The manifest: every example of a data set in one local Arrow file, written once, read at random.

Rows keep text, media paths and what a template reads; media bytes only where the source held
them inline. The last record batch is empty and carries what is known when all rows are written:
their number, the fingerprint of their content, a checksum of each batch, and the source's summary.

::

    key      string               "train.jsonl:7"
    origin   string               "train.jsonl:7", also where an id column gives the key
    payload  string               {"turns": [{"role": "user", "parts": [["image", "a/7.png"], ...
    media    list<large_binary>   what ["image", {"inline": 0}] in the payload refers to
"""

from __future__ import annotations

import bisect
import hashlib
import json
import os
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.ipc

from gemma_tuner.errors import DataError, SourceError
from gemma_tuner.records import Audio, Example, Image, Part, Text, Turn

FORMAT_VERSION = 1
"""Raise it whenever the same source would make other rows: old manifests are then written anew."""

_SCHEMA = pyarrow.schema(
    [
        ("key", pyarrow.string()),
        ("origin", pyarrow.string()),
        ("payload", pyarrow.string()),
        ("media", pyarrow.list_(pyarrow.large_binary())),
    ]
)
_ENTRY = b"gemma_tuner.manifest"
_ENTRY_CHECKSUM = b"gemma_tuner.manifest.crc32"
_BATCH_ROWS = 1024
_BATCH_BYTES = 16 << 20


class Manifest:
    """An open manifest.

    Args:
        path: The file; it is memory-mapped, and every batch's checksum is verified.

    Raises:
        SourceError: Damaged, incomplete, or of another format version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # Arrow's map outlives the file object and the file's name.
            with pyarrow.memory_map(str(path)) as file:
                self.num_bytes = file.size()
                reader = pyarrow.ipc.open_file(file)
                self._batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
                _, metadata = reader.get_batch_with_custom_metadata(len(self._batches) - 1)
            entry = json.loads(metadata[_ENTRY])
            is_whole = int(metadata[_ENTRY_CHECKSUM]) == zlib.crc32(metadata[_ENTRY])
            checksums = [_checksum(batch) for batch in self._batches]
        except (pyarrow.ArrowException, OSError, LookupError, TypeError, ValueError) as error:
            raise SourceError(
                f"the manifest {path.name} is damaged ({type(error).__name__})"
            ) from error
        if not is_whole or entry["version"] != FORMAT_VERSION or entry["checksums"] != checksums:
            raise SourceError(f"the manifest {path.name} is damaged or of another version")
        self._starts = [0, *accumulate(batch.num_rows for batch in self._batches)]
        self.fingerprint: str = entry["fingerprint"]
        self.root = Path(entry["root"])
        self.summary: dict[str, Any] = entry["summary"]

    def __len__(self) -> int:
        return self._starts[-1]

    def read_key(self, row: int) -> str:
        """Return the key of a row."""
        return self._read(row, "key")

    def read_keys(self) -> Iterator[str]:
        """Return the keys of all rows in order."""
        return (key for batch in self._batches for key in batch.column("key").to_pylist())

    def read_origin(self, row: int) -> str:
        """Return where in its source a row stands."""
        return self._read(row, "origin")

    def read_example(self, row: int) -> Example:
        """Return the example of a row, its media encoded or as paths below :attr:`root`."""
        payload = json.loads(self._read(row, "payload"))
        return _unpack(self.read_key(row), payload, self._read(row, "media"))

    def _read(self, row: int, column: str) -> Any:
        index = bisect.bisect_right(self._starts, row) - 1
        return self._batches[index].column(column)[row - self._starts[index]].as_py()


def write_manifest(
    path: Path,
    examples: Iterable[tuple[str, Example]],
    *,
    root: Path,
    read_summary: Callable[[], Mapping[str, Any]],
) -> None:
    """Write a manifest, replacing what is there only once it is complete.

    Args:
        path: Where; its folder is created, for the user alone, if need be.
        examples: Origin and example of each row; read once, a bounded number held at a time.
        root: The folder that relative media paths start from. Not part of the fingerprint.
        read_summary: Called after the last example for what to keep about the source (JSON).

    Raises:
        DataError: A row that cannot be kept: text that is not valid Unicode, or template fields
            that are not JSON.
        SourceError: No rows, two rows with one key, or a folder that cannot be written.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.")
        temporary = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as file:
                _write(file, examples, root, read_summary)
                file.flush()
                os.fsync(file.fileno())
            _refuse_double_keys(Manifest(temporary))
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise SourceError(
            f"the manifest cannot be written to the folder {path.parent.name!r} "
            f"({error.strerror}); free some space there, or choose another by cache_dir="
        ) from None


def _write(
    file: Any,
    examples: Iterable[tuple[str, Example]],
    root: Path,
    read_summary: Callable[[], Mapping[str, Any]],
) -> None:
    fingerprint = hashlib.sha256()
    checksums: list[int] = []
    rows: list[dict[str, Any]] = []
    num_bytes = num_rows = 0

    with pyarrow.ipc.new_file(file, _SCHEMA) as writer:

        def flush() -> None:
            batch = pyarrow.RecordBatch.from_pylist(rows, schema=_SCHEMA)
            checksums.append(_checksum(batch))
            writer.write_batch(batch)
            rows.clear()

        for origin, example in examples:
            payload, media = _pack(example)
            for content in (example.key.encode(), payload.encode(), *media):
                fingerprint.update(len(content).to_bytes(8, "little"))
                fingerprint.update(content)
                num_bytes += len(content)
            rows.append({"key": example.key, "origin": origin, "payload": payload, "media": media})
            num_rows += 1
            if len(rows) >= _BATCH_ROWS or num_bytes >= _BATCH_BYTES:
                flush()
                num_bytes = 0
        if not num_rows:
            raise SourceError("the data holds no rows; check the paths and the split")
        flush()
        end = pyarrow.RecordBatch.from_pylist([], schema=_SCHEMA)
        entry = {
            "version": FORMAT_VERSION,
            "fingerprint": fingerprint.hexdigest(),
            "checksums": [*checksums, _checksum(end)],
            "root": str(root),
            "summary": read_summary(),
        }
        content = json.dumps(entry).encode()
        metadata = {_ENTRY: content, _ENTRY_CHECKSUM: str(zlib.crc32(content)).encode()}
        writer.write_batch(end, custom_metadata=metadata)


def _checksum(batch: pyarrow.RecordBatch) -> int:
    checksum = zlib.crc32(batch.num_rows.to_bytes(8, "little"))
    for column in batch.columns:
        for buffer in column.buffers():
            checksum = zlib.crc32(buffer or b"", checksum)
    return checksum


def _refuse_double_keys(manifest: Manifest) -> None:
    """Find two rows with one key, by sorting eight bytes of each: a set of them may not fit."""
    hashes = hash_keys(manifest.read_keys())
    order = np.argsort(hashes, kind="stable")
    same = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]])
    for place in same.tolist():
        first, second = int(order[place]), int(order[place + 1])
        key = manifest.read_key(first)
        if key == manifest.read_key(second):
            raise SourceError(
                f"the key {key!r} stands for two rows, {manifest.read_origin(first)} and "
                f"{manifest.read_origin(second)}; name another column by id=, or set id=False to "
                "number the rows"
            )


def hash_keys(keys: Iterable[str], salt: str = "") -> np.ndarray:
    """Hash keys to 64 bits each.

    Args:
        keys: The keys.
        salt: Makes hashes that have nothing to do with those of another salt.

    Returns:
        uint64 ``[keys]``, the same on every machine.
    """
    prefix = hashlib.blake2b(f"{salt}/".encode(), digest_size=8)
    digests = bytearray()
    for key in keys:
        one = prefix.copy()
        one.update(key.encode())
        digests += one.digest()
    return np.frombuffer(digests, dtype="<u8")


def _pack(example: Example) -> tuple[str, list[bytes]]:
    """Write an example as JSON, and list the bytes that it refers to."""
    media: list[bytes] = []
    document: dict[str, Any] = {}
    if example.document is not None:
        document["document"] = example.document
    if example.turns:
        document["turns"] = [_pack_turn(turn, media) for turn in example.turns]
    if example.tools:
        document["tools"] = list(example.tools)
    try:
        payload = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
        (example.key + payload).encode()
    except UnicodeEncodeError:
        raise DataError(
            "its text or id holds half of a character (an unpaired surrogate); write it as UTF-8",
            key=example.key,
        ) from None
    except (TypeError, ValueError, RecursionError):
        raise DataError(
            "its messages or tools hold a value that JSON has no form for (a date or bytes, say); "
            "make it text",
            key=example.key,
        ) from None
    return payload, media


def _pack_turn(turn: Turn, media: list[bytes]) -> dict[str, Any]:
    packed: dict[str, Any] = {
        "role": turn.role,
        "parts": [_pack_part(part, media) for part in turn.parts],
    }
    return {**packed, "fields": dict(turn.fields)} if turn.fields else packed


def _pack_part(part: Part, media: list[bytes]) -> list[Any]:
    if isinstance(part, Text):
        return ["text", part.text]
    kind = "image" if isinstance(part, Image) else "audio"
    if isinstance(part.source, str):
        return [kind, part.source]
    place: dict[str, Any] = {"inline": len(media)}
    if isinstance(part.source, bytes):
        media.append(part.source)
    elif isinstance(part, Audio) and isinstance(part.source, np.ndarray):
        place["sample_rate_hz"] = part.sample_rate_hz
        media.append(part.source.astype("<f4").tobytes())
    else:
        raise TypeError(f"a source gives media encoded, and gave a {type(part.source).__name__}")
    return [kind, place]


def _unpack(key: str, document: Mapping[str, Any], media: list[bytes]) -> Example:
    turns = tuple(
        Turn(
            turn["role"],
            tuple(_unpack_part(kind, value, media) for kind, value in turn["parts"]),
            turn.get("fields", {}),
        )
        for turn in document.get("turns", ())
    )
    return Example(key, turns, document.get("document"), tuple(document.get("tools", ())))


def _unpack_part(kind: str, value: Any, media: list[bytes]) -> Part:
    if kind == "text":
        return Text(value)
    source = value if isinstance(value, str) else media[value["inline"]]
    if kind == "image":
        return Image(source)
    if isinstance(value, dict) and "sample_rate_hz" in value and isinstance(source, bytes):
        return Audio(np.frombuffer(source, dtype="<f4").copy(), value["sample_rate_hz"])
    return Audio(source)
