"""A run: what trains on which data, the loop over its steps, and what is due between them."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor
from torch.optim import Optimizer

from gemma_tuner.collators.preview import Preview, preview_row
from gemma_tuner.errors import CheckpointError, ConfigError, DataError
from gemma_tuner.log import announce
from gemma_tuner.models.lora import unwrap_peft
from gemma_tuner.models.loss import Loss, target_loss_sum
from gemma_tuner.models.modes import begin_training, end_training
from gemma_tuner.models.target_only import target_only_of
from gemma_tuner.planning.plan import Plan
from gemma_tuner.training.adapters import list_trainable, note_collator
from gemma_tuner.training.checks import check_collator, check_kinds, explain_resuming
from gemma_tuner.training.config import TrainConfig
from gemma_tuner.training.data_check import DataCheck, check_run
from gemma_tuner.training.feed import (
    ModelCollator,
    Prefetch,
    StepInput,
    Stream,
    check_stream,
    read_steps,
)
from gemma_tuner.training.held_out import measure_held_out
from gemma_tuner.training.interrupt import EARLY_STOPPING, StopRequest
from gemma_tuner.training.lock import folder_locked
from gemma_tuner.training.optim import build_optimizer, check_optimizer, learning_rate_at
from gemma_tuner.training.processes import Processes, StoppedElsewhereError
from gemma_tuner.training.reporting.metrics import EvalRecord
from gemma_tuner.training.reporting.page import open_page, require_page
from gemma_tuner.training.reporting.progress import write_result
from gemma_tuner.training.reporting.reports import Reports
from gemma_tuner.training.reporting.trackers import Trackers
from gemma_tuner.training.run_state import RunState
from gemma_tuner.training.samples import Samples, take_samples
from gemma_tuner.training.step import Stepper

if TYPE_CHECKING:
    from peft import PeftModel

    from gemma_tuner.collators.text import TextCollator


PLANNED_ROWS = 4
"""Rows of the data that ``Trainer.plan`` looks at."""


@dataclass(frozen=True, slots=True, repr=False)
class FitResult:
    """How a run ended.

    Args:
        step: Optimizer steps done in all, those before a resume included.
        stopped_by: What stopped it before its configured end: a signal's name,
            "early_stopping", or None.
        held_out: The held-out losses measured by this call, in order.
        best_step: The step of the lowest held-out loss of the whole run, whose adapter
            ``Trainer.save`` writes where it is kept; None without held-out data.
        notes: What there is to say of the held-out losses, in sentences.
    """

    step: int
    stopped_by: str | None
    held_out: tuple[EvalRecord, ...]
    best_step: int | None = None
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        """Say how it ended, and the held-out losses in order."""
        losses = " → ".join(f"{r.loss:.4f} (step {r.step})" for r in self.held_out)
        parts = [
            f"{self.step} steps done",
            *([f"stopped by {self.stopped_by}"] if self.stopped_by else []),
            *([f"held-out loss {losses}"] if losses else []),
            *self.notes,
        ]
        return f"FitResult({', '.join(parts)})"

    def _repr_html_(self) -> str:
        return write_result(self.step, self.stopped_by, self.held_out, self.notes)


class Trainer:
    """Fine-tune a LoRA-wrapped Gemma on a stream of examples.

    Args:
        model: From ``add_lora``; it is trained where it lies.
        stream: What to train on: an ``ExampleStream``, or a :class:`Stream` of one's own.
        collator: What makes batches of its examples.
        config: The settings.
        eval_stream: Held-out examples, whose loss is measured as ``config`` says.
        samples: Questions that are answered at intervals, see ``SampleGenerations``.
        optimizer: In place of AdamW: one of ``torch.optim`` over the model's trainable parameters.
            Its rate at each step is the settings'; theirs for AdamW (``betas``, ``epsilon``,
            ``weight_decay``) do not touch it. A run resumes with the same optimizer.
        loss: In place of cross-entropy: ``loss(model, batch, *, chunk_tokens)`` sums the losses of
            a batch's target tokens into a scalar that autograd follows. The sum is divided by the
            target tokens of the whole step. The held-out loss is measured by it, too.

    Raises:
        ConfigError: An argument of another kind, a stream without examples, a model without
            trainable parameters, a collator that is not for this model, or an optimizer of other
            parameters.
    """

    def __init__(
        self,
        model: PeftModel,
        stream: Stream,
        collator: TextCollator,
        config: TrainConfig,
        eval_stream: Stream | None = None,
        samples: Samples | None = None,
        *,
        optimizer: Optimizer | None = None,
        loss: Loss | None = None,
    ) -> None:
        check_kinds(model, collator, config)
        check_stream("stream", stream)
        if eval_stream is not None:
            check_stream("eval_stream", eval_stream)
        elif config.early_stopping_patience is not None:
            raise ConfigError("early_stopping_patience needs held-out data; give eval_stream=...")
        self.model = model
        self.stream = stream
        self.collator = collator
        self.config = config
        self.eval_stream = eval_stream
        self.samples = samples
        self.trainable = list_trainable(model)
        check_collator(model, collator)
        note_collator(model, collator)
        self.device = self.trainable[0].device
        self.processes = Processes(self.device)
        if optimizer is None:
            self.optimizer = build_optimizer(model.named_parameters(), config, self.device)
        else:
            self.optimizer = check_optimizer(optimizer, model.named_parameters(), self.device)
        self.stepper = Stepper(
            model, self.optimizer, loss or target_loss_sum, collator, config, self.processes
        )
        self.run_state = RunState(config, model, self.optimizer, stream, self.processes)

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.run_state.step

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run; the last may have fewer examples."""
        return self.run_state.total_steps

    @property
    def counts(self) -> Counter[str]:
        """What collating cut or split and what was passed over since the run began, by name."""
        return self.run_state.totals.counts

    @property
    def learning_rate(self) -> float:
        """The rate of the next optimizer step."""
        return learning_rate_at(self.step, self.config, self.total_steps)

    def plan(self) -> Plan:
        """Predict what a step will hold, and choose how this run trains; ``print`` it.

        A step is tried without weights, on a few rows of the data made as long as ``max_tokens``.
        :meth:`fit` uses the plan, and makes its own where there is none yet.

        Returns:
            The plan.

        Raises:
            MemoryPlanError: Nothing fits; the error names the nearest plans that would.
            DataError: A row that cannot be used.
        """
        count = min(len(self.stream), PLANNED_ROWS)
        rows = [self.stream[i * len(self.stream) // count] for i in range(count)]
        return self.stepper.make_plan([self.collator([row]) for row in rows])

    def preview(self, index: int = 0) -> Preview:
        """Show one collated example of the stream with its trained tokens marked.

        Args:
            index: The example's place in the data.

        Returns:
            What a person reads; ``print`` it.

        Raises:
            DataError: The example cannot be used.
        """
        return preview_row(self.collator([self.stream[index]]), self.collator.tokenizer)

    def check(self, seconds: float | None = None) -> DataCheck:
        """Look at every row as :meth:`fit` looks at them before its first step.

        Each row is collated, with its media as large as their headers say; a few are decoded.
        Nothing is downloaded or counted, and the stream stays where it is.

        Args:
            seconds: When to end, with what was seen so far; by default all rows are looked at.

        Returns:
            Lengths, what the collator would cut, and every row that cannot be used; ``print`` it.

        Raises:
            ConfigError: Data without the media that collator or adapters are for, or with others.
        """
        return self._check(math.inf if seconds is None else seconds)

    def fit(self, *, resume: bool = False) -> FitResult:
        """Train until the configured end, or until SIGINT or SIGTERM.

        A signal lets the step finish, saves a checkpoint and returns; so does the end. An error
        saves the steps before it and is raised; of several processes all end with it. The model
        is left ready for use: in eval mode, without activation checkpointing.

        Args:
            resume: Continue from the newest checkpoint in ``output_dir``, exactly; begin if there
                is none, and say so. It says, too, when there is less memory now, so that
                micro-batches have to be cut anew: then rounding and dropout's draws differ.

        Returns:
            The number of steps done and what stopped them.

        Raises:
            ConfigError: ``output_dir`` holds a run and ``resume`` is False, or a process trains
                in it; what ``trackers`` or ``watch`` need is not installed.
            ResumeError: The checkpoint is of another model, data or configuration.
            DataError: An example that cannot be used.
            SourceError: Data that cannot be read any more.
            DivergedError: Too many consecutive steps with non-finite gradients.
            MemoryPlanError: A single example does not fit on the device.
            CheckpointError: A checkpoint or the log that is damaged or cannot be written.
            ProcessError: Another process of the run met an error, or is gone.
        """
        if self.config.watch:
            require_page()
        with (
            self.processes.leaving_together(),
            folder_locked(self.config.output_dir, self.processes),
        ):
            return self._fit(resume=resume)

    def _fit(self, *, resume: bool) -> FitResult:
        cut_before = self.run_state.begin(self.collator.settings(), resume=resume)
        if cut_before is not None:
            self.stepper.restore(cut_before)
        # A step that an error ended halfway has left its gradients.
        self.optimizer.zero_grad(set_to_none=True)
        begin_training(self.model)
        with (
            StopRequest() as stop,
            self._open_reports() as reports,
            Prefetch(self._read_steps(), reports.note_wait) as feed,
        ):
            try:
                self._tell_beginning(reports)
                if self.step == 0:
                    found = self._check(self.config.check_seconds, stop)
                    num_bad = len(found.bad)
                    found.bad_elsewhere = self.processes.sum_counts([num_bad])[0] - num_bad
                    found.refuse_beyond_budget()
                    if self.config.check_seconds and found.is_remarkable:
                        reports.event(0, "checked", found.summary)
                if self.samples is not None and self.processes.is_main:
                    self.samples.begin(self.config.output_dir, self.step)
                stopped_by = self._run(feed, stop, reports)
            except CheckpointError:
                raise  # saving is what failed
            except DataError as error:
                explained = explain_resuming(error, self.step, len(self.stream))
                reports.failure(explained)
                self._save_checkpoint(reports)
                raise explained from error.__cause__
            except Exception as error:  # whatever it was, the steps before it are whole
                reports.failure(error)
                self._save_checkpoint(reports)
                raise
            finally:
                end_training(self.model)
            self._save_checkpoint(reports)
            self._tell_end(reports, stopped_by)
        self.processes.wait()
        best = self.run_state.best
        return FitResult(
            self.step,
            stopped_by,
            tuple(reports.held_out),
            best.standing.step,
            tuple(best.list_notes()),
        )

    def _run(self, feed: Iterable[StepInput], stop: StopRequest, reports: Reports) -> str | None:
        """Train, and do between steps what is due; return what stopped it early."""
        self._measure_held_out(reports)
        self._take_samples(reports)
        reports.note(self.step, "training")
        self._restart_clock(reports)
        for step_input in feed:
            if self.run_state.best.is_out_of_patience:
                reports.event(self.step, "stopped_early", self.run_state.best.describe_stop())
                return EARLY_STOPPING
            try:
                loss, grad_norm = self.train_step(step_input)
            except StoppedElsewhereError:
                return self._stop("signal to another process", reports)
            self._report_step(loss, grad_norm, reports)
            self._measure_held_out(reports)
            self._take_samples(reports)
            if self.run_state.save_is_due:
                self._save_checkpoint(reports)
            # A signal may reach one process alone; the others learn of it before their next step,
            # unless they take none.
            if stop.reason is not None:
                if self.run_state.remaining_slots and not self.run_state.best.is_out_of_patience:
                    self.processes.announce_stop()
                return self._stop(stop.reason, reports)
        return None

    def _stop(self, reason: str, reports: Reports) -> str:
        reports.event(self.step, "stopped", f"{reason}: stopped by request")
        return reason

    def train_step(self, step_input: StepInput) -> tuple[Tensor, Tensor]:
        """Take one optimizer step in which every target token weighs the same.

        Args:
            step_input: Its micro-batches, on the CPU.

        Returns:
            The mean loss over the step's target tokens and the gradient's norm before clipping,
            ``[]`` float32 on the device. Nothing here waits for the device.

        Raises:
            MemoryPlanError: A single example does not fit on the device.
        """
        outcome = self.stepper.take(step_input, step=self.step, learning_rate=self.learning_rate)
        self.run_state.count_step(step_input, outcome)
        return outcome.loss, outcome.grad_norm

    def evaluate(self) -> EvalRecord:
        """Measure the mean loss over every target token of the held-out stream.

        The model is left in eval mode.

        Returns:
            The loss in nats and its perplexity; the same however examples are batched.

        Raises:
            ConfigError: The trainer was made without ``eval_stream``.
            DataError: An example that cannot be used.
        """
        if self.eval_stream is None:
            raise ConfigError("there is nothing to evaluate on; give Trainer an eval_stream")
        return measure_held_out(
            self.model,
            self.eval_stream,
            ModelCollator(self.collator, self.model),
            self.stepper.loss_sum,
            step=self.step,
            batch_size=self.config.batch_size,
            processes=self.processes,
        )

    def save(self, path: str | Path, *, best: bool = True) -> Path:
        """Save the adapter as a standard PEFT folder; the main process writes it.

        Where the run has kept its best held-out adapter (``TrainConfig(keep_best=True)``, the
        default, and an ``eval_stream``), it is that one, and not the one that the model holds; a
        message says so where the two differ.

        Args:
            path: The folder; made if it is missing.
            best: False saves the adapter as the model holds it: that of the last step.

        Returns:
            The folder, which ``peft.PeftModel.from_pretrained`` opens.

        Raises:
            CheckpointError: No room or no permission, or the best adapter is gone.
        """
        if self.processes.is_main:
            self.run_state.best.save(Path(path), self.step, best=best)
        self.processes.wait()
        return Path(path)

    # --- what is read -------------------------------------------------------------------------

    def _read_steps(self) -> Iterable[StepInput]:
        """The steps that are left."""
        return read_steps(
            self.stream,
            ModelCollator(self.collator, self.model),
            batch_size=self.config.batch_size,
            num_micro_batches=self.config.gradient_accumulation,
            num_slots=self.run_state.remaining_slots,
            process_index=self.processes.index,
            num_processes=self.processes.count,
        )

    def _check(self, seconds: float, stop: StopRequest | None = None) -> DataCheck:
        end = time.monotonic() + seconds
        return check_run(
            self.model,
            self.stream,
            self.collator,
            shard=(self.processes.index, self.processes.count),
            is_over=lambda: time.monotonic() >= end or bool(stop and stop.reason),
        )

    # --- what is reported and measured on the way ---------------------------------------------

    def _open_reports(self) -> Reports:
        is_main = self.processes.is_main

        def open_trackers() -> Trackers:
            return Trackers(self.config, self.device, self.step)

        return Reports(
            self.config.output_dir,
            total_steps=self.total_steps,
            step=self.step,
            show=self.config.progress,
            is_main_process=is_main,
            open_trackers=open_trackers if is_main and self.config.trackers else None,
        )

    def _tell_beginning(self, reports: Reports) -> None:
        settings = self.config.to_dict()
        del settings["output_dir"]  # the log tells no path
        reports.note(
            self.step,
            "run",
            max_steps=self.total_steps,
            device=self.device.type,
            config=settings,
        )
        if self.config.watch and self.processes.is_main:
            # Not logged: whoever has the address reads the run's answers.
            announce(f"watch this run at {open_page(self.config.output_dir)}")
        if reason := target_only_of(unwrap_peft(self.model)).reason:
            reports.event(self.step, "all_positions", f"every layer runs everywhere: {reason}")

    def _tell_end(self, reports: Reports, stopped_by: str | None) -> None:
        if self.stepper.features.max_bytes:
            reports.event(self.step, "features", self.stepper.features.report())
        if notes := self.run_state.best.list_notes():
            reports.event(self.step, "held_out", ". ".join(notes))
        if stopped_by in (None, EARLY_STOPPING):
            reports.note(self.step, "finished")

    def _report_step(self, loss: Tensor, grad_norm: Tensor, reports: Reports) -> None:
        """Show that a step is done, tell what came up in it, and log it where that is due."""
        stepper = self.stepper
        if stepper.plan is not None:
            reports.plan(self.step, stepper.plan)
        reports.advance(self.step)
        for message in stepper.micro_batches.take_messages():
            reports.event(self.step, "out_of_memory", message)
        stepper.monitor.after_step(self.step, reports)
        if self.run_state.log_is_due:
            memory = stepper.monitor.read_memory()
            record = self.run_state.log_step(loss, grad_norm, memory, reports)
            stepper.monitor.after_record(record, reports)

    def _measure_held_out(self, reports: Reports) -> None:
        """Measure the held-out loss if there is one and it is due."""
        if self.eval_stream is None or not self.run_state.evaluation_is_due:
            return
        reports.note(self.step, "evaluating")
        self.run_state.note_held_out(self.evaluate(), reports)
        self._go_on_training(reports)

    def _take_samples(self, reports: Reports) -> None:
        """Answer the sample questions if they are due; the main process does."""
        if self.samples is None or not self.samples.is_due(self.step, self.total_steps):
            return
        if self.processes.is_main:
            take_samples(self.samples, self.model, self.step, self.device, reports)
        self._go_on_training(reports)

    def _go_on_training(self, reports: Reports) -> None:
        """Put the model back to training; the speeds leave out what was done meanwhile."""
        self.stepper.monitor.after_evaluation()
        begin_training(self.model)
        self._restart_clock(reports)

    def _restart_clock(self, reports: Reports) -> None:
        totals = self.run_state.totals
        reports.restart_clock(totals.tokens, totals.target_tokens)

    def _save_checkpoint(self, reports: Reports) -> None:
        self.run_state.save(reports, self.stepper.micro_batch_plan)
