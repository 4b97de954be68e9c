"""A run, read from its folder: history, samples, quarantine, and the phase it is in."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gemma_tuner.errors import ConfigError
from gemma_tuner.settings import FILE_NAME as SETTINGS_FILE
from gemma_tuner.settings import parse_file
from gemma_tuner.streaming.quarantine import RUN_FILE as QUARANTINE_FILE
from gemma_tuner.streaming.quarantine import BadExample, Budget, Quarantine
from gemma_tuner.training.reporting.metrics import LOG_FILE
from gemma_tuner.watch.history import History, read_steps
from gemma_tuner.watch.samples import Sample, read_sample
from gemma_tuner.watch.tail import JsonlTail

SAMPLES_FILE = "samples.jsonl"
_DEEPEST_LISTS = 3

SILENT_SECONDS = 60.0
"""A run that has logged nothing for so long, and for ten log intervals, counts as silent."""


@dataclass(frozen=True, slots=True)
class Phase:
    """The phase of a run: one of ``PHASES``, "waiting" (nothing logged yet) or "silent"."""

    name: str
    seconds_per_step: float | None = None  # of training alone, over the last records
    seconds_left: float | None = None  # at that speed; None where there is no end to expect
    silent_seconds: float = 0.0  # in whole minutes; 0 unless it is silent


class Run:
    """A run's folder, its ``output_dir``, read as it grows."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.name = name
        self.history = History()
        self.samples: dict[int, dict[str, Sample]] = {}  # by step and by key
        self.quarantine: list[BadExample] = []
        self.settings: dict[str, Any] = {}  # also those of the recipe or command that began it
        self._log = JsonlTail(folder / LOG_FILE, read_steps)
        self._samples = JsonlTail(folder / SAMPLES_FILE)
        self._changed: dict[str, int] = {}

    @property
    def num_damaged(self) -> int:
        """Lines of its files that could not be read."""
        return self._log.num_damaged + self._samples.num_damaged

    def refresh(self) -> bool:
        """Read what its files have gained; whether that is anything."""
        has_log = self._read_log()
        has_settings = self._has_changed(SETTINGS_FILE)
        if has_log or has_settings:
            self.settings = read_settings(self.folder) | self.history.config
        has_samples = self._read_samples()
        has_quarantine = self._has_changed(QUARANTINE_FILE)
        if has_quarantine:
            self.quarantine = Quarantine(self.folder / QUARANTINE_FILE, Budget()).inspect()
        return has_log or has_settings or has_samples or has_quarantine

    def _read_log(self) -> bool:
        has_changed = False
        for gain in self._log.read():
            if gain.has_restarted:
                self.history = History()
            if gain.table is not None:
                self.history.add_steps(gain.table)
            for record in gain.records:
                self.history.add(record)
            has_changed |= gain.has_restarted or bool(gain.records)
        return has_changed

    def _read_samples(self) -> bool:
        has_changed = False
        for gain in self._samples.read():
            if gain.has_restarted:
                self.samples = {}
            for record in gain.records:
                sample = read_sample(record)
                self.samples.setdefault(sample.step, {})[sample.key] = sample
            has_changed |= gain.has_restarted or bool(gain.records)
        return has_changed

    def find_phase(self, now_seconds: float | None = None) -> Phase:
        """The phase of the run now."""
        history = self.history
        if not len(history) and not history.held_out and not history.phase:
            return Phase("waiting")
        if history.phase in ("finished", "stopped", "failed"):
            return Phase(history.phase, _seconds_per_step(history))
        pace = _seconds_per_step(history)
        if history.max_steps is not None and history.step >= history.max_steps:
            return Phase("finished", pace)
        now_seconds = time.time() if now_seconds is None else now_seconds
        quiet_seconds = now_seconds - (self._log.changed_seconds or now_seconds)
        intervals = history.interval_seconds()[-20:]
        longest_seconds = float(np.nanmax(intervals)) if np.isfinite(intervals).any() else 0.0
        if quiet_seconds > max(SILENT_SECONDS, 10 * longest_seconds):
            # In whole minutes, so that the page changes only then.
            return Phase("silent", pace, silent_seconds=60 * (quiet_seconds // 60))
        left = None
        if pace is not None and history.max_steps is not None:
            left = pace * (history.max_steps - history.step)
        return Phase(history.phase or "training", pace, left)

    def _has_changed(self, name: str) -> bool:
        try:
            changed = (self.folder / name).stat().st_mtime_ns
        except OSError:
            return False
        is_new = self._changed.get(name) != changed
        self._changed[name] = changed
        return is_new


def open_runs(folders: Sequence[Path], *, may_be_empty: bool = False) -> list[Run]:
    """Open the folders of runs; where two have one name, their parents' names are added."""
    resolved = [folder.resolve() for folder in folders]
    for folder in resolved:
        if may_be_empty or (folder / LOG_FILE).is_file():
            continue
        if not folder.is_dir():
            raise ConfigError(f"there is no folder {folder.name!r}; give a run's output_dir")
        inside = sorted(path.parent.name for path in folder.glob(f"*/{LOG_FILE}"))
        hint = (
            f"the runs in it are {', '.join(inside[:8])}{', …' if len(inside) > 8 else ''}"
            if inside
            else "give a run's output_dir"
        )
        raise ConfigError(
            f"{folder.name!r} is not the folder of a run, it has no log.jsonl; {hint}"
        )
    if len(set(resolved)) < len(resolved):
        raise ConfigError("a run is given twice; give each one once")
    names = [folder.name for folder in resolved]
    return [
        Run(folder, name if names.count(name) == 1 else f"{folder.parent.name}/{name}")
        for folder, name in zip(resolved, names, strict=True)
    ]


def list_setting_differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """The settings in which runs differ, but for their folders, with each run's value."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    rows = [
        (name, [show_setting(run.settings.get(name)) for run in runs])
        for name in names
        if name not in ("output_dir", "out")
    ]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def read_settings(folder: Path) -> dict[str, Any]:
    """Read what :func:`gemma_tuner.settings.save_settings` wrote; {} where it did not."""
    try:
        content = parse_file(folder / SETTINGS_FILE)
    except ConfigError:
        return {}
    return {str(name): value for name, value in content.items()}


def _seconds_per_step(history: History) -> float | None:
    """Seconds of training a step takes, over the last twenty records."""
    seconds, steps = history.interval_seconds()[-20:], history.interval_steps()[-20:]
    known = np.isfinite(seconds) & (steps > 0)
    if not known.any():
        return None
    return float(seconds[known].sum() / steps[known].sum())


def show_setting(value: object, depth: int = 0) -> str:
    """A setting's value in words; "–" for none."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        if depth == _DEEPEST_LISTS:
            return "…"
        return ", ".join(show_setting(item, depth + 1) for item in value) or "–"
    return "–" if value is None else str(value)
