"""Rows that the program holds itself: dictionaries, examples, tables, data sets of ``datasets``.

Rows are understood as those of JSON lines, and images and samples among them may be decoded: they
are kept in the manifest. Relative paths start from the working directory. What is held is known
by a hash of its content, so that a program that makes the same rows again finds its manifest.

Origins are ``rows:<number>``, from 1; of a data set, ``rows/<subset>/<split>:<number>``.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow

from gemma_tuner.errors import ConfigError, DataError, SourceError
from gemma_tuner.media.image import decode_image
from gemma_tuner.records import Audio, Example, Image, PinnedFile, StoredObject
from gemma_tuner.sources.columns import Keywords
from gemma_tuner.sources.examples import ExampleReader, Outcome
from gemma_tuner.sources.formats.files import PEEKED_ROWS, Row
from gemma_tuner.sources.hub import HubRows, list_reach, locate_file
from gemma_tuner.sources.hub_loading import HubName, OpenedSplit
from gemma_tuner.sources.json_text import describe_type
from gemma_tuner.sources.media_places import check_media_root, start_at
from gemma_tuner.storage.stores import is_stored

MAX_GENERATED_ROWS = 100_000
"""Rows that are taken from a generator: it may have no end."""
_BLOCK_ROWS = 64  # small, as rows may hold media
_KINDS = (
    "a list of dictionaries or of Examples, a DataFrame, a pyarrow Table, a datasets.Dataset, or "
    "a generator"
)


def holds_rows(given: object) -> bool:
    """Whether an argument that should name files holds rows itself."""
    if isinstance(given, list | tuple):
        return any(isinstance(item, Mapping | Example) for item in given)
    is_table = hasattr(given, "__arrow_c_stream__") or _package_of(given) == "datasets"
    return is_table or isinstance(given, Mapping | Iterator)


class MemorySource:
    """The examples of rows in memory, read each time it is iterated."""

    def __init__(
        self,
        rows: object,
        *,
        split: str | None = None,
        keywords: Keywords | None = None,
        media_root: str | Path | None = None,
    ) -> None:
        self.root = Path.cwd()
        self._held = _hold(rows)
        self._split = split
        self._keywords: Keywords = keywords or {}
        self._media_root = check_media_root(media_root)
        locate = partial(locate_file, HubName("rows", self.root, None, "train", None))
        self._locate = start_at(self._media_root, locate)
        self._summary: dict[str, Any] = {}
        given = [*(name for name, column in self._keywords.items() if column)]
        given += [] if split is None else ["split"]
        if self._held.columns is None and given:
            raise ConfigError(
                f"rows are Examples, which have no columns; leave out {', '.join(given)}"
            )

    @property
    def reach(self) -> tuple[Path, ...]:
        """Where rows may name files."""
        return list_reach(self._media_root or self.root)

    def read_identity(self) -> dict[str, Any]:
        """Return what decides the examples, as JSON: a hash of the rows, and the choices made."""
        digest = hashlib.sha256()
        for row in self._held.read(self._held.columns or ()):
            try:
                text = json.dumps(row, default=_describe_value, skipkeys=True)
            except (ValueError, RecursionError):  # it holds itself: reading it says so
                text = "?"
            digest.update(text.encode())
        return {
            "source": "memory",
            "kind": self._held.kind,
            "rows": digest.hexdigest(),
            "root": str(self.root),
            "split": self._split,
            "keywords": dict(self._keywords),
            **({"media_root": str(self._media_root)} if self._media_root else {}),
        }

    def read_summary(self) -> dict[str, Any]:
        """Return what the last complete iteration met, as JSON."""
        return self._summary

    def __iter__(self) -> Iterator[tuple[str, Outcome]]:
        """Read every row."""
        kind = {"format": f"rows in memory ({self._held.kind})", "num_files": 1}
        if self._held.columns is None:
            for origin, example in self._held.read(()):
                yield origin, self._prepare(example, origin)
            found = {"layout": "examples", "columns": {}, "unused": [], "splits": {}, "notes": []}
            self._summary = {**found, **kind}
            return
        reader = ExampleReader(self._held.columns, self._keywords, split=self._split)
        # Of a datasets.Dataset only the columns in use are read: the first rows of the others are
        # looked at too.
        unread = reader.guard.list_unread()
        for _, values in islice(self._held.read(unread) if unread else (), PEEKED_ROWS):
            if isinstance(values, Mapping):
                reader.guard.look({name: values.get(name) for name in unread}, self.root)
        rows = self._held.read(reader.columns.names.values())
        yield from reader.read((Row(*_plain_row(*row), self.root) for row in rows), self._locate)
        self._summary = {**reader.read_summary(), **kind}

    def _prepare(self, example: object, origin: str) -> Outcome:
        """Give an example's media the form in which a manifest keeps them."""
        if not isinstance(example, Example):
            what = f"it is {describe_type(example)}, and the first row is an Example"
            return DataError(f"{what}; make all of one kind", key=origin)

        def prepare(part: Image | Audio) -> Image | Audio:
            source = _plain(part.source, example.key)
            if isinstance(source, str):
                kind = "image" if isinstance(part, Image) else "audio"
                return replace(part, source=self._locate(kind, source, self.root, example.key))
            if isinstance(part, Audio) and isinstance(source, np.ndarray) != bool(
                part.sample_rate_hz
            ):
                raise DataError(
                    "an Audio of samples has a sample_rate_hz, and another has none",
                    key=example.key,
                )
            return replace(part, source=source)

        try:
            return example.replace_media(prepare)
        except DataError as error:
            return error


