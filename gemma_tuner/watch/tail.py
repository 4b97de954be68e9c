"""Following a file of JSON lines that another process writes."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_tuner.errors import SourceError


@dataclass(frozen=True, slots=True)
class Gain:
    """What a file has gained since it was read last.

    Args:
        records: Its new lines.
        is_anew: Whether the file is another one, or shorter than it was: what was read before
            counts no more, and ``records`` begin at its beginning.
    """

    records: list[dict[str, Any]]
    is_anew: bool = False


class JsonlTail:
    """Reads the lines that a file has gained, from the place where it stopped.

    A line counts once it is finished. A resumed run writes its log anew under the same name; that
    is noticed, and read from its beginning.

    Args:
        path: The file; it need not be there yet.

    Attributes:
        num_damaged: Finished lines that are not a JSON object, since the file's beginning.
        changed_seconds: When the file was last written, in seconds since 1970; None before.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_damaged = 0
        self.changed_seconds: float | None = None
        self._identity: tuple[int, int] | None = None
        self._offset = 0

    def read(self) -> Gain:
        """Read what is new."""
        try:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                identity = (status.st_dev, status.st_ino)
                was_read = self._identity is not None
                is_anew = was_read and (
                    identity != self._identity or status.st_size < self._offset
                )
                if is_anew:
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
        return Gain(list(self._parse(finished)), is_anew)

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
