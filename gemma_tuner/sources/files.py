"""Rows of local files, one at a time: JSON lines, CSV, Parquet, and media with captions.

Every reader holds one row, one Parquet batch, or one ``.json`` array at most.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import pyarrow
import pyarrow.parquet

from gemma_tuner.errors import DataError, SourceError
from gemma_tuner.sources.columns import Columns
from gemma_tuner.sources.messages import describe_type, parse_json

Format = Literal["jsonl", "csv", "parquet", "captions"]

PEEKED_ROWS = 1000
"""JSON lines name their columns row by row: this many rows of each file decide what there is."""
_PARQUET_ROWS = 64  # small, as rows may hold media
_CAPTION_COLUMNS = ("file_name", "text")


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it stands in a file.

    Args:
        origin: The file, relative to the data's root, and the row's number from 1: the line of
            JSON lines, the record below the header of CSV, the row of Parquet.
        values: By column.
        folder: Where the row's relative paths start.
    """

    origin: str
    values: Mapping[str, Any]
    folder: Path


def list_columns(files: Sequence[Path], file_format: Format) -> list[str]:
    """List the columns of all files, in the order in which they appear.

    Args:
        files: The data files.
        file_format: What they hold.

    Returns:
        Column names: of CSV and Parquet all; of JSON lines those of the first
        :data:`PEEKED_ROWS` rows of each file.

    Raises:
        DataError: The first row is no JSON object.
        SourceError: A file that cannot be read.
    """
    if file_format == "captions":
        return list(_CAPTION_COLUMNS)
    names: dict[str, None] = {}
    for path in files:
        if file_format == "parquet":
            with _open_parquet(path) as file:
                names.update(dict.fromkeys(file.schema_arrow.names))
        elif file_format == "csv":
            names.update(dict.fromkeys(next(_read_csv(path), (0, {}))[1]))
        else:
            try:
                for _, values in islice(_read_json(path, path.name), PEEKED_ROWS):
                    names.update(dict.fromkeys(values))
            except DataError:
                if not names:
                    raise
                # Reading the rows meets it again, and can say how many were fine before.
    if not names:
        raise SourceError(f"{files[0].name!r} holds no rows")
    return list(names)


def read_rows(
    files: Sequence[Path],
    file_format: Format,
    root: Path,
    columns: Columns,
) -> Iterator[Row]:
    """Read the rows of all files.

    Args:
        files: The data files, in order.
        file_format: What they hold.
        root: The folder that origins are relative to.
        columns: Which columns are needed; Parquet reads no other.

    Yields:
        Each row.

    Raises:
        DataError: A row that cannot be read.
        SourceError: A file that cannot be read.
    """
    needed = set(columns.names.values())
    for path in files:
        name = path.relative_to(root).as_posix()
        if file_format == "captions":
            yield _read_caption(path, name)
            continue
        if file_format == "parquet":
            rows = _read_parquet(path, needed)
        elif file_format == "csv":
            rows = _read_csv(path, name)
        else:
            rows = _read_json(path, name)
        for number, values in rows:
            yield Row(f"{name}:{number}", values, path.parent)


def _read_json(path: Path, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    may_be_array = path.name.lower().removesuffix(".gz").endswith(".json")
    for number, line in _read_lines(path):
        if may_be_array and line.lstrip().startswith("["):
            yield from _read_array(path, name)
            return
        if line.strip():
            may_be_array = False
            row = parse_json(line, "the line", key=f"{name}:{number}")
            yield number, _check_object(row, name, number)


def _read_array(path: Path, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        rows = json.loads("".join(line for _, line in _read_lines(path)))
    except (ValueError, RecursionError):
        raise SourceError(f"{name!r} begins like a JSON array and is not valid JSON") from None
    for number, row in enumerate(rows, 1):
        yield number, _check_object(row, name, number)


def _check_object(value: Any, name: str, number: int) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(
            f"the row is {describe_type(value)} and not an object of columns",
            key=f"{name}:{number}",
        )
    return value


def _read_csv(path: Path, name: str = "") -> Iterator[tuple[int, dict[str, Any]]]:
    # The limit is the csv module's own, for all its readers: 131,072 characters unless raised.
    csv.field_size_limit(max(csv.field_size_limit(), 2**31 - 1))
    lines = _read_lines(path)
    reader = csv.reader((line for _, line in lines), strict=True)
    try:
        header = next(reader, None)
        if not header:
            raise SourceError(f"{path.name!r} has no header; name the columns in its first line")
        if len(set(header)) < len(header):
            double = next(column for column in header if header.count(column) > 1)
            raise SourceError(f"{path.name!r} names the column {double!r} twice; rename one")
        if not name:  # the header is all that was asked for
            yield 0, dict.fromkeys(header)
            return
        for number, fields in enumerate((fields for fields in reader if fields), 1):
            if len(fields) != len(header):
                raise DataError(
                    f"it has {len(fields)} fields and the header {len(header)}; put quotes around "
                    "fields that hold commas or line breaks",
                    key=f"{name}:{number}",
                )
            yield number, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise SourceError(
            f"{path.name!r} is not valid CSV at line {reader.line_num} ({error})"
        ) from error


def _read_parquet(path: Path, needed: set[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    with _open_parquet(path) as file:
        names = [name for name in file.schema_arrow.names if name in needed]
        number = 0
        try:
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=names):
                for values in batch.to_pylist():
                    number += 1
                    yield number, values
        except (pyarrow.ArrowException, OSError) as error:
            raise SourceError(
                f"{path.name!r} is damaged after row {number:,} ({type(error).__name__}); write "
                "or fetch it again"
            ) from None


def _open_parquet(path: Path) -> pyarrow.parquet.ParquetFile:
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise SourceError(
            f"{path.name!r} cannot be read as Parquet ({type(error).__name__}); write or fetch it "
            "again"
        ) from None  # whose message holds the path


def _read_caption(path: Path, name: str) -> Row:
    caption = path.with_suffix(".txt")
    if not caption.is_file():
        raise DataError(
            f"it has no text: there is no {caption.name!r} beside it; write one, or move the file",
            key=name,
        )
    text = "".join(line for _, line in _read_lines(caption)).strip()
    return Row(name, dict(zip(_CAPTION_COLUMNS, (path.name, text), strict=True)), path.parent)


def _read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Read lines as UTF-8, split at line feeds alone, with their numbers from 1."""
    number = 0
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise SourceError(
            f"{path.name!r} is not UTF-8 at line {number}, byte {error.start + 1}; save it as "
            "UTF-8"
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise SourceError(
            f"{path.name!r} cannot be read at line {number} ({reason}); check that it is there, "
            "whole and readable"
        ) from None
