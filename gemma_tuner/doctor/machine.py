"""The machine, and the worth of a result on it; nothing here tells who uses it."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from gemma_tuner.device import (
    choose_dtype,
    memory_total_bytes,
    memory_used_bytes,
    swap_used_bytes,
)

_PACKAGES = ("gemma_tuner", "torch", "transformers", "peft", "accelerate")
_VARIABLES = (
    "PYTORCH_ENABLE_MPS_FALLBACK",
    "PYTORCH_MPS_HIGH_WATERMARK_RATIO",
    "PYTORCH_MPS_LOW_WATERMARK_RATIO",
    "PYTORCH_MPS_FAST_MATH",
    "PYTORCH_MPS_PREFER_METAL",
)
# Of the processors, on average over the last minute; above it speeds are not the machine's own.
_BUSY_SHARE = 0.25
_LARGEST_QUIET_SWAP_BYTES = 2 * 2**30


def describe_machine() -> dict[str, Any]:
    """Describe the system, the chip, the memory and the installed packages."""
    memory = psutil.virtual_memory()
    return {
        "system": _name_system(),
        "architecture": platform.machine(),
        "chip": _name_chip(),
        "is_virtual": _is_virtual(),
        "num_cpus": os.cpu_count(),
        "load_average_1min": round(os.getloadavg()[0], 2),
        "memory_total_bytes": memory.total,
        "memory_available_bytes": memory.available,
        "swap_used_bytes": swap_used_bytes(),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in _PACKAGES},
    }


def describe_device(device: torch.device, reason: str) -> dict[str, Any]:
    """Describe where training would run."""
    return {
        "type": device.type,
        "name": _name_device(device),
        "reason": reason,
        "is_pretend": is_pretend(device),
        "dtype": str(choose_dtype(device)[0]).removeprefix("torch."),
        # On a Mac recommended_max_memory: what Metal recommends as a working set.
        "memory_total_bytes": memory_total_bytes(device),
        "memory_used_bytes": memory_used_bytes(device),
        # Read here and set nowhere: device.py has set what training needs.
        "environment": {name: os.environ.get(name) for name in _VARIABLES},  # noqa: TID251
    }


def find_evidence(device: torch.device, machine: dict[str, Any]) -> dict[str, Any]:
    """Say what a result of this device on this machine proves, and what it does not."""
    name = _name_device(device)
    if is_pretend(device):
        rung = "pretend"
        statement = (
            "A pretend MPS device: this proves that Metal has the operators and that dtypes are "
            "kept apart, and nothing of what Metal computes or how fast."
        )
    elif device.type == "cpu":
        rung = "cpu"
        statement = (
            "The CPU, compared with itself in float64: this shows that the checks run and what "
            "rounding does, and nothing of Metal or CUDA."
        )
    elif machine["is_virtual"] and device.type == "mps":
        rung = "virtual"
        statement = f"Metal on a virtual machine ({name}): what it computes counts, speeds do not."
    else:
        rung = "chip"
        statement = f"Measured on {name}, and on no other chip or version than these."
    return {
        "rung": rung,
        "statement": statement,
        "speeds_not_quotable": _find_disturbances(rung, machine),
    }


def _find_disturbances(rung: str, machine: dict[str, Any]) -> list[str]:
    reasons = []
    if rung == "pretend":
        reasons.append("the device is a pretence")
    if machine["is_virtual"]:
        reasons.append("the machine is virtual")
    if machine["load_average_1min"] > _BUSY_SHARE * machine["num_cpus"]:
        reasons.append(
            f"the machine is busy (load {machine['load_average_1min']} on "
            f"{machine['num_cpus']} processors)"
        )
    if machine["swap_used_bytes"] > _LARGEST_QUIET_SWAP_BYTES:
        reasons.append(f"{machine['swap_used_bytes'] / 2**30:.1f} GiB are swapped out")
    return reasons


def is_pretend(device: torch.device) -> bool:
    """Whether a device is that of ``gemma_tuner.testing.pretend_mps``: Metal, but no Mac."""
    return device.type == "mps" and platform.system() != "Darwin"


def find_available_bytes(device: torch.device) -> int:
    """Memory that a device may take now, with what the system has for it."""
    available = psutil.virtual_memory().available
    if device.type == "cpu":
        return available
    left = memory_total_bytes(device) - memory_used_bytes(device)
    return left if device.type == "cuda" else min(left, available)


def _name_system() -> str:
    if platform.system() == "Darwin":
        return f"macOS {platform.mac_ver()[0]}"
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return platform.system()


def _name_chip() -> str:
    if platform.system() == "Darwin":
        return _ask_kernel("machdep.cpu.brand_string") or platform.processor()
    return _read_processor().get("model name", platform.processor() or platform.machine())


def _is_virtual() -> bool:
    if platform.system() == "Darwin":
        return _ask_kernel("kern.hv_vmm_present") == "1" or "Virtual" in _name_chip()
    return "hypervisor" in _read_processor().get("flags", "").split()


def _name_device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)  # noqa: TID251 - a name, for people
    return "pretend MPS" if is_pretend(device) else _name_chip()


def _ask_kernel(name: str) -> str:
    """A setting of the kernel of macOS; empty where there is none of that name."""
    done = subprocess.run(
        ["/usr/sbin/sysctl", "-n", name], capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def _read_processor() -> dict[str, str]:
    """Linux's description of the first processor."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first = path.read_text(encoding="utf-8").split("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}
