"""One optimizer step in which every target token weighs the same, however it is cut."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gemma_tuner.batch import COUNTS, Batch
from gemma_tuner.device import random_generators
from gemma_tuner.log import announce
from gemma_tuner.models.attention import set_query_chunk
from gemma_tuner.models.features import FeatureCache
from gemma_tuner.models.lora import unwrap_peft
from gemma_tuner.models.loss import target_loss_sum
from gemma_tuner.models.modes import checkpoint_layers
from gemma_tuner.planning.choice import ANY_SIZE, LOSS_CHUNKS, PlanRequest
from gemma_tuner.planning.loaded import plan_training, plan_without_trace
from gemma_tuner.planning.plan import Plan
from gemma_tuner.training.config import TrainConfig
from gemma_tuner.training.cuts import Cuts, cut_as_before, read_cuts
from gemma_tuner.training.feed import StepInput
from gemma_tuner.training.micro_batches import MicroBatch, MicroBatches, retry_once
from gemma_tuner.training.monitor import RunMonitor
from gemma_tuner.training.optim import clip_gradients, guarded_step, set_learning_rate
from gemma_tuner.training.processes import Processes

if TYPE_CHECKING:
    from peft import PeftModel

    from gemma_tuner.collators.text import TextCollator


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What an optimizer step came to, over all processes; tensors are ``[]`` float32.

    Args:
        loss: The mean over its target tokens, on the device.
        grad_norm: The gradient's norm before clipping, on the device.
        skipped: 1 if the gradient was not finite and nothing was changed, else 0; on the device.
        num_tokens: Tokens read: prompts, media and targets, no padding.
        num_target_tokens: Tokens trained on.
        counts: What collating cut or split and what was passed over, by name.
    """

    loss: Tensor
    grad_norm: Tensor
    skipped: Tensor
    num_tokens: int
    num_target_tokens: int
    counts: Counter[str]


