"""Kernels of indices, strides, mixed dtypes, convolutions, dropout and the optimizer."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Generator
from torch.nn import Parameter
from torch.utils.checkpoint import checkpoint

from gemma_tuner.doctor.checks import Tensors
from gemma_tuner.models.modes import checkpointing_options
from gemma_tuner.training.step import guarded_step

_VOCABULARY = 262_144
_RATE, _BETAS, _EPSILON, _DECAY = 0.01, (0.9, 0.999), 1e-8, 0.1
_STATE = ("exp_avg", "exp_avg_sq", "step")


def make_repeated_ids(generator: Generator) -> Tensors:
    """The inputs of :func:`accumulate`."""
    return {
        "table": torch.randn(40, 64, generator=generator),
        "ids": torch.randint(40, (4_096,), generator=generator),
        "values": torch.randn(4_096, 64, generator=generator),
    }


def accumulate(t: Tensors) -> Tensors:
    """Add 4,096 rows to 40 places, in three ways; read them, in two."""
    table = t["table"].detach().requires_grad_()
    looked_up = F.embedding(t["ids"], table)
    empty = torch.zeros_like(t["table"])
    return {
        "embedding": looked_up,
        "index_select": t["table"].index_select(0, t["ids"]),
        "embedding, backward": torch.autograd.grad(looked_up, table, t["values"])[0],
        "index_put": empty.index_put((t["ids"],), t["values"], accumulate=True),
        "index_add": empty.index_add(0, t["ids"], t["values"]),
    }


def make_matrices(generator: Generator) -> Tensors:
    """The inputs of :func:`write_transposed`; nothing is divided by less than 0.5."""
    x, a, b = torch.randn(3, 96, 130, generator=generator)
    return {"x": x, "a": a, "b": b.abs() + 0.5}


def write_transposed(t: Tensors) -> Tensors:
    """Write into transposed tensors, in place."""
    a, b = t["a"].T, t["b"].T
    outputs = {name: t["x"].clone().T for name in ("addcmul", "addcdiv", "lerp", "mul and add")}
    outputs["addcmul"].addcmul_(a, b, value=0.5)
    outputs["addcdiv"].addcdiv_(a, b, value=0.5)
    outputs["lerp"].lerp_(a, 0.25)
    outputs["mul and add"].mul_(0.5).add_(b, alpha=2.0)
    return outputs


def make_media(generator: Generator) -> Tensors:
    """Images ``[rows, 3, height, width]``, clips ``[rows, channels, frames]``, and weights."""
    return {
        "images": torch.randn(2, 3, 16, 16, generator=generator),
        "weight": torch.randn(8, 3, 3, 3, generator=generator) / 27**0.5,
        "clips": torch.randn(2, 8, 50, generator=generator),
        "filters": torch.randn(8, 1, 5, generator=generator),
    }


def convolve(t: Tensors) -> Tensors:
    """Convolve as the towers do: a stride of 2, and each channel by itself; with gradients."""
    images, clips = (t[name].detach().requires_grad_() for name in ("images", "clips"))
    maps = F.conv2d(images, t["weight"], stride=2, padding=1)
    filtered = F.conv1d(clips, t["filters"], padding=4, groups=8)
    return {
        "conv2d": maps,
        "conv1d": filtered,
        "conv2d, backward": torch.autograd.grad(maps.square().sum(), images)[0],
        "conv1d, backward": torch.autograd.grad(filtered.square().sum(), clips)[0],
    }


def convolve_turned(t: Tensors) -> Tensors:
    """Convolve with weights that are stored in another order."""
    turned = t["weight"].permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)
    last = t["weight"].contiguous(memory_format=torch.channels_last)
    return {
        "permuted": F.conv2d(t["images"], turned),
        "channels last": F.conv2d(t["images"], last),
    }


def make_large_integers(generator: Generator) -> Tensors:
    """Neighbours that float32 cannot tell apart, and values beyond 32 bits."""
    near = 2**24 + torch.randint(200, (2_000,), generator=generator)
    far = 2**40 + torch.randint(200, (2_000,), generator=generator)
    ids = torch.cat([near, far])
    return {"ids": ids[torch.randperm(len(ids), generator=generator)]}


def find_unique(t: Tensors) -> Tensors:
    """Sorted distinct values, and where each one is."""
    values, inverse, counts = torch.unique(t["ids"], return_inverse=True, return_counts=True)
    return {"values": values, "inverse": inverse, "counts": counts}


def make_mixed(generator: Generator) -> Tensors:
    """The inputs of :func:`mix_dtypes`."""
    wide, narrow = torch.randn(2, 64, 96, generator=generator)
    numbers = {"wide_scalar": torch.tensor(0.7), "narrow_scalar": torch.tensor(3.0).bfloat16()}
    return {"wide": wide, "narrow": narrow.bfloat16(), **numbers}


def mix_dtypes(t: Tensors) -> Tensors:
    """Combine bfloat16 and float32, arrays and numbers on the device."""
    wide, narrow = t["wide"], t["narrow"]
    return {
        "add": narrow + wide,
        "multiply": wide * narrow,
        "add in place": wide.clone().add_(narrow),
        "times a float32 number": narrow * t["wide_scalar"],
        "over a bfloat16 number": wide / t["narrow_scalar"],
        "where": torch.where(narrow > 0, narrow, wide),
    }


def make_vocabulary_rows(generator: Generator) -> Tensors:
    """The inputs of :func:`gather_and_scatter`; the first and the last id are among them."""
    ids = torch.randint(_VOCABULARY, (8, 64), generator=generator)
    ids[:, 0], ids[:, 1] = 0, _VOCABULARY - 1
    logits = torch.randn(8, _VOCABULARY, generator=generator)
    return {"logits": logits, "ids": ids, "values": torch.randn(8, 64, generator=generator)}


def gather_and_scatter(t: Tensors) -> Tensors:
    """Read and add at places of ``[8, 262144]``."""
    return {
        "gather": t["logits"].gather(1, t["ids"]),
        "scatter_add": t["logits"].scatter_add(1, t["ids"], t["values"]),
        "masked_fill": t["logits"].masked_fill(t["logits"] > 1, 0.0),
    }


def make_adamw(generator: Generator) -> Tensors:
    """A parameter and its gradient, of a size that no vector width divides."""
    parameter, gradient = torch.randn(2, 257, 3, generator=generator)
    return {"parameter": parameter, "gradient": gradient}


def take_steps(t: Tensors) -> Tensors:
    """A fused AdamW step, and a second that must be skipped because its gradient is NaN."""
    parameter = Parameter(t["parameter"].clone())
    optimizer = torch.optim.AdamW(
        [parameter], lr=_RATE, betas=_BETAS, eps=_EPSILON, weight_decay=_DECAY, fused=True
    )
    for gradient in (t["gradient"], torch.full_like(t["gradient"], math.nan)):
        parameter.grad = gradient.clone()
        guarded_step(optimizer, gradient.norm())
    state = optimizer.state[parameter]
    return {"parameter": parameter.data, **{name: state[name] for name in _STATE}}


def take_steps_by_hand(t: Tensors) -> Tensors:
    """The first of the two steps, by AdamW's formula."""
    gradient, (first, second) = t["gradient"], _BETAS
    decayed = t["parameter"] * (1 - _RATE * _DECAY)
    return {
        "parameter": decayed - _RATE * gradient / (gradient.abs() + _EPSILON),
        "exp_avg": gradient * (1 - first),
        "exp_avg_sq": gradient.square() * (1 - second),
        "step": torch.ones((), dtype=gradient.dtype),
    }


def drop_twice(t: Tensors) -> Tensors:
    """Whether dropout in a checkpointed layer drops in backward what it dropped before."""
    hidden = t["hidden"].detach().requires_grad_()
    options = checkpointing_options(hidden.device)
    out = checkpoint(lambda x: F.dropout(x.square(), 0.5), hidden, **options)
    F.dropout(hidden, 0.5)  # another layer draws before the first is computed again
    (gradient,) = torch.autograd.grad(out.sum(), hidden)
    return {"same": ((gradient == 0) == (out == 0)).to(hidden.dtype)}
