"""Following a file of JSON lines that another process writes."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gemma_tuner.errors import SourceError

_BLOCK_BYTES = 1 << 20
_LONGEST_LINE_BYTES = 8 << 20  # a longer one counts as damaged


class Gain(NamedTuple):
    """New lines of a file: a block of them, so that no log has to fit in memory."""

    records: list[dict[str, Any]]
    # The file is another one, or shorter than it was: forget what was read before.
    has_restarted: bool = False
    # What the reader of many lines made of those that are not among the records.
    table: Any = None


class JsonlTail:
    """Reads the lines that a file has gained; a line counts once it is finished.

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
        self._identity: tuple[int, int] | None = None
        self._offset = 0
        self._is_within_long_line = False

    def read(self) -> Iterator[Gain]:
        """Read what is new, a block at a time."""
        size = None
        while size is None or self._offset < size:
            before = self._offset
            gain, size = self._read_block()
            yield gain
            if self._offset == before:  # the rest is no finished line yet
                return

    def _read_block(self) -> tuple[Gain, int]:
        try:
            if not stat.S_ISREG(self.path.stat().st_mode):
                raise SourceError(f"{self.path.name} is not a file; watch another run")
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                identity = (status.st_dev, status.st_ino)
                has_restarted = self._identity is not None and (
                    identity != self._identity or status.st_size < self._offset
                )
                if has_restarted:
                    self._offset = self.num_damaged = 0
                    self._is_within_long_line = False
                self._identity = identity
                self.changed_seconds = status.st_mtime
                file.seek(self._offset)
                content = file.read(_BLOCK_BYTES)
                while b"\n" not in content and len(content) < _LONGEST_LINE_BYTES:
                    more = file.read(_BLOCK_BYTES)
                    if not more:
                        break
                    content += more
        except FileNotFoundError:
            return Gain([]), 0
        except OSError as error:
            raise SourceError(
                f"{self.path.name} cannot be read ({error.strerror or type(error).__name__}); "
                "make it readable, or watch another run"
            ) from None
        finished, newline, rest = content.rpartition(b"\n")
        if not newline and len(rest) >= _LONGEST_LINE_BYTES:
            self._is_within_long_line = True
            self._offset += len(rest)
        self._offset += len(finished) + len(newline)
        if newline and self._is_within_long_line:
            self._is_within_long_line = False
            self.num_damaged += 1
            finished = finished.partition(b"\n")[2]
        table, lines = None, finished.split(b"\n")
        if self._read_many is not None:
            table, lines = self._read_many(lines)
        return Gain(self._parse(lines), has_restarted, table), status.st_size

    def _parse(self, lines: list[bytes]) -> list[dict[str, Any]]:
        records = []
        for line in lines:
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):  # of UTF-8 too
                record = None
            if isinstance(record, dict):
                records.append(record)
            else:
                self.num_damaged += 1
        return records
