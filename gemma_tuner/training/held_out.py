"""The mean loss over every target token of held-out examples."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from gemma_tuner.training.feed import Collate, Stream
from gemma_tuner.training.loss import target_loss_sum
from gemma_tuner.training.metrics import EvalRecord
from gemma_tuner.training.processes import Processes

if TYPE_CHECKING:
    from peft import PeftModel


def measure_held_out(
    model: PeftModel,
    stream: Stream,
    collate: Collate,
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
        collate: The collator.
        step: Optimizer steps done, for the record.
        batch_size: Examples in a forward pass; it does not change the result.
        chunk_tokens: As in ``target_loss_sum``.
        processes: The processes of the run.

    Returns:
        The loss in nats and its perplexity.

    Raises:
        DataError: An example that cannot be used.
    """
    indices = range(processes.index, len(stream), processes.count)
    loss_sum = torch.zeros((), device=processes.device)
    target_tokens = 0
    model.eval()
    with torch.no_grad():
        for start in range(0, len(indices), batch_size):
            rows = indices[start : start + batch_size]
            batch = collate([stream[index] for index in rows])
            target_tokens += batch.num_target_tokens
            loss_sum += target_loss_sum(
                model, batch.to(processes.device), chunk_tokens=chunk_tokens
            )
    target_tokens = processes.sum_count(target_tokens)
    loss = float(processes.sum_tensor(loss_sum)) / target_tokens
    return EvalRecord(
        step=step,
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        target_tokens=target_tokens,
        examples=len(stream),
    )
