"""What the device says when it has no memory: training halves its batches when it hears that.

Nothing is filled up: a tensor is asked for that no machine holds, and must be refused.
"""

from __future__ import annotations

import torch

from gemma_tuner.device import empty_cache, is_out_of_memory
from gemma_tuner.doctor.checks import Check, Finding, describe_error, run_check

_TOO_MANY_BYTES = 2**46  # 70 TB


def check_memory(device: torch.device) -> Check:
    """Ask for more memory than there is, and then for a little."""
    return run_check("memory", "running out is recognised", lambda: _measure(device))


def _measure(device: torch.device) -> Finding:
    if device.type == "cpu":
        return "skipped", "a system may promise more memory than it has", {}
    try:
        torch.empty(_TOO_MANY_BYTES, dtype=torch.uint8, device=device)
    except RuntimeError as error:
        return judge_refusal(error, device)
    return "wrong", f"the device gave {_TOO_MANY_BYTES / 1e12:.0f} TB", {}


def judge_refusal(error: RuntimeError, device: torch.device) -> Finding:
    """Decide whether an error is known as that of a full device, which works on afterwards."""
    said = describe_error(error)
    if not is_out_of_memory(error):
        return "wrong", f"a full device is not recognised by: {said}", {"error": said}
    empty_cache(device)
    if float(torch.ones(1_000, device=device).sum()) != 1_000.0:
        return "wrong", "the device computes wrongly after it has refused", {"error": said}
    return "ok", None, {"error": said}
