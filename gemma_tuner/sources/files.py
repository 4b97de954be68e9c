"""Rows of files, one at a time: JSON lines, CSV and Parquet, wherever the files lie.

Every reader holds one row, one Parquet batch, or one ``.json`` array at most. What is wrong with
one row is handed out in its place; what is wrong with a file is raised.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol, cast

import pyarrow
import pyarrow.parquet

from gemma_tuner.errors import DataError, SourceError, quote_name
from gemma_tuner.records import StoredObject
from gemma_tuner.sources.columns import Columns
from gemma_tuner.sources.messages import describe_type, parse_json

RowFormat = Literal["jsonl", "csv", "parquet"]
"""Formats of files that hold rows."""
Format = RowFormat | Literal["webdataset", "captions"]
"""Rows, samples in a tar, or an image or a clip with a text beside it."""

PEEKED_ROWS = 1000
"""JSON lines name their columns row by row: this many rows of each file decide what there is."""
_PARQUET_ROWS = 64  # small, as rows may hold media
_GZIP_MAGIC = b"\x1f\x8b"  # by content: an object may be stored zipped under a plain name


class DataFile(Protocol):
    """A file of rows or samples."""

    @property
    def name(self) -> str:
        """What origins call it: its path from the data's root."""
        ...

    @property
    def folder(self) -> str | Path:
        """Where relative paths in it start: a folder, or a URI ending in a slash."""
        ...

    def open(self) -> BinaryIO:
        """Open it for reading from its first byte; seekable, to be closed by the caller."""
        ...

    def cut(self, start: int, num_bytes: int) -> StoredObject:
        """Return a part of it, as examples refer to it."""
        ...


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


def list_columns(files: Sequence[DataFile], file_format: RowFormat) -> list[str]:
    """List the columns of all files, in the order in which they appear."""
    names: dict[str, None] = {}
    for file in files:
        if file_format == "parquet":
            with _open_parquet(file) as table:
                names.update(dict.fromkeys(table.schema_arrow.names))
        elif file_format == "csv":
            names.update(dict.fromkeys(_read_header(file)))
        else:
            for _, values in islice(_read_json(file), PEEKED_ROWS):
                if not isinstance(values, DataError):
                    names.update(dict.fromkeys(values))
                elif not names:
                    raise values
    if not names:
        raise SourceError(f"{_last(files[0])!r} holds no rows; write one example on each line")
    return list(names)


def read_rows(
    file: DataFile, file_format: RowFormat, columns: Columns
) -> Iterator[tuple[int, Mapping[str, Any] | DataError]]:
    """Read the rows of a file, numbered from 1; Parquet reads no other columns than these."""
    if file_format == "parquet":
        return _read_parquet(file, set(columns.names.values()))
    return _read_csv(file) if file_format == "csv" else _read_json(file)


def read_text(file: DataFile) -> str:
    """Read a whole text file."""
    return "".join(line for _, line in _read_lines(file))


def _last(file: DataFile) -> str:
    return file.name.rpartition("/")[2]


def _read_json(file: DataFile) -> Iterator[tuple[int, dict[str, Any] | DataError]]:
    may_be_array = file.name.lower().removesuffix(".gz").endswith(".json")
    for number, line in _read_lines(file):
        if may_be_array and line.lstrip().startswith("["):
            yield from _read_array(file)
            return
        if line.strip():
            may_be_array = False
            try:
                row = parse_json(line, "the line", key=f"{file.name}:{number}")
            except DataError as error:
                yield number, error
            else:
                yield number, _check_object(row, file, number)


def _read_array(file: DataFile) -> Iterator[tuple[int, dict[str, Any] | DataError]]:
    try:
        rows = json.loads(read_text(file))
    except (ValueError, RecursionError):
        raise SourceError(
            f"{_last(file)!r} begins like a JSON array and is not valid JSON"
        ) from None
    for number, row in enumerate(rows, 1):
        yield number, _check_object(row, file, number)


