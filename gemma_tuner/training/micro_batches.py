"""Cutting a step's micro-batches to what fits, as planned and as the run finds out.

A step's gradient is a sum over its micro-batches, so it does not depend on how they are cut, nor
on which layers are checkpointed. When one does not fit, what the step has summed so far is thrown
away, and the step begins anew with smaller ones or more checkpointing; the run then keeps to that.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch.utils.checkpoint import _CheckpointFrame  # pyright: ignore[reportPrivateUsage]

from gemma_tuner.batch import Batch
from gemma_tuner.device import empty_cache, is_out_of_memory, memory_used_bytes
from gemma_tuner.errors import MemoryPlanError
from gemma_tuner.planning.choice import BUSY_TOKENS, CheckpointingLevel
from gemma_tuner.records import Example
from gemma_tuner.training.feed import StepInput

T = TypeVar("T")
MicroBatch = tuple[Batch, int]
"""A batch, and how many decoder layers are checkpointed for it."""


class MicroBatches:
    """Cuts micro-batches to what fits.

    Args:
        levels: From the fastest to the most sparing.
        target_share: What share of a row's tokens the levels take to be targets; a row with more
            counts as a longer one.
        device: Where training runs.
        collate: Makes a batch of examples that have been collated before.

    Attributes:
        levels: As the run has found them to be.
        num_retries: How often a step was begun anew.
    """

    def __init__(
        self,
        levels: Sequence[CheckpointingLevel],
        target_share: float,
        device: torch.device,
        collate: Callable[[Sequence[Example]], Batch],
    ) -> None:
        self.levels = list(levels)
        self.num_retries = 0
        self._target_share = target_share
        self._device = device
        self._collate = collate
        self._messages: list[str] = []
        self._is_second_try = False
        self._running = (0, 0, 0)  # level, rows and tokens a row of what was begun last

    def run(self, accumulate: Callable[[Iterable[MicroBatch]], T], step_input: StepInput) -> T:
        """Run micro-batches, cutting them until they fit."""
        self._is_second_try = False
        while True:
            batches = step_input.micro_batches
            parts = [part for batch in batches for part in self._cut(batch, step_input)]
            for batch, index in parts[:1]:  # memory may run out before the first has begun
                self._running = (index, len(batch), self._row_tokens(batch))
            try:
                return accumulate(self._follow(parts))
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

    def _follow(self, parts: Iterable[tuple[Batch, int]]) -> Iterator[MicroBatch]:
        """Hand out batches with the layers of their level, and note which one runs."""
        for batch, index in parts:
            self._running = (index, len(batch), self._row_tokens(batch))
            yield batch, self.levels[index].checkpointed_layers

    def _row_tokens(self, batch: Batch) -> int:
        """Padded tokens of a row, or of a longer one with the planned share of targets."""
        targets = batch.target_rows.shape[1]
        return max(batch.labels.shape[1], round(targets / self._target_share))

    def _cut(self, batch: Batch, step_input: StepInput) -> Iterator[tuple[Batch, int]]:
        """Choose a level for a batch, and collate it again in pieces where it is too large."""
        rows, row_tokens = len(batch), self._row_tokens(batch)
        enough = min(rows * row_tokens, max(row_tokens, BUSY_TOKENS))
        # Better whole at the next level than in small pieces, but better in pieces than beyond
        # what was planned.
        index = self._find_level(enough)
        if index is None:
            index = self._find_level(row_tokens)
        if index is None:
            index = len(self.levels) - 1
        fitting = max(1, self.levels[index].max_tokens // row_tokens)
        if rows <= fitting:
            yield batch, index
            return
        examples = {example.key: example for example in step_input.examples}
        size = -(-rows // -(-rows // fitting))  # pieces of one size, or nearly
        for start in range(0, rows, size):
            keys = batch.keys[start : start + size]
            yield self._collate([examples[key] for key in keys]), index

    def _find_level(self, tokens: int) -> int | None:
        return next((i for i, level in enumerate(self.levels) if level.max_tokens >= tokens), None)

    def _spare(self, step_input: StepInput) -> None:
        """Note that what ran last does not fit: fewer rows at its level, or the next level."""
        index, rows, row_tokens = self._running
        level = self.levels[index]
        is_last = rows == 1 and index + 1 == len(self.levels)
        if is_last and self._is_second_try:
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
                f"out of memory with one example of {row_tokens} tokens; the layers of such are "
                f"computed twice from now on, {change}"
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
    """Call a function again, after freeing what can be freed, if memory runs out in it."""
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
