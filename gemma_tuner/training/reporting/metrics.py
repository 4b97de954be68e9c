"""Records of a run, and its log of JSON lines."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from gemma_tuner.disk import disk_errors_explained, replaced
from gemma_tuner.errors import CheckpointError

LOG_FILE = "log.jsonl"
"""The log's name in a run's folder."""


@dataclass(frozen=True, slots=True)
class DeviceRecord:
    """What a run has done to its device; it depends on the machine and on where a run resumed.

    Args:
        driver_bytes: Memory of tensors, of pools, and on MPS of compiled graphs (on the CPU, what
            is resident in the process).
        peak_bytes: The most since the last record: of tensors, as CUDA counts it; elsewhere the
            largest ``driver_bytes`` after a step.
        num_shapes: Shapes of micro-batches that reached the device since this process began the
            run, each of which Metal compiles for.
        num_emptied: How often pooled memory was given back to the system, by reason
            ("length", "evaluation", "limit"); only what is above 0.
    """

    driver_bytes: int
    peak_bytes: int
    num_shapes: int
    num_emptied: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StepRecord:
    """The state of training after one optimizer step.

    Args:
        step: Optimizer steps done, this one included; the first has 1.
        loss: Mean cross-entropy over the step's target tokens, in nats.
        learning_rate: The rate that the step used.
        grad_norm: L2 norm of the gradient before clipping.
        tokens: Tokens read since the run began: prompts, media and targets, no padding.
        target_tokens: Tokens trained on since the run began.
        tokens_per_second: Tokens read per second since the last record.
        target_tokens_per_second: Tokens trained on per second since the last record.
        data_wait_seconds: Time spent waiting for data since the last record.
        memory_bytes: Device memory in use: of tensors, or on the CPU of the process.
        skipped_steps: Steps skipped since the run began because of a non-finite gradient.
        epoch: Passes over the data, fractions included.
        counts: What collating cut or split since the run began, by name (``cut_rows``,
            ``cut_tokens``, ``split_clips``), examples that were ``passed_over``, and how often
            micro-batches were halved because they were ``out_of_memory``; only what is above 0.
        device: More on the device's memory.
    """

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    target_tokens: int
    tokens_per_second: float
    target_tokens_per_second: float
    data_wait_seconds: float
    memory_bytes: int
    skipped_steps: int
    epoch: float
    counts: Mapping[str, int] = field(default_factory=dict)
    device: DeviceRecord | None = None


@dataclass(frozen=True, slots=True)
class EvalRecord:
    """The loss on held-out examples.

    Args:
        step: Optimizer steps done when it was measured.
        loss: Mean cross-entropy over all their target tokens, in nats.
        perplexity: ``exp(loss)``.
        target_tokens: How many tokens the mean is over.
        examples: How many examples there were.
        counts: What collating cut or split, what was passed over, and how often fewer examples
            were taken at a time because they were ``out_of_memory``, by name; only what is
            above 0.
    """

    step: int
    loss: float
    perplexity: float
    target_tokens: int
    examples: int
    counts: Mapping[str, int] = field(default_factory=dict)


class JsonlLog:
    """A log with one JSON object a line, flushed as it is written.

    Each line has ``kind`` ("step", "eval" or "event"), ``step`` and ``time`` (seconds since 1970).
    JSON has no NaN and no infinity: such a value becomes null, and ``nonfinite`` says which it
    was::

        {"kind": "step", "step": 7, "loss": null, "nonfinite": {"loss": "nan"}, ...}

    Use as a context manager, or call :meth:`close`.

    Args:
        resume_step: Drop what was logged beyond this step, so that the log of a resumed run
            is the log of one that never stopped. None keeps every line.

    Raises:
        CheckpointError: A line of the existing log, other than its last, is not JSON; or the
            file cannot be written, then or later.
    """

    def __init__(self, path: str | Path, resume_step: int | None = None) -> None:
        self.path = Path(path)
        with _errors_explained(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if resume_step is not None and self.path.exists():
                _drop_lines_after(self.path, resume_step)
            self._file = self.path.open("a", encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def step(self, record: StepRecord) -> None:
        """Append a step's record."""
        self._append("step", dataclasses.asdict(record))

    def evaluation(self, record: EvalRecord) -> None:
        """Append a held-out loss."""
        self._append("eval", dataclasses.asdict(record))

    def event(self, step: int, name: str, **details: Any) -> None:
        """Append something that happened."""
        self._append("event", {"step": step, "name": name, **details})

    def close(self) -> None:
        """Close the file; closing twice is fine."""
        with _errors_explained(self.path):
            self._file.close()

    def _append(self, kind: str, fields: Mapping[str, Any]) -> None:
        nonfinite = {
            name: str(value)
            for name, value in fields.items()
            if isinstance(value, float) and not math.isfinite(value)
        }
        line = {"kind": kind, **fields, "time": round(time.time(), 3)} | dict.fromkeys(nonfinite)
        if nonfinite:
            line["nonfinite"] = nonfinite
        with _errors_explained(self.path):
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()


def _drop_lines_after(path: Path, step: int) -> None:
    """Rewrite a log without the lines beyond a step; the old file stands until the new does."""
    kept = [line for line, line_step in _read_lines(path) if line_step <= step]
    with replaced(path) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")


def _read_lines(path: Path) -> Iterator[tuple[str, int]]:
    """Yield each finished line of a log and its step."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            # A run killed while it wrote leaves its last line unfinished.
            if not line.endswith("\n"):
                return
            try:
                step = int(json.loads(line)["step"])
            except (ValueError, KeyError, TypeError) as error:
                raise CheckpointError(
                    f"line {number} of the log {path.name} is not one of its records "
                    f"({type(error).__name__}): move the file away to start a new log"
                ) from error
            yield line, step


def _errors_explained(path: Path) -> AbstractContextManager[None]:
    """Turn what can go wrong with a disk into a CheckpointError with a remedy."""
    return disk_errors_explained(
        lambda reason: CheckpointError(
            f"the log {path.name} cannot be written in {path.parent.resolve().name!r} "
            f"({reason}). What was saved before is untouched. Free disk space there, or choose "
            "another output_dir, and resume"
        )
    )