# --- what may hold rows ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Held:
    """Rows that can be read again and again, each with where it stands."""

    kind: str
    columns: list[str] | None  # None: the rows are Examples
    read: Callable[[Iterable[str]], Iterable[tuple[str, Any]]]  # gets the columns it needs


def _hold(rows: Any) -> _Held:
    """Find out how rows are held, and which columns they have."""
    kind, package = type(rows).__name__, _package_of(rows)
    if isinstance(rows, str | bytes | os.PathLike):
        raise ConfigError(
            f"rows is {describe_type(rows)}; stream_local(path) reads files, and here rows are "
            f"given themselves: {_KINDS}"
        )
    if package == "datasets":
        return _hold_dataset(rows, kind)
    if package == "pandas" and getattr(rows, "ndim", 0) == 2:
        # Not as a table: its cells may hold images and dictionaries that differ.
        return _Held(kind, list(map(str, rows.columns)), partial(_number, lambda: _iterate(rows)))
    if hasattr(rows, "__arrow_c_stream__"):
        try:
            table = pyarrow.table(rows)
            table.validate(full=True)
        except (pyarrow.ArrowException, TypeError, ValueError) as error:
            raise SourceError(
                f"rows is a {kind} that Arrow cannot read as a table ({type(error).__name__}); "
                f"give {_KINDS}"
            ) from None
        return _Held(
            kind,
            table.column_names,
            lambda columns: _number(lambda: _iterate_table(table.select([*columns])), ()),
        )
    if isinstance(rows, Mapping):
        raise ConfigError(
            f"rows is a {kind}, one object; give a list of dictionaries, one for each row, or "
            "datasets.Dataset.from_dict(rows) where its values are columns"
        )
    return _hold_items(rows, kind)


def _hold_items(rows: Any, kind: str) -> _Held:
    items = rows
    if isinstance(rows, Iterator):
        items = list(islice(rows, MAX_GENERATED_ROWS + 1))
        if len(items) > MAX_GENERATED_ROWS:
            raise SourceError(
                f"rows is a {kind} of more than {MAX_GENERATED_ROWS:,} rows, and may have no end; "
                "give list(rows) if it has one, or write the rows to a file for stream_local"
            )
    elif not isinstance(rows, Iterable):
        if not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")):
            raise ConfigError(f"rows is a {kind}; give {_KINDS}")
        items = [rows[index] for index in range(len(rows))]
    first = next(iter(items), None)
    if first is None:
        raise SourceError("rows is empty; give at least one row")
    if isinstance(first, Example):
        return _Held("Examples", None, partial(_number, lambda: items))
    columns = dict.fromkeys(str(name) for row in items if isinstance(row, Mapping) for name in row)
    if not isinstance(first, Mapping):
        raise ConfigError(f"the first row is {describe_type(first)}; give {_KINDS}")
    return _Held(kind, list(columns), partial(_number, lambda: items))


