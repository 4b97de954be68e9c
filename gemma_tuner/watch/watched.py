"""The runs of a page, read once for all browsers that show it."""

from __future__ import annotations

from collections.abc import Sequence

import psutil

from gemma_tuner.errors import SourceError
from gemma_tuner.watch.run import Phase, Run


class Watched:
    """Runs, and the process that they belong to.

    Args:
        runs: One to show, or several to compare.
        parent_pid: The process that trains and wanted the page; None where somebody else did.

    Attributes:
        runs: The runs.
        phases: Where each of them is.
        problem: Why a file cannot be read now; nothing where all can.
        version: Grows when anything has changed.
        has_parent_ended: Whether the process that trains has ended.
    """

    def __init__(self, runs: Sequence[Run], parent_pid: int | None = None) -> None:
        self.runs = list(runs)
        self.phases = [Phase("waiting")] * len(runs)
        self.problem = ""
        self.version = 0
        self.has_parent_ended = False
        self._parent = _find_process(parent_pid)
        self._has_parent = parent_pid is not None
        self.refresh()

    def refresh(self) -> None:
        """Read what the files have gained, and look after the parent."""
        before = (self.phases, self.problem, self.has_parent_ended)
        # Before the files are read: what it wrote last is then seen.
        if self._has_parent and not _is_alive(self._parent):
            self.has_parent_ended = True
        try:
            has_changed = any([run.refresh() for run in self.runs])  # noqa: C419 - all of them
            self.problem = ""
        except SourceError as error:
            has_changed = False
            self.problem = str(error)
        self.phases = [run.find_phase() for run in self.runs]
        if has_changed or before != (self.phases, self.problem, self.has_parent_ended):
            self.version += 1


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
