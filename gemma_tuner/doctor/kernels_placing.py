"""Kernels that read and write at places: gather, scatter, strides, mixed dtypes, the optimizer."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch.nn import Parameter
from torch.utils.checkpoint import checkpoint

from gemma_tuner.doctor.kernels import Kernel, Tensors
from gemma_tuner.models.modes import checkpointing_options
from gemma_tuner.training.optim import guarded_step

_VOCABULARY = 262_144
_RATE, _BETAS, _EPSILON, _DECAY = 0.01, (0.9, 0.999), 1e-8, 0.1


def _make_repeated_ids(generator: torch.Generator) -> Tensors:
    return {
        "table": torch.randn(40, 64, generator=generator),
        "ids": torch.randint(40, (4_096,), generator=generator),
        "values": torch.randn(4_096, 64, generator=generator),
    }


def accumulate(t: Tensors) -> Tensors:
    """Add 4,096 rows to 40 places, in three ways; read them, in two."""
    table = t["table"].detach().requires_grad_()
    looked_up = F.embedding(t["ids"], table)
    looked_up.backward(t["values"])
    if table.grad is None:
        raise RuntimeError("the backward pass left no gradient")
    empty = torch.zeros_like(t["table"])
    return {
        "embedding": looked_up,
        "index_select": t["table"].index_select(0, t["ids"]),
        "embedding, backward": table.grad,
        "index_put": empty.index_put((t["ids"],), t["values"], accumulate=True),
        "index_add": empty.index_add(0, t["ids"], t["values"]),
    }


def _make_matrices(generator: torch.Generator) -> Tensors:
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


def _make_pictures(generator: torch.Generator) -> Tensors:
    return {
        "pictures": torch.randn(2, 3, 16, 16, generator=generator),
        "weight": torch.randn(8, 3, 3, 3, generator=generator) / 27**0.5,
        "sounds": torch.randn(2, 8, 50, generator=generator),
        "filters": torch.randn(8, 1, 5, generator=generator),
    }


def convolve(t: Tensors) -> Tensors:
    """Convolve as the towers do: a stride of 2, and each channel by itself; with gradients."""
    pictures, sounds = (t[name].detach().requires_grad_() for name in ("pictures", "sounds"))
    maps = F.conv2d(pictures, t["weight"], stride=2, padding=1)
    filtered = F.conv1d(sounds, t["filters"], padding=4, groups=8)
    maps.square().sum().backward()
    filtered.square().sum().backward()
    if pictures.grad is None or sounds.grad is None:
        raise RuntimeError("the backward pass left no gradient")
    return {
        "conv2d": maps,
        "conv1d": filtered,
        "conv2d, backward": pictures.grad,
        "conv1d, backward": sounds.grad,
    }


def convolve_turned(t: Tensors) -> Tensors:
    """Convolve with weights that are stored in another order."""
    turned = t["weight"].permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)
    last = t["weight"].contiguous(memory_format=torch.channels_last)
    return {
        "permuted": F.conv2d(t["pictures"], turned),
        "channels last": F.conv2d(t["pictures"], last),
    }


def _make_large_integers(generator: torch.Generator) -> Tensors:
    """Neighbours that float32 cannot tell apart, and values beyond 32 bits."""
    near = 2**24 + torch.randint(200, (2_000,), generator=generator)
    far = 2**40 + torch.randint(200, (2_000,), generator=generator)
    ids = torch.cat([near, far])
    return {"ids": ids[torch.randperm(len(ids), generator=generator)]}


def find_unique(t: Tensors) -> Tensors:
    """Sorted distinct values, and where each one is."""
    values, inverse, counts = torch.unique(t["ids"], return_inverse=True, return_counts=True)
    return {"values": values, "inverse": inverse, "counts": counts}


def _make_mixed(generator: torch.Generator) -> Tensors:
    draws = torch.randn(2, 64, 96, generator=generator)
    return {
        "wide": draws[0],
        "narrow": draws[1].bfloat16(),
        "wide_scalar": torch.tensor(0.7),
        "narrow_scalar": torch.tensor(3.0).bfloat16(),
    }


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


def _make_vocabulary_rows(generator: torch.Generator) -> Tensors:
    ids = torch.randint(_VOCABULARY, (8, 64), generator=generator)
    ids[:, 0], ids[:, 1] = 0, _VOCABULARY - 1
    return {
        "logits": torch.randn(8, _VOCABULARY, generator=generator),
        "ids": ids,
        "values": torch.randn(8, 64, generator=generator),
    }


def gather_and_scatter(t: Tensors) -> Tensors:
    """Read and add at places of ``[8, 262144]``."""
    return {
        "gather": t["logits"].gather(1, t["ids"]),
        "scatter_add": t["logits"].scatter_add(1, t["ids"], t["values"]),
        "masked_fill": t["logits"].masked_fill(t["logits"] > 1, 0.0),
    }


def _make_adamw(generator: torch.Generator) -> Tensors:
    draws = torch.randn(2, 257, 3, generator=generator)
    return {"parameter": draws[0], "gradient": draws[1]}


def take_steps(t: Tensors) -> Tensors:
    """A fused AdamW step, and a second that it is told to skip, its gradient being NaN."""
    parameter = Parameter(t["parameter"].clone())
    optimizer = torch.optim.AdamW(
        [parameter], lr=_RATE, betas=_BETAS, eps=_EPSILON, weight_decay=_DECAY, fused=True
    )
    for gradient in (t["gradient"], torch.full_like(t["gradient"], math.nan)):
        parameter.grad = gradient.clone()
        guarded_step(optimizer, gradient.norm())
    state = optimizer.state[parameter]
    return {"parameter": parameter.data, **{name: state[name] for name in _STATE}}


_STATE = ("exp_avg", "exp_avg_sq", "step")


def take_steps_by_hand(t: Tensors) -> Tensors:
    """What :func:`take_steps` computes: one step of AdamW."""
    gradient, (first, second) = t["gradient"], _BETAS
    decayed = t["parameter"] * (1 - _RATE * _DECAY)
    return {
        "parameter": decayed - _RATE * gradient / (gradient.abs() + _EPSILON),
        "exp_avg": gradient * (1 - first),
        "exp_avg_sq": gradient.square() * (1 - second),
        "step": torch.ones((), dtype=gradient.dtype),
    }


def _make_hidden(generator: torch.Generator) -> Tensors:
    return {"hidden": torch.randn(64, 64, generator=generator)}


def drop_twice(t: Tensors) -> Tensors:
    """Whether dropout in a checkpointed layer drops in backward what it dropped before."""
    hidden = t["hidden"].detach().requires_grad_()
    options = checkpointing_options(hidden.device)
    out = checkpoint(lambda x: F.dropout(x.square(), 0.5), hidden, **options)
    F.dropout(hidden, 0.5)  # another layer draws before the first is computed again
    (gradient,) = torch.autograd.grad(out.sum(), hidden)
    return {"same": ((gradient == 0) == (out == 0)).to(hidden.dtype)}


PLACING = (
    Kernel(
        name="embedding and index_put, backward too",
        source="pytorch#195754",
        make=_make_repeated_ids,
        compute=accumulate,
    ),
    Kernel(
        name="addcmul, addcdiv and lerp into transposed tensors",
        source="pytorch#118115",
        make=_make_matrices,
        compute=write_transposed,
        avoided="parameters and moments are contiguous",
    ),
    Kernel(
        name="convolutions of the towers",
        source="pytorch#192212",
        make=_make_pictures,
        compute=convolve,
        tolerance=1e-4,
    ),
    Kernel(
        name="conv2d with a weight that is not contiguous",
        source="pytorch#192212",
        make=_make_pictures,
        compute=convolve_turned,
        tolerance=1e-4,
        avoided="weights are loaded contiguous",
    ),
    Kernel(
        name="unique of integers over 2^24",
        source="pytorch#195595",
        make=_make_large_integers,
        compute=find_unique,
        tolerance=0.0,
        avoided="it looks for distinct ids on the CPU",
    ),
    Kernel(
        name="bfloat16 with float32, elementwise",
        source="karpathy/nanochat#741",
        make=_make_mixed,
        compute=mix_dtypes,
        tolerance=8e-3,
    ),
    Kernel(
        name="gather and scatter_add in rows of 262,144",
        source="the vocabulary's size; no report is known",
        make=_make_vocabulary_rows,
        compute=gather_and_scatter,
        tolerance=1e-6,
    ),
    Kernel(
        name="fused AdamW that skips a step",
        source="pytorch#186360",
        make=_make_adamw,
        compute=take_steps,
        reference=take_steps_by_hand,
        avoided="it is tried before a run, and the plain one used instead",
    ),
    Kernel(
        name="dropout that is computed twice",
        source="pytorch#127676",
        make=_make_hidden,
        compute=drop_twice,
        reference=lambda t: {"same": torch.ones_like(t["hidden"])},
        tolerance=0.0,
    ),
)
"""What reads or writes at places."""
