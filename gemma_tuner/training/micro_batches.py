"""Cutting a step's micro-batches to what fits, as planned and as the run finds out.

A step's gradient is a sum over its micro-batches, so it does not depend on how they are cut, nor
on which layers are checkpointed. When one does not fit, what the step has summed so far is thrown
away, and the step begins again with smaller ones or more checkpointing; the run then keeps to
that.

How a run cuts is a value, :class:`MicroBatchPlan`. It is saved with the run, and a resumed run
cuts by it again: with other micro-batches the gradient is rounded otherwise, and dropout draws
other numbers.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import torch
from torch.utils.checkpoint import _CheckpointFrame  # pyright: ignore[reportPrivateUsage]

from gemma_tuner.batch import Batch
from gemma_tuner.device import empty_cache, is_out_of_memory, memory_used_bytes
from gemma_tuner.errors import MemoryPlanError
from gemma_tuner.log import announce
from gemma_tuner.planning.choice import ANY_SIZE, BUSY_TOKENS, CheckpointingLevel
from gemma_tuner.planning.plan import Plan
from gemma_tuner.records import Example
from gemma_tuner.training.config import TrainConfig
from gemma_tuner.training.feed import StepInput

T = TypeVar("T")
MicroBatch = tuple[Batch, int]
"""A batch, and how many decoder layers are checkpointed for it."""


@dataclass(frozen=True, slots=True)
class MicroBatchPlan:
    """What decides how micro-batches are cut and computed.

    Args:
        levels: Those of the plan, as the run has found them to be since.
        target_share: As in :class:`Plan`, like the next two.
        loss_chunk_tokens: Target tokens whose logits exist at one time.
        query_chunk_tokens: Queries of a full-attention layer that attend at one time.
        peak_bytes: The predicted peak; 0 where none was needed.
        asked: The settings that had a say.
    """

    levels: tuple[CheckpointingLevel, ...]
    target_share: float
    loss_chunk_tokens: int
    query_chunk_tokens: int | None
    peak_bytes: int
    asked: tuple[bool | float | None, ...]

    @classmethod
    def of(
        cls, plan: Plan, levels: Sequence[CheckpointingLevel], config: TrainConfig
    ) -> MicroBatchPlan:
        """How a run cuts that follows ``plan`` and has come to ``levels``."""
        return cls(
            levels=tuple(levels),
            target_share=plan.target_share,
            loss_chunk_tokens=plan.loss_chunk_tokens,
            query_chunk_tokens=plan.query_chunk_tokens,
            peak_bytes=plan.peak_bytes,
            asked=(config.gradient_checkpointing, config.loss_chunk_tokens, config.memory_gib),
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> MicroBatchPlan:
        """Read what :meth:`to_dict` wrote."""
        levels = tuple(CheckpointingLevel(**level) for level in saved["levels"])
        return cls(**{**saved, "levels": levels, "asked": tuple(saved["asked"])})


def restore(plan: Plan, saved: MicroBatchPlan, config: TrainConfig) -> Plan:
    """Let a resumed run's plan cut as the run did before, if that fits and is still asked for."""
    now = MicroBatchPlan.of(plan, plan.levels, config)
    if saved.asked != now.asked or replace(saved, peak_bytes=now.peak_bytes) == now:
        return plan
    # Where there was so much room that nothing was tried, it must be so still.
    has_room = plan.levels[0].max_tokens >= config.batch_size * plan.max_tokens
    if saved.peak_bytes > plan.usable_bytes or not (saved.peak_bytes or has_room):
        announce(
            "there is less memory than when this run was saved, so micro-batches are cut anew: "
            "gradients are the same but for rounding, and dropout draws other numbers"
        )
        return plan
    return replace(
        plan,
        levels=saved.levels,
        target_share=saved.target_share,
        loss_chunk_tokens=saved.loss_chunk_tokens,
        query_chunk_tokens=saved.query_chunk_tokens,
        reasons={**plan.reasons, "micro-batch": "cut as before this run was resumed"},
    )


