"""Where a run's records go: the log, the display, and the clock that they share."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from gemma_tuner.errors import CheckpointError, describe_error
from gemma_tuner.training.reporting.metrics import LOG_FILE, EvalRecord, JsonlLog, StepRecord
from gemma_tuner.training.reporting.progress import Progress
from gemma_tuner.training.reporting.trackers import Trackers

if TYPE_CHECKING:
    from gemma_tuner.planning.plan import Plan


class Reports:
    """Send records to ``log.jsonl`` and to the display; time what happens between two of them.

    Use as a context manager: an error that leaves it is logged. In processes other than the main
    one it only keeps time.

    Args:
        step: Steps done before; lines of the log beyond it are dropped, and at 0 all of them.

    Attributes:
        held_out: The held-out losses that were reported, in order.
    """

    def __init__(
        self,
        output_dir: str | Path,
        *,
        total_steps: int,
        step: int,
        show: bool,
        is_main_process: bool,
        open_trackers: Callable[[], Trackers] | None = None,
    ) -> None:
        # An attempt that never took a step may have logged its first held-out loss.
        resume_step = step if step else -1
        self._log = JsonlLog(Path(output_dir) / LOG_FILE, resume_step) if is_main_process else None
        self._progress = Progress(total_steps, enabled=show and is_main_process, done_steps=step)
        self._open_trackers = open_trackers
        self._receivers: list[JsonlLog | Trackers | Progress] = []
        self._stack = ExitStack()
        self._step = step
        self._failure: BaseException | None = None  # the last that was logged
        self._logged_plan: Plan | None = None
        self.held_out: list[EvalRecord] = []
        self._wait_seconds = 0.0
        self._started = time.perf_counter()
        self._counts = (0, 0)

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            if self._log is not None:
                self._receivers.append(stack.enter_context(self._log))
            # From here on the log hears of what opening or closing the others raises, too.
            stack.push(lambda kind, error, trace: self.failure(error))
            if self._open_trackers is not None:
                trackers = self._open_trackers()
                stack.callback(trackers.close)
                self._receivers.append(trackers)
            self._receivers.append(stack.enter_context(self._progress))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def failure(self, error: BaseException | None) -> None:
        """Log what ends the run, once: an error, or an interrupt."""
        if error is None or error is self._failure:
            return
        self._failure = error
        name = "failed" if isinstance(error, Exception) else "stopped"
        with suppress(CheckpointError):  # the log may be what cannot be written
            self.note(self._step, name, message=describe_error(error))

    def advance(self, step: int) -> None:
        """Show that a step is done; nothing is read from the device."""
        self._step = step
        self._progress.advance(step)

    def step(self, record: StepRecord) -> None:
        """Report an optimizer step."""
        for receiver in self._receivers:
            receiver.step(record)

    def evaluation(self, record: EvalRecord) -> None:
        """Report a held-out loss."""
        self.held_out.append(record)
        for receiver in self._receivers:
            receiver.evaluation(record)

    def event(self, step: int, name: str, message: str, **details: Any) -> None:
        """Report something that happened, by a name for programs and a sentence for people."""
        self.note(step, name, message=message, **details)
        self._progress.message(message)

    def note(self, step: int, name: str, **details: Any) -> None:
        """Log something that programs alone read."""
        if self._log is not None:
            self._log.event(step, name, **details)

    def plan(self, step: int, plan: Plan) -> None:
        """Log what a run is planned to hold, in bytes by part, unless that is logged already."""
        if plan is self._logged_plan:
            return
        self._logged_plan = plan
        footprint = plan.footprint
        parts = {**footprint.resident, **footprint.step} if footprint else {}
        self.note(
            step,
            "plan",
            parts=parts,
            peak_bytes=plan.peak_bytes,
            budget_bytes=plan.budget_bytes,
            summary=str(plan),
        )

    def note_wait(self, seconds: float) -> None:
        """Count time spent waiting for data."""
        self._wait_seconds += seconds

    def restart_clock(self, num_tokens: int, num_target_tokens: int) -> None:
        """Begin an interval of the speeds, so that evaluation and saving are not counted."""
        self._counts = (num_tokens, num_target_tokens)
        self._started = time.perf_counter()

    def read_clock(self, num_tokens: int, num_target_tokens: int) -> tuple[float, float, float]:
        """End an interval and begin the next."""
        seconds = time.perf_counter() - self._started
        waited = self._wait_seconds
        speeds = (
            (num_tokens - self._counts[0]) / seconds,
            (num_target_tokens - self._counts[1]) / seconds,
        )
        self._wait_seconds = 0.0
        self.restart_clock(num_tokens, num_target_tokens)
        return (*speeds, waited)
