"""Rows of CSV and its kin: what separates and quotes fields is told by the file's first lines.

LJSpeech's ``id|text|normalised text`` has no header, and is known by its form: the clip of a line
is ``wavs/<id>.wav``, and what is said is the last field.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import PurePosixPath
from typing import Any

from gemma_tuner.errors import DataError, SourceError
from gemma_tuner.modalities import kind_of_suffix
from gemma_tuner.sources.formats.lines import (
    MAX_TEXT_BYTES,
    DataFile,
    measure_text,
    name_last,
    read_lines,
)

_PEEKED_LINES = 1000
_PEEKED_CHARACTERS = 1 << 22
_MAX_DELIMITERS = 1 << 20
_MAX_NAME_CHARACTERS, _MAX_NAME_WORDS = 64, 5
_LJSPEECH = ("id", "audio", "text")
_LJSPEECH_ID = re.compile(r"[\w-]*\d[\w-]*", re.ASCII)


@dataclass(frozen=True, slots=True)
class _Dialect:
    delimiter: str
    is_quoted: bool
    is_spaced: bool = False  # a space follows each delimiter
    is_ljspeech: bool = False
    num_fields: int = 0


def list_csv_columns(file: DataFile, named: Collection[str] = ()) -> list[str]:
    """List the columns in a file's header; ``named`` are those that the user names."""
    dialect = _find_dialect(file)
    if dialect.is_ljspeech:
        return list(_LJSPEECH)
    header = _read_header(_read_fields(file, dialect), file)
    doubtful = [number for number, name in enumerate(header, 1) if not _reads_like_a_name(name)]
    if doubtful and not set(named) & set(header):
        raise SourceError(
            f"{name_last(file)!r} has no header: field {doubtful[0]} of the {len(header)} in its "
            "first line does not read like the name of a column; put a line of names before it"
        )
    return header


def read_csv(file: DataFile) -> Iterator[tuple[int, dict[str, Any] | DataError]]:
    """Read the rows of a file, numbered from 1."""
    dialect = _find_dialect(file)
    numbered = _read_fields(file, dialect)
    if dialect.is_ljspeech:
        header: list[str] = [""] * dialect.num_fields
        numbered = ((number + 1, fields) for number, fields in numbered)
    else:
        header = _read_header(numbered, file)
    for number, fields in numbered:
        if len(fields) != len(header):
            yield (
                number,
                DataError(
                    f"it has {len(fields)} fields and the header {len(header)}; put quotes around "
                    "fields that hold delimiters or line breaks",
                    key=f"{file.name}:{number}",
                ),
            )
        elif dialect.is_ljspeech:
            name, *texts = fields
            said = next(filter(None, reversed(texts)), "")
            yield number, {"id": name, "audio": f"wavs/{name}.wav", "text": said}
        else:
            yield number, dict(zip(header, fields, strict=True))


def _read_header(numbered: Iterator[tuple[int, list[str]]], file: DataFile) -> list[str]:
    _, header = next(numbered, (0, []))
    if not header:
        raise SourceError(f"{name_last(file)!r} has no header; name the columns in its first line")
    if all(len(name) > 2 and name[0] == name[-1] == "'" for name in header):
        raise SourceError(
            f"{name_last(file)!r} quotes its fields by ', which would be read as letters; write "
            'it with "'
        )
    double = next((name for name, count in Counter(header).items() if count > 1), None)
    if double is not None:
        shown = repr(double) if _reads_like_a_name(double) else "of one name"
        raise SourceError(f"{name_last(file)!r} names the column {shown} twice; rename one")
    return header


def _find_dialect(file: DataFile) -> _Dialect:
    """Tell the dialect from the first lines."""
    lines: list[str] = []
    with closing(read_lines(file)) as numbered:
        num_left = _PEEKED_CHARACTERS
        for _, line in islice(numbered, _PEEKED_LINES):
            num_left -= len(line)
            if num_left < 0 and lines:
                break
            lines += [line] if line.strip() else []
    header = re.sub(r'"[^"]*"', "", lines[0]) if lines else ""
    delimiter = next((mark for mark in "\t|;" if mark in header), ",")
    is_spaced = header.count(delimiter) == header.count(f"{delimiter} ") > 0
    rows = [line.rstrip("\r\n").split(delimiter) for line in lines]
    if delimiter == "|" and _is_ljspeech(rows):
        return _Dialect(delimiter, is_quoted=False, is_ljspeech=True, num_fields=len(rows[0]))
    is_even = len({len(fields) for fields in rows}) == 1
    try:
        parsed = csv.reader(lines, delimiter=delimiter, strict=True)
        is_quoted = not is_even or {len(fields) for fields in parsed} == {len(rows[0])}
    except csv.Error:
        is_quoted = not is_even or delimiter not in "\t|"
    return _Dialect(delimiter, is_quoted, is_spaced)


def _is_ljspeech(rows: list[list[str]]) -> bool:
    """Whether lines are ``id|text`` or ``id|text|normalised text``, all of them."""
    widths = {len(fields) for fields in rows}
    if widths not in ({2}, {3}) or not all(_LJSPEECH_ID.fullmatch(fields[0]) for fields in rows):
        return False
    # A third field that is much shorter names a speaker.
    return widths == {2} or 2 * sum(len(row[2]) for row in rows) > sum(len(row[1]) for row in rows)


def _reads_like_a_name(field: str) -> bool:
    words = field.split()
    return not (
        len(field) > _MAX_NAME_CHARACTERS
        or len(words) > _MAX_NAME_WORDS
        or (len(words) > 1 and field.strip()[-1] in ".!?,;:")
        or re.fullmatch(r"[-+]?\d+([.,]\d+)?", field.strip())
        or kind_of_suffix(PurePosixPath(field).suffix.lower())
    )


def _read_fields(file: DataFile, dialect: _Dialect) -> Iterator[tuple[int, list[str]]]:
    """Read the first record of a file as number 0, then the others."""
    # The limit is the csv module's own, for all its readers: 131,072 characters unless raised.
    csv.field_size_limit(max(csv.field_size_limit(), 2**31 - 1))
    num_bytes = num_delimiters = 0  # of the record that is being read, whose lines may be many

    def read_bounded() -> Iterator[str]:
        nonlocal num_bytes, num_delimiters
        for number, line in read_lines(file):
            num_bytes += measure_text(line)
            num_delimiters += line.count(dialect.delimiter)
            if num_bytes > MAX_TEXT_BYTES or num_delimiters > _MAX_DELIMITERS:
                raise SourceError(
                    f"{name_last(file)!r} has one record of more than {MAX_TEXT_BYTES:,} bytes or "
                    f"{_MAX_DELIMITERS:,} delimiters up to line {number}; close the quotes in it"
                )
            yield line

    reader = csv.reader(
        read_bounded(),
        delimiter=dialect.delimiter,
        quoting=csv.QUOTE_MINIMAL if dialect.is_quoted else csv.QUOTE_NONE,
        skipinitialspace=dialect.is_spaced,
        strict=True,
    )
    number = 0
    try:
        for fields in reader:
            num_bytes = num_delimiters = 0
            if fields:
                yield number, fields
                number += 1
    except csv.Error as error:
        raise SourceError(
            f"{name_last(file)!r} is not valid CSV at line {reader.line_num} ({error})"
        ) from error
