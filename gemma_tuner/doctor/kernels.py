"""Operators that have been silently wrong on some device, each against the CPU in float64.

The faults are of Metal's kernels and mostly of older versions of torch or of some chips; on a
device without them every check passes, and that is worth knowing before a long run.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch

from gemma_tuner.doctor import kernels_indexing as indexing
from gemma_tuner.doctor import kernels_reductions as reductions
from gemma_tuner.doctor.checks import Check, Finding, Tensors, find_difference, judge, run_check
from gemma_tuner.models.few_bits.tables import MAX_REDUCTION

Compute = Callable[[Tensors], Tensors]


@dataclass(frozen=True, slots=True)
class Kernel:
    """A computation that some device gets wrong, or once did."""

    name: str
    source: str  # where the fault was reported
    make: Callable[[torch.Generator], Tensors]  # the inputs, on the CPU
    compute: Compute  # what is checked
    reference: Compute | None = None  # the same by another formula; None is ``compute`` itself
    tolerance: float = 1e-5  # the largest difference that rounding explains
    bfloat16_tolerance: float | None = None  # None: not checked in bfloat16 as well
    # How this library does without the operation; None where training needs it. A device that
    # refuses an operation is at fault only where training needs it.
    avoided: str | None = None


_VOCABULARY = "the vocabulary's size; no report is known"
_MATMUL = "pytorch#193487, pytorch#177116 (fixed in 2.14 by pytorch#183535)"
_BLOCKS = f"no reduction of its loss is longer than {MAX_REDUCTION:,}"
# is_causal=True has been wrong too (pytorch#174861); nothing here uses it
_ATTENTION = "pytorch#179294, pytorch#184180, pytorch#190791 (is_causal is not used)"

# fmt: off
_TABLE = (
    Kernel("embedding and index_put, backward too", "pytorch#195754",
           indexing.make_repeated_ids, indexing.accumulate),
    Kernel("addcmul, addcdiv and lerp into transposed tensors", "pytorch#118115",
           indexing.make_matrices, indexing.write_transposed,
           avoided="parameters and moments are contiguous"),
    Kernel("convolutions of the towers", "pytorch#192212",
           indexing.make_media, indexing.convolve, tolerance=1e-4),
    Kernel("conv2d with a weight that is not contiguous", "pytorch#192212",
           indexing.make_media, indexing.convolve_turned, tolerance=1e-4,
           avoided="weights are loaded contiguous"),
    Kernel("unique of integers over 2^24", "pytorch#195595",
           indexing.make_large_integers, indexing.find_unique, tolerance=0.0,
           avoided="it looks for distinct ids on the CPU"),
    Kernel("bfloat16 with float32, elementwise", "karpathy/nanochat#741",
           indexing.make_mixed, indexing.mix_dtypes, tolerance=8e-3),
    Kernel("gather and scatter_add in rows of 262,144", _VOCABULARY,
           indexing.make_vocabulary_rows, indexing.gather_and_scatter, tolerance=1e-6),
    Kernel("fused AdamW that skips a step", "pytorch#186360",
           indexing.make_adamw, indexing.take_steps, indexing.take_steps_by_hand,
           avoided="it is tried before a run, and the plain one used instead"),
    Kernel("dropout that is computed twice", "pytorch#127676",
           lambda generator: {"hidden": torch.randn(64, 64, generator=generator)},
           indexing.drop_twice, lambda t: {"same": torch.ones_like(t["hidden"])}, tolerance=0.0),
    Kernel("matmul, K up to 262,144", _MATMUL,
           reductions.make_matrices, reductions.multiply,
           tolerance=1e-3, bfloat16_tolerance=1e-2, avoided=_BLOCKS),
    Kernel("matmul, transposed, K up to 262,144", _MATMUL,
           reductions.make_matrices, reductions.multiply_transposed,
           tolerance=1e-3, bfloat16_tolerance=1e-2, avoided=_BLOCKS),
    Kernel("matmul, batched, K up to 262,144", "pytorch#195163 (open in 2.15)",
           reductions.make_matrices, reductions.multiply_batched,
           tolerance=1e-3, bfloat16_tolerance=1e-2, avoided=_BLOCKS),
    Kernel("linear, backward, K up to 262,144", _MATMUL,
           reductions.make_matrices, reductions.differentiate_linear,
           tolerance=1e-3, bfloat16_tolerance=1e-2, avoided=_BLOCKS),
    Kernel("attention with a mask, head size 256", _ATTENTION,
           partial(reductions.make_attention, 256), reductions.attend, reductions.attend_by_hand,
           tolerance=1e-4, bfloat16_tolerance=3e-2),
    Kernel("attention with a mask, head size 512", _ATTENTION,
           partial(reductions.make_attention, 512), reductions.attend, reductions.attend_by_hand,
           tolerance=1e-4, bfloat16_tolerance=3e-2),
    Kernel("tanh, logsumexp and softmax over 262,144", _VOCABULARY,
           lambda generator: {"logits": 20 * torch.randn(16, 262_144, generator=generator)},
           reductions.normalize, tolerance=1e-4),
    Kernel("clip_grad_norm_", "no report is known; every step of training uses it",
           reductions.make_gradients, reductions.clip, reductions.clip_by_hand),
    Kernel("the library's norm and adapter", "no report is known; every layer is made of them",
           reductions.make_adapted, reductions.adapt, reductions.adapt_by_hand,
           tolerance=1e-4, bfloat16_tolerance=3e-2),
    Kernel("the library's loss over 262,144", "pytorch#193487, which it is built to avoid",
           reductions.make_loss, reductions.lose, reductions.lose_by_hand,
           tolerance=1e-4, bfloat16_tolerance=3e-2),
)
# fmt: on


def _split_dtypes(kernel: Kernel) -> Iterator[Kernel]:
    if kernel.bfloat16_tolerance is None:
        yield kernel
        return
    yield replace(kernel, name=f"{kernel.name}, float32", bfloat16_tolerance=None)
    yield replace(
        kernel,
        name=f"{kernel.name}, bfloat16",
        make=partial(_make_bfloat16, kernel.make),
        tolerance=kernel.bfloat16_tolerance,
        bfloat16_tolerance=None,
    )


def _make_bfloat16(
    make: Callable[[torch.Generator], Tensors], generator: torch.Generator
) -> Tensors:
    # Adapters stay float32, as in training.
    return {
        name: x.bfloat16() if x.is_floating_point() and not name.startswith("lora") else x
        for name, x in make(generator).items()
    }


KERNELS = tuple(kernel for row in _TABLE for kernel in _split_dtypes(row))
"""Every kernel that is checked, but the large table; names are unique."""


def expect(kernel: Kernel) -> tuple[Tensors, Tensors]:
    """A kernel's inputs, and the right answers from the same values in float64, on the CPU."""
    generator = torch.Generator().manual_seed(zlib.crc32(kernel.name.encode()))
    inputs = kernel.make(generator)
    exact = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    return inputs, (kernel.reference or kernel.compute)(exact)


def answer(compute: Compute, inputs: Tensors, device: torch.device) -> Tensors:
    """Compute on the device, and bring the answers to the CPU."""
    found = compute({name: x.to(device) for name, x in inputs.items()})
    return {name: x.detach().cpu() for name, x in found.items()}


def check_kernel(kernel: Kernel, device: torch.device) -> Check:
    """Compare a device's answer with the right one."""
    check = run_check(
        "kernels",
        kernel.name,
        partial(_measure, kernel, device),
        source=kernel.source,
        refusal="skipped" if kernel.avoided else "wrong",
    )
    if check.result == "ok" or kernel.avoided is None:
        return check
    return replace(check, reason=f"{check.reason}. Training avoids it: {kernel.avoided}")


def _measure(kernel: Kernel, device: torch.device) -> Finding:
    inputs, expected = expect(kernel)
    difference = find_difference(answer(kernel.compute, inputs, device), expected)
    return judge(difference, kernel.tolerance)
