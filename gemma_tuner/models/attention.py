"""Attention with explicit masks, in which sliding layers look at their band only.

Axes: ``B`` rows, ``H`` heads, ``S`` positions, ``Q`` queries, ``K`` keys, ``D`` head size, ``N``
blocks of ``b`` positions, ``W`` keys that a block may see.

Three of four layers and more see the last 512 or 1024 positions only. transformers computes their
scores against all keys and masks most of them out; here each block of queries meets the keys that
it may see, and no tensor of S x S elements is made. Full layers take their queries in parts, as no
part needs the keys behind it; these can be recomputed in backward, so that no more than one part's
scores are alive.

A mask is always given to the kernel, as ``is_causal`` is wrong on MPS for some shapes. Source:
pytorch issues 174861 and 169222.

Relied on in transformers 5.23: keyword arguments of the model's forward reach the attention.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from gemma_tuner.errors import ConfigError
from gemma_tuner.models.masks import AttentionMask, make_mask

if TYPE_CHECKING:
    from torch.nn import Module

ATTENTION = "gemma_tuner"
"""The name of this attention, as ``_attn_implementation`` of a configuration."""

_PART_TOKENS = 512
"""Queries that meet the keys up to the last of them: fewer save little and wait for the host."""

_VISION = "gemma4_vision"  # the one tower whose attention goes through transformers' interface


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: AttentionMask | Tensor,
    *,
    sliding_window: int | None = None,
    has_images: bool = True,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute a layer's attention, as transformers' attention interface has it."""
    # query: ``[B, H, Q, D]``.
    # key: ``[B, key heads, K, D]``.
    # attention_mask: Of ``make_mask``, or ``[B or 1, 1, Q, K]`` as a kernel takes it.
    # Returns: ``[B, Q, H, D]``, and no weights.
    run = partial(sdpa_attention_forward, module, **kwargs)
    if isinstance(attention_mask, Tensor):
        return run(query, key, value, attention_mask)
    length = query.shape[2]
    two_ways = getattr(module.config, "use_bidirectional_attention", None) is not None
    looks_back = attention_mask.is_whole and module.is_causal and not (two_ways and has_images)
    chunk: int | None = getattr(module, "query_chunk_tokens", None)
    part = chunk or (_PART_TOKENS if looks_back else length)
    if looks_back and sliding_window is not None:
        block, width = choose_blocks(sliding_window)
        if -(-length // block) * block * width < _count_scores(length, part):
            return _attend_band(
                run, query, key, value, attention_mask, block=block, width=width, chunk=chunk
            ), None
    if length <= part:
        return run(query, key, value, attention_mask.dense())
    parts = []
    for start, stop in _cut_evenly(length, part):
        num_keys = stop if looks_back else attention_mask.num_keys
        tensors = query[:, :, start:stop], key[:, :, :num_keys], value[:, :, :num_keys]
        if chunk is None:
            mask = attention_mask.dense()[:, :, start:stop, :num_keys]
            parts.append(run(*tensors, mask)[0])
        else:
            make = partial(attention_mask.part, slice(start, stop), num_keys)
            parts.append(_recomputed(partial(_attend_part, run, make), *tensors))
    return torch.cat(parts, dim=1), None


def use_attention(model: Any) -> None:
    """Let a model's decoder, and a vision tower that can, use this attention."""
    AttentionInterface.register(ATTENTION, attend)
    AttentionMaskInterface.register(ATTENTION, make_mask)
    config = model.config
    parts = {"" if config.get_text_config() is config else "text_config": ATTENTION}
    if getattr(getattr(config, "vision_config", None), "model_type", None) == _VISION:
        parts["vision_config"] = ATTENTION
    model.set_attn_implementation(parts)


def set_query_chunk(model: Module, tokens: int | None) -> None:
    """Choose how many queries the decoder's layers take at a time."""
    # The scores of each chunk are computed again in backward: less memory, more time. What takes
    # fewer queries is not cut.
    if tokens is not None and tokens < 1:
        raise ConfigError(f"a query chunk of {tokens} tokens; give at least 1, or None for all")
    gemma: Any = model
    for layer in gemma.get_decoder().layers:
        layer.self_attn.query_chunk_tokens = tokens


def _cut_evenly(length: int, most: int) -> list[tuple[int, int]]:
    """Cut a length into as few spans as hold at most so many each."""
    count = -(-length // most)
    return [(i * length // count, (i + 1) * length // count) for i in range(count)]


def _count_scores(length: int, part: int) -> int:
    """How many scores there are of queries in parts and the keys up to each part's end."""
    return sum((stop - start) * stop for start, stop in _cut_evenly(length, part))


def choose_blocks(window: int) -> tuple[int, int]:
    """Choose how many queries meet how many keys."""
    # Small blocks meet few keys that they may not see, but copy each key into more of them: half
    # a window takes the least memory.
    block = max(1, window // 2)
    before = -(-(window - 1) // block)
    return block, (before + 1) * block


def _attend_band(
    run: Callable[..., tuple[Tensor, None]],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: AttentionMask,
    *,
    block: int,
    width: int,
    chunk: int | None,
) -> Tensor:
    """Let each block of queries meet the keys up to its end: ``[B, S, H, D]``."""
    length = query.shape[2]
    num_blocks = -(-length // block)
    missing, before = num_blocks * block - length, width - block
    query = pad(query, (0, 0, 0, missing))
    key, value = (pad(x, (0, 0, before, missing)) for x in (key, value))
    step = num_blocks if chunk is None else max(1, chunk // block)
    parts = []
    for first in range(0, num_blocks, step):
        count = min(step, num_blocks - first)
        queries = slice(first * block, (first + count) * block)
        keys = slice(first * block, (first + count) * block + before)
        attend_blocks = partial(
            _attend_blocks, run, mask, first=first, count=count, block=block, width=width
        )
        tensors = query[:, :, queries], key[:, :, keys], value[:, :, keys]
        is_whole = count == num_blocks
        parts.append(attend_blocks(*tensors) if is_whole else _recomputed(attend_blocks, *tensors))
    return torch.cat(parts, dim=1)[:, :length] if len(parts) > 1 else parts[0][:, :length]


def _attend_blocks(
    run: Callable[..., tuple[Tensor, None]],
    mask: AttentionMask,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    first: int,
    count: int,
    block: int,
    width: int,
) -> Tensor:
    """Fold blocks into the batch and attend: ``[B, count * block, H, D]``."""
    output, _ = run(
        query.unflatten(2, (count, block)).transpose(1, 2).flatten(0, 1),
        _fold_keys(key, count, block, width),
        _fold_keys(value, count, block, width),
        mask.band(first, count, block, width),
    )
    return output.unflatten(0, (-1, count)).flatten(1, 2)


def _fold_keys(keys: Tensor, count: int, block: int, width: int) -> Tensor:
    """Lay keys of blocks out, overlapping: ``[B * count, heads, width, D]``."""
    blocks = keys.unflatten(2, (-1, block))
    spans = [blocks[:, :, start : start + count] for start in range(width // block)]
    return torch.cat(spans, dim=3).transpose(1, 2).flatten(0, 1)


def _attend_part(
    run: Callable[..., tuple[Tensor, None]],
    make: Callable[[], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
) -> Tensor:
    return run(query, key, value, make())[0]


def _recomputed(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Keep nothing of a function but its inputs for backward."""
    if not torch.is_grad_enabled():
        return function(*tensors)
    # Attention drops nothing, in eval mode and by Gemma's configurations: no random state to keep.
    return checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=False)
