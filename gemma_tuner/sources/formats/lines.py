"""Text of data files, line by line: what they are packed by and encoded in is told by content."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import sys
import zlib
from collections.abc import Generator, Iterable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

import pyarrow

from gemma_tuner.errors import SourceError
from gemma_tuner.records import StoredObject

PACKED = (".gz", ".bz2", ".xz", ".zst")
"""Endings of text files that are packed; by which, their content says."""

MAX_TEXT_BYTES = 1 << 25
"""Of a line or a text, in the file and in memory: until it is an example it is held six times."""

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


def read_lines(file: DataFile, *, in_parts: bool = False) -> Generator[tuple[int, str]]:
    """Read lines of UTF-8 or marked UTF-16, split at line feeds alone, numbered from 1."""
    # in_parts: a line of any length, in parts of some MiB that have a number each.
    number = 0
    try:
        with (
            file.open() as stream,
            closing(_split(_unpack(stream), file, in_parts=in_parts)) as lines,
        ):
            decoder = codecs.getincrementaldecoder("utf-8-sig")()
            for number, line in enumerate(lines, 1):
                text = line if isinstance(line, str) else ""
                if isinstance(line, bytes) and len(line) <= MAX_TEXT_BYTES:
                    text = decoder.decode(line, not in_parts and not line.endswith(b"\n"))
                if len(line) > MAX_TEXT_BYTES or measure_text(text) > MAX_TEXT_BYTES:
                    raise SourceError(
                        f"{name_last(file)!r} has more than {MAX_TEXT_BYTES:,} bytes in line "
                        f"{number}; write one row a line, and media to files of their own"
                    )
                yield number, text
            decoder.decode(b"", final=True)
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


def read_text(file: DataFile, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """Read a whole text file."""
    return join_text(read_lines(file, in_parts=True), file, max_bytes)


def join_text(parts: Iterable[tuple[int, str]], file: DataFile, max_bytes: int) -> str:
    """Join the parts of a text that is one example or document."""
    found: list[str] = []
    num_bytes = 0
    for _, part in parts:
        found.append(part)
        num_bytes += measure_text(part)
        if num_bytes > max_bytes:
            raise SourceError(
                f"{name_last(file)!r} is one text of more than {max_bytes:,} bytes; write JSON "
                "lines, which are read one by one"
            )
    return "".join(found)


def measure_text(text: str) -> int:
    """Return the bytes that a text takes in memory: a wide character makes all of them wide."""
    return sys.getsizeof(text) - sys.getsizeof("")


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


def _split(stream: BinaryIO, file: DataFile, *, in_parts: bool) -> Generator[bytes | str]:
    head = cast("io.BufferedReader", stream).peek(4)[:4]
    if head[:2] in _UTF_16:
        decoder = codecs.getincrementaldecoder("utf-16")()
        text = ""
        while chunk := stream.read(_CHUNK_BYTES):
            *lines, text = (text + decoder.decode(chunk)).split("\n")
            yield from (f"{line}\n" for line in lines)
            if in_parts or measure_text(text) > MAX_TEXT_BYTES:
                yield text
                text = ""
        if text := text + decoder.decode(b"", final=True):
            yield text
    elif b"\0" in head:
        raise SourceError(
            f"{name_last(file)!r} is no text: it begins with zero bytes, as UTF-16 without a byte "
            "order mark and binary files do; save it as UTF-8"
        )
    else:
        num_bytes = _CHUNK_BYTES if in_parts else MAX_TEXT_BYTES + 1
        yield from iter(partial(stream.readline, num_bytes), b"")
