"""Text of data files, line by line: what they are packed by and encoded in is told by content."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Generator, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

import pyarrow

from gemma_tuner.errors import SourceError
from gemma_tuner.records import StoredObject

PACKED = (".gz", ".bz2", ".xz", ".zst")
"""Endings of text files that are packed; by which, their content says."""

_MAX_LINE_BYTES = 1 << 29
_MAX_DOCUMENT_CHARACTERS = 1 << 30
_CHUNK_BYTES = 1 << 20
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")


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


def name_last(file: DataFile) -> str:
    """Return a file's name without its folders."""
    return file.name.rpartition("/")[2]


def read_lines(file: DataFile) -> Iterator[tuple[int, str]]:
    """Read lines of UTF-8 or marked UTF-16, split at line feeds alone, numbered from 1."""
    number = 0
    try:
        with file.open() as stream, closing(_split(_unpack(stream), file)) as lines:
            for number, line in enumerate(lines, 1):
                if isinstance(line, str):
                    yield number, line
                elif len(line) > _MAX_LINE_BYTES:
                    raise SourceError(
                        f"{name_last(file)!r} has more than {_MAX_LINE_BYTES:,} bytes in line "
                        f"{number}; write one row a line, and media to files of their own"
                    )
                else:
                    yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeError as error:
        place = f", byte {error.start + 1}" if isinstance(error, UnicodeDecodeError) else ""
        raise SourceError(
            f"{name_last(file)!r} is not UTF-8 at line {number or 1}{place}, and not marked as "
            "UTF-16; save it as UTF-8 (from Windows-1252: iconv -f CP1252 -t UTF-8)"
        ) from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError, pyarrow.ArrowException) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise SourceError(
            f"{name_last(file)!r} cannot be read at line {number} ({reason}); check that it is "
            "there, whole and readable"
        ) from None


def read_text(file: DataFile) -> str:
    """Read a whole text file."""
    lines: list[str] = []
    num_characters = 0
    for _, line in read_lines(file):
        lines.append(line)
        num_characters += len(line)
        if num_characters > _MAX_DOCUMENT_CHARACTERS:
            raise SourceError(
                f"{name_last(file)!r} is one text of more than {_MAX_DOCUMENT_CHARACTERS:,} "
                "characters; write JSON lines, which are read one by one"
            )
    return "".join(lines)


def _unpack(stream: BinaryIO) -> BinaryIO:
    """Unpack by content: an object may be stored packed under a plain name."""
    head = stream.read(6)
    stream.seek(0)
    if head.startswith(b"\x1f\x8b"):
        return cast("BinaryIO", gzip.open(stream))
    if head.startswith(b"BZh"):
        return cast("BinaryIO", bz2.open(stream))
    if head.startswith(b"\xfd7zXZ"):
        return cast("BinaryIO", lzma.open(stream))
    if head.startswith(b"\x28\xb5\x2f\xfd"):
        unpacked: Any = pyarrow.CompressedInputStream(stream, "zstd")
        return io.BufferedReader(unpacked)
    return stream


def _split(stream: BinaryIO, file: DataFile) -> Generator[bytes | str]:
    head = cast("io.BufferedReader", stream).peek(4)[:4]
    if head[:2] in _UTF_16:
        decoder = codecs.getincrementaldecoder("utf-16")()
        text = ""
        while chunk := stream.read(_CHUNK_BYTES):
            *lines, text = (text + decoder.decode(chunk)).split("\n")
            yield from (f"{line}\n" for line in lines)
        if text := text + decoder.decode(b"", final=True):
            yield text
    elif b"\0" in head:
        raise SourceError(
            f"{name_last(file)!r} is no text: it begins with zero bytes, as UTF-16 without a byte "
            "order mark and binary files do; save it as UTF-8"
        )
    else:
        yield from iter(partial(stream.readline, _MAX_LINE_BYTES + 1), b"")
