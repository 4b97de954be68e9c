"""Summed cross-entropy at the target positions, without ever holding their logits.

Axes: ``N`` target tokens, ``H`` hidden size, ``V`` vocabulary.

With 262,144 tokens in the vocabulary the logits, not the weights, fill a laptop: one fp32 row is a
mebibyte, and a plain step keeps several copies for every position of the sequence. Here only
positions that predict a target reach the head, a few rows at a time, and the gradient with respect
to the hidden states is computed in the same pass, so that nothing of size ``V`` outlives its
chunk. That needs a frozen head, which LoRA's is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from gemma_tuner.batch import IGNORED, Batch
from gemma_tuner.errors import ConfigError
from gemma_tuner.models.few_bits.tables import PackedHead, PackedRows, list_blocks
from gemma_tuner.models.lora import unwrap_peft
from gemma_tuner.models.lora_linear import is_linear
from gemma_tuner.models.target_only import target_only_of

if TYPE_CHECKING:
    from torch.nn import Module


class Loss(Protocol):
    """What a run minimises, by the target tokens of each optimizer step."""

    def __call__(self, model: Module, batch: Batch, *, chunk_tokens: int) -> Tensor:
        """Sum the losses of a batch's target tokens, a scalar that autograd follows."""
        ...


def target_loss_sum(model: Module, batch: Batch, *, chunk_tokens: int) -> Tensor:
    """Sum the cross-entropy of a batch's target tokens, ``chunk_tokens`` of them at a time."""
    # Returns: A float32 scalar: the sum, not the mean, over target tokens. Divided by the number
    # of targets of the whole optimizer step, every token weighs the same however they are batched.
    gemma = unwrap_peft(model)
    head = gemma.get_output_embeddings()
    if not (is_linear(head) or isinstance(head, PackedHead)) or head.weight.requires_grad:
        raise ConfigError(
            "the vocabulary head (lm_head) is trainable or has an adapter, of which this loss "
            "knows nothing; leave it out of the adapter (gemma_tuner's targets never include it)"
        )
    # [N, H], in the order of the ids; where an id is IGNORED, the state of some other position.
    predicting = target_only_of(gemma).hidden_states(
        batch.inputs, batch.target_rows, batch.target_slots
    )
    softcap = gemma.config.get_text_config().final_logit_softcapping
    return FrozenHeadCrossEntropy.apply(
        predicting, head.weight, batch.target_ids, softcap, chunk_tokens
    )


class FrozenHeadCrossEntropy(torch.autograd.Function):
    """Chunked, soft-capped cross-entropy of a frozen head; its gradient is made in the forward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor | PackedRows,
        target_ids: Tensor,
        softcap: float | None,
        chunk_tokens: int,
    ) -> Tensor:
        """Sum the losses of ``hidden`` ``[N, H]`` against ``target_ids`` ``[N]``."""
        # hidden: ``[N, H]``, any float dtype.
        # weight: ``[V, H]``, the frozen head; read in blocks of rows, once for the scores of a
        # chunk and once for its gradient.
        # target_ids: ``[N]`` int64, ``IGNORED`` where there is no target.
        # Returns: A float32 scalar.
        wants_gradient = ctx.needs_input_grad[0]
        # Kept in float32 until it is scaled: rounded twice, it would lean to one side.
        gradient = torch.empty_like(hidden, dtype=torch.float32) if wants_gradient else None
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(hidden), chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            counted = (target_ids[rows] != IGNORED).unsqueeze(1)
            safe_ids = target_ids[rows].clamp_min(0).unsqueeze(1)
            logits = score(hidden[rows], weight, softcap)
            normalizer = torch.logsumexp(logits, dim=1, keepdim=True)
            losses = normalizer - logits.gather(1, safe_ids)
            total += losses.masked_fill(~counted, 0.0).sum()
            if gradient is not None:
                gradient[rows] = _hidden_gradient(
                    logits, normalizer, safe_ids, counted, weight, softcap
                )
        ctx.save_for_backward(gradient)
        ctx.dtype = hidden.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradient that the forward pass made."""
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_outputs[0]).to(ctx.dtype), None, None, None, None


def score(hidden: Tensor, weight: Tensor | PackedRows, softcap: float | None) -> Tensor:
    """Score every token of the vocabulary after ``hidden`` ``[rows, H]``, soft-capped."""
    # Returns: ``[rows, V]`` float32, the one large tensor.
    logits = hidden.new_empty(len(hidden), weight.shape[0], dtype=torch.float32)
    for block in list_blocks(weight):
        logits[:, block] = hidden @ weight[block].T
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    return logits


def _hidden_gradient(
    logits: Tensor,
    normalizer: Tensor,
    target_ids: Tensor,
    counted: Tensor,
    weight: Tensor | PackedRows,
    softcap: float | None,
) -> Tensor:
    """Differentiate the summed loss by the hidden states, in blocks of the vocabulary."""
    # Blocks keep each matmul's reduction short and its temporaries small.
    # logits: ``[rows, V]`` float32, soft-capped.
    # normalizer: ``[rows, 1]`` float32, their log-sum-exp.
    # target_ids: ``[rows, 1]`` int64.
    # counted: ``[rows, 1]`` bool, False for rows without a target.
    # weight: ``[V, H]``.
    # Returns: ``[rows, H]`` float32.
    gradient = logits.new_zeros(len(logits), weight.shape[1])
    for block in list_blocks(weight):
        capped = logits[:, block]
        slope = torch.exp(capped - normalizer)  # softmax; becomes d loss / d logits
        local_ids = target_ids - block.start
        inside = (local_ids >= 0) & (local_ids < slope.shape[1])
        slope.scatter_add_(1, local_ids.clamp(0, slope.shape[1] - 1), -inside.to(slope.dtype))
        if softcap is not None:  # d capped / d logits = 1 - tanh² = 1 - (capped / c)²
            slope.mul_(1.0 - (capped / softcap).square_())
        slope.masked_fill_(~counted, 0.0)
        gradient += (slope.to(weight.dtype) @ weight[block]).float()
    return gradient
