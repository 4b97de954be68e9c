"""Kernels that sum: products, attention, the vocabulary's softmax, norms, adapters, the loss.

Axes: ``K`` the axis that a product sums over, ``V`` the vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from gemma_tuner.batch import IGNORED
from gemma_tuner.doctor.kernels import Kernel, Tensors, surround
from gemma_tuner.models.lora_linear import AdaptedLinear
from gemma_tuner.models.loss import MAX_REDUCTION, FrozenHeadCrossEntropy
from gemma_tuner.models.norms import NormKeepingInput
from gemma_tuner.training.optim import clip_gradients

VOCABULARY = 262_144
# Either side of 2^15, where M1 and M2 begin to read beyond their operands, and Gemma's vocabulary.
REDUCTIONS = (32_767, 32_769, VOCABULARY)
# Wrong only where both outer axes are 16 or more. Source: pytorch#193487.
_ROWS, _COLUMNS = 16, 24
_SOFTCAP = 30.0
_AVOIDED = f"no reduction of its loss is longer than {MAX_REDUCTION:,}"
_MATMUL_SOURCE = "pytorch#193487, pytorch#177116 (fixed in 2.14 by pytorch#183535)"


def _make_matrices(generator: torch.Generator, dtype: torch.dtype) -> Tensors:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return {"left": draw(_ROWS, VOCABULARY), "right": draw(VOCABULARY, _COLUMNS)}


def multiply(t: Tensors) -> Tensors:
    """``[rows, K] @ [K, columns]``, the loss' backward without blocks."""
    return {f"K={k}": surround(t["left"][:, :k]) @ surround(t["right"][:k]) for k in REDUCTIONS}


def multiply_transposed(t: Tensors) -> Tensors:
    """The same with each operand, and both, stored transposed, as gradients have them."""
    found = {}
    for k in REDUCTIONS:
        left, right = t["left"][:, :k], t["right"][:k]
        left_turned, right_turned = surround(left.T).T, surround(right.T).T
        found[f"left, K={k}"] = left_turned @ surround(right)
        found[f"right, K={k}"] = surround(left) @ right_turned
        found[f"both, K={k}"] = left_turned @ right_turned
    return found


def multiply_batched(t: Tensors) -> Tensors:
    """``[2, rows, K] @ [2, K, columns]``."""
    found = {}
    for k in REDUCTIONS:
        left, right = t["left"][:, :k], t["right"][:k]
        pair = surround(torch.stack([left, left.flip(0)]))
        found[f"K={k}"] = pair @ surround(torch.stack([right, right.flip(1)]))
    return found


def differentiate_linear(t: Tensors) -> Tensors:
    """The gradient of ``[rows, columns] @ [columns, K]`` for its input: a sum over K."""
    found = {}
    for k in REDUCTIONS:
        inputs = torch.zeros_like(t["left"][:, :_COLUMNS]).requires_grad_()
        F.linear(inputs, surround(t["right"][:k])).backward(surround(t["left"][:, :k]))
        found[f"K={k}"] = _gradient(inputs)
    return found


def _make_attention(generator: torch.Generator, dtype: torch.dtype, head_size: int) -> Tensors:
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
    tensors = {"q": draw(heads) * 4 * head_size**-0.5, "k": draw(1), "v": draw(1)}
    tensors["gradient"] = draw(heads)
    return {**{name: x.to(dtype) for name, x in tensors.items()}, "mask": mask}


def attend(t: Tensors) -> Tensors:
    """Scaled dot product attention with an explicit mask and shared keys, and its gradients."""
    q, k, v = (t[name].detach().requires_grad_() for name in "qkv")
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=t["mask"], scale=1.0, enable_gqa=True)
    out.backward(t["gradient"])
    return {"out": out, "dq": _gradient(q), "dk": _gradient(k), "dv": _gradient(v)}


