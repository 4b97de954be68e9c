"""A run, read from its folder: history, samples, quarantine, and the phase it is in."""

from __future__ import annotations

import contextlib
import math
import stat
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gemma_tuner.errors import ConfigError, SourceError
from gemma_tuner.settings import FILE_NAME as SETTINGS_FILE
from gemma_tuner.settings import parse_file
from gemma_tuner.streaming.quarantine import RUN_FILE as QUARANTINE_FILE
from gemma_tuner.streaming.quarantine import BadExample
from gemma_tuner.training.reporting.metrics import LOG_FILE
from gemma_tuner.watch.history import History, read_steps, whole
from gemma_tuner.watch.samples import Sample, read_sample
from gemma_tuner.watch.tail import JsonlTail

SAMPLES_FILE = "samples.jsonl"
FILES = (LOG_FILE, SETTINGS_FILE, SAMPLES_FILE, QUARANTINE_FILE)
_DEEPEST_LISTS = 3
_LARGEST_SETTINGS_BYTES = 1 << 17  # YAML is slow: as many take a second

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
        self.saved_settings: dict[str, Any] = {}  # of the recipe or command that began it
        self.settings: dict[str, Any] = {}  # these and those in the log
        self.problems: dict[str, str] = {}  # why a file cannot be read now, by its name
        self.share_read = 1.0  # of the log; until it is read, history has samples of it
        self._history = self.history  # as far as the log is read
        self._log = JsonlTail(folder / LOG_FILE, read_steps)
        self._samples = JsonlTail(folder / SAMPLES_FILE)
        self._quarantine = JsonlTail(folder / QUARANTINE_FILE)
        self._settings_time = 0  # when their file was last changed

    @property
    def num_damaged(self) -> int:
        """Lines of its files that could not be read."""
        return sum(tail.num_damaged for tail in (self._log, self._samples, self._quarantine))

    def refresh(self, seconds: float = math.inf) -> bool:
        """Read what its files have gained, of the log for so long; whether that is anything."""
        before = self.problems.copy(), self.share_read
        readers = {
            LOG_FILE: lambda: self._read_log(time.monotonic() + seconds),
            SETTINGS_FILE: self._read_settings,
            SAMPLES_FILE: self._read_samples,
            QUARANTINE_FILE: self._read_quarantine,
        }
        has_changed = False
        for name, read in readers.items():
            try:
                has_changed |= read()
            except (ConfigError, SourceError) as error:
                self.problems[name] = str(error)
            except OSError as error:
                self.problems[name] = f"{name} cannot be read ({error.strerror})"
        return has_changed or before != (self.problems, self.share_read)

    def _read_log(self, end_seconds: float) -> bool:
        log, has_changed, self.share_read = self._log, False, 1.0
        for gain in log.read():
            if gain.has_restarted:
                self._history = History()
            if gain.table is not None:
                self._history.add_steps(gain.table)
            for record in gain.records:
                self._history.add(record)
            has_changed |= gain.has_restarted or bool(gain.records)
            if time.monotonic() > end_seconds and log.num_read < log.num_bytes:
                self.share_read = log.num_read / log.num_bytes
                break
        if self.share_read == 1:
            self.history = self._history
        elif self.history is self._history:
            self.history = History()
            for record in log.glance():
                self.history.add(record)
        self.problems.pop(LOG_FILE, None)
        if log.changed_seconds is None and (self.samples or self.quarantine):
            self.problems[LOG_FILE] = f"{LOG_FILE} is not there: only what is beside it is shown"
        return has_changed

    def _read_settings(self) -> bool:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            status = (self.folder / SETTINGS_FILE).stat()
            if status.st_ctime_ns != self._settings_time:
                self._settings_time = status.st_ctime_ns
                if not stat.S_ISREG(status.st_mode) or status.st_size > _LARGEST_SETTINGS_BYTES:
                    raise ConfigError(f"{SETTINGS_FILE} is no file, or too large for settings")
                content = parse_file(self.folder / SETTINGS_FILE)
                self.saved_settings = {str(name): value for name, value in content.items()}
                self.problems.pop(SETTINGS_FILE, None)
        before, self.settings = self.settings, self.saved_settings | self.history.config
        return before != self.settings

    def _read_samples(self) -> bool:
        has_changed = False
        for gain in self._samples.read():
            if gain.has_restarted:
                self.samples = {}
            for record in gain.records:
                sample = read_sample(record)
                self.samples.setdefault(sample.step, {})[sample.key] = sample
            has_changed |= gain.has_restarted or bool(gain.records)
        self.problems.pop(SAMPLES_FILE, None)
        return has_changed

    def _read_quarantine(self) -> bool:
        has_changed = False
        for gain in self._quarantine.read():
            if gain.has_restarted:
                self.quarantine = []
            self.quarantine += map(_read_bad, gain.records)
            has_changed |= gain.has_restarted or bool(gain.records)
        self.problems.pop(QUARANTINE_FILE, None)
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


def open_runs(folders: Sequence[Path], *, may_be_empty: bool = False) -> list[Run]:
    """Open the folders of runs; where two have one name, their parents' names are added."""
    resolved = [folder.resolve() for folder in folders]
    for folder in resolved:
        if may_be_empty or any((folder / name).is_file() for name in FILES):
            continue
        if not folder.is_dir():
            raise ConfigError(f"there is no folder {folder.name!r}; give a run's output_dir")
        inside = sorted(_show_name(path.parent) for path in folder.glob(f"*/{LOG_FILE}"))
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
    names = [_show_name(folder) for folder in resolved]
    return [
        Run(folder, name if names.count(name) == 1 else f"{_show_name(folder.parent)}/{name}")
        for folder, name in zip(resolved, names, strict=True)
    ]


def _show_name(folder: Path) -> str:
    return "".join(letter if letter.isprintable() else "�" for letter in folder.name)


def list_setting_differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """The settings in which runs differ, but for their folders, with each run's value."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    rows = [
        (name, [show_setting(run.settings.get(name)) for run in runs])
        for name in names
        if name not in ("output_dir", "out")
    ]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def _read_bad(record: Mapping[str, Any]) -> BadExample:
    """Make a bad example of a line; what is missing is empty, objects are left out."""
    names = ("key", "origin", "stage", "error", "reason")
    texts: dict[str, Any] = {name: str(record.get(name, "")) for name in names}
    return BadExample(row=whole(record.get("row")), objects=(), **texts)


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
    if isinstance(value, int) and abs(value) >= 2**1000:  # Python writes no longer ones out
        return "…"
    if isinstance(value, list | tuple):
        if depth == _DEEPEST_LISTS:
            return "…"
        return ", ".join(show_setting(item, depth + 1) for item in value) or "–"
    return "–" if value is None else str(value)
