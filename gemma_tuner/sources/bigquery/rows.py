"""Rows of a BigQuery table from its parts, and what a column may be to play a part."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow

from gemma_tuner.errors import DataError, SourceError
from gemma_tuner.sources.bigquery.parts import Column, Part
from gemma_tuner.sources.columns import Columns
from gemma_tuner.sources.formats.files import Row
from gemma_tuner.sources.json_text import drop_padding, parse_json
from gemma_tuner.storage.stores import is_stored

_SLICE_BYTES = 4 << 20
_JSON_FIELD = (b"ARROW:extension:name", b"google:sqlType:json")
# Source: https://cloud.google.com/bigquery/docs/reference/storage#arrow_schema_details

_TEXT = ("STRING", "JSON")
_CONVERSATION = ("STRING", "JSON", "REPEATED RECORD")
_NAMES = ("STRING", "REPEATED STRING")
_NUMBERS = ("FLOAT", "FLOAT64", "INTEGER", "NUMERIC", "BIGNUMERIC", "STRING")
_MEDIA = (*_NAMES, "BYTES", "REPEATED BYTES", "RECORD", "REPEATED RECORD")
_KINDS: Mapping[str, tuple[str, ...]] = {
    "prompt": _TEXT,
    "context": _TEXT,
    "response": _TEXT,
    "text": _TEXT,
    "system": _TEXT,
    "messages": _CONVERSATION,
    "history": _CONVERSATION,
    "tools": _CONVERSATION,
    "image": _MEDIA,
    "audio": _MEDIA,
    "file": _NAMES,
    "id": ("STRING", "INTEGER"),
    "start": _NUMBERS,
    "end": _NUMBERS,
    "duration": _NUMBERS,
}
_PARSED = ("messages", "history", "tools")  # whose JSON is read as what it says


def check_kinds(available: Sequence[Column], columns: Columns) -> None:
    """Refuse a column whose type cannot play its part, before reading it costs something."""
    kinds = {column.name: _name_kind(column) for column in available}
    for part, name in columns.names.items():
        expected = _KINDS.get(part)
        if expected is not None and kinds[name] not in expected:
            raise SourceError(
                f"the column {name!r} is {kinds[name]}, and the {part} is one of "
                f"{', '.join(expected)}; name another by {part}=, or convert it in a query (CAST, "
                "TO_JSON_STRING)"
            )
    for name in columns.unused:  # what they hold is not read, and names alone tell little
        if kinds[name] in ("BYTES", "REPEATED BYTES"):
            raise SourceError(
                f"the column {name!r} is {kinds[name]}: media, it may be, and would be "
                f"passed over; name it by image= or audio=, or leave it out by ignore=({name!r},)"
            )


def note_kinds(available: Sequence[Column], columns: Columns) -> list[str]:
    """Say what was made of columns that could have been read in another way."""
    kinds = {column.name: column.kind for column in available}
    notes = [
        f"column {name!r} is JSON; the {part} is its JSON text"
        for part, name in columns.names.items()
        if kinds[name] == "JSON" and part not in _PARSED
    ]
    if "id" not in columns.names:
        notes.append("rows are numbered as they came, as there is no id; BigQuery keeps no order")
    return notes


def read_rows(opened: Iterable[Part], columns: Columns, origin: str) -> Iterator[Row]:
    """Read the rows of parts in order; one decoded batch, and a slice of it, at a time."""
    parsed = [columns.names[part] for part in _PARSED if part in columns.names]
    number = 0
    for part in opened:
        for batch in part.read_batches():
            texts = {name: _list_json_fields(batch.schema.field(name).type) for name in parsed}
            for values in (row for piece in _slice(batch) for row in piece.to_pylist()):
                number += 1
                key = f"{origin}:{number}"
                values = {name: drop_padding(item) for name, item in values.items()}  # noqa: PLW2901
                try:
                    for name, fields in texts.items():
                        values[name] = _parse_fields(values[name], fields, key)
                except DataError as error:
                    yield Row(key, error)
                else:
                    yield Row(key, values)


def refuse_paths(kind: str, source: str, folder: str | Path, key: str) -> str:
    """Take a ``gs://`` URI as it is."""
    # A row of a table has no folder that a path could start from.
    if is_stored(source):
        return source
    scheme, is_uri, _ = source.partition("://")
    what = f"a {scheme[:12]}: URI" if is_uri else "a path"
    raise DataError(
        f"its {kind} is {what}, and media of BigQuery rows are gs:// URIs, ObjectRefs or bytes; "
        "copy the files to a bucket and say where their paths start by media_root=, or write "
        "URIs, such as by a query with CONCAT('gs://bucket/', column)",
        key=key,
    )


def _name_kind(column: Column) -> str:
    kind = {"INT64": "INTEGER", "STRUCT": "RECORD"}.get(column.kind, column.kind)
    return f"REPEATED {kind}" if column.mode == "REPEATED" else kind


def _slice(batch: pyarrow.RecordBatch) -> Iterator[pyarrow.RecordBatch]:
    """Halve a batch until its pieces are small: Python objects take their room again."""
    if batch.num_rows <= 1 or batch.nbytes <= _SLICE_BYTES:
        yield batch
        return
    half = batch.num_rows // 2
    yield from _slice(batch.slice(0, half))
    yield from _slice(batch.slice(half))


def _list_json_fields(kind: pyarrow.DataType) -> list[str]:
    """Name the fields of a list of structs that are of the type JSON."""
    if not (pyarrow.types.is_list(kind) and pyarrow.types.is_struct(kind.value_type)):
        return []
    name, value = _JSON_FIELD
    return [field.name for field in kind.value_type if (field.metadata or {}).get(name) == value]


def _parse_fields(value: Any, fields: Sequence[str], key: str) -> Any:
    if not fields or not isinstance(value, list):
        return value
    return [
        {
            name: parse_json(item, f"its field {name!r}", key=key)
            if name in fields and isinstance(item, str)
            else item
            for name, item in struct.items()
        }
        for struct in value
    ]
