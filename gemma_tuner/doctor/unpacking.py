"""Weights of 4 and 8 bits: a device's own kernel, its torch operators and the CPU, bit for bit."""

from __future__ import annotations

from functools import partial

import torch

from gemma_tuner.device import is_out_of_memory
from gemma_tuner.doctor.checks import Check, Finding, describe_error, run_check
from gemma_tuner.models.few_bits.unpacking import (
    VARIANTS,
    Variant,
    agrees,
    make_kernel,
    make_samples,
    unpack,
    unpack_plainly,
)

UNPACKING = "weights of 4 and 8 bits"
_AVOIDED = "Training avoids it: torch's operators unpack instead"


def check_unpacking(device: torch.device) -> Check:
    """Unpack a little of every kind in each way that the device has, and on the CPU."""
    return run_check("kernels", UNPACKING, partial(_compare, device))


def _compare(device: torch.device) -> Finding:
    has_kernel = False
    for variant in VARIANTS:
        if not _is_right(device, variant):
            reason = f"{variant}: torch's operators unpack other bits there than on the CPU"
            return "wrong", reason, {}
        try:
            kernel = make_kernel(device, variant)
            if kernel is not None and not agrees(kernel, device, variant):
                reason = f"{variant}: the device's kernel unpacks other bits than torch there"
                return "wrong", f"{reason}. {_AVOIDED}", {}
        except Exception as error:  # whatever a compiler raises
            if is_out_of_memory(error):
                raise
            reason = f"the device's kernel cannot be made: {describe_error(error)}"
            return "skipped", f"{reason}. {_AVOIDED}", {}
        has_kernel = kernel is not None
    # Without a kernel of its own the device was compared with the CPU alone.
    return "ok", None, {"ways": 3 if has_kernel else 2}


def _is_right(device: torch.device, variant: Variant) -> bool:
    """Whether torch's operators give on the device what the CPU gives."""
    for sample in make_samples(variant):
        found = unpack_plainly(sample.change(lambda part: part.to(device)), variant.bits)
        if not torch.equal(found.cpu(), unpack(sample, variant.bits)):
            return False
    return True