def _check_object(value: Any, file: DataFile, number: int) -> dict[str, Any] | DataError:
    if isinstance(value, dict):
        return value
    return DataError(
        f"the row is {describe_type(value)} and not an object of columns",
        key=f"{file.name}:{number}",
    )


def _read_header(file: DataFile) -> list[str]:
    for _, fields in _read_fields(file):
        return fields
    return []


def _read_csv(file: DataFile) -> Iterator[tuple[int, dict[str, Any] | DataError]]:
    fields_by_number = _read_fields(file)
    _, header = next(fields_by_number)
    for number, fields in fields_by_number:
        if len(fields) == len(header):
            yield number, dict(zip(header, fields, strict=True))
        else:
            yield (
                number,
                DataError(
                    f"it has {len(fields)} fields and the header {len(header)}; put quotes around "
                    "fields that hold commas or line breaks",
                    key=f"{file.name}:{number}",
                ),
            )


def _read_fields(file: DataFile) -> Iterator[tuple[int, list[str]]]:
    """Read the header of a CSV file as number 0, then its records."""
    # The limit is the csv module's own, for all its readers: 131,072 characters unless raised.
    csv.field_size_limit(max(csv.field_size_limit(), 2**31 - 1))
    reader = csv.reader((line for _, line in _read_lines(file)), strict=True)
    try:
        header = next(reader, None)
        if not header:
            raise SourceError(f"{_last(file)!r} has no header; name the columns in its first line")
        if len(set(header)) < len(header):
            double = next(column for column in header if header.count(column) > 1)
            raise SourceError(
                f"{_last(file)!r} names the column {quote_name(double)} twice; rename one"
            )
        yield 0, header
        yield from enumerate((fields for fields in reader if fields), 1)
    except csv.Error as error:
        raise SourceError(
            f"{_last(file)!r} is not valid CSV at line {reader.line_num} ({error})"
        ) from error


def _read_parquet(file: DataFile, needed: set[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    with _open_parquet(file) as table:
        names = [name for name in table.schema_arrow.names if name in needed]
        number = 0
        try:
            for batch in table.iter_batches(batch_size=_PARQUET_ROWS, columns=names):
                for values in batch.to_pylist():
                    number += 1
                    yield number, values
        except (pyarrow.ArrowException, OSError) as error:
            raise SourceError(
                f"{_last(file)!r} is damaged after row {number:,} ({type(error).__name__}); write "
                "or fetch it again"
            ) from None


@contextmanager
def _open_parquet(file: DataFile) -> Iterator[pyarrow.parquet.ParquetFile]:
    with ExitStack() as opened:
        try:
            stream = cast("io.BufferedReader", opened.enter_context(file.open()))
            # Nothing is read ahead: what lies behind a column in the file is another one.
            exact = opened.enter_context(io.BufferedReader(stream.raw, 1))
            table = opened.enter_context(pyarrow.parquet.ParquetFile(exact, pre_buffer=True))
        except (pyarrow.ArrowException, OSError) as error:
            raise SourceError(
                f"{_last(file)!r} cannot be read as Parquet ({type(error).__name__}); write or "
                "fetch it again"
            ) from None  # whose message holds the path
        yield table


def _read_lines(file: DataFile) -> Iterator[tuple[int, str]]:
    """Read lines as UTF-8, split at line feeds alone, with their numbers from 1."""
    number = 0
    try:
        with file.open() as stream:
            is_zipped = stream.read(2) == _GZIP_MAGIC
            stream.seek(0)
            lines = gzip.GzipFile(fileobj=stream) if is_zipped else stream
            for number, line in enumerate(lines, 1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise SourceError(
            f"{_last(file)!r} is not UTF-8 at line {number}, byte {error.start + 1}; save it as "
            "UTF-8"
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise SourceError(
            f"{_last(file)!r} cannot be read at line {number} ({reason}); check that it is there, "
            "whole and readable"
        ) from None
