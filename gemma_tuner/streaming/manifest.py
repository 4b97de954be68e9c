"""The manifest: every example of a data set in one local Arrow file, written once, read at random.

Rows keep text, media paths, stored objects with their versions, and what a template reads; media
bytes only where the source held them inline. The last record batch is empty and carries what is
known when all rows are written: the fingerprint of their content, a checksum of each batch, the
rows at which shards begin, how much media there is to fetch, and the source's summary.

::

    key      string               "train.jsonl:7"
    origin   string               "train.jsonl:7", also where an id column gives the key
    payload  string               {"turns": [{"role": "user", "parts": [["image", "a/7.png"], ...
    media    list<large_binary>   what ["image", {"inline": 0}] in the payload refers to
    pins     binary               of each path in the payload, in its order: the file's size and
                                  checksum (8 and 4 bytes)

A stored object stands in the payload as ``["image", {"stored": [uri, generation, num_bytes,
crc32c, start]}]``, and behind a part of a recording stand its start and duration in seconds:
``["audio", "a.wav", 2.0, 1.5]``. The fingerprint leaves the pins out: whoever mends a file and
reads the source anew (``refresh=True``) goes on with the run.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import mmap
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.ipc

from gemma_tuner.disk import disk_errors_explained, replaced
from gemma_tuner.errors import DataError, SourceError
from gemma_tuner.modalities import MediaKind, kind_of
from gemma_tuner.records import Audio, Example, Image, Part, PinnedFile, StoredObject, Text, Turn
from gemma_tuner.sources.examples import Outcome

FORMAT_VERSION = 4
"""Raise it when the same source would make other rows: old manifests are then written again."""

_SCHEMA = pyarrow.schema(
    [
        ("key", pyarrow.string()),
        ("origin", pyarrow.string()),
        ("payload", pyarrow.string()),
        ("media", pyarrow.list_(pyarrow.large_binary())),
        ("pins", pyarrow.binary()),
    ]
)
_ENTRY = b"gemma_tuner.manifest"
_ENTRY_CHECKSUM = b"gemma_tuner.manifest.crc32"
_PIN = struct.Struct("<QI")
_BATCH_ROWS = 1024
_BATCH_BYTES = 16 << 20
_VERIFIED_AT_ONCE_BYTES = 128 << 20  # a larger manifest would make every start wait for its disk
# Pages that are mapped at most before they are given back. One that is touched brings those around
# it along: on Linux 64 KiB, and since 6.18 as much as the kernel keeps together, up to 2 MiB.
_MAPPED_BYTES = 64 << 20
_AROUND_BYTES = 2 << 20


class Manifest:
    """An open manifest.

    It is memory-mapped. Pages that were read are given back from time to time: they would count
    as this process's memory until the whole file does.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._touched_bytes = 0
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self.num_bytes = len(self._map)
            reader = pyarrow.ipc.open_file(pyarrow.py_buffer(self._map))
            is_ours = reader.schema.equals(_SCHEMA)
            self._batches: list[pyarrow.RecordBatch] = []
            for index in range(reader.num_record_batches):
                self._batches.append(reader.get_batch(index))
                self._touch(0)
            _, metadata = reader.get_batch_with_custom_metadata(len(self._batches) - 1)
            entry = json.loads(metadata[_ENTRY])
            is_whole = int(metadata[_ENTRY_CHECKSUM]) == zlib.crc32(metadata[_ENTRY])
            self._checksums = entry["checksums"]
            is_whole &= len(self._checksums) == len(self._batches)
        except (pyarrow.ArrowException, OSError, LookupError, TypeError, ValueError) as error:
            raise SourceError(
                f"the manifest {path.name} is damaged ({type(error).__name__})"
            ) from error
        # The number alone is not asked: one that two writers raised at once has meant two schemas.
        if not (is_whole and is_ours) or entry.get("version") != FORMAT_VERSION:
            raise SourceError(f"the manifest {path.name} is damaged or of another version")
        self._starts = [0, *accumulate(batch.num_rows for batch in self._batches)]
        self._verified = bytearray(len(self._batches))
        if self.num_bytes <= _VERIFIED_AT_ONCE_BYTES:
            for index in range(len(self._batches)):
                self._open_batch(index)
        self.fingerprint: str = entry["fingerprint"]
        self.root = Path(entry["root"])
        self.summary: dict[str, Any] = entry["summary"]
        self.shards: list[int] = entry["shards"]
        """The rows at which another file of the source begins."""
        self.num_objects: int = entry["num_objects"]
        """Stored objects that the examples refer to, one counted as often as it is named."""
        self.object_bytes: int = entry["object_bytes"]
        """Their bytes, of those whose size is known."""

    def __len__(self) -> int:
        return self._starts[-1]

    def read_key(self, row: int) -> str:
        """Return the key of a row."""
        return self._read(row, "key")[0]

    def read_keys(self) -> Iterator[str]:
        """Return the keys of all rows in order."""
        for index in range(len(self._batches)):
            yield from self._open_batch(index).column("key").to_pylist()
            self._forget_pages()

    def read_origin(self, row: int) -> str:
        """Return where in its source a row stands."""
        return self._read(row, "origin")[0]

    def read_example(self, row: int) -> Example:
        """Return the example of a row, its media encoded, stored, or as paths below the root."""
        key, payload, media, packed = self._read(row, "key", "payload", "media", "pins")
        pins = _PIN.iter_unpack(packed)
        document = json.loads(payload)
        turns = tuple(
            Turn(
                turn["role"],
                tuple(_unpack_part(media, pins, *part) for part in turn["parts"]),
                turn.get("fields", {}),
                turn.get("is_trained", True),
            )
            for turn in document.get("turns", ())
        )
        return Example(key, turns, document.get("document"), tuple(document.get("tools", ())))

    def find_media(self, kind: MediaKind, rows: Sequence[int] | np.ndarray) -> int | None:
        """Find the first of some rows, ascending, that holds this kind of media."""
        wanted = np.asarray(rows)
        for index, start in enumerate(self._starts[:-1]):
            payloads = self._open_batch(index).column("payload")
            # In JSON no text holds this, its quotes escaped; a tool's declaration may.
            mask = pyarrow.compute.match_substring(payloads, f'["{kind}",')  # pyright: ignore[reportAttributeAccessIssue]
            first, end = np.searchsorted(wanted, [start, start + len(payloads)])
            found = np.flatnonzero(mask.to_numpy(zero_copy_only=False)) + start
            for row in np.intersect1d(found, wanted[first:end]).tolist():
                if any(kind_of(part) == kind for part in self.read_example(row).media):
                    return row
            self._forget_pages()
        return None

    def _read(self, row: int, *columns: str) -> list[Any]:
        index = bisect.bisect_right(self._starts, row) - 1
        batch, place = self._open_batch(index), row - self._starts[index]
        values = [batch.column(column)[place].as_py() for column in columns]
        for value in values:
            self._touch(sum(map(len, value)) if isinstance(value, list) else len(value))
        return values

    def _open_batch(self, index: int) -> pyarrow.RecordBatch:
        batch = self._batches[index]
        if not self._verified[index]:
            if _checksum(batch) != self._checksums[index]:
                raise SourceError(
                    f"the manifest {self.path.name} is damaged; delete it, and it is written anew"
                )
            self._verified[index] = True
            self._touch(batch.nbytes)
        return batch

    def _touch(self, num_bytes: int) -> None:
        """Count bytes that were read at one place, and give all pages back after some MiB."""
        self._touched_bytes += _AROUND_BYTES + num_bytes
        if self._touched_bytes >= _MAPPED_BYTES:
            self._forget_pages()

    def _forget_pages(self) -> None:
        self._map.madvise(mmap.MADV_DONTNEED)
        self._touched_bytes = 0