class Stepper:
    """Takes optimizer steps, with as much on the device at one time as fits.

    Args:
        model: From ``add_lora``.
        optimizer: Over its trainable parameters.
        collator: What made the micro-batches; makes them anew where they are cut.
        config: The settings.
        processes: The processes of the run.

    Attributes:
        features: What frozen towers made of media, where the settings keep it.
        monitor: What watches the device.
        plan: How steps are taken; None until one is known.
        micro_batches: What cuts them, by that plan.
    """

    def __init__(
        self,
        model: PeftModel,
        optimizer: torch.optim.Optimizer,
        collator: TextCollator,
        config: TrainConfig,
        processes: Processes,
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._trainable = [p for group in optimizer.param_groups for p in group["params"]]
        self._collator = collator
        self._config = config
        self._processes = processes
        self._device = processes.device
        self._loss_chunk_tokens = config.loss_chunk_tokens or LOSS_CHUNKS[0]
        self.features = FeatureCache(model, round(config.feature_cache_gib * 2**30))
        self.monitor = RunMonitor(self._device)
        self._cuts_before: Cuts | None = None
        self.plan: Plan | None = None
        self.micro_batches: MicroBatches | None = None

    def take(self, step_input: StepInput, *, step: int, learning_rate: float) -> StepOutcome:
        """Take one step. Nothing here waits for the device."""
        num_tokens, num_target_tokens, counts = self._count(step_input)
        micro = self._cut_to_fit(step_input)
        retries_before = micro.num_retries
        loss = micro.run(partial(self._accumulate, step, num_target_tokens), step_input)
        self._processes.sum_gradients(self._trainable, loss)
        grad_norm, skipped = self._update(learning_rate)
        self._optimizer.zero_grad(set_to_none=True)
        counts["out_of_memory"] = micro.num_retries - retries_before
        return StepOutcome(loss, grad_norm, skipped, num_tokens, num_target_tokens, counts)

    def _accumulate(
        self, step: int, num_target_tokens: int, micro_batches: Iterable[MicroBatch]
    ) -> Tensor:
        """Sum a step's gradient anew, and return its mean loss, ``[]`` float32."""
        self._optimizer.zero_grad(set_to_none=True)
        self._seed_dropout(step)
        loss = torch.zeros((), device=self._device)
        for batch, checkpointed_layers in micro_batches:
            checkpoint_layers(self._model, checkpointed_layers)
            micro_loss = self.loss_sum(batch) / num_target_tokens
            micro_loss.backward()
            loss += micro_loss.detach()
        return loss

    def _update(self, learning_rate: float) -> tuple[Tensor, Tensor]:
        """Clip the gradient and take the step."""
        # Each of the two takes its memory before it changes anything, so that it can be tried
        # again once what the backward pass left is freed.
        # Returns: The gradient's norm before clipping, and 1 if the step was skipped: ``[]``
        # float32.
        grad_norm = retry_once(
            clip_gradients, self._trainable, self._config.max_grad_norm, device=self._device
        )
        set_learning_rate(self._optimizer, learning_rate)
        skipped = retry_once(guarded_step, self._optimizer, grad_norm, device=self._device)
        return grad_norm, skipped

    def loss_sum(self, batch: Batch) -> Tensor:
        """Sum a batch's losses; its media that are known need no tower."""
        # Returns: ``[]`` float32, on the device.
        with self.features.serve(batch.inputs, batch.media_hashes) as inputs:
            placed = self.monitor.place(replace(batch, inputs=inputs))
            return target_loss_sum(self._model, placed, chunk_tokens=self._loss_chunk_tokens)

    def _seed_dropout(self, step: int) -> None:
        """Make a step's dropout a function of its number, however often it is tried."""
        name = f"{self._config.seed} {step} {self._processes.index}"
        digest = hashlib.sha256(name.encode()).digest()
        for generator in random_generators(self._device).values():
            generator.manual_seed(int.from_bytes(digest[:8], "big") >> 1)

    def _count(self, step_input: StepInput) -> tuple[int, int, Counter[str]]:
        """Sum a step's tokens, its targets, and what was cut or passed over."""
        batches = step_input.micro_batches
        num_tokens, num_target_tokens, *counts = self._processes.sum_counts(
            [
                sum(batch.num_tokens for batch in batches),
                sum(batch.num_target_tokens for batch in batches),
                step_input.num_passed_over,
                *(sum(batch.counts.get(name, 0) for batch in batches) for name in COUNTS),
            ]
        )
        names = ("passed_over", *COUNTS)
        return num_tokens, num_target_tokens, Counter(dict(zip(names, counts, strict=True)))

    # --- what fits ----------------------------------------------------------------------------

    def make_plan(self, rows: Sequence[Batch]) -> Plan:
        """Try a step without weights, and take the next ones as that comes out."""
        plan = self._try_steps(rows)
        self._follow(plan)
        return plan

    @property
    def cuts(self) -> Cuts | None:
        """How micro-batches are cut; None until it is known."""
        if self.plan is None or self.micro_batches is None:
            return self._cuts_before
        return read_cuts(self.plan, self.micro_batches.levels, self._config)

    def cut_as_before(self, cuts: Cuts) -> None:
        """Cut as the run did that is resumed, where that still fits."""
        self._cuts_before = cuts
        if self.plan is not None:
            self._follow(self.plan)

    def _cut_to_fit(self, step_input: StepInput) -> MicroBatches:
        """What cuts micro-batches, planned with the first step that has any."""
        batches = step_input.micro_batches
        if self.micro_batches is not None:
            return self.micro_batches
        if not batches:
            return MicroBatches([ANY_SIZE], 1.0, self._device, self._collator)
        examples = {example.key: example for example in step_input.examples}
        rows = [self._collator([examples[batch.longest_key]]) for batch in batches]
        plan = plan_without_trace(self._model, rows, self._request(rows))
        is_sure = plan is not None
        micro = self._follow(plan or self._try_steps(rows))
        if self._processes.is_main and not is_sure:
            announce(str(self.plan))
        return micro

    def _request(self, rows: Sequence[Batch]) -> PlanRequest:
        return request_plan(rows, self._config, self._collator.max_tokens)

    def _try_steps(self, rows: Sequence[Batch]) -> Plan:
        return plan_training(self._model, rows, self._request(rows))

    def _follow(self, plan: Plan) -> MicroBatches:
        if self._cuts_before is not None:
            plan = cut_as_before(plan, self._cuts_before, self._config)
        self.plan = plan
        self.micro_batches = MicroBatches(
            plan.levels, plan.target_share, self._device, self._collator
        )
        self.monitor = RunMonitor(self._device, plan.budget_bytes)
        self._loss_chunk_tokens = plan.loss_chunk_tokens
        set_query_chunk(unwrap_peft(self._model), plan.query_chunk_tokens)
        return self.micro_batches


def request_plan(rows: Sequence[Batch], config: TrainConfig, max_tokens: int) -> PlanRequest:
    """What a run asks of a plan."""
    # Its share of targets as in some of its rows and a quarter more.
    shares = [row.target_rows.shape[1] / row.labels.shape[1] for row in rows]
    return PlanRequest(
        batch_size=config.batch_size,
        max_tokens=max_tokens,
        target_share=min(1.0, 1.25 * max(shares)),
        checkpointing=config.gradient_checkpointing,
        loss_chunk_tokens=config.loss_chunk_tokens,
        memory_gib=config.memory_gib,
    )
