"""A run's log as columns that charts draw from.

The log is :class:`gemma_tuner.training.reporting.metrics.JsonlLog`'s. Beside steps and held-out
losses, two of its events carry data::

    {"kind": "event", "name": "run", "max_steps": 500, "config": {"learning_rate": 2e-4, ...},
     "device": "mps"}
    {"kind": "event", "name": "plan", "parts": {"weights": 10200000000, ...}, "peak_bytes": ...,
     "budget_bytes": ..., "summary": "..."}
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.json as pa_json
from numpy.typing import NDArray

COLUMNS = (
    "loss",
    "learning_rate",
    "grad_norm",
    "tokens",
    "tokens_per_second",
    "target_tokens_per_second",
    "data_wait_seconds",
    "memory_bytes",
    "peak_bytes",
)
"""Fields kept of each step's record, in the units of ``StepRecord``."""

PHASES = ("training", "evaluating", "sampling", "finished", "stopped", "failed")
"""Events that say where a run is; "saved" is not among them, as it follows the last three too."""

WARNINGS = (
    "all_positions",
    "failed",
    "many_shapes",
    "memory_growth",
    "nonfinite",
    "out_of_memory",
    "overfitting",
    "samples_skipped",
    "speed",
    "swap",
)
"""Events that somebody should look at."""

# Phases that come and go, and the address of the page.
_UNLISTED = ("training", "evaluating", "sampling", "watch")


_STEP = b'{"kind": "step", '  # how JsonlLog begins the line of a step
_MANY_LINES = 100
_ENDLESS = 2.0**1000
_NUMBERS = [(name, pa.float64()) for name in COLUMNS]
_READING = pa_json.ReadOptions(block_size=1 << 18)  # for each core a part of what is read
_PARSING = pa_json.ParseOptions(
    explicit_schema=pa.schema([("step", pa.int64()), *_NUMBERS, ("device", pa.struct(_NUMBERS))]),
    unexpected_field_behavior="ignore",
)


class HeldOut(NamedTuple):
    """A held-out loss, after so many optimizer steps."""

    step: int
    loss: float  # nats a token; NaN where it was not finite


class Event(NamedTuple):
    """Something that happened after so many optimizer steps."""

    step: int
    name: str
    message: str  # a sentence for people, or ""

    @property
    def is_warning(self) -> bool:
        """Whether somebody should look at it."""
        return self.name in WARNINGS


class MemoryPlan(NamedTuple):
    """The memory that the run was planned to take."""

    # Bytes at the predicted peak; nothing, and a peak of 0, where room was ample.
    parts: Mapping[str, int]
    peak_bytes: int
    budget_bytes: int  # of the device; 0 where the log does not say
    summary: str  # the plan in words


