"""Going on when the device has no memory for a micro-batch.

A step's gradient is a sum over its micro-batches, so it does not depend on how they are cut. When
one does not fit, what the step has summed so far is thrown away, its micro-batches are collated
again at half the size, and the step begins anew; the run then keeps to the smaller size.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch.utils.checkpoint import _CheckpointFrame  # pyright: ignore[reportPrivateUsage]

from gemma_tuner.collators.batch import Batch
from gemma_tuner.device import empty_cache, is_out_of_memory, memory_used_bytes
from gemma_tuner.errors import MemoryPlanError
from gemma_tuner.records import Example
from gemma_tuner.training.feed import StepInput

T = TypeVar("T")


class MicroBatchSize:
    """How many examples fit the device at one time, as the run has found out.

    Args:
        batch_size: What the user asked for.
        device: Where training runs.
        collate: Makes a batch of examples that have been collated before.

    Attributes:
        value: Examples that are tried at one time; halved when they do not fit.
        num_halvings: How often that was.
    """

    def __init__(
        self, batch_size: int, device: torch.device, collate: Callable[[Sequence[Example]], Batch]
    ) -> None:
        self.value = batch_size
        self.num_halvings = 0
        self._device = device
        self._collate = collate
        self._messages: list[str] = []

    def run(self, accumulate: Callable[[Sequence[Batch]], T], step_input: StepInput) -> T:
        """Run micro-batches, cutting them until they fit.

        Args:
            accumulate: Runs all of a step's micro-batches. It is called again from the start, so
                it has to throw away what an earlier call left.
            step_input: The step.

        Returns:
            What ``accumulate`` returned.

        Raises:
            MemoryPlanError: A single example does not fit.
            RuntimeError: Any other that ``accumulate`` raises.
        """
        while True:
            batches = tuple(self._cut(step_input))
            try:
                return accumulate(batches)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            # Not above: while the error is handled, its traceback holds the step's tensors.
            _free(self._device)
            self._halve(batches)

    def take_messages(self) -> list[str]:
        """What has been done since this was last asked, in sentences for the user."""
        messages, self._messages = self._messages, []
        return messages

    def _cut(self, step_input: StepInput) -> Iterator[Batch]:
        """Collate again what was collated at a larger size."""
        examples = {example.key: example for example in step_input.examples}
        for batch in step_input.micro_batches:
            if len(batch) <= self.value:
                yield batch
                continue
            for start in range(0, len(batch), self.value):
                keys = batch.keys[start : start + self.value]
                yield self._collate([examples[key] for key in keys])

    def _halve(self, batches: Sequence[Batch]) -> None:
        largest = max(batches, key=lambda batch: batch.labels.numel())
        size = max(len(batch) for batch in batches)
        if size == 1:
            held = memory_used_bytes(self._device) / 2**30
            raise MemoryPlanError(
                f"a micro-batch of one example does not fit on {self._device}, of whose memory "
                f"{held:.2f} GiB are held between steps; the longest of the step, "
                f"{largest.keys[0]!r}, has {largest.num_tokens} tokens. What helps: the "
                "collator's max_tokens, image_tokens or max_seconds, gradient_checkpointing=True, "
                "a smaller loss_chunk_tokens, a smaller LoRA rank or fewer layers, a smaller model"
            )
        before, self.value = size, (size + 1) // 2
        self.num_halvings += 1
        self._messages.append(
            f"out of memory with {before} examples at a time; going on with {self.value}, which "
            "changes the speed and not the gradient"
        )


def retry_once(function: Callable[..., T], *arguments: object, device: torch.device) -> T:
    """Call a function again, after freeing what can be freed, if memory runs out in it.

    Args:
        function: What to call; it takes its memory before it changes anything.
        *arguments: Its arguments.
        device: Where it runs.

    Returns:
        What the function returned.

    Raises:
        RuntimeError: Any other that the function raises, or the second for want of memory.
    """
    try:
        return function(*arguments)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    _free(device)
    return function(*arguments)


def _free(device: torch.device) -> None:
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