def write_manifest(
    path: Path,
    outcomes: Iterable[tuple[str, Outcome]],
    *,
    root: Path,
    read_summary: Callable[[], Mapping[str, Any]],
    pass_over: Callable[[str, DataError], None] | None = None,
) -> None:
    """Write a manifest, replacing what is there only once it is complete."""
    # pass_over gets each row that cannot be kept, and raises to end the writing; None raises the
    # first. read_summary is called after the last row.
    with disk_errors_explained(
        lambda reason: SourceError(
            f"the manifest cannot be written to the folder {path.parent.name!r} ({reason}); free "
            "some space there, or choose another by cache_dir="
        )
    ):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with replaced(path) as temporary:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                _write(file, outcomes, root, read_summary, pass_over or _raise)
            _refuse_double_keys(Manifest(temporary))


def _raise(origin: str, error: DataError) -> None:
    raise error


def _write(
    file: Any,
    outcomes: Iterable[tuple[str, Outcome]],
    root: Path,
    read_summary: Callable[[], Mapping[str, Any]],
    pass_over: Callable[[str, DataError], None],
) -> None:
    fingerprint = hashlib.sha256()
    checksums: list[int] = []
    shards: list[int] = []
    rows: list[dict[str, Any]] = []
    num_bytes = num_rows = num_objects = object_bytes = 0
    shard = None

    with pyarrow.ipc.new_file(file, _SCHEMA) as writer:

        def flush() -> None:
            batch = pyarrow.RecordBatch.from_pylist(rows, schema=_SCHEMA)
            checksums.append(_checksum(batch))
            writer.write_batch(batch)
            rows.clear()

        for origin, outcome in outcomes:
            try:
                example = _need_example(outcome)
                payload, media, pins = _pack(example)
            except DataError as error:
                pass_over(origin, error)
                continue
            for content in (example.key.encode(), payload.encode(), *media):
                fingerprint.update(len(content).to_bytes(8, "little"))
                fingerprint.update(content)
                num_bytes += len(content)
            for stored in list_stored(example):
                num_objects += 1
                object_bytes += stored.num_bytes or 0
            if shard != (shard := origin.rpartition(":")[0]):
                shards.append(num_rows)
            row = {"key": example.key, "origin": origin, "payload": payload}
            rows.append({**row, "media": media, "pins": pins})
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
            "shards": shards,
            "num_objects": num_objects,
            "object_bytes": object_bytes,
            "summary": read_summary(),
        }
        content = json.dumps(entry).encode()
        metadata = {_ENTRY: content, _ENTRY_CHECKSUM: str(zlib.crc32(content)).encode()}
        writer.write_batch(end, custom_metadata=metadata)


