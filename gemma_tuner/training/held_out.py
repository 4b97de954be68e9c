"""The mean loss over every target token of held-out examples."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import islice
from typing import TYPE_CHECKING

import torch

from gemma_tuner.collators.batch import COUNTS, Batch
from gemma_tuner.errors import ConfigError
from gemma_tuner.records import Example
from gemma_tuner.training.feed import Stream
from gemma_tuner.training.loss import target_loss_sum
from gemma_tuner.training.metrics import EvalRecord
from gemma_tuner.training.processes import Processes

if TYPE_CHECKING:
    from peft import PeftModel


def measure_held_out(
    model: PeftModel,
    stream: Stream,
    collate: Callable[[Stream, Sequence[Example]], Batch | None],
    *,
    step: int,
    batch_size: int,
    chunk_tokens: int,
    processes: Processes,
) -> EvalRecord:
    """Measure the loss of a model on a stream, each process on its share.

    Args:
        model: Put into eval mode, and left in it.
        stream: Read in the order of its rows; its position is not touched.
        collate: Collates examples of a stream; None where none of them can be used.
        step: Optimizer steps done, for the record.
        batch_size: Examples in a forward pass; it does not change the result.
        chunk_tokens: As in ``target_loss_sum``.
        processes: The processes of the run.

    Returns:
        The loss in nats and its perplexity.

    Raises:
        ConfigError: None of the examples can be used.
        DataError: An example that cannot be used, beyond what the stream passes over.
    """
    rows = iter(stream.read_rows(range(processes.index, len(stream), processes.count)))
    loss_sum = torch.zeros((), device=processes.device)
    passed_over = stream.num_passed_over
    counts: Counter[str] = Counter()
    model.eval()
    with torch.no_grad():
        while read := list(islice(rows, batch_size)):
            batch = collate(stream, [example for example in read if example is not None])
            if batch is None:
                continue
            counts["examples"] += len(batch.keys)
            counts["target_tokens"] += batch.num_target_tokens
            counts.update(batch.counts)
            loss_sum += target_loss_sum(
                model, batch.to(processes.device), chunk_tokens=chunk_tokens
            )
    counts["passed_over"] = stream.num_passed_over - passed_over
    names = ("examples", "target_tokens", *COUNTS, "passed_over")
    sums = processes.sum_counts([counts[name] for name in names])
    num_examples, target_tokens, *cuts = sums
    if not target_tokens:
        raise ConfigError("no example of the held-out stream can be used; see its quarantine")
    loss = float(processes.sum_tensor(loss_sum)) / target_tokens
    return EvalRecord(
        step=step,
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        target_tokens=target_tokens,
        examples=num_examples,
        counts={name: cut for name, cut in zip(names[2:], cuts, strict=True) if cut},
    )