def attend_by_hand(t: Tensors) -> Tensors:
    """What :func:`attend` computes, written out."""
    q, k, v = (t[name].detach().requires_grad_() for name in "qkv")
    scores = (q @ k.mT).masked_fill(~t["mask"], -torch.inf)
    out = scores.softmax(-1) @ v
    out.backward(t["gradient"])
    return {"out": out, "dq": _gradient(q), "dk": _gradient(k), "dv": _gradient(v)}


def _make_logits(generator: torch.Generator) -> Tensors:
    return {"logits": 20 * torch.randn(16, VOCABULARY, generator=generator)}


def normalize(t: Tensors) -> Tensors:
    """Soft-cap in place, log-sum-exp and softmax of ``[16, V]``."""
    capped = (t["logits"] / _SOFTCAP).tanh_().mul_(_SOFTCAP)
    normalizer = torch.logsumexp(capped, dim=1, keepdim=True)
    return {
        "capped": capped,
        "normalizer": normalizer,
        "softmax": torch.exp(capped - normalizer),
    }


def _make_gradients(generator: torch.Generator) -> Tensors:
    shapes = ((64, 32), (7,), (129, 16))
    return {str(i): 3 * torch.randn(s, generator=generator) for i, s in enumerate(shapes)}


def clip(t: Tensors) -> Tensors:
    """Clip gradients by their norm, as a step does."""
    parameters = [Parameter(torch.zeros_like(x)) for x in t.values()]
    for parameter, gradient in zip(parameters, t.values(), strict=True):
        parameter.grad = gradient.clone()
    norm = clip_gradients(parameters, 1.0)
    return {"norm": norm, **{n: _gradient(p) for n, p in zip(t, parameters, strict=True)}}


def clip_by_hand(t: Tensors) -> Tensors:
    """What :func:`clip` computes, written out."""
    norm = torch.cat([x.flatten() for x in t.values()]).norm()
    return {"norm": norm, **{name: x / norm for name, x in t.items()}}


def _make_adapted(generator: torch.Generator, dtype: torch.dtype) -> Tensors:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    frozen = {"hidden": draw(2, 40, 96), "norm": draw(96), "weight": draw(160, 96) / 10}
    frozen["gradient"] = draw(2, 40, 160)
    adapter = {"a": draw(8, 96) / 10, "b": draw(160, 8)}  # which stay float32
    return {**{name: x.to(dtype) for name, x in frozen.items()}, **adapter}


def adapt(t: Tensors) -> Tensors:
    """This library's norm and a linear layer with its adapter, and their gradients."""
    hidden, a, b = (t[name].detach().requires_grad_() for name in ("hidden", "a", "b"))
    normed = NormKeepingInput.apply(hidden, t["norm"], 1e-6)
    out = AdaptedLinear.apply(normed.flatten(0, 1), t["weight"], a, b, 2.0).unflatten(0, (2, 40))
    out.backward(t["gradient"])
    return {"out": out, "dhidden": _gradient(hidden), "da": _gradient(a), "db": _gradient(b)}


def adapt_by_hand(t: Tensors) -> Tensors:
    """What :func:`adapt` computes, written out."""
    hidden, a, b = (t[name].detach().requires_grad_() for name in ("hidden", "a", "b"))
    normed = hidden / (hidden.square().mean(-1, keepdim=True) + 1e-6).sqrt() * t["norm"]
    out = normed @ t["weight"].T + 2.0 * (normed @ a.T @ b.T)
    out.backward(t["gradient"])
    return {"out": out, "dhidden": _gradient(hidden), "da": _gradient(a), "db": _gradient(b)}


def _make_loss(generator: torch.Generator, dtype: torch.dtype) -> Tensors:
    target_ids = torch.randint(VOCABULARY, (24,), generator=generator)
    target_ids[:3] = torch.tensor([0, VOCABULARY - 1, IGNORED])
    return {
        "hidden": torch.randn(24, 64, generator=generator).to(dtype),
        "weight": (0.5 * torch.randn(VOCABULARY, 64, generator=generator)).to(dtype),
        "target_ids": target_ids,
    }


