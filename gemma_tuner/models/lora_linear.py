"""PEFT's adapters with fewer passes over what flows through them.

PEFT writes an adapter as two products, a scaling and a sum, and beside a bfloat16 layer turns the
layer's input and the adapter's output into float32: passes over tensors as wide as the MLP, which
cost more than the adapter. Here sums are made where the products are, forward and backward, and
float32 weights are rounded where they are multiplied, as autocast would do.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners import lora
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from gemma_tuner.errors import ConfigError
from gemma_tuner.models.few_bits.layers import PackedLinear


@register_flop_formula(torch.ops.aten.addmm_, get_raw=True)
def _count_addmm_flops(_: Tensor, one: Tensor, other: Tensor, **__: Any) -> int:
    """What torch's flop counter knows of addmm, but not of its in-place form."""
    return 2 * one.shape[0] * one.shape[1] * other.shape[1]


LINEAR: tuple[type[nn.Module], ...] = (nn.Linear, PackedLinear)
"""Layers that multiply by ``weight`` (``[out, in]``), which some may unpack when it is read, and
add a bias. They can be adapted."""


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a layer that can be adapted."""
    return isinstance(module, LINEAR)


def register_layers(config: Any) -> None:
    """Let PEFT adapt the layers that it does not know as it adapts torch's."""
    # config: PEFT's, in which this is not saved.
    others = {kind: lora.Linear for kind in LINEAR if not issubclass(kind, nn.Linear)}
    if others:
        config._register_custom_module(others)  # noqa: SLF001


class LoraLinear(lora.Linear):
    """PEFT's adapter on a frozen linear layer; what it does not know, PEFT's own forward does."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Add the adapter to what the layer makes of ``[..., in]``."""
        active = self.active_adapters
        name = active[0] if len(active) == 1 else ""
        base = self.base_layer
        is_known = (
            name in self.lora_A
            and name not in self.lora_variant
            and not (args or kwargs or self.disable_adapters or self.merged)
            and isinstance(self.lora_dropout[name], nn.Identity)
            and type(base) in LINEAR
            and base.bias is None
            and self.lora_B[name].bias is None
            and not _is_autocast(x.device)
        )
        weight: Any = base.weight if is_known else None
        if weight is None or weight.requires_grad or x.dtype != weight.dtype:
            return super().forward(x, *args, **kwargs)
        output = AdaptedLinear.apply(
            x.flatten(0, -2),
            weight,
            base,
            _read_a(self.lora_A[name]),
            self.lora_B[name].weight,
            self.scaling[name],
        )
        # Out here, as what is added in place to a function's own view is an error of autograd.
        return output.unflatten(0, x.shape[:-1])


def _is_autocast(device: torch.device) -> bool:
    kind = device.type  # which may be one that knows no autocast, as torch's meta device
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


class RoundedLinear(nn.Linear):
    """A linear layer of float32 weights that computes in its input's dtype, as autocast would."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that torch gives it
        """Multiply ``[..., in]`` by the weights, rounded to its dtype."""
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.weight.to(input.dtype), bias)


class PooledLinear(RoundedLinear):
    """QA-LoRA's ``lora_A``: it multiplies the sum of each group of its input, by ``1 / sqrt``."""

    def __init__(self, like: Any, group: int) -> None:
        columns, rank = like.in_features, like.out_features
        if columns % group:
            raise ConfigError(
                f"the adapter sees groups of {group} inputs, and a layer has {columns}; give the "
                "packed base that it was trained on"
            )
        super().__init__(columns // group, rank, bias=False, device=like.weight.device)
        self.group = group

    def spread(self) -> Tensor:
        """What multiplies the input itself, ``[rank, in]``: equal numbers within each group."""
        return spread_groups(self.weight, self.group)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that torch gives it
        """Multiply ``[..., in]`` by the weights, rounded to its dtype."""
        return F.linear(input, self.spread().to(input.dtype))


def spread_groups(lora_a: Tensor, group: int) -> Tensor:
    """Turn what multiplies pooled inputs, ``[rank, in / group]``, into what multiplies inputs."""
    return (lora_a / math.sqrt(group)).unsqueeze(-1).expand(*lora_a.shape, group).flatten(-2)


def _read_a(layer: Any) -> Tensor:
    return layer.spread() if isinstance(layer, PooledLinear) else layer.weight


def pool_adapters(model: nn.Module, group: int) -> None:
    """Let new adapters see their inputs in groups, as QA-LoRA does."""
    # Source: arXiv 2309.14717. By the root, sums are as large as single inputs, and the learning
    # rate means what it means to LoRA; PEFT's own, for GPTQ alone, scales otherwise.
    for layer in model.modules():
        if isinstance(layer, lora.Linear):
            for name, part in layer.lora_A.items():
                layer.lora_A[name] = PooledLinear(part, group)


def use_lean_adapters(model: nn.Module) -> None:
    """Let adapters compute as this module says; weights and gradients stay float32."""
    # DoRA is left to PEFT: its norms need float32.
    for layer in model.modules():
        if isinstance(layer, ModulesToSaveWrapper):
            original = layer.original_module
            for part in layer.modules_to_save.values():
                if isinstance(original, nn.Embedding):  # whose dtype its readers take over
                    part.to(original.weight.dtype)
                elif is_linear(original) and original.weight.dtype != torch.float32:
                    part.__class__ = RoundedLinear
            continue
        if type(layer) is not lora.Linear or layer.lora_variant:
            continue
        layer.__class__ = LoraLinear
        if layer.get_base_layer().weight.dtype != torch.float32:
            layer.cast_input_dtype_enabled = False  # for PEFT's own forward
            for part in (*layer.lora_A.values(), *layer.lora_B.values()):
                if not isinstance(part, PooledLinear):
                    part.__class__ = RoundedLinear


class AdaptedLinear(torch.autograd.Function):
    """``x Wᵀ + scale · x Aᵀ Bᵀ``, of a frozen ``W``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        base: nn.Module,
        lora_a: Tensor,
        lora_b: Tensor,
        scale: float,
    ) -> Tensor:
        """Multiply by the layer's weight and the adapter's."""
        # x: ``[rows, in]``.
        # weight: ``[out, in]``, of ``x``'s dtype: ``base``'s, which backward reads again, so that
        # what a layer unpacks is not kept.
        # lora_a: ``[rank, in]``, any float dtype; rounded to ``x``'s.
        # lora_b: ``[out, rank]``, also.
        # Returns: ``[rows, out]``, of ``x``'s dtype.
        inner = x @ lora_a.to(x.dtype).T  # [rows, rank]
        output = x @ weight.T  # [rows, out]
        output.addmm_(inner, lora_b.to(x.dtype).T, alpha=scale)
        ctx.save_for_backward(x, inner, lora_a, lora_b)
        ctx.base = base
        ctx.scale = scale
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Differentiate by ``x``, where that is wanted, and by the adapter."""
        x, inner, lora_a, lora_b = ctx.saved_tensors
        (of_output,) = grad_outputs
        of_inner = (of_output @ lora_b.to(x.dtype)) * ctx.scale
        of_a = of_inner.T @ x
        of_b = of_output.T @ (inner * ctx.scale)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = of_output @ ctx.base.weight
            of_x.addmm_(of_inner, lora_a.to(x.dtype))
        return of_x, None, None, of_a.to(lora_a.dtype), of_b.to(lora_b.dtype), None
