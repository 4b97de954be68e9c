"""When a page is drawn anew: a browser beside a run on the same cores must not slow it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from gemma_tuner.watch.watched import Watched

GROWTH = 1.1
"""A chart with so many times the records it had looks different."""
LONGEST_SECONDS = 30.0
"""What is new is shown after so long in any case; drawing it takes a browser some 0.1 s."""


class _Drawn(NamedTuple):
    """What a page has shown, and when."""

    version: int
    seconds: float
    num_records: Sequence[int]
    states: tuple[Sequence[str], str, bool]


class Pace:
    """Says when a page shows what is new: at every look while a run is young, then less often.

    Args:
        watched: What the page shows.
        now_seconds: When it was first drawn, on a clock that does not go back.
    """

    def __init__(self, watched: Watched, now_seconds: float) -> None:
        self._watched = watched
        self._drawn = self._look(now_seconds)

    def is_due(self, now_seconds: float) -> bool:
        """Whether to draw now; if so, it counts as done."""
        before, now = self._drawn, self._look(now_seconds)
        if now.version == before.version:
            return False
        has_grown = any(
            new < old or new >= GROWTH * max(old, 1)
            for new, old in zip(now.num_records, before.num_records, strict=True)
        )
        is_late = now_seconds - before.seconds >= LONGEST_SECONDS
        if not (has_grown or is_late or now.states != before.states):
            return False
        self._drawn = now
        return True

    def _look(self, now_seconds: float) -> _Drawn:
        watched = self._watched
        return _Drawn(
            watched.version,
            now_seconds,
            [len(run.history) for run in watched.runs],
            (
                [phase.name for phase in watched.phases],
                watched.problem,
                watched.has_parent_ended,
            ),
        )
