"""One optimizer step in which every target token weighs the same, however it is cut.

Nothing here waits for the device: the gradient's norm, the decision to skip a step and the count
of skipped steps stay on it until the loop reads them back together with the loss.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from gemma_tuner.batch import COUNTS, Batch
from gemma_tuner.device import random_generators
from gemma_tuner.log import announce
from gemma_tuner.models.attention import set_query_chunk
from gemma_tuner.models.features import FeatureCache
from gemma_tuner.models.lora import unwrap_peft
from gemma_tuner.models.loss import Loss
from gemma_tuner.models.modes import checkpoint_layers
from gemma_tuner.planning.choice import LOSS_CHUNKS, PlanRequest
from gemma_tuner.planning.loaded import plan_training, plan_without_trace
from gemma_tuner.planning.plan import Plan, read_budget
from gemma_tuner.training.config import TrainConfig
from gemma_tuner.training.feed import StepInput
from gemma_tuner.training.micro_batches import (
    MicroBatch,
    MicroBatches,
    MicroBatchPlan,
    restore,
    retry_once,
)
from gemma_tuner.training.optim import measure_state, set_learning_rate
from gemma_tuner.training.processes import Processes
from gemma_tuner.training.reporting.monitor import RunMonitor

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

    Attributes:
        features: What frozen towers made of media, where the settings keep it.
        monitor: What watches the device.
        plan: How steps are taken; None before the first that has examples.
        micro_batches: What cuts them, by that plan.
    """

    def __init__(
        self,
        model: PeftModel,
        optimizer: torch.optim.Optimizer,
        loss: Loss,
        collator: TextCollator,
        config: TrainConfig,
        processes: Processes,
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._loss = loss
        self._trainable = [p for group in optimizer.param_groups for p in group["params"]]
        self._collator = collator
        self._config = config
        self._processes = processes
        self._device = processes.device
        self._loss_chunk_tokens = config.loss_chunk_tokens or LOSS_CHUNKS[0]
        self._saved: MicroBatchPlan | None = None
        self.features = FeatureCache(model, round(config.feature_cache_gib * 2**30))
        self.monitor = RunMonitor(self._device, read_budget(self._device, config.memory_gib)[0])
        self.plan: Plan | None = None
        self.micro_batches = MicroBatches(self._device, collator)

    def take(self, step_input: StepInput, *, step: int, learning_rate: float) -> StepOutcome:
        """Take one step."""

        def accumulate(micro_batches: Iterable[MicroBatch]) -> Tensor:
            """Sum the step's gradient, from nothing, and return its mean loss."""
            self._optimizer.zero_grad(set_to_none=True)
            self._seed_dropout(step)
            loss = torch.zeros((), device=self._device)
            for batch, checkpointed_layers in micro_batches:
                checkpoint_layers(self._model, checkpointed_layers)
                micro_loss = self.loss_sum(batch) / num_target_tokens
                micro_loss.backward()
                loss += micro_loss.detach()
            return loss

        num_tokens, num_target_tokens, *others = self._processes.sum_counts(_count(step_input))
        if self.plan is None and step_input.micro_batches:
            self._plan_for(step_input)
        retries_before = self.micro_batches.num_retries
        loss = self.micro_batches.run(accumulate, step_input)
        self._processes.sum_gradients(self._trainable, loss)
        # Clipping and stepping take their memory before they change anything, so that each can be
        # tried again once what the backward pass left is freed.
        grad_norm = retry_once(
            clip_grad_norm_, self._trainable, self._config.max_grad_norm, device=self._device
        ).to(self._device)  # of no gradients at all, torch's is on the CPU
        set_learning_rate(self._optimizer, learning_rate)
        skipped = guarded_step(self._optimizer, grad_norm)
        self._optimizer.zero_grad(set_to_none=True)
        counts: Counter[str] = Counter(dict(zip(("passed_over", *COUNTS), others, strict=True)))
        counts["out_of_memory"] = self.micro_batches.num_retries - retries_before
        return StepOutcome(loss, grad_norm, skipped, num_tokens, num_target_tokens, counts)

    def loss_sum(self, batch: Batch) -> Tensor:
        """Sum a batch's losses on the device, ``[]`` float32; known media need no tower."""
        features = self.features
        with (
            features.serve(batch.inputs, batch.media_hashes)
            if features.max_bytes
            else nullcontext(batch.inputs)
        ) as inputs:
            placed = replace(batch, inputs=inputs).to(self._device)
            self.monitor.note_shape(placed.labels.shape[1], placed.shape)
            return self._loss(self._model, placed, chunk_tokens=self._loss_chunk_tokens)

    def _seed_dropout(self, step: int) -> None:
        """Make a step's dropout a function of its number, however often it is tried."""
        name = f"{self._config.seed} {step} {self._processes.index}"
        digest = hashlib.sha256(name.encode()).digest()
        for generator in random_generators(self._device).values():
            generator.manual_seed(int.from_bytes(digest[:8], "big") >> 1)

    # --- what fits ----------------------------------------------------------------------------

    def make_plan(self, rows: Sequence[Batch]) -> Plan:
        """Try a step without weights, and take the next ones as that comes out."""
        return self._follow(plan_training(self._model, rows, self._request(rows)))

    def restore(self, saved: MicroBatchPlan) -> None:
        """Cut as the run did that is resumed, where that still fits."""
        self._saved = saved
        if self.plan is not None:
            self._follow(self.plan)

    @property
    def micro_batch_plan(self) -> MicroBatchPlan | None:
        """How micro-batches are cut, to be saved; None where no step had any."""
        if self.plan is None:
            return self._saved
        return MicroBatchPlan.of(self.plan, self.micro_batches.levels, self._config)

    def _plan_for(self, step_input: StepInput) -> None:
        """Plan with the longest rows of a step, and without trying one where that is needless."""
        examples = {example.key: example for example in step_input.examples}
        longest = [batch.longest_key for batch in step_input.micro_batches]
        rows = [self._collator([examples[key]]) for key in longest]
        plan = plan_without_trace(self._model, rows, self._request(rows))
        if plan is not None:
            self._follow(plan)
            return
        plan = self.make_plan(rows)
        if self._processes.is_main:
            announce(str(plan))

    def _request(self, rows: Sequence[Batch]) -> PlanRequest:
        request = request_plan(rows, self._config, self._collator.max_tokens)
        return replace(request, state_bytes=measure_state(self._optimizer), loss=self._loss)

    def _follow(self, plan: Plan) -> Plan:
        """Take the next steps by a plan, or as the resumed run did; returns what is followed."""
        if self._saved is not None:
            plan = restore(plan, self._saved, self._config)
        self.plan = plan
        self.micro_batches.follow(plan.levels, plan.target_share)
        self._loss_chunk_tokens = plan.loss_chunk_tokens
        set_query_chunk(unwrap_peft(self._model), plan.query_chunk_tokens)
        return plan


def _count(step_input: StepInput) -> list[int]:
    """A step's tokens, its targets, and what was passed over or cut, of this process's share."""
    batches = step_input.micro_batches
    return [
        sum(batch.num_tokens for batch in batches),
        sum(batch.num_target_tokens for batch in batches),
        step_input.num_passed_over,
        *(sum(batch.counts.get(name, 0) for batch in batches) for name in COUNTS),
    ]


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


def guarded_step(optimizer: torch.optim.Optimizer, grad_norm: Tensor) -> Tensor:
    """Take the optimizer's step unless the gradient is infinite or undefined."""
    # A skipped step leaves parameters, moments and step counters as they were, bit for bit. A
    # fused kernel reads ``found_inf`` on the device, as it does for torch's GradScaler
    # (``torch/optim/adam.py``, ``_fused_adam``), so the host need not know. Without a fused kernel
    # the host has to ask: one sync a step.
    # grad_norm: ``[]``, the L2 norm of all gradients before clipping; clipped by one that is not
    # finite, every gradient is undefined.
    # Returns: ``[]`` float32 on the device: 1 if the step was skipped, else 0.
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    is_fused = all(group.get("fused") for group in optimizer.param_groups)

    def find_skipped() -> tuple[Tensor, bool]:
        skipped = grad_norm.isfinite().logical_not().to(torch.float32)
        return skipped, not is_fused and bool(skipped.item())

    def step() -> None:
        new = [parameter for parameter in parameters if parameter not in optimizer.state]
        try:
            optimizer.step()
        except BaseException:  # a state of which memory lacked a part would be taken as whole
            for parameter in new:
                optimizer.state.pop(parameter, None)
            raise

    skipped, host_skips = retry_once(find_skipped, device=grad_norm.device)
    if is_fused:
        optimizer.found_inf = skipped  # pyright: ignore[reportAttributeAccessIssue]
    if not host_skips:
        # A fused AdamW takes its memory before it changes anything. One that is not fused changes
        # parameter after parameter, and would change the first ones twice; of others it is not
        # known.
        if is_fused and isinstance(optimizer, torch.optim.AdamW):
            retry_once(step, device=grad_norm.device)
        else:
            step()
    return skipped


class NonfiniteGuard:
    """Count skipped steps on the device, to be read back together with the loss.

    Attributes:
        total: ``[]`` float32, steps skipped in all; exact up to 2**24.
        consecutive: ``[]`` float32, steps skipped since the last one that was taken.
    """

    def __init__(self, device: torch.device, total: int = 0, consecutive: int = 0) -> None:
        self.total = torch.tensor(float(total), device=device)
        self.consecutive = torch.tensor(float(consecutive), device=device)

    def count(self, skipped: Tensor) -> None:
        """Add one step's outcome."""
        # skipped: ``[]`` float32 from :func:`guarded_step`.
        # In place, which needs no memory: here the step is taken and cannot be tried again.
        self.total.add_(skipped)
        self.consecutive.add_(skipped).mul_(skipped)
