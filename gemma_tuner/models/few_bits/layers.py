"""Frozen layers of packed weights, which are unpacked where they are multiplied and never kept.

An unpacked matrix lives from the read of ``weight`` to the end of the product: in the forward
pass, in its recomputation, and in the backward pass, one layer at a time.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemma_tuner.errors import CheckpointError
from gemma_tuner.models.families import family_of
from gemma_tuner.models.few_bits.grids import Grid, Packed

_PILES = ("gate_up_proj", "down_proj")
_PACKABLE = re.compile(
    r"\d+\.((self_attn|mlp)\.\w+_proj|per_layer_(input_gate|projection)|experts)"
)


class FrozenLinear(torch.autograd.Function):
    """``x Wᵀ`` of a layer whose ``W`` is read again for the backward pass, not kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, layer: Any) -> Tensor:
        """Multiply ``[..., in]`` by ``[out, in]``, ``layer``'s weight."""
        ctx.layer = layer
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Differentiate by ``x``."""
        (of_output,) = grad_outputs
        return of_output @ ctx.layer.weight, None, None


def list_parts(module: str, weight: str) -> tuple[str, ...]:
    """Name what stands for a weight of a packed module, ``weight`` or a pile of experts."""
    start = f"{module}." if weight == "weight" else f"{module}.{weight}_"
    return tuple(start + part for part in Packed._fields)


class PackedLayer(nn.Module):
    """Buffers of packed weights."""

    is_traced = False
    """Whether tensors have no values: then experts share tokens evenly, and torch's own
    operators unpack."""

    def _register(self, name: str, packed: Packed) -> None:
        for part, tensor in zip(Packed._fields, packed, strict=True):
            self.register_buffer(name + part, tensor)

    def _find(self, name: str) -> Packed:
        # Not as attributes, which torch looks for in several places, hundreds of times a step.
        buffers: Any = self._buffers
        return Packed(*[buffers[name + part] for part in Packed._fields])


class PackedLinear(PackedLayer):
    """A linear layer without bias whose ``weight`` is made whenever it is read."""

    bias = None

    def __init__(self, packed: Packed, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        self.out_features, groups = packed.scales.shape
        self.in_features = groups * grid.group
        self._register("", packed)

    @property
    def weight(self) -> Tensor:
        """``[out, in]``, of the scales' dtype."""
        return self.grid.unpack(self._find(""), is_traced=self.is_traced)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that torch gives it
        """Multiply ``[..., in]`` by the weights."""
        return FrozenLinear.apply(input, self.weight, self)

    def extra_repr(self) -> str:
        """Say the shape and the grid."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, grid={self.grid}"
        )


class PackedExperts(PackedLayer):
    """Gemma 4's experts; one is unpacked when tokens are sent to it."""

    def __init__(self, experts: Any, gate_up: Packed, down: Packed, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        self.num_experts = experts.num_experts
        self.act_fn = experts.act_fn
        for name, packed in zip(_PILES, (gate_up, down), strict=True):
            self._register(f"{name}_", packed)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Send each of ``[tokens, hidden]`` through its experts and sum what they answer."""
        total = torch.zeros_like(hidden_states)
        tokens = len(hidden_states)
        # In the order of transformers' own loop: by expert, then by rank, then by token.
        chosen = top_k_index.T.flatten()
        order = chosen.argsort(stable=True)
        start = 0
        for expert, count in enumerate(self._count(chosen)):
            sent = order[start : start + count]
            start += count
            if not count:
                continue
            token, rank = sent % tokens, sent // tokens
            gate, up = self._multiply("gate_up_proj", expert, hidden_states[token]).chunk(2, -1)
            answer = self._multiply("down_proj", expert, self.act_fn(gate) * up)
            answer = answer * top_k_weights[token, rank, None]
            total.index_add_(0, token, answer.to(total.dtype))
        return total

    def _count(self, chosen: Tensor) -> list[int]:
        """How many tokens each expert gets; the layer's only wait for the device."""
        if self.is_traced:
            each, rest = divmod(len(chosen), self.num_experts)
            return [each + (expert < rest) for expert in range(self.num_experts)]
        return F.one_hot(chosen, self.num_experts + 1).sum(0)[:-1].tolist()

    def _multiply(self, name: str, expert: int, x: Tensor) -> Tensor:
        matrix = _Expert(self, f"{name}_", expert)
        return FrozenLinear.apply(x, matrix.weight, matrix)

    def read_expert(self, name: str, expert: int) -> Tensor:
        """Unpack one matrix of a pile, ``[out, in]``."""
        numbers, scales, biases = self._find(name)
        one = Packed(numbers[expert], scales[expert], None if biases is None else biases[expert])
        return self.grid.unpack(one, is_traced=self.is_traced)


class _Expert:
    """A matrix of a pile, as :class:`FrozenLinear` reads it."""

    def __init__(self, experts: PackedExperts, name: str, index: int) -> None:
        self._experts, self._name, self._index = experts, name, index

    @property
    def weight(self) -> Tensor:
        return self._experts.read_expert(self._name, self._index)


def make_parts(weight: Tensor, grid: Grid, *, is_filled: bool = True) -> Packed:
    """Pack a weight; unfilled, the parts are to be loaded."""
    if is_filled:
        return grid.pack(weight.detach())
    return grid.empty(*weight.shape, dtype=weight.dtype, device=weight.device)


def make_packed(layer: Any, grid: Grid, *, is_filled: bool = True) -> nn.Module:
    """Pack a linear layer or experts; unfilled, the packed layer is to be loaded."""
    if isinstance(layer, nn.Linear):
        return PackedLinear(make_parts(layer.weight, grid, is_filled=is_filled), grid)
    gate_up, down = (
        make_parts(getattr(layer, name), grid, is_filled=is_filled) for name in _PILES
    )
    return PackedExperts(layer, gate_up, down, grid)


def list_packable(gemma: Any, grid: Grid) -> dict[str, Grid]:
    """Name the decoder's large matrices that fit a grid: nearly all that a model weighs."""
    # Not its router, nor Gemma 3n's small mixers; towers and tables stay as they are.
    start = f"{family_of(gemma.config).decoder}.layers."
    named = _PACKABLE.fullmatch
    return {
        start + name: grid
        for name, module in gemma.get_decoder().layers.named_modules()
        if named(name) and all(grid.fits(weight.shape[-1]) for weight in module.parameters())
    }


def replace_packed(model: nn.Module, grids: Mapping[str, Grid], *, is_filled: bool = True) -> None:
    """Put packed layers in the places of those named."""
    for name, grid in grids.items():
        try:
            layer = model.get_submodule(name)
        except AttributeError:
            layer = None
        if not (isinstance(layer, nn.Linear) or all(hasattr(layer, pile) for pile in _PILES)):
            raise CheckpointError(f"{name} is named as packed, and is no layer of the model")
        model.set_submodule(name, make_packed(layer, grid, is_filled=is_filled))