def lose(t: Tensors) -> Tensors:
    """This library's loss over a full vocabulary, and its gradient."""
    hidden = t["hidden"].detach().requires_grad_()
    loss = FrozenHeadCrossEntropy.apply(hidden, t["weight"], t["target_ids"], _SOFTCAP, 10)
    loss.backward()
    return {"loss": loss, "gradient": _gradient(hidden)}


def lose_by_hand(t: Tensors) -> Tensors:
    """What :func:`lose` computes, with all logits at once."""
    hidden = t["hidden"].detach().requires_grad_()
    logits = _SOFTCAP * torch.tanh(hidden @ t["weight"].T / _SOFTCAP)
    loss = F.cross_entropy(logits, t["target_ids"], ignore_index=IGNORED, reduction="sum")
    loss.backward()
    return {"loss": loss, "gradient": _gradient(hidden)}


def _gradient(leaf: Tensor) -> Tensor:
    if leaf.grad is None:
        raise RuntimeError("the backward pass left no gradient")
    return leaf.grad


_TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 1e-2}
_FORMS = {
    "matmul": (multiply, _MATMUL_SOURCE),
    "matmul, transposed": (multiply_transposed, _MATMUL_SOURCE),
    "matmul, batched": (multiply_batched, "pytorch#195163 (open in 2.15)"),
    "linear, backward": (differentiate_linear, _MATMUL_SOURCE),
}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


REDUCING = (
    *(
        Kernel(
            name=f"{form}, K up to 262,144, {_name(dtype)}",
            source=source,
            make=lambda generator, dtype=dtype: _make_matrices(generator, dtype),
            compute=compute,
            tolerance=tolerance,
            avoided=_AVOIDED,
        )
        for form, (compute, source) in _FORMS.items()
        for dtype, tolerance in _TOLERANCES.items()
    ),
    *(
        Kernel(
            # is_causal=True has been wrong too (pytorch#174861); nothing here uses it
            name=f"attention with a mask, head size {size}, {_name(dtype)}",
            source="pytorch#179294, pytorch#184180, pytorch#190791 (is_causal is not used)",
            make=lambda generator, dtype=dtype, size=size: _make_attention(generator, dtype, size),
            compute=attend,
            reference=attend_by_hand,
            tolerance=tolerance,
        )
        for size in (256, 512)
        for dtype, tolerance in {torch.float32: 1e-4, torch.bfloat16: 3e-2}.items()
    ),
    Kernel(
        name="tanh, logsumexp and softmax over 262,144",
        source="the vocabulary's size; no report is known",
        make=_make_logits,
        compute=normalize,
        tolerance=1e-4,
    ),
    Kernel(
        name="clip_grad_norm_",
        source="no report is known; every step of training uses it",
        make=_make_gradients,
        compute=clip,
        reference=clip_by_hand,
    ),
    *(
        Kernel(
            name=f"the library's norm and adapter, {_name(dtype)}",
            source="no report is known; every layer is made of them",
            make=lambda generator, dtype=dtype: _make_adapted(generator, dtype),
            compute=adapt,
            reference=adapt_by_hand,
            tolerance=tolerance,
        )
        for dtype, tolerance in {torch.float32: 1e-4, torch.bfloat16: 3e-2}.items()
    ),
    *(
        Kernel(
            name=f"the library's loss over 262,144, {_name(dtype)}",
            source="pytorch#193487, which it is built to avoid",
            make=lambda generator, dtype=dtype: _make_loss(generator, dtype),
            compute=lose,
            reference=lose_by_hand,
            tolerance=tolerance,
        )
        for dtype, tolerance in {torch.float32: 1e-4, torch.bfloat16: 3e-2}.items()
    ),
)
"""What sums many numbers."""
