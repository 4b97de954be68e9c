"""Following a file of JSON lines that another process writes."""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from gemma_tuner.errors import SourceError

_BLOCK_BYTES = 1 << 20
_LONGEST_LINE_BYTES = 8 << 20  # a longer one counts as damaged
_GLANCES, _GLANCE_BYTES = 64, 1 << 15


class Gain(NamedTuple):
    """New lines of a file: a block of them, so that no log has to fit in memory."""

    records: list[dict[str, Any]]
    # The file is another one, or shorter than it was: forget what was read before.
    has_restarted: bool = False
    # What the reader of many lines made of those that are not among the records.
    table: Any = None


class JsonlTail:
    """Reads the lines that a file has gained; a line counts once its object is finished.

    The file need not be there yet. A resumed run replaces its log by another of the same name,
    which is read from its beginning.

    Args:
        path: The file.
        read_many: Takes lines, and returns what it makes of those that it reads at once, and the
            others, which are parsed one by one.
    """

    def __init__(
        self,
        path: Path,
        read_many: Callable[[list[bytes]], tuple[Any, list[bytes]]] | None = None,
    ) -> None:
        self.path = path
        self._read_many = read_many
        self.num_damaged = 0  # finished lines that are not a JSON object
        self.changed_seconds: float | None = None  # when it was last written, since 1970
        self.num_bytes = 0  # of the file, when it was last looked at
        self.num_read = 0  # of these
        self._identity: tuple[int, int] | None = None
        self._is_within_long_line = False

    def read(self) -> Iterator[Gain]:
        """Read what is new, a block at a time."""
        is_more = True
        while is_more:
            gain, is_more = self._read_block()
            yield gain

    def _read_block(self) -> tuple[Gain, bool]:
        try:
            with self._open() as file:
                status = os.fstat(file.fileno())
                identity = (status.st_dev, status.st_ino)
                has_restarted = self._identity is not None and (
                    identity != self._identity or status.st_size < self.num_read
                )
                if has_restarted:
                    self.num_read = self.num_damaged = 0
                    self._is_within_long_line = False
                self._identity = identity
                self.num_bytes, self.changed_seconds = status.st_size, status.st_mtime
                file.seek(self.num_read)
                content = file.read(_BLOCK_BYTES)
                while b"\n" not in content and len(content) < _LONGEST_LINE_BYTES:
                    more = file.read(_BLOCK_BYTES)
                    if not more:
                        break
                    content += more
                is_last = self.num_read + len(content) >= status.st_size
        except FileNotFoundError:
            if self._identity is None:
                return Gain([]), False
            raise SourceError(
                f"{self.path.name} is no longer there; what was read of it stays"
            ) from None
        before = self.num_read
        finished, newline, rest = content.rpartition(b"\n")
        if not newline and len(rest) >= _LONGEST_LINE_BYTES:
            self._is_within_long_line = True
            self.num_read += len(rest)
        self.num_read += len(finished) + len(newline)
        if newline and self._is_within_long_line:
            self._is_within_long_line = False
            self.num_damaged += 1
            finished = finished.partition(b"\n")[2]
        table, lines = None, finished.split(b"\n")
        if self._read_many is not None:
            table, lines = self._read_many(lines)
        records, num_damaged = _parse(lines)
        self.num_damaged += num_damaged
        if is_last and not self._is_within_long_line:
            # An object whose last brace is there is whole: some writers put the end of a line
            # before the next one, and a kill can take it.
            whole, _ = _parse([rest])
            records += whole
            self.num_read += len(rest) if whole else 0
        return Gain(records, has_restarted, table), before < self.num_read < status.st_size

    def glance(self) -> list[dict[str, Any]]:
        """Read records at places spread over the file, its ends among them."""
        records = []
        with contextlib.suppress(FileNotFoundError), self._open() as file:
            end = os.fstat(file.fileno()).st_size - _GLANCE_BYTES
            for place in range(_GLANCES):
                at = max(0, end) * place // (_GLANCES - 1)
                file.seek(at)
                lines = file.read(_GLANCE_BYTES).split(b"\n")
                records += _parse(lines[1 if at else 0 : -1])[0]
        return records

    def _open(self) -> BinaryIO:
        try:
            if not stat.S_ISREG(self.path.stat().st_mode):
                raise SourceError(f"{self.path.name} is not a file; watch another run")
            return self.path.open("rb")
        except FileNotFoundError:
            raise
        except OSError as error:
            raise SourceError(
                f"{self.path.name} cannot be read ({error.strerror or type(error).__name__}); "
                "make it readable, or watch another run"
            ) from None


def _parse(lines: list[bytes]) -> tuple[list[dict[str, Any]], int]:
    """Parse lines; returns their objects, and how many lines are none."""
    records, num_damaged = [], 0
    for line in lines:
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if b"\\ud" in line.lower():  # half a pair, perhaps, which no page can hold
                text = json.dumps(record, ensure_ascii=False)
                record = json.loads(text.encode("utf-8", "replace"))
        except (ValueError, RecursionError):  # of UTF-8 too
            record = None
        if isinstance(record, dict):
            records.append(record)
        else:
            num_damaged += 1
    return records, num_damaged
