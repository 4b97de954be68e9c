"""The state of a run: what it has done, what is due after a step, and what of it is saved."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock
from torch import Tensor

from gemma_tuner.device import memory_used_bytes
from gemma_tuner.differences import list_differences, shorten_differences
from gemma_tuner.errors import DivergedError, ResumeError
from gemma_tuner.log import announce
from gemma_tuner.streaming.quarantine import RUN_FILE, Budget, Quarantine
from gemma_tuner.training.best import BestAdapter, Standing
from gemma_tuner.training.checkpoint import (
    TrainerState,
    latest_checkpoint,
    load_checkpoint,
    name_checkpoint,
    prune_checkpoints,
    refuse_second_run,
    save_checkpoint,
    show_folder,
)
from gemma_tuner.training.config import TrainConfig
from gemma_tuner.training.feed import StepInput, Stream
from gemma_tuner.training.micro_batches import MicroBatchPlan
from gemma_tuner.training.processes import Processes
from gemma_tuner.training.reporting.metrics import DeviceRecord, EvalRecord, StepRecord
from gemma_tuner.training.reporting.reports import Reports
from gemma_tuner.training.step import NonfiniteGuard, StepOutcome

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass
class Totals:
    """Running sums of a run, saved in its checkpoints under these names.

    Args:
        slots: Slots of the stream read, over all processes, as are the next two.
        tokens: Tokens read: prompts, media and targets, no padding.
        target_tokens: Tokens trained on.
        counts: What collating cut or split and what was passed over, by name.
        skipped_steps: Steps with a gradient that was not finite; filled in when it is saved.
        consecutive_skipped_steps: How many of them were the last ones; filled in then.
        held_out_step: When the held-out loss was measured last; None before the first time.
        cuts: The :class:`MicroBatchPlan`; None before the first step that has examples.
        best: The :class:`Standing` by held-out losses; filled in when it is saved.
    """

    slots: int = 0
    tokens: int = 0
    target_tokens: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    skipped_steps: int = 0
    consecutive_skipped_steps: int = 0
    held_out_step: int | None = None
    cuts: dict[str, Any] | None = None
    best: dict[str, Any] | None = None


class RunState:
    """Count what a run does, say what is due, save it, and take it up where it was saved.

    Attributes:
        step: Optimizer steps done.
        totals: Running sums.
        guard: Steps that were skipped, counted on the device.
        stream_state: What resumes the stream after this step.
        best: The best held-out adapter.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: PeftModel,
        optimizer: torch.optim.Optimizer,
        stream: Stream,
        processes: Processes,
    ) -> None:
        self._config = config
        self._model = model
        self._optimizer = optimizer
        self._stream = stream
        self._processes = processes
        self.step = 0
        self.totals = Totals()
        self.guard = NonfiniteGuard(processes.device)
        self.best = BestAdapter(config, model, processes)
        stream.read_slots()  # an epoch begun elsewhere is left: this run reads whole ones
        self.stream_state = stream.state_dict()
        self._settings: dict[str, Any] = {}  # what a resumed run must share, known once it begins
        self._num_copied = 0  # of the examples that were passed over
        self._saved: tuple[int, int | None] | None = None  # what the newest checkpoint holds

    # --- what is left, and what is due -------------------------------------------------------

    @property
    def slots_per_step(self) -> int:
        """Slots of the stream in one optimizer step, over all processes."""
        config = self._config
        return config.batch_size * config.gradient_accumulation * self._processes.count

    @property
    def remaining_slots(self) -> int:
        """Slots of the stream that are left to train on."""
        if self._config.max_steps is not None:
            return max(0, self._config.max_steps - self.step) * self.slots_per_step
        return max(0, (self._config.epochs or 0) * len(self._stream) - self.totals.slots)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run; the last may have fewer examples."""
        return self.step + math.ceil(self.remaining_slots / self.slots_per_step)

    @property
    def log_is_due(self) -> bool:
        """Whether this step is logged: the first, the last, and as configured."""
        return self.step in (1, self.total_steps) or self._is_every(self._config.log_every_steps)

    @property
    def evaluation_is_due(self) -> bool:
        """Whether to measure: before the first step, after the last, and as configured."""
        # What a resumed run measured before it was stopped is in its log already.
        is_due = self.step in (0, self.total_steps)
        is_due |= self._is_every(self._config.eval_every_steps)
        return is_due and self.step != self.totals.held_out_step

    @property
    def save_is_due(self) -> bool:
        """Whether a checkpoint is due between steps; the end saves one in any case."""
        return self._is_every(self._config.save_every_steps)

    def _is_every(self, every_steps: int | None) -> bool:
        return every_steps is not None and self.step % every_steps == 0

    # --- counting and logging ----------------------------------------------------------------

    def count_step(self, step_input: StepInput, outcome: StepOutcome) -> None:
        """Enter an optimizer step: from here on it is done, and what is saved says so."""
        self.guard.count(outcome.skipped)
        self.step += 1
        self.totals.slots += step_input.num_slots
        self.totals.tokens += outcome.num_tokens
        self.totals.target_tokens += outcome.num_target_tokens
        self.totals.counts.update(outcome.counts)
        self.stream_state = step_input.stream_state

    def log_step(
        self, loss: Tensor, grad_norm: Tensor, memory: DeviceRecord, reports: Reports
    ) -> StepRecord:
        """Report this step; waits for the device."""
        # loss: ``[]`` float32, its mean loss.
        # grad_norm: ``[]`` float32, before clipping.
        # The step's only read-back: four numbers in one transfer.
        values = torch.stack([loss, grad_norm, self.guard.total, self.guard.consecutive])
        loss_value, grad_norm_value, skipped, consecutive = values.tolist()
        totals = self.totals
        tokens_per_second, targets_per_second, data_wait_seconds = reports.read_clock(
            totals.tokens, totals.target_tokens
        )
        record = StepRecord(
            step=self.step,
            loss=loss_value,
            learning_rate=self._optimizer.param_groups[0]["lr"],
            grad_norm=grad_norm_value,
            tokens=totals.tokens,
            target_tokens=totals.target_tokens,
            tokens_per_second=tokens_per_second,
            target_tokens_per_second=targets_per_second,
            data_wait_seconds=data_wait_seconds,
            memory_bytes=memory_used_bytes(self._processes.device),
            skipped_steps=int(skipped),
            epoch=totals.slots / len(self._stream),
            counts={name: count for name, count in totals.counts.items() if count},
            device=memory,
        )
        reports.step(record)
        self.best.standing.note_train_loss(record.loss)
        self._copy_quarantine()
        if consecutive >= self._config.max_nonfinite_steps:
            raise DivergedError(
                f"the last {int(consecutive)} steps up to step {self.step} had an infinite or "
                "undefined gradient and were skipped; lower the learning rate (now "
                f"{self._config.learning_rate}) or look for damaged media in the data"
            )
        return record

    def note_held_out(self, record: EvalRecord, reports: Reports) -> None:
        """Report a held-out loss, and keep the adapter where it is the lowest."""
        reports.evaluation(record)
        self.totals.held_out_step = self.step
        self.best.note(record, reports, is_last=self.step == self.total_steps)

    def _copy_quarantine(self) -> None:
        """Lay what the data have in quarantine beside the log, where it has grown."""
        num_passed_over = self.totals.counts["passed_over"]
        if num_passed_over == self._num_copied or not self._processes.is_main:
            return
        copy = Quarantine(Path(self._config.output_dir) / RUN_FILE, Budget())
        copy.replace(self._stream.inspect_quarantine())
        self._num_copied = num_passed_over

    # --- saving, and going on from there -----------------------------------------------------

    def begin(self, collator: Mapping[str, Any], *, resume: bool) -> MicroBatchPlan | None:
        """Take up the run in ``output_dir``, or begin one there; returns how it was cut before."""
        self._settings = {
            **self._config.fixed_settings(),
            "num_processes": self._processes.count,
            "device": self._processes.device.type,
            "collator": dict(collator),
        }
        if not resume:
            refuse_second_run(self._config.output_dir)
        # The main process may be writing the checkpoint of an attempt that ended in another one.
        self._processes.sum_counts([0])
        checkpoint = latest_checkpoint(self._config.output_dir)
        if checkpoint is not None:
            self._resume(checkpoint)
        else:
            # An attempt that ended in an error has read further, and may have steps in memory
            # that a full disk did not take.
            self._stream.load_state_dict(self.stream_state)
            if self.step == 0:
                self.totals.held_out_step = None
                self.best.standing = Standing()
            if resume and self.step == 0:
                self._tell(
                    f"there is no checkpoint in {show_folder(self._config.output_dir)!r} to "
                    "resume; the run begins at step 0"
                )
        if not self.remaining_slots:
            longer = "max_steps" if self._config.epochs is None else "epochs"
            self._tell(
                f"nothing left to do: {self.step} of {self.total_steps} steps are done; raise "
                f"{longer} to train on"
            )
        if self._processes.sum_counts([self.step]) != [self.step * self._processes.count]:
            raise ResumeError(
                f"process {self._processes.index} is at step {self.step} and others are not; "
                "output_dir must be one folder that all processes share"
            )
        if checkpoint is None or self.totals.cuts is None:
            return None
        return MicroBatchPlan.from_dict(self.totals.cuts)

    def _tell(self, message: str) -> None:
        if self._processes.is_main:
            announce(message)

    def _resume(self, checkpoint: Path) -> None:
        def check(state: TrainerState) -> None:
            # Older checkpoints do not name their device.
            saved = {"device": self._settings["device"], **state.config}
            if differences := list_differences(saved, self._settings):
                raise ResumeError(
                    f"{checkpoint.name} was saved with other settings (saved there → here): "
                    f"{shorten_differences(differences)}. Use the same settings, or start a new "
                    "run in another output_dir"
                )
            self._stream.load_state_dict(dict(state.stream))

        state = load_checkpoint(checkpoint, self._model, self._optimizer, check=check)
        self.stream_state = dict(state.stream)
        self.step = state.step
        saved = {"cuts": None, "best": None, **state.totals}  # older checkpoints have neither
        self.totals = totals = Totals(**{each.name: saved[each.name] for each in fields(Totals)})
        totals.counts = Counter(totals.counts)
        self.best.standing = Standing(**(totals.best or {}))
        self._saved = (self.step, totals.held_out_step)
        self.guard = NonfiniteGuard(
            self._processes.device, totals.skipped_steps, totals.consecutive_skipped_steps
        )
        if self._processes.is_main:  # a killed run may have been about to
            prune_checkpoints(self._config.output_dir, keep=self._config.keep_checkpoints)
            self.best.prune()

    def save(self, reports: Reports, micro_batches: MicroBatchPlan | None) -> None:
        """Write a checkpoint, unless the newest one holds all of this already."""
        totals = self.totals
        if self.step == 0 or self._saved == (self.step, totals.held_out_step):
            return
        is_bereft = self._processes.is_bereft
        if self._processes.is_main or is_bereft:
            # The main process may be the one that is gone: the first of the others saves.
            with _in_turn(Path(self._config.output_dir)) if is_bereft else nullcontext():
                newest = latest_checkpoint(self._config.output_dir) if is_bereft else None
                if newest is None or newest.name != name_checkpoint(self.step):
                    if is_bereft:
                        self.best.complete(self.step)
                    self._write(reports, micro_batches)
        self._saved = (self.step, totals.held_out_step)
        reports.restart_clock(totals.tokens, totals.target_tokens)

    def _write(self, reports: Reports, micro_batches: MicroBatchPlan | None) -> None:
        totals = self.totals
        skipped = torch.stack([self.guard.total, self.guard.consecutive])
        totals.skipped_steps, totals.consecutive_skipped_steps = map(int, skipped.tolist())
        totals.cuts = None if micro_batches is None else micro_batches.to_dict()
        totals.best = vars(self.best.standing)
        path = save_checkpoint(
            self._config.output_dir,
            TrainerState(self.step, self.stream_state, self._settings, vars(totals)),
            self._model,
            self._optimizer,
            keep=self._config.keep_checkpoints,
        )
        self.best.prune()
        reports.event(self.step, "saved", f"saved {path.name}")


@contextmanager
def _in_turn(output_dir: Path) -> Iterator[None]:
    output_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(output_dir / ".survivors.lock"):
        yield
