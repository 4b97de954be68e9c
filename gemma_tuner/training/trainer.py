"""The training loop: optimizer steps in which every target token weighs the same."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gemma_tuner.collators.batch import COUNTS, Batch
from gemma_tuner.collators.preview import Preview, preview_row
from gemma_tuner.device import memory_used_bytes, random_generators
from gemma_tuner.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DivergedError,
    ResumeError,
)
from gemma_tuner.models.families import loaded_modalities
from gemma_tuner.records import Example
from gemma_tuner.training.checkpoint import (
    TrainerState,
    latest_checkpoint,
    load_checkpoint,
    save_adapter,
    save_checkpoint,
)
from gemma_tuner.training.config import TrainConfig
from gemma_tuner.training.feed import Prefetch, StepInput, Stream, read_steps
from gemma_tuner.training.held_out import measure_held_out
from gemma_tuner.training.identity import list_differences
from gemma_tuner.training.interrupt import StopRequest
from gemma_tuner.training.loss import target_loss_sum, unwrap_peft
from gemma_tuner.training.metrics import EvalRecord, StepRecord
from gemma_tuner.training.modes import begin_training, end_training
from gemma_tuner.training.optim import (
    NonfiniteGuard,
    build_optimizer,
    clip_gradients,
    guarded_step,
    learning_rate_at,
    set_learning_rate,
)
from gemma_tuner.training.processes import Processes
from gemma_tuner.training.reports import Reports

if TYPE_CHECKING:
    from peft import PeftModel

    from gemma_tuner.collators.text import TextCollator


@dataclass(frozen=True, slots=True)
class FitResult:
    """How a run ended.

    Args:
        step: Optimizer steps done in all, those before a resume included.
        stopped_by: The signal that stopped it early, or None.
        held_out: The held-out losses measured by this call, in order.
    """

    step: int
    stopped_by: str | None
    held_out: tuple[EvalRecord, ...]


class Trainer:
    """Fine-tune a LoRA-wrapped Gemma on a stream of examples.

    Args:
        model: From ``add_lora``; it is trained where it lies.
        stream: What to train on; an ``ExampleStream`` or anything that iterates, counts and
            resumes as one does.
        collator: What makes batches of its examples.
        config: The settings.
        eval_stream: Held-out examples, whose loss is measured as ``config`` says.

    Raises:
        ConfigError: A model without trainable parameters, or a stream without examples.
    """

    def __init__(
        self,
        model: PeftModel,
        stream: Stream,
        collator: TextCollator,
        config: TrainConfig,
        eval_stream: Stream | None = None,
    ) -> None:
        self.model = model
        self.stream = stream
        self.collator = collator
        self.config = config
        self.eval_stream = eval_stream
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        if not self.trainable:
            raise ConfigError(
                "no parameter of the model is trainable; wrap it with add_lora(model) first"
            )
        for name, given in (("stream", stream), ("eval_stream", eval_stream)):
            if given is not None and len(given) == 0:
                raise ConfigError(f"{name} has no examples; check what it reads")
        self.device = self.trainable[0].device
        self._modalities = loaded_modalities(unwrap_peft(model))
        self.processes = Processes(self.device)
        self.optimizer = build_optimizer(model.named_parameters(), config, self.device)
        self.guard = NonfiniteGuard(self.device)
        self.step = 0
        self.num_examples = 0
        self.num_tokens = 0
        self.num_target_tokens = 0
        self.counts: Counter[str] = Counter()
        iter(stream)  # an epoch begun elsewhere is left: this run reads whole ones
        self._stream_state = stream.state_dict()
        self._measured_step: int | None = None
        self._saved: tuple[int, int | None] | None = None  # what the newest checkpoint holds

    @property
    def examples_per_step(self) -> int:
        """Examples of one optimizer step over all processes."""
        config = self.config
        return config.batch_size * config.gradient_accumulation * self.processes.count

    @property
    def remaining_examples(self) -> int:
        """Examples that are left to train on."""
        if self.config.max_steps is not None:
            return max(0, self.config.max_steps - self.step) * self.examples_per_step
        return max(0, (self.config.epochs or 0) * len(self.stream) - self.num_examples)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run; the last may have fewer examples."""
        return self.step + math.ceil(self.remaining_examples / self.examples_per_step)

    def preview(self, index: int = 0) -> Preview:
        """Show one collated example of the stream with its trained tokens marked.

        Args:
            index: The example's place in the data.

        Returns:
            What a person reads; ``print`` it.
        """
        batch = self._collate([self.stream[index]])
        return preview_row(batch, self.collator.processor.tokenizer)

    def fit(self, *, resume: bool = False) -> FitResult:
        """Train until the configured end, or until SIGINT or SIGTERM.

        A signal lets the step finish, saves a checkpoint and returns; so does the end. An error
        saves the steps before it and is raised. The model is left ready for use: in eval mode,
        without activation checkpointing.

        Args:
            resume: Continue from the newest checkpoint in ``output_dir``, exactly; begin if there
                is none.

        Returns:
            The number of steps done and what stopped them.

        Raises:
            ConfigError: ``output_dir`` holds a run and ``resume`` is False.
            ResumeError: The checkpoint is of another model, data or configuration.
            DataError: An example that cannot be used.
            SourceError: Data that cannot be read any more.
            DivergedError: Too many consecutive steps with non-finite gradients.
            CheckpointError: A checkpoint or the log that is damaged or cannot be written.
        """
        self._begin(resume=resume)
        held_out: list[EvalRecord] = []
        with (
            StopRequest() as stop,
            Reports(
                self.config.output_dir,
                total_steps=self.total_steps,
                step=self.step,
                show=self.config.progress,
                is_main_process=self.processes.is_main,
            ) as reports,
            Prefetch(self._read_steps()) as feed,
        ):
            try:
                stopped_by = self._run(feed, stop, reports, held_out)
            except CheckpointError:
                raise  # saving is what failed
            except Exception:  # whatever it was, the steps before it are whole
                self._save_checkpoint(reports)
                raise
            finally:
                end_training(self.model)
            self._save_checkpoint(reports)
        self.processes.wait()
        return FitResult(self.step, stopped_by, tuple(held_out))

    def _run(
        self,
        feed: Iterable[StepInput],
        stop: StopRequest,
        reports: Reports,
        held_out: list[EvalRecord],
    ) -> str | None:
        """Train, and do between steps what is due; return what stopped it early."""
        self._measure_held_out(reports, held_out)
        reports.restart_clock(self.num_tokens, self.num_target_tokens)
        for step_input in reports.time_waits(feed):
            loss, grad_norm = self.train_step(step_input)
            if self._is_due(self.config.log_every_steps):
                self._log_step(loss, grad_norm, reports)
            self._measure_held_out(reports, held_out)
            if self._is_due(self.config.save_every_steps):
                self._save_checkpoint(reports)
            # A signal may reach one process alone; all must stop after the same step.
            if self.processes.sum_count(int(stop.reason is not None)):
                reason = stop.reason or "signal to another process"
                reports.event(self.step, "stopped", f"{reason}: stopped by request")
                return reason
        return None

    def train_step(self, step_input: StepInput) -> tuple[Tensor, Tensor]:
        """Take one optimizer step in which every target token weighs the same.

        Args:
            step_input: Its micro-batches, on the CPU.

        Returns:
            The mean loss over the step's target tokens and the gradient's norm before clipping,
            float32 scalars on the device. Nothing here waits for the device.
        """
        micro_batches = step_input.micro_batches
        target_tokens, tokens, *counts = self.processes.sum_counts(
            [
                sum(batch.num_target_tokens for batch in micro_batches),
                sum(batch.num_tokens for batch in micro_batches),
                *(sum(batch.counts.get(name, 0) for batch in micro_batches) for name in COUNTS),
            ]
        )
        self._seed_dropout()
        loss = torch.zeros((), device=self.device)
        for batch in micro_batches:
            loss_sum = target_loss_sum(
                self.model, batch.to(self.device), chunk_tokens=self.config.loss_chunk_tokens
            )
            micro_loss = loss_sum / target_tokens
            micro_loss.backward()
            loss += micro_loss.detach()
        self.processes.sum_gradients(self.trainable, loss)
        grad_norm = clip_gradients(self.trainable, self.config.max_grad_norm)
        set_learning_rate(self.optimizer, self.learning_rate)
        self.guard.count(guarded_step(self.optimizer, grad_norm))
        # From here on the step is done, and what is saved must say so.
        self.step += 1
        self.num_examples += step_input.num_examples
        self.num_tokens += tokens
        self.num_target_tokens += target_tokens
        self.counts.update(dict(zip(COUNTS, counts, strict=True)))
        self._stream_state = step_input.stream_state
        self.optimizer.zero_grad(set_to_none=True)
        return loss, grad_norm

    def _seed_dropout(self) -> None:
        """Make a step's dropout a function of its number, however often it is tried."""
        name = f"{self.config.seed} {self.step} {self.processes.index}"
        digest = hashlib.sha256(name.encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)

    @property
    def learning_rate(self) -> float:
        """The rate of the next optimizer step."""
        return learning_rate_at(self.step, self.config, self.total_steps)

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
            self._collate,
            step=self.step,
            batch_size=self.config.batch_size,
            chunk_tokens=self.config.loss_chunk_tokens,
            processes=self.processes,
        )

    def save(self, path: str | Path) -> Path:
        """Save the adapter as a standard PEFT folder; the main process writes it.

        Args:
            path: The folder; made if it is missing.

        Returns:
            The folder, which ``peft.PeftModel.from_pretrained`` opens.

        Raises:
            CheckpointError: No room or no permission.
        """
        if self.processes.is_main:
            save_adapter(self.model, path)
        self.processes.wait()
        return Path(path)

    def _collate(self, examples: Sequence[Example]) -> Batch:
        """Collate, and refuse media for which the model was loaded without a tower."""
        batch = self.collator(examples)
        for name, modality in (("pixel_values", "image"), ("input_features", "audio")):
            if name in batch.inputs and modality not in self._modalities:
                raise DataError(
                    f"it holds {modality}, but the model has no part for that; load it with "
                    f"load_model(..., modalities=('text', '{modality}'))",
                    key=batch.keys[0],
                )
        return batch

    # --- beginning, saving, logging ----------------------------------------------------------

    def _begin(self, *, resume: bool) -> None:
        checkpoint = latest_checkpoint(self.config.output_dir)
        if checkpoint is not None and not resume:
            raise ConfigError(
                f"output_dir {Path(self.config.output_dir).resolve().name!r} already holds a run "
                f"({checkpoint.name}); continue it with fit(resume=True), or choose another folder"
            )
        if checkpoint is not None:
            self._resume(checkpoint)
        else:
            # An attempt that ended in an error has read further, and may have steps in memory
            # that a full disk did not take.
            self.stream.load_state_dict(self._stream_state)
            if self.step == 0:
                self._measured_step = None
        if self.processes.sum_count(self.step) != self.step * self.processes.count:
            raise ResumeError(
                f"process {self.processes.index} is at step {self.step} and others are not; "
                "output_dir must be one folder that all processes share"
            )
        # A step that an error ended halfway has left its gradients.
        self.optimizer.zero_grad(set_to_none=True)
        begin_training(self.model, checkpointing=self.config.gradient_checkpointing)

    def _resume(self, checkpoint: Path) -> None:
        def check(state: TrainerState) -> None:
            if differences := list_differences(state.config, self._continuity()):
                raise ResumeError(
                    f"{checkpoint.name} was saved with other settings; saved there against here: "
                    f"{'; '.join(differences)}. Use the same settings, or start a new run in "
                    "another output_dir"
                )
            self.stream.load_state_dict(dict(state.stream))

        state = load_checkpoint(
            checkpoint, self.model, self.optimizer, random_generators(self.device), check=check
        )
        self._stream_state = dict(state.stream)
        self.step = state.step
        self.num_examples = state.totals["examples"]
        self.num_tokens = state.totals["tokens"]
        self.num_target_tokens = state.totals["target_tokens"]
        self.counts = Counter(state.totals["counts"])
        self._measured_step = state.totals["held_out_step"]
        self._saved = (self.step, self._measured_step)
        self.guard = NonfiniteGuard(
            self.device, state.totals["skipped_steps"], state.totals["consecutive_skipped_steps"]
        )

    def _continuity(self) -> dict[str, Any]:
        """The settings that a resumed run must share with the run that it continues."""
        return {
            **self.config.fixed_settings(),
            "num_processes": self.processes.count,
            "collator": self.collator.settings(),
        }

    def _read_steps(self) -> Iterable[StepInput]:
        """The steps that are left."""
        return read_steps(
            self.stream,
            self._collate,
            batch_size=self.config.batch_size,
            num_micro_batches=self.config.gradient_accumulation,
            num_examples=self.remaining_examples,
            process_index=self.processes.index,
            num_processes=self.processes.count,
        )

    def _measure_held_out(self, reports: Reports, held_out: list[EvalRecord]) -> None:
        """Measure if it is due: before the first step, as configured, and after the last."""
        is_due = self._is_due(self.config.eval_every_steps)
        if self.eval_stream is None or not (self.step in (0, self.total_steps) or is_due):
            return
        # What a resumed run measured before it was stopped is in its log; what failed is not.
        if self.step != self._measured_step:
            record = self.evaluate()
            begin_training(self.model, checkpointing=self.config.gradient_checkpointing)
            held_out.append(record)
            reports.evaluation(record)
            reports.restart_clock(self.num_tokens, self.num_target_tokens)
            self._measured_step = self.step

    def _save_checkpoint(self, reports: Reports) -> None:
        if self.step == 0 or self._saved == (self.step, self._measured_step):
            return
        if self.processes.is_main:
            skipped, consecutive = torch.stack([self.guard.total, self.guard.consecutive]).tolist()
            state = TrainerState(
                step=self.step,
                stream=self._stream_state,
                config=self._continuity(),
                totals={
                    "examples": self.num_examples,
                    "tokens": self.num_tokens,
                    "target_tokens": self.num_target_tokens,
                    "counts": dict(self.counts),
                    "skipped_steps": int(skipped),
                    "consecutive_skipped_steps": int(consecutive),
                    "held_out_step": self._measured_step,
                },
            )
            path = save_checkpoint(
                self.config.output_dir,
                state,
                self.model,
                self.optimizer,
                random_generators(self.device),
                keep=self.config.keep_checkpoints,
            )
            reports.event(self.step, "saved", f"saved {path.name}")
        self._saved = (self.step, self._measured_step)
        reports.restart_clock(self.num_tokens, self.num_target_tokens)

    def _log_step(self, loss: Tensor, grad_norm: Tensor, reports: Reports) -> None:
        # The step's only read-back: four numbers in one transfer.
        values = torch.stack([loss, grad_norm, self.guard.total, self.guard.consecutive])
        loss_value, grad_norm_value, skipped, consecutive = values.tolist()
        tokens_per_second, targets_per_second, data_wait_seconds = reports.read_clock(
            self.num_tokens, self.num_target_tokens
        )
        record = StepRecord(
            step=self.step,
            loss=loss_value,
            learning_rate=self.optimizer.param_groups[0]["lr"],
            grad_norm=grad_norm_value,
            tokens=self.num_tokens,
            target_tokens=self.num_target_tokens,
            tokens_per_second=tokens_per_second,
            target_tokens_per_second=targets_per_second,
            data_wait_seconds=data_wait_seconds,
            memory_bytes=memory_used_bytes(self.device),
            skipped_steps=int(skipped),
            epoch=self.num_examples / len(self.stream),
            counts={name: count for name, count in self.counts.items() if count},
        )
        reports.step(record)
        if consecutive >= self.config.max_nonfinite_steps:
            raise DivergedError(
                f"the last {int(consecutive)} steps up to step {self.step} had an infinite or "
                "undefined gradient and were skipped; lower the learning rate (now "
                f"{self.config.learning_rate}) or look for damaged media in the data"
            )

    def _is_due(self, every_steps: int | None) -> bool:
        return every_steps is not None and self.step % every_steps == 0