class MicroBatches:
    """Cuts micro-batches to what fits: to any size, until it is given levels to follow.

    Attributes:
        levels: From the fastest to the most sparing, as the run has found them to be.
        num_retries: How often a step was begun again.
    """

    def __init__(
        self, device: torch.device, collate: Callable[[Sequence[Example]], Batch]
    ) -> None:
        self.levels = [ANY_SIZE]
        self.num_retries = 0
        self._target_share = 1.0
        self._device = device
        self._collate = collate
        self._messages: list[str] = []
        self._is_second_try = False
        self._levels_before: tuple[CheckpointingLevel, ...] = ()
        self._running = (0, 0, 0)  # level, rows and tokens a row of what was begun last

    def follow(self, levels: Sequence[CheckpointingLevel], target_share: float) -> None:
        """Cut by these levels, which take this share of a row's tokens to be targets."""
        self.levels = list(levels)
        self._target_share = target_share

    def run(self, accumulate: Callable[[Iterable[MicroBatch]], T], step_input: StepInput) -> T:
        """Run micro-batches, cutting them until they fit; each try calls ``accumulate`` anew."""

        def note(batch: Batch, index: int) -> None:
            self._running = (index, len(batch), self._row_tokens(batch))

        def hand_out() -> Iterator[MicroBatch]:
            for batch, index in parts:
                note(batch, index)
                yield batch, self.levels[index].checkpointed_layers

        self._is_second_try = False
        self._levels_before = tuple(self.levels)
        while True:
            parts: list[tuple[Batch, int]] = []
            for batch in step_input.micro_batches:
                index, fitting = self._choose_level(len(batch), self._row_tokens(batch))
                is_whole = len(batch) <= fitting
                pieces = [batch] if is_whole else self._split(batch, fitting, step_input)
                parts += [(piece, index) for piece in pieces]
            if parts:  # memory may run out before the first has begun
                note(*parts[0])
            try:
                return accumulate(hand_out())
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            # Not above: while the error is handled, its traceback holds the step's tensors.
            free(self._device)
            self._spare(step_input)

    def take_messages(self) -> list[str]:
        """What has been done since this was last asked, in sentences for the user."""
        messages, self._messages = self._messages, []
        return messages

    def _row_tokens(self, batch: Batch) -> int:
        """Padded tokens of a row; a row of many targets counts as the longer one planned so."""
        targets = batch.target_rows.shape[1]
        return max(batch.labels.shape[1], round(targets / self._target_share))

    def _choose_level(self, rows: int, row_tokens: int) -> tuple[int, int]:
        """Choose a level for a batch; returns its index, and how many rows it holds at a time."""
        enough = min(rows * row_tokens, max(row_tokens, BUSY_TOKENS))
        # Better whole at the next level than in small pieces, but better in pieces than beyond
        # what was planned.
        index = self._find_level(enough)
        if index is None:
            index = self._find_level(row_tokens)
        if index is None:
            index = len(self.levels) - 1
        return index, max(1, self.levels[index].max_tokens // row_tokens)

    def _split(self, batch: Batch, fitting: int, step_input: StepInput) -> Iterator[Batch]:
        """Collate a batch again in pieces of one size, or nearly, of at most ``fitting`` rows."""
        examples = {example.key: example for example in step_input.examples}
        rows = len(batch)
        size = -(-rows // -(-rows // fitting))
        for start in range(0, rows, size):
            yield self._collate([examples[key] for key in batch.keys[start : start + size]])

    def _find_level(self, tokens: int) -> int | None:
        return next((i for i, level in enumerate(self.levels) if level.max_tokens >= tokens), None)

    def _spare(self, step_input: StepInput) -> None:
        """Note that what ran last does not fit: fewer rows at its level, or the next level."""
        index, rows, row_tokens = self._running
        level = self.levels[index]
        is_last = rows == 1 and index + 1 == len(self.levels)
        if is_last and self._is_second_try:
            # The step is not taken: what is saved cuts as the steps before it did.
            self.levels = list(self._levels_before)
            raise MemoryPlanError(self._describe_misfit(step_input))
        self.num_retries += 1
        if is_last:  # what other work held may be free now
            self._is_second_try = True
            self._messages.append(
                f"out of memory with one example of {row_tokens} tokens; trying it once more"
            )
            return
        fewer = (rows + 1) // 2
        held = fewer * row_tokens if rows > 1 else row_tokens - 1
        self.levels[index] = replace(level, max_tokens=held)
        change = "which changes the speed and not the gradient"
        if rows > 1:
            self._messages.append(
                f"out of memory with {rows} examples at a time; going on with {fewer}, {change}"
            )
        else:
            self._messages.append(
                f"out of memory with one example of {row_tokens} tokens; the layers of such "
                f"examples are checkpointed from now on, {change}"
            )

    def _describe_misfit(self, step_input: StepInput) -> str:
        held = memory_used_bytes(self._device) / 2**30
        largest = max(step_input.micro_batches, key=lambda batch: batch.labels.shape[1])
        num_tokens = int(largest.inputs["attention_mask"].sum(1).max())
        return (
            f"a micro-batch of one example does not fit on {self._device}, of whose memory "
            f"{held:.2f} GiB are held between steps; the longest of the step, "
            f"{largest.longest_key!r}, has {num_tokens} tokens. What helps: the collator's "
            "max_tokens, image_tokens or max_seconds, gradient_checkpointing=None (chosen by what "
            "fits), a smaller loss_chunk_tokens, fewer LoRA layers or a smaller rank, a smaller "
            "model"
        )


def retry_once(function: Callable[..., T], *arguments: object, device: torch.device) -> T:
    """Call a function, once more if memory runs out in it before it has changed anything."""
    try:
        return function(*arguments)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    free(device)
    return function(*arguments)


def free(device: torch.device) -> None:
    """Free what a forward or backward pass that was broken off has left."""
    # A checkpointed layer keeps its arguments to run again, among them the dict in which layers
    # share keys and values, and these lead back to the layer through autograd, where Python's
    # collector cannot follow. A finished backward pass lets go of them; a broken one does not.
    for left in gc.get_objects():
        if type(left) is _CheckpointFrame:  # isinstance would wake lazy objects
            left.recompute_fn = None
            left.recomputed.clear()
    gc.collect()
    empty_cache(device)
