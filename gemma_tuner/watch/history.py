"""What a run's log says, as columns that charts draw from.

The log is :class:`gemma_tuner.training.metrics.JsonlLog`'s. Beside steps and held-out losses two
of its events are read for what they hold::

    {"kind": "event", "name": "run", "max_steps": 500, "config": {"learning_rate": 2e-4, ...},
     "device": "mps"}
    {"kind": "event", "name": "plan", "parts": {"weights": 10200000000, ...}, "peak_bytes": ...,
     "budget_bytes": ..., "summary": "..."}
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

COLUMNS = (
    "loss",
    "learning_rate",
    "grad_norm",
    "tokens",
    "target_tokens",
    "tokens_per_second",
    "target_tokens_per_second",
    "data_wait_seconds",
    "memory_bytes",
    "peak_bytes",
    "epoch",
)
"""What is kept of each step's record, in the units of ``StepRecord``."""

PHASES = ("training", "evaluating", "sampling", "finished", "stopped")
"""Events that say where a run is. A "saved" says nothing: one follows a "stopped" too."""

WARNINGS = (
    "all_positions",
    "many_shapes",
    "memory_growth",
    "nonfinite",
    "out_of_memory",
    "samples_skipped",
    "speed",
    "swap",
)
"""Events that somebody should look at."""


# Phases that come and go, and where the page was.
_UNTOLD = ("training", "evaluating", "sampling", "watch")


@dataclass(frozen=True, slots=True)
class HeldOut:
    """A held-out loss.

    Args:
        step: Optimizer steps done when it was measured.
        loss: In nats a token; NaN where it was not finite.
        target_tokens: How many tokens it is the mean over.
        examples: How many examples they are of.
    """

    step: int
    loss: float
    target_tokens: int
    examples: int


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened.

    Args:
        step: Optimizer steps done when it did.
        name: What it was.
        message: A sentence for people, or nothing.
    """

    step: int
    name: str
    message: str

    @property
    def is_warning(self) -> bool:
        """Whether somebody should look at it."""
        return self.name in WARNINGS


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What the run was planned to hold.

    Args:
        parts: Bytes at the predicted peak, by what holds them; empty where there was ample room
            and nothing was tried.
        peak_bytes: The predicted peak; 0 where nothing was tried.
        budget_bytes: What the device may hold; 0 where it is not said.
        summary: The plan in words.
    """

    parts: Mapping[str, int] = field(default_factory=dict)
    peak_bytes: int = 0
    budget_bytes: int = 0
    summary: str = ""


