"""Ask whether Metal works on this machine, and how far it is from the CPU.

Allocates, multiplies and compares with the CPU; every tensor stays far below 10 MiB, because
hosted Macs fail on larger heaps. Writes one JSON file and, on GitHub, the step output ``usable``.
Not being usable is reported as a warning, not as a failure: a virtual Mac without Metal says
nothing about this library. Never quote speed from a virtual Mac.

Usage: python .ci/mps_probe.py [report.json]
"""

import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path

os.environ["PYTORCH_ENABLE_MPS_FALLBACK"] = "0"  # read by torch when it is imported

import torch
from torch import Tensor
from torch.nn import functional as F

# The largest difference from the CPU, relative to the largest value, at which Metal counts as
# computing the same: rounding of one float32 or bfloat16 operation over at most 512 terms.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}


def attend(x: Tensor) -> Tensor:
    heads = x.reshape(1, 8, 64, 256)
    return F.scaled_dot_product_attention(heads, heads, heads)


def gradient_of_loss(x: Tensor) -> Tensor:
    weight = x.detach().clone().requires_grad_()
    labels = torch.arange(x.shape[0], device=x.device).flip(0)
    logits = x @ weight.mT / x.shape[-1] ** 0.5  # far from saturation, where gradients vanish
    F.cross_entropy(logits.float(), labels).backward()
    if weight.grad is None:
        raise RuntimeError("backward left no gradient")
    return weight.grad


OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "copy": lambda x: x.clone(),
    "matmul": lambda x: x @ x.mT,
    "rms_norm": lambda x: F.rms_norm(x, (x.shape[-1],)),
    "softmax": lambda x: x.softmax(-1),
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "embedding": lambda x: F.embedding(torch.arange(0, 256, 7, device=x.device), x),
    "attention": attend,
    "gradient_of_loss": gradient_of_loss,
}


def compare_with_cpu(operation: Callable[[Tensor], Tensor], dtype: torch.dtype) -> float:
    """Return the largest difference, relative to the largest value on the CPU."""
    torch.manual_seed(0)
    x = torch.randn(256, 512, dtype=dtype)
    expected = operation(x).float()
    measured = operation(x.to("mps")).float().cpu()
    return float((measured - expected).abs().max() / expected.abs().max())


def probe() -> tuple[list[dict[str, object]], str | None]:
    """Return one row per operation and dtype, and why Metal is not usable, or None."""
    rows: list[dict[str, object]] = []
    if not torch.backends.mps.is_available():
        return rows, "torch says that MPS is not available"
    for dtype_name, tolerance in TOLERANCE.items():
        for name, operation in OPERATIONS.items():
            try:
                difference = compare_with_cpu(operation, getattr(torch, dtype_name))
            except (RuntimeError, NotImplementedError, TypeError) as error:
                first_line = str(error).splitlines()[0]
                return rows, f"{name} in {dtype_name} raised {type(error).__name__}: {first_line}"
            rows.append({"operation": name, "dtype": dtype_name, "difference": difference})
            if not difference <= tolerance:  # NaN too
                return rows, f"{name} in {dtype_name} differs by {difference:.2g} of {tolerance}"
    return rows, None


def main() -> None:
    rows, trouble = probe()
    report = {
        "usable": trouble is None,
        "trouble": trouble,
        "torch": torch.__version__,
        "macos": platform.mac_ver()[0],
        "machine": platform.machine(),
        "processor": platform.processor(),
        "difference": "largest absolute difference / largest absolute value on the CPU",
        "operations": rows,
    }
    text = json.dumps(report, indent=2)
    print(text)
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(text + "\n")
    if "GITHUB_OUTPUT" in os.environ:
        with Path(os.environ["GITHUB_OUTPUT"]).open("a") as output:
            output.write(f"usable={'true' if trouble is None else 'false'}\n")
    if trouble is not None:
        print(f"::warning title=Metal not tested::{trouble}; tests marked mps did not run")


if __name__ == "__main__":
    main()
