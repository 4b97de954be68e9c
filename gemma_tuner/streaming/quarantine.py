"""Examples that could not be used, why, and how many of them a run allows.

A bad example is passed over and leaves a hole in the order, so that every later one keeps its
place. Each is written once to a file beside the manifest, which only its owner can read::

    {"key": "tickets:17", "origin": "tickets:17", "row": 16, "stage": "decode",
     "error": "DataError", "reason": "image 'a.jpg' is damaged ...", "objects": ["gs://b/a.jpg#17"]}
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Self

from gemma_tuner.checks import bounds, check_fields
from gemma_tuner.disk import sync
from gemma_tuner.errors import DataError, SourceError
from gemma_tuner.records import StoredObject

_VARIABLE = re.compile(r"'[^']*'|\d[\d,.]*")
_SHOWN_REASONS = 5

Stage = Literal["row", "fetch", "decode", "collate"]


RUN_FILE = "quarantine.jsonl"
"""In a run's folder: what its data have in quarantine, for whoever looks at the run."""


@dataclass(frozen=True, slots=True)
class BadExample:
    """One example that could not be used.

    Args:
        key: Its key, or where it stands if it has none.
        origin: Where in its source it stands.
        row: Its row of the manifest; None where it was never written there.
        stage: What failed: making the row an example, fetching its media, decoding, collating.
        error: The kind of error.
        reason: What is wrong and what would mend it.
        objects: The stored objects that it names, ``uri#generation``.
    """

    key: str
    origin: str
    row: int | None
    stage: Stage
    error: str
    reason: str
    objects: tuple[str, ...] = ()

    @classmethod
    def explain(
        cls,
        error: DataError,
        origin: str,
        stage: Stage,
        *,
        row: int | None = None,
        stored: Iterable[StoredObject] = (),
    ) -> Self:
        """Describe what is wrong with an example."""
        return cls(
            key=error.key,
            origin=origin,
            row=row,
            stage=stage,
            error=type(error.__cause__ or error).__name__,
            reason=read_reason(error),
            objects=tuple(f"{each.uri}#{each.generation}" for each in stored),
        )


@dataclass(frozen=True, slots=True)
class Budget:
    """How much of the data may be bad."""

    # Of an epoch's rows; 0 lets the first bad row end the run.
    max_bad_fraction: float = field(default=0.0, metadata=bounds(at_least=0, at_most=1))
    max_consecutive_bad: int = field(default=100, metadata=bounds(at_least=1))

    def __post_init__(self) -> None:
        check_fields(self)

    def count_allowed(self, rows: int) -> int:
        """Return how many of so many rows may be bad."""
        return int(self.max_bad_fraction * rows + 1e-9)  # 0.29 of 100 is 28.999999999999996

    def check(
        self,
        error: DataError,
        *,
        bad: int,
        consecutive: int,
        rows: int,
        read_records: Callable[[], Iterable[BadExample]],
        num_shards: int = 1,
    ) -> None:
        """Raise if the bad rows are more than the budget allows, or than a shard's part of it."""
        allowed = -(-self.count_allowed(rows) // num_shards)
        if bad <= allowed and consecutive <= self.max_consecutive_bad:
            return
        if bad == 1:
            raise error
        limit = (
            f"max_bad_fraction={self.max_bad_fraction:g} of {rows:,} rows allows {allowed:,}"
            f"{f' to each of {num_shards} processes' if num_shards > 1 else ''}"
            if bad > allowed
            else f"max_consecutive_bad={self.max_consecutive_bad:,}"
        )
        raise DataError(
            f"{read_reason(error)}. It is bad row {bad:,} ({consecutive:,} in a row), and "
            f"{limit}. Most frequent: {count_reasons(read_records())}",
            key=error.key,
        ) from error


class Quarantine:
    """The bad examples of one manifest."""

    def __init__(self, path: Path, budget: Budget) -> None:
        self.path = path
        self.budget = budget
        self._known = {_identify(record) for record in self.inspect()}
        self._num_bytes = 0  # of the file, as this object has left it

    def add(self, record: BadExample) -> None:
        """Write an example to the file, if it is not there with the same fault."""
        if _identify(record) in self._known:
            return
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)  # until it is closed
                self._append(descriptor, record)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise SourceError(
                f"the quarantine {self.path.name} cannot be written ({error.strerror}); free some "
                "space there, or choose another folder by cache_dir="
            ) from None

    def _append(self, descriptor: int, record: BadExample) -> None:
        # Another stream of the same data may have written meanwhile.
        if os.fstat(descriptor).st_size != self._num_bytes:
            self._known = {_identify(known) for known in self.inspect()}
        if _identify(record) not in self._known:
            self._known.add(_identify(record))
            # On a new line, also after one that a kill cut off.
            line = "\n" + json.dumps(dataclasses.asdict(record), ensure_ascii=False)
            os.write(descriptor, line.encode("utf-8", "replace"))
        self._num_bytes = os.fstat(descriptor).st_size

    def inspect(self) -> list[BadExample]:
        """Read what is in the file; a last line that was cut off by a kill is passed over."""
        try:
            # Not splitlines(): JSON leaves line separators of Unicode as they are. The cut may be
            # within a character.
            lines = self.path.read_text(encoding="utf-8", errors="replace").split("\n")
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise SourceError(
                f"the quarantine {self.path.name} cannot be read ({error.strerror}); make it "
                "readable, or choose another folder by cache_dir="
            ) from None
        records = []
        for line in lines:
            try:
                fields = json.loads(line)
                fields["objects"] = tuple(fields["objects"])
                records.append(BadExample(**fields))
            except (ValueError, TypeError, KeyError):
                continue
        return records

    def replace(self, records: Iterable[BadExample]) -> None:
        """Let the file hold these and no others; it is the old or the new one at any time."""
        fresh = Quarantine(self.path.with_suffix(".new"), self.budget)
        fresh.path.unlink(missing_ok=True)
        fresh._known.clear()
        for record in records:
            fresh.add(record)
        if fresh._known:
            sync(fresh.path)
            fresh.path.replace(self.path)
        else:
            self.path.unlink(missing_ok=True)
        self._known, self._num_bytes = fresh._known, fresh._num_bytes


def read_reason(error: DataError) -> str:
    """Return an error's message without the key that it begins with."""
    return str(error).removeprefix(f"example {error.key!r}: ")


def count_reasons(records: Iterable[BadExample]) -> str:
    """Name the five most frequent reasons, how often each came, and the first key of each."""
    # Names and numbers differ from row to row where the reason is one.
    kinds: dict[str, list[BadExample]] = {}
    for record in records:
        kinds.setdefault(_VARIABLE.sub("…", f"{record.stage}: {record.reason}"), []).append(record)
    most = sorted(kinds.values(), key=len, reverse=True)
    shown = [
        f"{len(same):,} × {same[0].stage}: {same[0].reason[:120]} (first {same[0].key!r})"
        for same in most[:_SHOWN_REASONS]
    ]
    others = sum(map(len, most[_SHOWN_REASONS:]))
    return "; ".join([*shown, *([f"{others:,} × other reasons"] if others else [])])


def _identify(record: BadExample) -> tuple[str, str, str]:
    return record.origin, record.stage, record.error