def _pack(example: Example) -> tuple[str, list[bytes], bytes]:
    """Write an example as JSON, the bytes that it refers to, and what its files were."""
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
    files = [part.source for part in example.media if isinstance(part.source, PinnedFile)]
    return payload, media, b"".join(_PIN.pack(each.num_bytes, each.crc32c) for each in files)


def _pack_turn(turn: Turn, media: list[bytes]) -> dict[str, Any]:
    packed: dict[str, Any] = {
        "role": turn.role,
        "parts": [_pack_part(part, media) for part in turn.parts],
    }
    if turn.fields:
        packed["fields"] = dict(turn.fields)
    if not turn.is_trained:
        packed["is_trained"] = False
    return packed


def _pack_part(part: Part, media: list[bytes]) -> list[Any]:
    if isinstance(part, Text):
        return ["text", part.text]
    kind = kind_of(part)
    segment: list[float | None] = []
    if isinstance(part, Audio) and part.duration_seconds is not None:
        segment = [part.start_seconds, part.duration_seconds]
    if isinstance(part.source, StoredObject):
        return [kind, {"stored": list(astuple(part.source))}, *segment]
    if isinstance(part.source, PinnedFile):
        return [kind, part.source.path, *segment]
    place: dict[str, Any] = {"inline": len(media)}
    if isinstance(part.source, bytes):
        media.append(part.source)
    elif isinstance(part, Audio) and isinstance(part.source, np.ndarray):
        place["sample_rate_hz"] = part.sample_rate_hz
        media.append(part.source.astype("<f4").tobytes())
    else:
        raise TypeError(f"a source gives media encoded, and gave a {type(part.source).__name__}")
    return [kind, place, *segment]


def _unpack_part(
    media: list[bytes],
    pins: Iterator[tuple[int, int]],
    kind: str,
    value: Any,
    *segment: float | None,
) -> Part:
    if kind == "text":
        return Text(value)
    if isinstance(value, str):
        source = PinnedFile(value, *next(pins))
    elif "stored" in value:
        source = StoredObject(*value["stored"])
    else:
        source = media[value["inline"]]
    if kind == "image":
        return Image(source)
    if isinstance(value, dict) and "sample_rate_hz" in value and isinstance(source, bytes):
        samples = np.frombuffer(source, dtype="<f4").copy()
        return Audio(samples, value["sample_rate_hz"], *segment)
    return Audio(source, None, *segment)


def list_stored(example: Example) -> list[StoredObject]:
    """Return the stored objects that an example refers to."""
    return [part.source for part in example.media if isinstance(part.source, StoredObject)]


def _need_example(outcome: Outcome) -> Example:
    if isinstance(outcome, DataError):
        raise outcome
    return outcome


def _checksum(batch: pyarrow.RecordBatch) -> int:
    checksum = zlib.crc32(batch.num_rows.to_bytes(8, "little"))
    for column in batch.columns:
        for buffer in column.buffers():
            checksum = zlib.crc32(buffer or b"", checksum)
    return checksum


def _refuse_double_keys(manifest: Manifest) -> None:
    """Find two rows with one key, by sorting eight bytes of each: a set of them may not fit."""
    hashes = hash_keys(manifest.read_keys())
    ordered = np.sort(hashes)
    if not (ordered[1:] == ordered[:-1]).any():
        return
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
    """Hash keys to 64 bits each."""
    # Returns: uint64 ``[keys]``, the same on every machine.
    prefix = hashlib.blake2b(f"{salt}/".encode(), digest_size=8)
    digests = bytearray()
    for key in keys:
        one = prefix.copy()
        one.update(key.encode())
        digests += one.digest()
    return np.frombuffer(digests, dtype="<u8")
