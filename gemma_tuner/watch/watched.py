"""The runs of a page, read once for all browsers that show it, and when each draws them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import psutil

from gemma_tuner.watch.run import Phase, Run

P = ParamSpec("P")
T = TypeVar("T")

GROWTH = 1.1
"""A chart with so many times the records it had looks different."""

SLICE_SECONDS = 0.1
"""So long may reading a log keep a page from answering."""

LONGEST_SECONDS = 30.0
"""After so long, whatever is new is drawn; that takes a browser some 0.1 s."""


class Watched:
    """One run to show, or several to compare, and the process that trains (None: any)."""

    def __init__(self, runs: Sequence[Run], parent_pid: int | None = None) -> None:
        self.runs = list(runs)
        self.phases = [Phase("waiting")] * len(runs)
        self.problem = ""  # why files cannot be read now, a line each
        self.is_behind = False  # more of a log is there than was read
        self.version = 0  # grows when anything has changed
        self.has_parent_ended = False
        self._made: dict[object, Any] = {}
        self._parent = _find_process(parent_pid)
        self._has_parent = parent_pid is not None
        self.refresh()

    def refresh(self) -> None:
        """Read what the files have gained, and look after the parent."""
        before = (self.phases, self.problem, self.has_parent_ended)
        # Before the files are read, so that its last lines are among them.
        if self._has_parent and not _is_alive(self._parent):
            self.has_parent_ended = True
        has_changed = any([run.refresh(SLICE_SECONDS) for run in self.runs])  # noqa: C419 - all of them
        self.is_behind = any(run.share_read < 1 for run in self.runs)
        self.problem = "\n".join(_list_problems(self.runs))
        self.phases = [run.find_phase() for run in self.runs]
        if has_changed or before != (self.phases, self.problem, self.has_parent_ended):
            self.version += 1
            self._made = {}

    def make(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What a function makes of all runs as they are, once for every page."""
        if function not in self._made:
            self._made[function] = function(*args, **kwargs)
        return self._made[function]


def _list_problems(runs: Sequence[Run]) -> Iterator[str]:
    for run in runs:
        yield from (f"{run.name}: {problem}" for problem in run.problems.values())
        if run.share_read < 1:
            yield (
                f"{run.name}: {run.share_read:.0%} of its log are read; until all is, curves and "
                "figures are of samples of it."
            )
        if run.num_damaged:
            yield f"{run.name}: {run.num_damaged:,} damaged lines of its files are passed over."


def _find_process(pid: int | None) -> psutil.Process | None:
    try:
        return None if pid is None else psutil.Process(pid)
    except (psutil.NoSuchProcess, ValueError):
        return None


def _is_alive(process: psutil.Process | None) -> bool:
    """Whether a process runs: not one that took its number later, nor a dead one's entry."""
    try:
        return (
            process is not None
            and process.is_running()
            and process.status() != psutil.STATUS_ZOMBIE
        )
    except psutil.NoSuchProcess:
        return False


class _Drawn(NamedTuple):
    """The state that a page last drew."""

    version: int
    seconds: float
    num_records: Sequence[int]
    states: tuple[Sequence[str], str, bool]


class Pace:
    """Decides when a page draws: at every look while a run is young, then less often.

    A browser beside a run on the same cores must not slow it. Times are of a clock that does not
    go back.
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
        phases = [phase.name for phase in watched.phases]
        states = (phases, watched.problem, watched.has_parent_ended)
        num_records = [len(run.history) for run in watched.runs]
        return _Drawn(watched.version, now_seconds, num_records, states)
