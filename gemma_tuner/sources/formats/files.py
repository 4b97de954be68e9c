"""Rows of files, one at a time, wherever the files lie: JSON, CSV, Parquet, Arrow, plain text.

Every reader holds one row, one batch, or one document at most. What is wrong with one row is
handed out in its place; what is wrong with a file is raised.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from gemma_tuner.errors import DataError, SourceError, quote_name
from gemma_tuner.records import StoredObject
from gemma_tuner.sources.columns import MAX_COLUMNS, Columns
from gemma_tuner.sources.formats.corpora import (
    SEGMENT_COLUMNS,
    TRANSCRIPT_COLUMNS,
    read_kaldi,
    read_transcripts,
)
from gemma_tuner.sources.formats.delimited import list_csv_columns, read_csv
from gemma_tuner.sources.formats.json_rows import read_json
from gemma_tuner.sources.formats.lines import DataFile, name_last, read_text
from gemma_tuner.sources.guard import weigh
from gemma_tuner.sources.json_text import drop_padding

RowFormat = Literal["jsonl", "csv", "parquet", "arrow", "text", "transcripts", "kaldi"]
"""Formats of files that hold rows."""
Format = RowFormat | Literal["webdataset", "captions"]
"""Rows, samples in a tar, or an image or a clip with a text beside it."""

PEEKED_ROWS = 1000
"""JSON lines name their columns row by row: this many rows of each file decide what there is."""
_PARQUET_ROWS = 64  # small, as rows may hold media
_BATCH_BYTES = 64 << 20
_MAX_ROW_BYTES = 128 << 20
_OBJECT_BYTES = 64
_MANY_BATCHES = 1000
_PEEKED_AT_ONCE = 16
_PEEKED_BYTES = 1 << 20
_HEADER = re.compile(r"\w+(,\w+|\t\w+|;\w+|\|\w+)+")  # the first line of a table


# What a damaged file can raise, wherever it is looked at: lengths without end, names that are no
# text, types that are none.
_DAMAGE = (pyarrow.ArrowException, OSError, MemoryError, ArithmeticError, LookupError, TypeError,
           ValueError)  # fmt: skip


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A data file on this machine."""

    path: Path
    name: str  # its path from the data's root

    @property
    def folder(self) -> Path:
        """Where relative paths in it start."""
        return self.path.parent

    def open(self) -> BinaryIO:
        """Open it for reading from its first byte."""
        return self.path.open("rb")

    def cut(self, start: int, num_bytes: int) -> StoredObject:
        """Return a part of it, as examples refer to it: by its path from the data's root."""
        return StoredObject(self.name, num_bytes=num_bytes, start=start)


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it stands in a file."""

    origin: str  # the file's name and the row's number from 1 (in JSON lines, the line)
    values: Mapping[str, Any] | DataError  # by column, or what is wrong with the row
    folder: str | Path = ""  # where its relative paths start; a URI ends in a slash


def list_columns(
    files: Sequence[DataFile], file_format: RowFormat, named: Collection[str] = ()
) -> list[str]:
    """List the columns of all files, in the order in which they appear."""
    # named: those that the user names by keyword.
    names = dict.fromkeys(
        name for file in files for name in _list_columns_of(file, file_format, named)
    )
    if not names:
        raise SourceError(f"{name_last(files[0])!r} holds no rows; write one example on each line")
    return list(names)


def _list_columns_of(
    file: DataFile, file_format: RowFormat, named: Collection[str]
) -> Iterable[str]:
    match file_format:
        case "parquet":
            with _open_parquet(file) as table:
                return _check_names(file, table.schema_arrow.names)
        case "arrow":
            with _open_arrow(file) as batches:
                return _check_names(file, batches.schema.names)
        case "csv":
            return list_csv_columns(file, named)
        case "text":
            return ("text",)
        case "transcripts":
            return TRANSCRIPT_COLUMNS
        case "kaldi":
            is_cut = name_last(file) == "segments"
            return (*TRANSCRIPT_COLUMNS, *SEGMENT_COLUMNS) if is_cut else TRANSCRIPT_COLUMNS
        case _:
            return _peek_names(file)


def _check_names(file: DataFile, names: list[str]) -> list[str]:
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        raise SourceError(
            f"{name_last(file)!r} has several columns named {quote_name(twice)}; rename all but "
            "one"
        )
    return names


def _peek_names(file: DataFile) -> dict[str, None]:
    names: dict[str, None] = {}
    for _, values in islice(read_json(file), PEEKED_ROWS):
        if not isinstance(values, DataError):
            names.update(dict.fromkeys(values))
        elif not names:
            raise values
        if len(names) > MAX_COLUMNS or sum(map(len, names)) > _PEEKED_BYTES:
            break  # whoever makes sense of them refuses them
    return names


def read_rows(
    file: DataFile, file_format: RowFormat, columns: Columns, files: Sequence[DataFile] = ()
) -> Iterator[tuple[int, Mapping[str, Any] | DataError]]:
    """Read the rows of a file, numbered from 1; Parquet reads no other columns than these."""
    # files: the data set's, among them those that belong to this one.
    match file_format:
        case "parquet":
            return _read_parquet(file, set(columns.names.values()))
        case "arrow":
            return _read_arrow(file, set(columns.names.values()))
        case "csv":
            return read_csv(file)
        case "text":
            return iter([(1, {"text": _read_document(file)})])
        case "transcripts":
            return read_transcripts(file)
        case "kaldi":
            beside = {name_last(each): each for each in files if each.folder == file.folder}
            return read_kaldi(file, beside) if name_last(file) == "text" else iter(())
        case _:
            return read_json(file)


def peek_columns(
    file: DataFile, file_format: Format, columns: Mapping[str, int]
) -> Iterator[tuple[str, Any]]:
    """Read the first values of columns that rows leave out, so many of each and no nulls."""
    if file_format == "parquet":
        with _open_parquet(file, ahead=False) as table:
            for field in table.schema_arrow:
                left = {field.name: columns.get(field.name, 0)}
                count = _count_peeked(table.metadata)
                batches = table.iter_batches(batch_size=count, columns=[field.name])
                if not pyarrow.types.is_primitive(field.type):
                    yield from _peek(batches, left)
    elif file_format == "arrow":
        with _open_arrow(file) as batches:
            names = {
                name: count for name, count in columns.items() if name in batches.schema.names
            }
            yield from _peek(_list_batches(batches), names)


def _count_peeked(metadata: pyarrow.parquet.FileMetaData) -> int:
    """How many values of a Parquet column to read at once: those of large rows one by one."""
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        # Of all columns: pyarrow ends the process at a column whose statistics are damaged.
        if num_bytes := group.total_byte_size:
            return max(1, min(_PEEKED_AT_ONCE, group.num_rows * _PEEKED_BYTES // num_bytes))
    return _PEEKED_AT_ONCE


def _peek(
    batches: Iterator[pyarrow.RecordBatch], left: dict[str, int]
) -> Iterator[tuple[str, Any]]:
    while any(left.values()) and (batch := next(batches, None)) is not None:
        for name in (name for name, count in left.items() if count):
            found = batch.column(name).drop_null()[: left[name]]
            values = found.to_pylist() if _measure(found) <= _MAX_ROW_BYTES else []
            left[name] = max(0, left[name] - sum(map(weigh, values)))
            yield from ((name, value) for value in values)


def _read_document(file: DataFile) -> str:
    """Read a plain text, and refuse rows under a name that says nothing of them."""
    text = read_text(file)
    first = text.lstrip().partition("\n")[0].strip()
    kind = "csv" if _HEADER.fullmatch(first) else "jsonl" if first.startswith(("{", "[{")) else ""
    if kind:
        raise SourceError(
            f"{name_last(file)!r} is a plain text by its name, and its first line reads like "
            f"{'names of columns' if kind == 'csv' else 'JSON'}; set format={kind!r}, or rename "
            "it"
        )
    return text


def _read_parquet(
    file: DataFile, needed: set[str]
) -> Iterator[tuple[int, dict[str, Any] | DataError]]:
    with _open_parquet(file) as table:
        names = [name for name in table.schema_arrow.names if name in needed]
        batches = (
            batch
            for number in range(table.num_row_groups)
            for batch in table.iter_batches(
                batch_size=_count_at_once(table.metadata.row_group(number)),
                row_groups=[number],  # one after the other: all of them would stay in memory
                columns=names,
            )
        )
        yield from _number_rows(file, batches)


def _count_at_once(group: pyarrow.parquet.RowGroupMetaData) -> int:
    """How many rows of a group to read at once: few where it is large and not for their number."""
    # A dictionary may give each row of it all that it holds.
    fitting = _BATCH_BYTES // max(1, group.total_byte_size)
    return min(_PARQUET_ROWS, max(1, fitting, group.num_rows // _MANY_BATCHES))


def _read_arrow(
    file: DataFile, needed: set[str]
) -> Iterator[tuple[int, dict[str, Any] | DataError]]:
    with _open_arrow(file) as batches:
        names = [name for name in batches.schema.names if name in needed]
        yield from _number_rows(
            file,
            (
                batch.select(names).slice(start, _PARQUET_ROWS)
                for batch in _list_batches(batches)
                for start in range(0, batch.num_rows, _PARQUET_ROWS)
            ),
        )


def _number_rows(
    file: DataFile, batches: Iterable[pyarrow.RecordBatch]
) -> Iterator[tuple[int, dict[str, Any] | DataError]]:
    number = 0
    try:
        for batch in batches:
            for values in _list_rows(batch, file, number + 1):
                number += 1
                yield number, values
    except _DAMAGE as error:
        raise SourceError(
            f"{name_last(file)!r} is damaged after row {number:,} ({type(error).__name__}); write "
            "or fetch it again"
        ) from None


def _list_rows(
    batch: pyarrow.RecordBatch, file: DataFile, first: int
) -> Iterator[dict[str, Any] | DataError]:
    """List the rows of a batch; one with a value that Python cannot hold costs itself alone."""
    what, rows = "", list[dict[str, Any]]()
    if sum(map(_measure, batch.columns)) > (
        _BATCH_BYTES if batch.num_rows > 1 else _MAX_ROW_BYTES
    ):
        what = f"more than {_MAX_ROW_BYTES:,} bytes, or too many values,"
    else:
        try:
            rows = batch.to_pylist()
        except UnicodeDecodeError:
            what = "text that is not UTF-8"
        except (OverflowError, ValueError):
            what = "a date"
    if what and batch.num_rows > 1:
        half = batch.num_rows // 2
        yield from _list_rows(batch.slice(0, half), file, first)
        yield from _list_rows(batch.slice(half), file, first + half)
    elif what:
        yield DataError(
            f"it holds {what} that cannot be read; write that column again",
            key=f"{file.name}:{first}",
        )
    for values in rows:
        yield {name: drop_padding(item) for name, item in values.items()}


def _measure(values: Any) -> int:
    """Estimate the bytes of values as Python's objects."""
    inner: list[Any] = []
    if pyarrow.types.is_nested(values.type):
        inner = values.flatten()
        inner = inner if isinstance(inner, list) else [inner]
    return values.nbytes + _OBJECT_BYTES * len(values) + sum(map(_measure, inner))


