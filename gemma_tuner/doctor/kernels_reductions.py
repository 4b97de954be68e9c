"""Reduction kernels: products, attention, the vocabulary's softmax, norms, adapters, the loss.

Axes: ``K`` the axis that a product sums over, ``V`` the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.nn import Linear, Parameter
from torch.nn.utils import clip_grad_norm_

from gemma_tuner.batch import IGNORED
from gemma_tuner.doctor.checks import Tensors
from gemma_tuner.models.lora_linear import AdaptedLinear
from gemma_tuner.models.loss import FrozenHeadCrossEntropy
from gemma_tuner.models.norms import NormKeepingInput

_VOCABULARY = 262_144
# Either side of 2^15, where M1 and M2 begin to read beyond their operands, and Gemma's vocabulary.
_REDUCTIONS = (32_767, 32_769, _VOCABULARY)
# Wrong only where both outer axes are 16 or more. Source: pytorch#193487.
_ROWS, _COLUMNS = 16, 24
_SOFTCAP = 30.0


def make_matrices(generator: Generator) -> Tensors:
    """``[rows, V]`` and ``[V, columns]``, of which products take the first K."""
    left = torch.randn(_ROWS, _VOCABULARY, generator=generator)
    return {"left": left, "right": torch.randn(_VOCABULARY, _COLUMNS, generator=generator)}


def _for_each_reduction(
    multiply: Callable[[Tensor, Tensor], dict[str, Tensor]],
) -> Callable[[Tensors], Tensors]:
    def compute(t: Tensors) -> Tensors:
        return {
            f"{name}K={k}": product
            for k in _REDUCTIONS
            for name, product in multiply(t["left"][:, :k], t["right"][:k]).items()
        }

    return compute


@_for_each_reduction
def multiply(left: Tensor, right: Tensor) -> dict[str, Tensor]:
    """``[rows, K] @ [K, columns]``, the backward pass of a loss without blocks."""
    return {"": _surround(left) @ _surround(right)}


@_for_each_reduction
def multiply_transposed(left: Tensor, right: Tensor) -> dict[str, Tensor]:
    """The same with each operand, and both, stored transposed, as gradients are."""
    left_turned, right_turned = _surround(left.T).T, _surround(right.T).T
    return {
        "left, ": left_turned @ _surround(right),
        "right, ": _surround(left) @ right_turned,
        "both, ": left_turned @ right_turned,
    }


@_for_each_reduction
def multiply_batched(left: Tensor, right: Tensor) -> dict[str, Tensor]:
    """``[2, rows, K] @ [2, K, columns]``."""
    pair = _surround(torch.stack([left, left.flip(0)]))
    return {"": pair @ _surround(torch.stack([right, right.flip(1)]))}


@_for_each_reduction
def differentiate_linear(left: Tensor, right: Tensor) -> dict[str, Tensor]:
    """The gradient of ``[rows, columns] @ [columns, K]`` for its input: a sum over K."""
    inputs = torch.zeros_like(left[:, :_COLUMNS]).requires_grad_()
    out = F.linear(inputs, _surround(right))
    return {"": torch.autograd.grad(out, inputs, _surround(left))[0]}


def _surround(x: Tensor) -> Tensor:
    """Copy a tensor to where large values follow it, so that reading beyond it shows."""
    buffer = x.new_full((x.numel() + 2**16,), 64.0)
    buffer[: x.numel()] = x.flatten()
    return buffer[: x.numel()].view(x.shape)


def _with_gradients(
    inputs: Sequence[str], answers: Sequence[str]
) -> Callable[[Callable[..., Tensor]], Callable[[Tensors], Tensors]]:
    """Answer with a function's value and its gradients for some of the inputs."""

    def wrap(function: Callable[..., Tensor]) -> Callable[[Tensors], Tensors]:
        def compute(t: Tensors) -> Tensors:
            leaves = [t[name].detach().requires_grad_() for name in inputs]
            out = function(t, *leaves)
            gradients = torch.autograd.grad(out, leaves, t.get("gradient"))
            return dict(zip(answers, (out, *gradients), strict=True))

        return compute

    return wrap


def make_attention(head_size: int, generator: Generator) -> Tensors:
    """Two rows of 80 positions, the second padded; four heads share keys; a window of 32."""
    rows, heads, length = 2, 4, 80

    def draw(num_heads: int) -> Tensor:
        return torch.randn(rows, num_heads, length, head_size, generator=generator)

    positions = torch.arange(length)
    distance = positions.unsqueeze(1) - positions
    mask = ((distance >= 0) & (distance < 32)).repeat(rows, 1, 1, 1)
    mask[1, :, :, 70:] = False
    mask |= distance == 0  # every position sees itself
    # Gemma's scale is 1: scores of normed queries and keys, here with a deviation of 4
    q = draw(heads) * 4 * head_size**-0.5
    return {"q": q, "k": draw(1), "v": draw(1), "gradient": draw(heads), "mask": mask}