class History:
    """A log as it grows: give its records to :meth:`add` in their order.

    Attributes:
        held_out: The held-out losses.
        events: What happened, the oldest first.
        plan: The memory plan; None before it is logged.
        config: The run's settings; empty before they are logged.
        device: Where it trains, such as "cpu" or "mps"; "" where the log does not say.
        max_steps: Optimizer steps of the whole run; None while it is not known.
        last: The newest step's record as it was logged.
        phase: The name of the newest event among ``PHASES``, "training" after a step; "" before.
    """

    def __init__(self) -> None:
        self.held_out: list[HeldOut] = []
        self.events: list[Event] = []
        self.plan: MemoryPlan | None = None
        self.config: dict[str, Any] = {}
        self.device = ""
        self.max_steps: int | None = None
        self.last: Mapping[str, Any] = {}
        self.phase = ""
        self._steps = array("q")
        self._columns = {name: array("d") for name in COLUMNS}

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def step(self) -> int:
        """Optimizer steps done, as far as is known."""
        return max(
            self._steps[-1] if self._steps else 0,
            self.held_out[-1].step if self.held_out else 0,
        )

    @property
    def steps(self) -> NDArray[np.int64]:
        """The logged steps, ``[records]``."""
        return np.array(self._steps, dtype=np.int64)

    def column(self, name: str) -> NDArray[np.float64]:
        """A column of ``COLUMNS``, ``[records]``; NaN where a record has no finite number."""
        return np.array(self._columns[name], dtype=np.float64)

    def interval_steps(self, newest: int | None = None) -> NDArray[np.float64]:
        """Optimizer steps between each record and the one before it, ``[records]``."""
        return _differences(self._steps, newest)

    def interval_seconds(self, newest: int | None = None) -> NDArray[np.float64]:
        """Seconds of training between each record and the one before it, ``[records]``."""
        # The log has no times: they follow from tokens and tokens a second. What was spent on
        # evaluating and saving is not in them.
        tokens = _differences(self._columns["tokens"], newest)
        speed = np.array(self._columns["tokens_per_second"][-(newest or 0) :], dtype=np.float64)
        return np.divide(tokens, speed, out=np.full(len(speed), np.nan), where=speed > 0)

    def wait_shares(self) -> NDArray[np.float64]:
        """Which share of each interval was spent waiting for data, ``[records]``, 0 to 1."""
        seconds = self.interval_seconds()
        waits = self.column("data_wait_seconds")
        shares = np.divide(waits, seconds, out=np.full(len(seconds), np.nan), where=seconds > 0)
        return np.clip(shares, 0, 1)

    def add(self, record: Mapping[str, Any]) -> None:
        """Take up one line of the log; of a kind that is not known, nothing is kept."""
        kind = record.get("kind")
        if kind == "step":
            self._add_step(record)
        elif kind == "eval":
            self.held_out.append(
                HeldOut(
                    whole(record.get("step")),
                    number(record.get("loss")),
                    whole(record.get("target_tokens")),
                    whole(record.get("examples")),
                )
            )
        elif kind == "event":
            self._add_event(record)

    def _add_step(self, record: Mapping[str, Any]) -> None:
        device = record.get("device")
        device = device if isinstance(device, Mapping) else {}
        step = whole(record.get("step"))
        self._steps.append(step)
        for name, column in self._columns.items():
            column.append(number(record.get(name, device.get(name))))
        nonfinite = record.get("nonfinite")
        if isinstance(nonfinite, Mapping) and nonfinite:
            what = ", ".join(f"{name} is {value}" for name, value in nonfinite.items())
            self.events.append(Event(step, "nonfinite", what.replace("_", " ")))
        self.last = record
        self.phase = "training"

    def _add_event(self, record: Mapping[str, Any]) -> None:
        step, name = whole(record.get("step")), str(record.get("name", ""))
        if name == "run":
            config = record.get("config")
            self.config = dict(config) if isinstance(config, Mapping) else {}
            self.max_steps = whole(record.get("max_steps")) or None
            self.device = str(record.get("device", ""))
            return
        if name == "plan":
            parts = record.get("parts")
            self.plan = MemoryPlan(
                parts={str(part): whole(held) for part, held in parts.items()}
                if isinstance(parts, Mapping)
                else {},
                peak_bytes=whole(record.get("peak_bytes")),
                budget_bytes=whole(record.get("budget_bytes")),
                summary=str(record.get("summary", "")),
            )
            return
        if name in PHASES:
            self.phase = name
        message = str(record.get("message", ""))
        if name not in _UNTOLD:
            self.events.append(Event(step, name, message))


def number(value: object) -> float:
    """A JSON value as a float; NaN where it is no finite number."""
    if type(value) is float:
        return value if math.isfinite(value) else math.nan
    # JSON has whole numbers of any size.
    return float(value) if type(value) is int and abs(value) < 2**1000 else math.nan


def whole(value: object) -> int:
    """A JSON value as a whole number from 0 up; 0 where it is none."""
    found = number(value)
    return 0 if math.isnan(found) else min(max(0, int(found)), 2**62)


def _differences(values: array[Any], newest: int | None) -> NDArray[np.float64]:
    """Differences to the value before, of the newest so many; the first has 0 before it."""
    if newest is None or newest >= len(values):
        return np.diff(np.array(values, dtype=np.float64), prepend=0.0)
    return np.diff(np.array(values[-newest - 1 :], dtype=np.float64))
