"""Operators that have been silently wrong on some device, each against the CPU in float64.

The faults are of Metal's kernels and mostly of older versions of torch or of some chips; on a
device without them every check passes, and that is worth knowing before a long run.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from gemma_tuner.doctor.checks import Check, Finding, Tensors, find_difference, judge, run_check

Compute = Callable[[Tensors], Tensors]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """A computation that some device does or did wrongly.

    Args:
        name: Unique; what is computed, with its dtype where it matters.
        source: Where the fault was reported.
        make: Makes the inputs, on the CPU, from a seeded generator.
        compute: What is examined: inputs on the device to answers.
        reference: The same by another formula, on inputs in float64; None is ``compute`` itself.
        tolerance: The largest difference that rounding explains, by :func:`find_difference`.
        avoided: How this library stays clear of the operation; None where training needs it. Then
            an error of the device, which is not silent, is no fault.
    """

    name: str
    source: str
    make: Callable[[torch.Generator], Tensors]
    compute: Compute
    reference: Compute | None = None
    tolerance: float = 1e-5
    avoided: str | None = None


def expect(kernel: Kernel) -> tuple[Tensors, Tensors]:
    """Make a kernel's inputs and the right answers, on the CPU."""
    # Returns: Inputs in the dtypes that are examined, and answers from their values in float64.
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


def surround(x: Tensor) -> Tensor:
    """Copy a tensor to where large values follow it, so that reading beyond it shows."""
    buffer = x.new_full((x.numel() + 2**16,), 64.0)
    buffer[: x.numel()] = x.flatten()
    return buffer[: x.numel()].view(x.shape)