@_with_gradients(inputs="qkv", answers=("out", "dq", "dk", "dv"))
def attend(t: Tensors, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled dot product attention with an explicit mask and shared keys."""
    mask = t["mask"]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0, enable_gqa=True)


@_with_gradients(inputs="qkv", answers=("out", "dq", "dk", "dv"))
def attend_by_hand(t: Tensors, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Its formula."""
    return (q @ k.mT).masked_fill(~t["mask"], -torch.inf).softmax(-1) @ v


def normalize(t: Tensors) -> Tensors:
    """Soft-cap in place, log-sum-exp and softmax of ``[16, V]``."""
    capped = (t["logits"] / _SOFTCAP).tanh_().mul_(_SOFTCAP)
    normalizer = torch.logsumexp(capped, dim=1, keepdim=True)
    softmax = torch.exp(capped - normalizer)
    return {"capped": capped, "normalizer": normalizer, "softmax": softmax}


def make_gradients(generator: Generator) -> Tensors:
    """Three gradients, longer together than the norm that :func:`clip` allows."""
    shapes = ((64, 32), (7,), (129, 16))
    return {str(i): 3 * torch.randn(s, generator=generator) for i, s in enumerate(shapes)}


def clip(t: Tensors) -> Tensors:
    """Clip gradients by their norm, as a step does."""
    parameters = {name: Parameter(torch.zeros_like(x)) for name, x in t.items()}
    clipped = {name: x.clone() for name, x in t.items()}
    for name, parameter in parameters.items():
        parameter.grad = clipped[name]  # which is changed in place
    return {"norm": clip_grad_norm_(list(parameters.values()), 1.0), **clipped}


def clip_by_hand(t: Tensors) -> Tensors:
    """Its formula."""
    norm = torch.cat([x.flatten() for x in t.values()]).norm()
    return {"norm": norm, **{name: x / norm for name, x in t.items()}}


def make_adapted(generator: Generator) -> Tensors:
    """A layer's inputs, its weights and its adapter, which stays float32 by its names."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    frozen = {"hidden": draw(2, 40, 96), "norm": draw(96), "weight": draw(160, 96) / 10}
    gradient = draw(2, 40, 160)
    return {**frozen, "gradient": gradient, "lora_a": draw(8, 96) / 10, "lora_b": draw(160, 8)}


@_with_gradients(("hidden", "lora_a", "lora_b"), answers=("out", "dhidden", "da", "db"))
def adapt(t: Tensors, hidden: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """This library's norm, and its linear layer with an adapter."""
    normed = NormKeepingInput.apply(hidden, t["norm"], 1e-6).flatten(0, 1)
    base = Linear(96, 160, bias=False, device="meta")
    base.weight = Parameter(t["weight"], requires_grad=False)
    return AdaptedLinear.apply(normed, base.weight, base, a, b, 2.0).unflatten(0, (2, 40))


@_with_gradients(("hidden", "lora_a", "lora_b"), answers=("out", "dhidden", "da", "db"))
def adapt_by_hand(t: Tensors, hidden: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Its formula."""
    normed = hidden / (hidden.square().mean(-1, keepdim=True) + 1e-6).sqrt() * t["norm"]
    return normed @ t["weight"].T + 2.0 * (normed @ a.T @ b.T)


def make_loss(generator: Generator) -> Tensors:
    """24 positions; their targets are the first id, the last, none, and others."""
    target_ids = torch.randint(_VOCABULARY, (24,), generator=generator)
    target_ids[:3] = torch.tensor([0, _VOCABULARY - 1, IGNORED])
    hidden = torch.randn(24, 64, generator=generator)
    weight = 0.5 * torch.randn(_VOCABULARY, 64, generator=generator)
    return {"hidden": hidden, "weight": weight, "target_ids": target_ids}


@_with_gradients(("hidden",), answers=("loss", "gradient"))
def lose(t: Tensors, hidden: Tensor) -> Tensor:
    """This library's loss over a full vocabulary."""
    return FrozenHeadCrossEntropy.apply(hidden, t["weight"], t["target_ids"], _SOFTCAP, 10)


@_with_gradients(("hidden",), answers=("loss", "gradient"))
def lose_by_hand(t: Tensors, hidden: Tensor) -> Tensor:
    """Its formula, with all logits at once."""
    logits = _SOFTCAP * torch.tanh(hidden @ t["weight"].T / _SOFTCAP)
    return F.cross_entropy(logits, t["target_ids"], ignore_index=IGNORED, reduction="sum")
