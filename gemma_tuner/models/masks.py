"""Lazy attention masks: built only for the queries and keys that a layer uses.

Axes: ``B`` rows, ``Q`` queries, ``K`` keys.

What may see what is what transformers says: its own mask functions are asked, at any positions, so
that no mask of all queries and keys need be made. Making one asks nothing of the device.

Relied on in transformers 5.23: a mask function answers for indices of any shapes that broadcast;
what a mask interface returns reaches the layers as it is, or sliced by ``[:, :, queries, :]``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import and_masks, padding_mask_function, prepare_padding_mask


class AttentionMask:
    """Which keys each query may see: what is asked to make a mask, not the mask itself.

    A query that may see nothing sees itself, as some kernels would answer it with NaN. Only
    padding is such a query, and nobody reads what it becomes.

    Args:
        queries: ``[1 or B, Q]`` int64: the position of each query.
    """

    def __init__(
        self,
        may_see: Callable[..., Tensor],
        batch_size: int,
        queries: Tensor,
        num_keys: int,
        first_key: int = 0,
        *,
        is_whole: bool,
    ) -> None:
        self._may_see = may_see
        self._batch_size = batch_size
        self._queries = queries
        self._first_key = first_key
        self._made: dict[tuple[int, ...], Tensor] = {}  # by all layers that ask for the same
        self.num_keys = num_keys
        self.is_whole = is_whole

    def __getitem__(self, index: tuple[slice, slice, slice, slice]) -> AttentionMask:
        """Cut to some queries, as transformers cuts a mask of ``[B, 1, Q, K]``."""
        queries = self._queries[:, index[2]]
        return self if queries.shape == self._queries.shape else self._with_queries(queries)

    def at(self, rows: Tensor) -> AttentionMask:
        """The mask of other queries."""
        # rows: ``[B, M]`` int64: their positions.
        return self._with_queries(rows)

    def _with_queries(self, queries: Tensor) -> AttentionMask:
        return AttentionMask(
            self._may_see,
            self._batch_size,
            queries,
            self.num_keys,
            self._first_key,
            is_whole=False,
        )

    def dense(self) -> Tensor:
        """Make the mask of all queries and keys, once: ``[B, 1, Q, K]`` bool."""
        if () not in self._made:
            self._made[()] = self.part(slice(None), self.num_keys)
        return self._made[()]

    def part(self, queries: slice, num_keys: int) -> Tensor:
        """Make the mask of some queries and the first keys: ``[B, 1, queries, num_keys]`` bool."""
        positions = self._queries[:, queries]
        keys = torch.arange(num_keys, device=positions.device) + self._first_key
        return self._ask(positions[:, None, :, None], keys[None, None, None, :])

    def band(self, first: int, num_blocks: int, block: int, width: int) -> Tensor:
        """Make the mask of blocks of queries and the keys up to each block's end."""
        # Returns: ``[B * num_blocks, 1, block, width]`` bool.
        wanted = (first, num_blocks, block, width)
        if wanted not in self._made:
            device = self._queries.device
            ends = (torch.arange(num_blocks, device=device) + first + 1) * block
            queries = (ends - block)[:, None] + torch.arange(block, device=device)
            keys = (ends - width)[:, None] + torch.arange(width, device=device)
            self._made[wanted] = self._ask(queries[None, :, :, None], keys[None, :, None, :])
        return self._made[wanted].flatten(0, 1).unsqueeze(1)

    def _ask(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Ask for positions that broadcast to ``[B or 1, any, queries, keys]``."""
        last = self._first_key + self.num_keys - 1
        rows = torch.arange(self._batch_size, device=keys.device)[:, None, None, None]
        # Positions before the first key or behind the last are padding of blocks.
        seen = self._may_see(
            rows, rows.new_zeros(()), queries.clamp(max=last), keys.clamp(self._first_key, last)
        )
        seen = seen & (keys >= self._first_key) & (keys <= last)
        seen = seen | (queries == keys) & ~seen.any(-1, keepdim=True)
        shape = torch.broadcast_shapes(rows.shape, queries.shape, keys.shape)
        return seen.expand(shape)


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    *,
    mask_function: Callable[..., Tensor],
    attention_mask: Tensor | None = None,
    device: torch.device | str,
    **_: Any,
) -> AttentionMask:
    """Note what transformers asks of a mask interface; nothing is computed yet."""
    # attention_mask: ``[B, tokens]`` bool: what is not padding.
    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is not None:
        mask_function = and_masks(mask_function, padding_mask_function(padding))
    queries = (torch.arange(q_length, device=device) + q_offset).unsqueeze(0)
    starts_at_zero = isinstance(q_offset, int) and q_offset == kv_offset == 0
    return AttentionMask(
        mask_function,
        batch_size,
        queries,
        kv_length,
        kv_offset,
        is_whole=starts_at_zero and q_length == kv_length,
    )
