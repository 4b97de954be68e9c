"""A decoder layer run at wanted positions: its keys and values everywhere, all else there.

Axes as in :mod:`gemma_tuner.models.target_only`, which wraps the forward of layers with these.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.models.gemma4.modeling_gemma4 import apply_rotary_pos_emb

from gemma_tuner.models.masks import AttentionMask

# How a layer is given keys and values that it does not make: where the family's layers can share
# them, as shared ones, and else by a cache.
SHARED, CACHED = "shared_kv_states", "past_key_values"


def can_share(attention: Any) -> bool:
    """Whether layers of its family can read keys and values of others."""
    return hasattr(attention, "is_kv_shared_layer")


def shares_keys(layer: Any) -> bool:
    """Whether a decoder layer reads keys and values of an earlier one."""
    return getattr(layer.self_attn, "is_kv_shared_layer", False)


class Rows:
    """The wanted positions, and cuts of tensors to them; each is made once a forward pass."""

    def __init__(self, rows: Tensor, length: int) -> None:
        self.shape = rows.shape
        starts = torch.arange(len(rows), device=rows.device) * length
        self.flat = (rows + starts.unsqueeze(1)).flatten()  # [B * M] into [B * S]
        self._rows = rows
        self._length = length
        self._cut: dict[tuple[str, str], Any] = {}

    def gather(self, tensor: Tensor) -> Tensor:
        """Cut ``[..., B, S, X]`` to ``[..., B, M, X]``."""
        cut = tensor.flatten(-3, -2).index_select(-2, self.flat)
        return cut.unflatten(-2, self.shape)

    def cut(self, attention: Any, arguments: dict[str, Any]) -> dict[str, Any]:
        """Cut a layer's arguments but its hidden states; keys and values stay whole."""
        kind = attention.layer_type
        cut = dict(arguments)
        if arguments.get("per_layer_input") is not None:
            cut["per_layer_input"] = self.gather(arguments["per_layer_input"])
        if ("mask", kind) not in self._cut:
            self._cut["mask", kind] = self._cut_mask(arguments["attention_mask"])
            self._cut["rotary", kind] = tuple(
                self.gather(x.expand(len(self._rows), -1, -1))
                for x in arguments["position_embeddings"]
            )
        cut["attention_mask"] = self._cut["mask", kind]
        cut["position_embeddings"] = self._cut["rotary", kind]
        return cut

    def _cut_mask(self, mask: AttentionMask | Tensor | None) -> AttentionMask | Tensor:
        """Cut ``[B or 1, 1, S, keys]`` to ``[B, 1, M, keys]``."""
        if isinstance(mask, AttentionMask):
            return mask.at(self._rows)
        if mask is None:  # transformers leaves it to a causal kernel, which needs all queries
            keys = torch.arange(self._length, device=self._rows.device)
            return (keys <= self._rows.unsqueeze(2)).unsqueeze(1)
        if mask.dim() != 4 or mask.shape[1] != 1:
            raise ValueError(f"attention mask of shape {list(mask.shape)}")
        return self.gather(mask.squeeze(1).expand(len(self._rows), -1, -1)).unsqueeze(1)


def run_sharer(layer: Any, rows: Rows, *args: Any, **kwargs: Any) -> Tensor:
    """Run a layer that makes no keys; its input holds the wanted rows already."""
    hidden, arguments = _name_arguments(layer, args, kwargs)
    # the class's forward checkpoints itself
    return type(layer).forward(layer, hidden, **rows.cut(layer.self_attn, arguments))


def run_owner(layer: Any, rows: Rows, *args: Any, **kwargs: Any) -> Tensor:
    """Run the last layer that makes keys and values: these everywhere, all else at rows."""
    hidden, arguments = _name_arguments(layer, args, kwargs)
    run = partial(_keys_everywhere, layer, rows, arguments, rows.cut(layer.self_attn, arguments))
    if layer.gradient_checkpointing and layer.training:
        return layer._gradient_checkpointing_func(run, hidden)  # noqa: SLF001
    return run(hidden)


def _keys_everywhere(
    layer: Any, rows: Rows, arguments: dict[str, Any], cut: dict[str, Any], hidden: Tensor
) -> Tensor:
    """What :func:`run_owner` checkpoints."""
    attention = layer.self_attn
    # Gemma 3n: hidden is [streams, B, S, H], of which attention reads the predicted active one
    source = (
        layer.altup.predict(hidden)[layer.config.altup_active_idx]
        if hasattr(layer, "altup")
        else hidden
    )
    states = _keys_and_values(
        attention, layer.input_layernorm(source), arguments["position_embeddings"]
    )
    plain_forward = inspect.unwrap(type(layer).forward)  # without its own checkpointing
    if not can_share(attention):
        cut = {**cut, CACHED: _Cache(states)}
        return plain_forward(layer, rows.gather(hidden), **cut)
    if attention.store_full_length_kv:
        arguments["shared_kv_states"][attention.layer_type] = states
    cut = {**cut, "shared_kv_states": {attention.layer_type: states}}
    stores = attention.store_full_length_kv
    attention.is_kv_shared_layer, attention.store_full_length_kv = True, False
    try:
        return plain_forward(layer, rows.gather(hidden), **cut)
    finally:
        attention.is_kv_shared_layer, attention.store_full_length_kv = False, stores


class _Cache:
    """Gives an attention keys and values of all positions for those that it has made at some."""

    def __init__(self, states: tuple[Tensor, Tensor]) -> None:
        self._states = states

    def update(self, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """What an attention calls with its own."""
        return self._states


def _keys_and_values(
    attention: Any, normed: Tensor, rotary: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Project ``[B, S, H]`` as the attention does: two of ``[B, heads, S, head size]``."""
    keys = attention.k_proj(normed).unflatten(-1, (-1, attention.head_dim))
    if attention.v_proj is None:  # full layers of the large families use keys as values
        values = keys
    else:
        values = attention.v_proj(normed).unflatten(-1, (-1, attention.head_dim))
    keys = apply_rotary_pos_emb(attention.k_norm(keys), *rotary, unsqueeze_dim=2)
    values = attention.v_norm(values) if hasattr(attention, "v_norm") else values
    return keys.transpose(1, 2), values.transpose(1, 2)


def _name_arguments(
    layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, dict[str, Any]]:
    """Tell hidden states from the other arguments, by name: families order them differently."""
    bound = inspect.signature(type(layer).forward).bind(layer, *args, **kwargs)
    named = dict(bound.arguments)
    named.update(named.pop("kwargs", {}))
    del named["self"]
    return named.pop("hidden_states"), named
