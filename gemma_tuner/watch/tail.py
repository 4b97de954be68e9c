"""Following a file of JSON lines that another process writes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from gemma_tuner.errors import SourceError


class Gain(NamedTuple):
    """The new lines of a file since it was last read."""

    records: list[dict[str, Any]]
    # The file is another one, or shorter than it was: forget what was read before.
    has_restarted: bool = False


class JsonlTail:
    """Reads the lines that a file has gained; a line counts once it is finished.

    The file need not be there yet. A resumed run replaces its log by another of the same name,
    which is read from its beginning.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_damaged = 0  # finished lines that are not a JSON object
        self.changed_seconds: float | None = None  # when it was last written, since 1970
        self._identity: tuple[int, int] | None = None
        self._offset = 0

    def read(self) -> Gain:
        """Read what is new."""
        try:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                identity = (status.st_dev, status.st_ino)
                has_restarted = self._identity is not None and (
                    identity != self._identity or status.st_size < self._offset
                )
                if has_restarted:
                    self._offset = self.num_damaged = 0
                self._identity = identity
                self.changed_seconds = status.st_mtime
                file.seek(self._offset)
                content = file.read()
        except FileNotFoundError:
            return Gain([])
        except OSError as error:
            raise SourceError(
                f"{self.path.name} cannot be read ({error.strerror or type(error).__name__}); "
                "make it readable, or watch another run"
            ) from None
        finished, newline, _ = content.rpartition(b"\n")
        self._offset += len(finished) + len(newline)
        return Gain(self._parse(finished), has_restarted)

    def _parse(self, lines: bytes) -> list[dict[str, Any]]:
        records = []
        for line in lines.split(b"\n"):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError:  # of UTF-8 too
                record = None
            if isinstance(record, dict):
                records.append(record)
            else:
                self.num_damaged += 1
        return records
