"""The mean loss over every target token of held-out examples."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gemma_tuner.batch import COUNTS, Batch
from gemma_tuner.errors import ConfigError
from gemma_tuner.records import Example
from gemma_tuner.streaming.quarantine import count_reasons
from gemma_tuner.training.feed import StepInput, Stream
from gemma_tuner.training.micro_batches import MicroBatch, MicroBatches, retry_once
from gemma_tuner.training.processes import Processes
from gemma_tuner.training.reporting.metrics import EvalRecord

if TYPE_CHECKING:
    from peft import PeftModel


def measure_held_out(
    model: PeftModel,
    stream: Stream,
    collate: Callable[[Stream, Sequence[Example]], Batch | None],
    loss_sum_of: Callable[[Batch], Tensor],
    *,
    step: int,
    batch_size: int,
    processes: Processes,
) -> EvalRecord:
    """Measure the loss of a model on a stream, each process on its share."""
    # loss_sum_of: Sums the losses of a batch that is on the CPU, ``[]`` float32.
    rows = iter(stream.read_rows(range(processes.index, len(stream), processes.count)))
    device = processes.device
    loss_sum = retry_once(partial(torch.zeros, (), device=device), device=device)
    passed_over = stream.num_passed_over
    counts: Counter[str] = Counter()
    micro = MicroBatches(device, partial(_collate_again, collate, stream))

    def add_losses(batches: Iterable[MicroBatch]) -> Tensor:
        total = loss_sum.clone()  # called again where memory runs out
        for batch, _ in batches:
            total += loss_sum_of(batch)
        return total

    model.eval()
    with torch.no_grad():
        while read := list(islice(rows, batch_size)):
            examples = tuple(example for example in read if example is not None)
            batch = collate(stream, examples)
            if batch is None:
                continue
            counts["examples"] += len(batch.keys)
            counts["target_tokens"] += batch.num_target_tokens
            counts.update(batch.counts)
            loss_sum = micro.run(add_losses, StepInput((batch,), examples, len(read), 0, {}))
    counts["out_of_memory"] = micro.num_retries
    counts["passed_over"] = stream.num_passed_over - passed_over
    names = ("examples", "target_tokens", *COUNTS, "passed_over", "out_of_memory")
    *sums, summed_loss = processes.sum_numbers(
        [*(counts[name] for name in names), float(loss_sum)]
    )
    num_examples, target_tokens, *cuts = map(int, sums)
    if not target_tokens:
        reasons = count_reasons(stream.inspect_quarantine())
        raise ConfigError(f"no example of the held-out stream can be used: {reasons}")
    loss = summed_loss / target_tokens
    return EvalRecord(
        step=step,
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        target_tokens=target_tokens,
        examples=num_examples,
        counts={name: cut for name, cut in zip(names[2:], cuts, strict=True) if cut},
    )


def _collate_again(
    collate: Callable[[Stream, Sequence[Example]], Batch | None],
    stream: Stream,
    examples: Sequence[Example],
) -> Batch:
    """Collate some of what has been collated before."""
    batch = collate(stream, examples)
    if batch is None:
        raise ConfigError("the collator refuses examples that it has taken before")
    return batch