def _hold_dataset(rows: Any, kind: str) -> _Held:
    import datasets

    if isinstance(rows, Mapping):
        splits = ", ".join(map(repr, rows))
        raise ConfigError(f"rows is a {kind} of several splits; give one of them: {splits}")
    if not isinstance(rows, datasets.Dataset):
        raise ConfigError(
            f"rows is a {kind}, which is read as it goes and may have no end; give "
            "list(rows.take(1000)), or read it by stream_hub(name, streaming=True, max_rows=1000)"
        )
    if rows.format["type"] == "custom":
        raise ConfigError(
            "rows has a transform (set_transform), which makes rows only as they are read; apply "
            "it by map() first"
        )
    subset, split = rows.info.config_name or "default", str(rows.split or "train")
    opened = OpenedSplit(rows.with_format("arrow"), rows.features, subset, split, None, 1, ())
    stored = HubRows(opened, HubName("rows", None, None, split, None))

    def read(columns: Iterable[str]) -> Iterator[tuple[str, Any]]:
        return ((row.origin, row.values) for row in stored.read([*columns], None))

    return _Held(kind, list(rows.features), read)


def _iterate(frame: Any) -> Iterator[Mapping[str, Any]]:
    for start in range(0, len(frame), _BLOCK_ROWS):
        yield from frame.iloc[start : start + _BLOCK_ROWS].to_dict("records")


def _iterate_table(table: pyarrow.Table) -> Iterator[Mapping[str, Any]]:
    for batch in table.to_batches(max_chunksize=_BLOCK_ROWS):
        yield from batch.to_pylist()


def _number(
    iterate: Callable[[], Iterable[Any]], columns: Iterable[str]
) -> Iterator[tuple[str, Any]]:
    return ((f"rows:{number}", row) for number, row in enumerate(iterate(), 1))


def _package_of(value: object) -> str:
    return type(value).__module__.partition(".")[0]


# --- values ----------------------------------------------------------------------------------


def _plain_row(origin: str, values: Any) -> tuple[str, Mapping[str, Any] | DataError]:
    """Give the values of a row the forms that they have in files."""
    if isinstance(values, DataError):
        return origin, values
    try:
        if isinstance(values, Mapping):
            return origin, _plain(values, origin)
        what = f"it is {describe_type(values)}, and the first row is a dictionary"
        return origin, DataError(f"{what}; make it one", key=origin)
    except DataError as error:
        return origin, error
    except RecursionError:
        error = DataError("its values hold themselves; write them out", key=origin)
        return origin, error


def _plain(value: Any, key: str) -> Any:
    if value is None or isinstance(value, str | bytes | bool | int):
        return value
    if isinstance(value, Mapping):
        return {str(name): _plain(item, key) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, key) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, PinnedFile):  # of another stream, and found anew
        return value.path
    if isinstance(value, StoredObject) and not is_stored(value.uri):
        raise DataError("a part of a local file is no source in memory; give its bytes", key=key)
    if isinstance(value, bytearray | memoryview):
        return bytes(value)
    if isinstance(value, PIL.Image.Image):
        return _encode_image(value, key)
    if isinstance(value, np.ndarray):
        if value.dtype == object:  # how DataFrames keep lists
            return [_plain(item, key) for item in value]
        is_picture = value.dtype == np.uint8 and value.ndim in (2, 3)
        return _encode_image(PIL.Image.fromarray(value), key) if is_picture else value
    if isinstance(value, np.generic):
        return _plain(value.item(), key)
    # How DataFrames keep what is absent.
    is_absent = type(value).__name__ in ("NAType", "NaTType")
    return None if is_absent or (isinstance(value, float) and math.isnan(value)) else value


def _encode_image(image: PIL.Image.Image, key: str) -> bytes:
    """Write an image as it will be looked at, upright and in RGB, without loss."""
    buffer = io.BytesIO()
    decode_image(image, key=key).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _describe_value(value: Any) -> Any:
    """Say in JSON what a value is that JSON has no form for: of much data a hash."""
    if isinstance(value, PIL.Image.Image):
        try:
            upright = decode_image(value, key="rows")
        except DataError as error:
            return str(error)
        return ["image", upright.size, _hash(upright.tobytes())]
    if isinstance(value, np.ndarray):
        if value.dtype == object:
            return list(value)
        return [str(value.dtype), value.shape, _hash(value.tobytes())]
    if isinstance(value, bytes | bytearray | memoryview):
        return ["bytes", _hash(value)]
    if is_dataclass(value):
        return [type(value).__name__, *(getattr(value, field.name) for field in fields(value))]
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, DataError | os.PathLike):
        return str(value)
    # What nothing is made of: the row that needs it is refused.
    return type(value).__name__


def _hash(content: bytes | bytearray | memoryview) -> str:
    return hashlib.sha256(content).hexdigest()
