"""The training loop: optimizer steps in which every target token weighs the same."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gemma_tuner.collators.batch import COUNTS, Batch
from gemma_tuner.collators.preview import Preview, preview_row
from gemma_tuner.device import announce
from gemma_tuner.errors import CheckpointError, ConfigError, DataError
from gemma_tuner.models.attention import set_query_chunk
from gemma_tuner.models.embeddings import find_mapped_embedding
from gemma_tuner.models.families import loaded_modalities
from gemma_tuner.models.features import FeatureCache
from gemma_tuner.models.lora import unwrap_peft
from gemma_tuner.models.target_only import target_only_of
from gemma_tuner.records import Example
from gemma_tuner.training.adapter_files import save_adapter
from gemma_tuner.training.checks import check_collator, check_kinds
from gemma_tuner.training.choice import ANY_SIZE, LOSS_CHUNKS
from gemma_tuner.training.config import TrainConfig
from gemma_tuner.training.feed import Prefetch, StepInput, Stream, collate_good, read_steps
from gemma_tuner.training.governor import Governor
from gemma_tuner.training.held_out import measure_held_out
from gemma_tuner.training.interrupt import StopRequest
from gemma_tuner.training.ledger import Ledger
from gemma_tuner.training.loss import target_loss_sum
from gemma_tuner.training.memory import MicroBatch, MicroBatches, retry_once
from gemma_tuner.training.metrics import EvalRecord
from gemma_tuner.training.modes import begin_training, checkpoint_layers, end_training
from gemma_tuner.training.notebooks import write_result
from gemma_tuner.training.optim import (
    build_optimizer,
    clip_gradients,
    guarded_step,
    learning_rate_at,
    set_learning_rate,
)
from gemma_tuner.training.page import open_page
from gemma_tuner.training.plan import Plan
from gemma_tuner.training.plan_loaded import plan_training, plan_without_trial
from gemma_tuner.training.processes import Processes
from gemma_tuner.training.reports import Reports
from gemma_tuner.training.samples import Samples, take_samples
from gemma_tuner.training.trackers import Trackers

if TYPE_CHECKING:
    from peft import PeftModel

    from gemma_tuner.collators.text import TextCollator


PLANNED_ROWS = 4
"""Rows of the data that ``Trainer.plan`` looks at."""


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

    def _repr_html_(self) -> str:
        return write_result(self.step, self.stopped_by, self.held_out)


class Trainer:
    """Fine-tune a LoRA-wrapped Gemma on a stream of examples.

    Args:
        model: From ``add_lora``; it is trained where it lies.
        stream: What to train on; an ``ExampleStream`` or anything that iterates, counts and
            resumes as one does.
        collator: What makes batches of its examples.
        config: The settings.
        eval_stream: Held-out examples, whose loss is measured as ``config`` says.
        samples: Questions that are answered at intervals, see ``SampleGenerations``.

    Raises:
        ConfigError: An argument of another kind, a stream without examples, a model without
            trainable parameters, or a collator that is not for this model.
    """

    def __init__(
        self,
        model: PeftModel,
        stream: Stream,
        collator: TextCollator,
        config: TrainConfig,
        eval_stream: Stream | None = None,
        samples: Samples | None = None,
    ) -> None:
        check_kinds(model, stream, collator, config, eval_stream)
        self.model = model
        self.stream = stream
        self.collator = collator
        self.config = config
        self.eval_stream = eval_stream
        self.samples = samples
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        if not self.trainable:
            raise ConfigError(
                "no parameter of the model is trainable; wrap it with add_lora(model) first"
            )
        check_collator(model, collator)
        self.device = self.trainable[0].device
        self._modalities = loaded_modalities(unwrap_peft(model))
        self._mapped_embedding = find_mapped_embedding(model)
        self.processes = Processes(self.device)
        self.features = FeatureCache(model, round(config.feature_cache_gib * 2**30))
        self.governor = Governor(self.device)
        self.micro_batches: MicroBatches | None = None  # planned when the first step is known
        self._plan: Plan | None = None
        self._loss_chunk_tokens = config.loss_chunk_tokens or LOSS_CHUNKS[0]
        self.optimizer = build_optimizer(model.named_parameters(), config, self.device)
        self.ledger = Ledger(config, model, self.optimizer, stream, self.processes)

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.ledger.step

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run; the last may have fewer examples."""
        return self.ledger.total_steps

    @property
    def counts(self) -> Counter[str]:
        """What collating cut or split and what was passed over since the run began, by name."""
        return self.ledger.counts

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
        return self._use(self._make_plan([self.collator([row]) for row in rows]))

    def preview(self, index: int = 0) -> Preview:
        """Show one collated example of the stream with its trained tokens marked.

        Args:
            index: The example's place in the data.

        Returns:
            What a person reads; ``print`` it.

        Raises:
            DataError: The example cannot be used.
        """
        return preview_row(self.collator([self.stream[index]]), self.collator.processor.tokenizer)

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
            MemoryPlanError: A single example does not fit on the device.
            CheckpointError: A checkpoint or the log that is damaged or cannot be written.
        """
        self.ledger.begin(self.collator.settings(), resume=resume)
        # A step that an error ended halfway has left its gradients.
        self.optimizer.zero_grad(set_to_none=True)
        begin_training(self.model)
        is_main = self.processes.is_main
        if self.samples is not None and is_main:
            self.samples.begin(self.config.output_dir, self.step)
        has_trackers = is_main and self.config.trackers
        held_out: list[EvalRecord] = []
        with (
            StopRequest() as stop,
            Reports(
                self.config.output_dir,
                total_steps=self.total_steps,
                step=self.step,
                show=self.config.progress,
                is_main_process=is_main,
                trackers=Trackers(self.config, self.device, self.step) if has_trackers else None,
            ) as reports,
            Prefetch(self._read_steps()) as feed,
        ):
            reports.note(
                self.step,
                "run",
                max_steps=self.total_steps,
                device=self.device.type,
                config=self._settings(),
            )
            if self.config.watch and is_main:
                address = open_page(self.config.output_dir)
                reports.event(self.step, "watch", f"watch this run at {address}")
            try:
                stopped_by = self._run(feed, stop, reports, held_out)
            except CheckpointError:
                raise  # saving is what failed
            except Exception:  # whatever it was, the steps before it are whole
                self.ledger.save(reports)
                raise
            finally:
                end_training(self.model)
            self.ledger.save(reports)
            if self.features.max_bytes:
                reports.event(self.step, "features", self.features.report())
            if stopped_by is None:
                reports.note(self.step, "finished")
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
        if reason := target_only_of(unwrap_peft(self.model)).reason:
            reports.event(self.step, "all_positions", f"every layer runs everywhere: {reason}")
        self._measure_held_out(reports, held_out)
        self._take_samples(reports)
        reports.note(self.step, "training")
        told: Plan | None = None
        reports.restart_clock(self.ledger.num_tokens, self.ledger.num_target_tokens)
        for step_input in reports.time_waits(feed):
            loss, grad_norm = self.train_step(step_input)
            if self._plan is not None and self._plan is not told:
                reports.plan(self.step, self._plan)
                told = self._plan
            reports.advance(self.step)
            for message in self.micro_batches.take_messages() if self.micro_batches else ():
                reports.event(self.step, "out_of_memory", message)
            self.governor.after_step(self.step, reports)
            if self.ledger.log_is_due:
                memory = self.governor.read_memory()
                record = self.ledger.log_step(loss, grad_norm, memory, reports)
                self.governor.after_record(record, reports)
            self._measure_held_out(reports, held_out)
            self._take_samples(reports)
            if self.ledger.save_is_due:
                self.ledger.save(reports)
            # A signal may reach one process alone; all must stop after the same step.
            if self.processes.sum_count(int(stop.reason is not None)):
                reason = stop.reason or "signal to another process"
                reports.event(self.step, "stopped", f"{reason}: stopped by request")
                return reason
        return None

    def _measure_held_out(self, reports: Reports, held_out: list[EvalRecord]) -> None:
        """Measure the held-out loss if there is one and it is due."""
        ledger = self.ledger
        if self.eval_stream is None or not ledger.evaluation_is_due:
            return
        reports.note(self.step, "evaluating")
        record = self.evaluate()
        self.governor.after_evaluation()
        begin_training(self.model)
        held_out.append(record)
        reports.evaluation(record)
        reports.restart_clock(ledger.num_tokens, ledger.num_target_tokens)
        ledger.held_out_step = self.step

    def _take_samples(self, reports: Reports) -> None:
        """Answer the sample questions if they are due; the main process does."""
        if self.samples is None or not self.samples.is_due(self.step, self.total_steps):
            return
        if self.processes.is_main:
            take_samples(self.samples, self.model, self.step, self.device, reports)
        self.governor.after_evaluation()
        begin_training(self.model)
        reports.restart_clock(self.ledger.num_tokens, self.ledger.num_target_tokens)

    def _settings(self) -> dict[str, Any]:
        """The settings for the log, which tells no path."""
        return {k: v for k, v in self.config.to_dict().items() if k != "output_dir"}

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
        micro_batches = step_input.micro_batches
        target_tokens, tokens, *counts = self.processes.sum_counts(
            [
                sum(batch.num_target_tokens for batch in micro_batches),
                sum(batch.num_tokens for batch in micro_batches),
                step_input.num_passed_over,
                *(sum(batch.counts.get(name, 0) for batch in micro_batches) for name in COUNTS),
            ]
        )
        micro = self._cut_to_fit(step_input)
        retries_before = micro.num_retries
        loss = micro.run(partial(self._accumulate, target_tokens), step_input)
        self.processes.sum_gradients(self.trainable, loss)
        grad_norm, skipped = self._update()
        self.ledger.guard.count(skipped)
        names = ("passed_over", *COUNTS, "out_of_memory")
        num_retries = micro.num_retries - retries_before
        self.ledger.count_step(
            step_input,
            tokens,
            target_tokens,
            Counter(dict(zip(names, (*counts, num_retries), strict=True))),
        )
        self.optimizer.zero_grad(set_to_none=True)
        return loss, grad_norm

    def _accumulate(self, target_tokens: int, micro_batches: Iterable[MicroBatch]) -> Tensor:
        """Sum a step's gradient anew, and return its mean loss, ``[]`` float32."""
        self.optimizer.zero_grad(set_to_none=True)
        self._seed_dropout()
        loss = torch.zeros((), device=self.device)
        for batch, checkpointed_layers in micro_batches:
            checkpoint_layers(self.model, checkpointed_layers)
            micro_loss = self._loss_sum(batch) / target_tokens
            micro_loss.backward()
            loss += micro_loss.detach()
        return loss

    def _loss_sum(self, batch: Batch) -> Tensor:
        """Sum a batch's losses; its media that are known need no tower."""
        with self.features.serve(batch.inputs, batch.media_hashes) as inputs:
            placed = self.governor.place(replace(batch, inputs=inputs))
            return target_loss_sum(self.model, placed, chunk_tokens=self._loss_chunk_tokens)

    def _update(self) -> tuple[Tensor, Tensor]:
        """Clip the gradient and take the step.

        Each of the two takes its memory before it changes anything, so that it can be tried again
        once what the backward pass left is freed.

        Returns:
            The gradient's norm before clipping, and 1 if the step was skipped: ``[]`` float32.
        """
        grad_norm = retry_once(
            clip_gradients, self.trainable, self.config.max_grad_norm, device=self.device
        )
        set_learning_rate(self.optimizer, self.learning_rate)
        skipped = retry_once(guarded_step, self.optimizer, grad_norm, device=self.device)
        return grad_norm, skipped

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
            self._loss_sum,
            step=self.step,
            batch_size=self.config.batch_size,
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

    def _collate(self, stream: Stream, examples: Sequence[Example]) -> Batch | None:
        """Collate what can be, and refuse media for which the model was loaded without a tower."""
        batch = collate_good(self.collator, stream, examples)
        for name, modality in (("pixel_values", "image"), ("input_features", "audio")):
            if batch and name in batch.inputs and modality not in self._modalities:
                raise DataError(
                    f"it holds {modality}, but the model has no part for that; load it with "
                    f"load_model(..., modalities=('text', '{modality}'))",
                    key=batch.keys[0],
                )
        if batch and self._mapped_embedding is not None:
            self._mapped_embedding.warm(batch.inputs["input_ids"])
        return batch

    # --- memory ------------------------------------------------------------------------------

    def _cut_to_fit(self, step_input: StepInput) -> MicroBatches:
        """What cuts micro-batches, planned with the first step that has any."""
        batches = step_input.micro_batches
        if self.micro_batches is None and not batches:
            return MicroBatches([ANY_SIZE], 1.0, self.device, self.collator)
        if self.micro_batches is None:
            examples = {example.key: example for example in step_input.examples}
            rows = [self.collator([examples[batch.longest_key]]) for batch in batches]
            plan = plan_without_trial(self.model, rows, self.config, self.collator.max_tokens)
            if plan is None:
                plan = self._make_plan(rows)
                if self.processes.is_main:
                    announce(str(plan))
            self._use(plan)
        return self.micro_batches  # pyright: ignore[reportReturnType]

    def _make_plan(self, rows: Sequence[Batch]) -> Plan:
        return plan_training(self.model, rows, self.config, self.collator.max_tokens)

    def _use(self, plan: Plan) -> Plan:
        self.micro_batches = MicroBatches(
            plan.levels, plan.target_share, self.device, self.collator
        )
        self.governor = Governor(self.device, plan.budget_bytes)
        self._plan = plan
        self._loss_chunk_tokens = plan.loss_chunk_tokens
        set_query_chunk(unwrap_peft(self.model), plan.query_chunk_tokens)
        return plan

    def _read_steps(self) -> Iterable[StepInput]:
        """The steps that are left."""
        return read_steps(
            self.stream,
            self._collate,
            batch_size=self.config.batch_size,
            num_micro_batches=self.config.gradient_accumulation,
            num_slots=self.ledger.remaining_slots,
            process_index=self.processes.index,
            num_processes=self.processes.count,
        )