def _list_batches(opened: Any) -> Iterator[pyarrow.RecordBatch]:
    if isinstance(opened, pyarrow.ipc.RecordBatchFileReader):
        batches = map(opened.get_batch, range(opened.num_record_batches))
    else:
        batches = iter(opened)
    for batch in batches:
        batch.validate(full=True)  # what is damaged would end the process
        yield batch


@contextmanager
def _open_arrow(file: DataFile) -> Iterator[Any]:
    """Open Arrow's file format (Feather too), or its stream, which ``save_to_disk`` writes."""
    with ExitStack() as opened:
        try:
            stream = opened.enter_context(file.open())
            is_file = stream.read(6) == b"ARROW1"
            stream.seek(0)
            read = pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream
            yield opened.enter_context(read(stream))
        except _DAMAGE as error:
            raise SourceError(
                f"{name_last(file)!r} cannot be read as Arrow ({type(error).__name__}); write or "
                "fetch it again"
            ) from None


@contextmanager
def _open_parquet(file: DataFile, *, ahead: bool = True) -> Iterator[pyarrow.parquet.ParquetFile]:
    with ExitStack() as opened:
        try:
            stream = cast("io.BufferedReader", opened.enter_context(file.open()))
            # Nothing is read ahead: what lies behind a column in the file is another one.
            exact = opened.enter_context(io.BufferedReader(stream.raw, 1))
            parquet = pyarrow.parquet.ParquetFile(
                exact, pre_buffer=ahead, buffer_size=0 if ahead else 1 << 16
            )
            table = opened.enter_context(parquet)
            for group in map(table.metadata.row_group, range(table.num_row_groups)):
                if group.total_byte_size > _MAX_ROW_BYTES * max(1, group.num_rows):
                    raise SourceError(
                        f"{name_last(file)!r} has rows of {group.total_byte_size:,} bytes and "
                        f"more, of at most {_MAX_ROW_BYTES:,}; write media to files of their own"
                    )
            yield table
        except _DAMAGE as error:
            raise SourceError(
                f"{name_last(file)!r} cannot be read as Parquet ({type(error).__name__}); write "
                "or fetch it again"
            ) from None  # whose message holds the path