class History:
    """A log as it grows: give its records to :meth:`add` in their order."""

    def __init__(self) -> None:
        self.held_out: list[HeldOut] = []
        self.events: list[Event] = []  # the oldest first
        self.plan: MemoryPlan | None = None
        self.config: dict[str, Any] = {}
        self.device = ""  # "cpu", "mps" or "cuda"; "" where the log does not say
        self.max_steps: int | None = None
        self.last: Mapping[str, Any] = {}  # the newest step's record as it was logged
        # The newest event among PHASES, "training" after a step; "" before the first.
        self.phase = ""
        self._steps = array("q")
        self._columns = {name: array("d") for name in COLUMNS}

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def step(self) -> int:
        """Optimizer steps done, as far as is known."""
        newest = self.held_out[-1].step if self.held_out else 0
        return max(self._steps[-1], newest) if self._steps else newest

    @property
    def counts(self) -> Mapping[str, int]:
        """What was cut, split or passed over up to the newest step."""
        return {name: whole(count) for name, count in _mapping(self.last.get("counts")).items()}

    @property
    def failure(self) -> str:
        """The sentence of the error that ended the run; "" where none did."""
        if self.phase != "failed":
            return ""
        return next((e.message for e in reversed(self.events) if e.name == "failed"), "")

    @property
    def best_held_out(self) -> HeldOut | None:
        """The lowest finite held-out loss."""
        known = [record for record in self.held_out if math.isfinite(record.loss)]
        return min(known, key=lambda record: record.loss, default=None)

    @property
    def steps(self) -> NDArray[np.int64]:
        """The logged steps, ``[records]``."""
        return np.array(self._steps, dtype=np.int64)

    def column(self, name: str) -> NDArray[np.float64]:
        """A column of ``COLUMNS``, ``[records]``; NaN where a record has no finite number."""
        return np.array(self._columns[name], dtype=np.float64)

    def newest(self, name: str) -> float:
        """The last value of a column; NaN where there is none."""
        return self._columns[name][-1] if self._steps else math.nan

    def highest(self, name: str) -> float:
        """The largest value of a column; NaN where there is none."""
        return float(np.fmax.reduce(self.column(name), initial=np.nan))

    def interval_steps(self) -> NDArray[np.int64]:
        """Optimizer steps between each record and the one before it, ``[records]``."""
        return np.diff(self.steps, prepend=0)

    def interval_seconds(self) -> NDArray[np.float64]:
        """Seconds of training between each record and the one before it, ``[records]``."""
        # From tokens and tokens a second: between the times of the log there was evaluating and
        # saving too.
        tokens, speed = np.diff(self.column("tokens"), prepend=0), self.column("tokens_per_second")
        return np.divide(tokens, speed, out=np.full(len(speed), np.nan), where=speed > 0)

    def wait_shares(self) -> NDArray[np.float64]:
        """The share of each interval that was spent waiting for data, ``[records]``, 0 to 1."""
        seconds = self.interval_seconds()
        waits = self.column("data_wait_seconds")
        shares = np.divide(waits, seconds, out=np.full(len(seconds), np.nan), where=seconds > 0)
        return np.clip(shares, 0, 1)

    def add(self, record: Mapping[str, Any]) -> None:
        """Take up one line of the log; lines of unknown kinds are ignored."""
        kind = record.get("kind")
        if kind == "step":
            self._add_step(record)
        elif kind == "eval":
            self.held_out.append(HeldOut(whole(record.get("step")), number(record.get("loss"))))
        elif kind == "event":
            self._add_event(record)

    def add_steps(self, table: pa.Table) -> None:
        """Take up many steps' records at once, as :func:`read_steps` found them."""
        self._steps.frombytes(table["step"].to_numpy().tobytes())
        device = table["device"].combine_chunks()
        for name, column in self._columns.items():
            found = table[name].to_numpy().astype(np.float64)  # null is NaN
            of_device = device.field(name).to_numpy(zero_copy_only=False).astype(np.float64)
            found = np.where(np.isnan(found), of_device, found)
            column.frombytes(np.where(np.abs(found) < _ENDLESS, found, np.nan).tobytes())

    def _add_step(self, record: Mapping[str, Any]) -> None:
        device = _mapping(record.get("device"))
        step = whole(record.get("step"))
        self._steps.append(step)
        for name, column in self._columns.items():
            column.append(number(record.get(name, device.get(name))))
        if nonfinite := _mapping(record.get("nonfinite")):
            what = ", ".join(f"{name} is {value}" for name, value in nonfinite.items())
            self.events.append(Event(step, "nonfinite", what.replace("_", " ")))
        self.last = record
        self.phase = "training"

    def _add_event(self, record: Mapping[str, Any]) -> None:
        step, name = whole(record.get("step")), str(record.get("name", ""))
        if name == "run":
            self.config = dict(_mapping(record.get("config")))
            self.max_steps = whole(record.get("max_steps")) or None
            self.device = str(record.get("device", ""))
        elif name == "plan":
            parts = _mapping(record.get("parts"))
            self.plan = MemoryPlan(
                parts={str(part)[:80]: whole(held) for part, held in parts.items()},
                peak_bytes=whole(record.get("peak_bytes")),
                budget_bytes=whole(record.get("budget_bytes")),
                summary=str(record.get("summary", "")),
            )
        elif name not in _UNLISTED:
            self.events.append(Event(step, name, str(record.get("message", ""))))
        if name in PHASES:
            self.phase = name


def read_steps(lines: list[bytes]) -> tuple[pa.Table | None, list[bytes]]:
    """Read the steps among a log's lines at once: a million in 3 seconds, not 24."""
    # Returns: Their records, or None; and the lines to be read one by one: all others, the last
    # step, which says where the run is, and where something is odd every one.
    last = next((i for i in reversed(range(len(lines))) if lines[i].startswith(_STEP)), 0)
    steps, others = [], []
    for line in lines[:last]:
        (steps if line.startswith(_STEP) else others).append(line)
    text = b"\n".join(steps)
    if len(steps) < _MANY_LINES or b'"nonfinite"' in text:  # which is an event, too
        return None, lines
    try:
        table = pa_json.read_json(pa.BufferReader(text), _READING, _PARSING)
    except pa.ArrowInvalid:
        return None, lines
    if len(table) != len(steps) or table["step"].null_count or table["step"].to_numpy().min() < 0:
        return None, lines
    return table, others + lines[last:]


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def number(value: object) -> float:
    """A JSON value as a float; NaN where it is no finite number."""
    # JSON has whole numbers of any size; a little room below infinity is for sums and shares.
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _ENDLESS:
        return float(value)
    return math.nan


def whole(value: object) -> int:
    """A JSON value as a whole number from 0 up; 0 where it is none."""
    found = number(value)
    return 0 if math.isnan(found) else min(max(0, int(found)), 2**62)
