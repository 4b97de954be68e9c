"""RMS norms that keep only their input for backward.

transformers writes the norm as six operators on a float32 copy of its input, which autograd keeps.
Here the same numbers are computed, and backward makes what it needs from the input, which is alive
anyway, and one factor a row. On CUDA torch's own fused norm does that.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from gemma_tuner.log import announce
from gemma_tuner.models.families import FAMILIES

_PROBE_TOLERANCE = 1e-5


class LeanNorm(nn.Module):
    """transformers' norm with another forward: the first base of a class made for each of them."""

    eps: float
    weight: nn.Parameter
    offset: float  # Gemma 3's norm multiplies by 1 + weight

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalize ``[..., H]`` over its last axis, in float32."""
        weight: Tensor | None = self.weight if getattr(self, "with_scale", True) else None
        if weight is not None and weight.requires_grad:
            return super().forward(hidden_states)
        if weight is not None and self.offset:
            weight = weight.float() + self.offset
        if hidden_states.is_cuda:
            size = hidden_states.shape[-1:]
            normed = nn.functional.rms_norm(hidden_states, size, weight, self.eps)
            return normed.to(hidden_states.dtype)  # autocast widens it
        return NormKeepingInput.apply(hidden_states, weight, self.eps)

    def __reduce__(self) -> tuple[Any, ...]:
        # Its class was made here and has no name that pickle could import.
        return _restore_lean, (type(self).__mro__[2], self.offset), self.__dict__


def use_lean_norms(model: nn.Module) -> None:
    """Let a model's norms keep only their input for backward."""
    # A family whose norm computes something else than this module knows keeps it, which is said.
    offsets = {family.norm: family.norm_offset for family in FAMILIES}
    stock_of = {type(module): type(module).__name__ for module in model.modules()}
    for stock, name in stock_of.items():
        if name not in offsets:
            continue
        lean = _make_lean(stock, offsets[name])
        if not _is_known(stock, lean):
            announce(
                f"{name} of this transformers is another norm than 5.23's; it is used "
                "as it is, which takes more memory"
            )
            continue
        for module in model.modules():
            if type(module) is stock:
                module.__class__ = lean


@cache
def _make_lean(stock: type[nn.Module], offset: float) -> type[nn.Module]:
    return type(f"Lean{stock.__name__}", (LeanNorm, stock), {"offset": offset})


def _restore_lean(stock: type[nn.Module], offset: float) -> nn.Module:
    lean = _make_lean(stock, offset)
    return lean.__new__(lean)


def _is_known(stock: type[nn.Module], lean: type[nn.Module]) -> bool:
    """Compare both on a few numbers, with weights that are not one."""
    with torch.device("cpu"), torch.no_grad():
        norm: Any = stock(8).float().requires_grad_(requires_grad=False)
        norm.weight.copy_(torch.linspace(-1, 2, 8))
        values = torch.linspace(-3, 5, 24).view(3, 8)
        expected = norm(values)
        norm.__class__ = lean
        return torch.allclose(norm(values), expected, rtol=_PROBE_TOLERANCE, atol=_PROBE_TOLERANCE)


class NormKeepingInput(torch.autograd.Function):
    """``x / sqrt(mean(x²) + eps) * weight``, in float32, of a frozen weight."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        """Normalize ``hidden`` ``[..., H]`` over its last axis."""
        # weight: ``[H]``; None for none.
        # Returns: ``[..., H]``, of ``hidden``'s dtype.
        wide = hidden.float()
        # pow as in transformers: rsqrt rounds otherwise
        factor = (wide.pow(2).mean(-1, keepdim=True) + eps).pow(-0.5)
        normed = wide * factor
        if weight is not None:
            normed.mul_(weight.float())
        ctx.save_for_backward(hidden, weight, factor)
        return normed.to(hidden.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Differentiate by ``hidden``."""
        hidden, weight, factor = ctx.saved_tensors
        wide = factor.dtype
        gradient = grad_outputs[0].to(wide)
        if weight is not None:
            gradient = gradient * weight.to(wide)
        normed = hidden.to(wide) * factor
        along = (gradient * normed).mean(-1, keepdim=True)
        return (gradient - normed.mul_(along)).mul_(factor).to(hidden.dtype), None, None
