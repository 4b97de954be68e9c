"""Find the fastest way to train that fits, by trying steps without weights.

What may be chosen changes no gradient: how many decoder layers compute their activations again in
the backward pass, how many rows of the vocabulary head exist at a time, in what chunks queries
attend, and how a step's examples are cut into micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from gemma_tuner.batch import Batch, Row, pad_rows
from gemma_tuner.models.loss import Loss, target_loss_sum
from gemma_tuner.planning.trace import Footprint, StepTracer

BUSY_TOKENS = 1024
"""Fewer tokens at a time leave a device waiting for its host."""

LOSS_CHUNKS = (256, 64)
"""Rows of the vocabulary head at a time, the faster first."""

_QUERY_CHUNK = 256


@dataclass(frozen=True, slots=True)
class CheckpointingLevel:
    """How many layers are checkpointed for micro-batches up to a size.

    Args:
        checkpointed_layers: Decoder layers, from the first on, that keep only their inputs.
        max_tokens: Padded tokens of the largest micro-batch that fits so; 0 for a level that was
            not planned, where a row is tried alone that no other level holds.
    """

    checkpointed_layers: int
    max_tokens: int


ANY_SIZE = CheckpointingLevel(0, 2**62)
"""Nothing is checkpointed, however large."""


def widen(example: Batch, *, rows: int, tokens: int, target_share: float) -> Batch:
    """Make the largest micro-batch that a plan allows out of one example."""
    (length,) = example.inputs["attention_mask"].sum(1).tolist()
    tokens = max(tokens, length)
    by_token = {
        name: tensor[0, :length]
        for name, tensor in example.inputs.items()
        if tensor.dtype == torch.int64 and tensor.shape == example.labels.shape
    }
    ids = by_token["input_ids"]
    type_name = next(iter(by_token.keys() - {"input_ids", "attention_mask"}), None)
    text = torch.full((tokens - length,), int(ids[0]))
    row = Row(
        key="",
        input_ids=torch.cat([ids, text]),
        token_types=torch.cat([by_token.get(type_name or "", ids * 0), torch.zeros_like(text)]),
        targets=torch.arange(tokens) >= tokens - max(1, round(target_share * tokens)),
        media={name: x for name, x in example.inputs.items() if name not in by_token},
    )
    return pad_rows([row] * rows, max_tokens=tokens, pad_token_id=0, token_type_name=type_name)


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What a run asks for, within which a plan chooses.

    Args:
        batch_size: Rows of the largest micro-batch.
        max_tokens: The longest row.
        target_share: Target tokens of all tokens in a row.
        checkpointing: True or False where the user has decided; None leaves it to the plan.
        loss_chunk_tokens: The same.
        memory_gib: What the device may hold, in GiB; None asks the device.
        state_bytes: What the optimizer keeps for each byte that it trains; AdamW two moments.
        loss: Sums the losses of a batch.
    """

    batch_size: int
    max_tokens: int
    target_share: float
    checkpointing: bool | None = None
    loss_chunk_tokens: int | None = None
    memory_gib: float | None = None
    state_bytes: float = 2.0
    loss: Loss = target_loss_sum


@dataclass(frozen=True, slots=True)
class PlanChoice:
    """What :func:`choose` has found; the fields are those of :class:`Plan`."""

    levels: tuple[CheckpointingLevel, ...]
    loss_chunk_tokens: int
    query_chunk_tokens: int | None
    footprint: Footprint


def choose(
    step: StepTracer,
    example: Batch,
    request: PlanRequest,
    *,
    layer_counts: Sequence[int],
    usable: int,
) -> PlanChoice | None:
    """Find the fastest way to train that fits; None where not even one longest row does."""
    if step.resident_bytes >= usable:
        return None
    if request.checkpointing is not None:
        layer_counts = layer_counts[-1:] if request.checkpointing else layer_counts[:1]
    chunks = [request.loss_chunk_tokens] if request.loss_chunk_tokens else LOSS_CHUNKS
    settings = [(chunk, None) for chunk in chunks] + [(chunks[-1], _QUERY_CHUNK)]
    row = widen(example, rows=1, tokens=request.max_tokens, target_share=request.target_share)
    for loss_chunk, query_chunk in settings:
        trial = _Trial(step, example, request, loss_chunk, query_chunk, usable)
        if any(trial.holds_one(layers) for layers in layer_counts):
            levels = tuple(trial.find_levels(layer_counts))
            return PlanChoice(levels, loss_chunk, query_chunk, trial.measure_largest(levels[-1]))
        if step.measure_least(row) > usable:
            return None
    return None


@dataclass(frozen=True, slots=True)
class _Trial:
    """Tries micro-batches with fixed chunks."""

    step: StepTracer
    example: Batch
    request: PlanRequest
    loss_chunk_tokens: int
    query_chunk_tokens: int | None
    usable: int

    def holds_one(self, layers: int) -> bool:
        """Whether one of the longest rows fits at a number of checkpointed layers."""
        return self._measure(layers, 1, self.request.max_tokens).peak_bytes <= self.usable

    def find_levels(self, layer_counts: Sequence[int]) -> Iterator[CheckpointingLevel]:
        """Go from fast to sparing until one holds what keeps a device busy."""
        longest = self.request.max_tokens
        enough = min(self.request.batch_size * longest, max(longest, BUSY_TOKENS))
        held = 0
        for layers in layer_counts:
            tokens = self._find_tokens(layers)
            if tokens > held:
                held = tokens
                yield CheckpointingLevel(layers, tokens)
            if held >= enough:
                return

    def measure_largest(self, level: CheckpointingLevel) -> Footprint:
        """What the largest micro-batch of the longest rows holds at a level."""
        rows = min(self.request.batch_size, level.max_tokens // self.request.max_tokens)
        return self._measure(level.checkpointed_layers, rows, self.request.max_tokens)

    def _find_tokens(self, layers: int) -> int:
        """Find how many padded tokens fit at a number of checkpointed layers; 0 for too few."""
        # Bytes are linear in rows. In a row's tokens they are nearly convex, as attention grows
        # with their square and all else with them, so that the straight line between two lengths
        # lies above; but sliding layers grow by blocks of queries, so the length found by it is
        # tried.
        rows, longest = self.request.batch_size, self.request.max_tokens
        one = self._measure(layers, 1, longest).peak_bytes
        if one > self.usable:
            half = self._measure(layers, 1, longest // 2).peak_bytes
            if half > self.usable:
                return 0
            share = (self.usable - half) / (one - half)
            tokens = int((1 + share) * (longest // 2))
            while self._measure(layers, 1, tokens).peak_bytes > self.usable:
                tokens = max(longest // 2, tokens - max(1, longest // 16))
            return tokens
        if rows == 1:
            return longest
        another = self._measure(layers, 2, longest).peak_bytes - one
        more = (self.usable - one) // max(1, another)
        return min(rows, 1 + more) * longest

    def _measure(self, layers: int, rows: int, tokens: int) -> Footprint:
        return self.step.measure(
            widen(self.example, rows=rows, tokens=tokens, target_share=self.request.target_share),
            checkpointed_layers=layers,
            loss_chunk_tokens=self.loss_chunk_tokens,
            query_chunk_tokens=self.query_chunk_tokens,
        )
