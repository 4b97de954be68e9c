"""A check: whether the device answers as the CPU does, and by how much it is off."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from gemma_tuner.device import is_out_of_memory

Result = Literal["ok", "wrong", "skipped"]
Tensors = Mapping[str, Tensor]
Figures = Mapping[str, float | int | str]
Finding = tuple[Result, str | None, Figures]

# Operators that a device lacks or refuses raise these. NotImplementedError is a RuntimeError.
REFUSALS = (RuntimeError, TypeError)


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one check, as the report's JSON has it."""

    part: str  # of the examination
    name: str  # unique within its part
    result: Result
    reason: str | None = None  # why it is wrong or was skipped
    source: str | None = None  # where the fault was reported; None if no single one is looked for
    figures: Figures = field(default_factory=dict)  # names without a unit are ratios
    seconds: float = 0.0


def find_difference(answer: Tensors, expected: Tensors) -> tuple[str, float]:
    """The tensor that is farthest off, and by how much of the largest value expected."""
    differences = {
        name: _difference(answer[name], expected[name]) if name in answer else torch.inf
        for name in expected
    }
    worst = max(differences, key=differences.__getitem__)
    return worst, differences[worst]


def _difference(answer: Tensor, expected: Tensor) -> float:
    if answer.shape != expected.shape:
        return torch.inf
    # float64 holds every integer that is compared here: they are below 2^53
    found, wanted = answer.detach().cpu().double(), expected.detach().double()
    largest = float(wanted.abs().max()) or 1.0
    difference = float((found - wanted).abs().max()) / largest
    return difference if difference == difference else torch.inf


def judge(difference: tuple[str, float], tolerance: float) -> Finding:
    """Decide whether an answer is right, given :func:`find_difference`'s."""
    name, value = difference
    figures = {
        "difference": value if value < torch.inf else "infinite",
        "tolerance": tolerance,
        "worst": name,
    }
    if value <= tolerance:
        return "ok", None, figures
    return "wrong", f"{name} differs by {value:.2g}; rounding explains {tolerance:.2g}", figures


def run_check(
    part: str,
    name: str,
    measure: Callable[[], Finding],
    *,
    source: str | None = None,
    refusal: Result = "wrong",
) -> Check:
    """Run one check; whatever the device refuses becomes its result."""
    started = time.perf_counter()
    figures: Figures = {}
    try:
        result, reason, figures = measure()
    except REFUSALS as error:
        result = "skipped" if is_out_of_memory(error) else refusal
        reason = f"the device refuses it: {describe_error(error)}"
    seconds = round(time.perf_counter() - started, 3)
    return Check(part, name, result, reason, source, figures, seconds)


def describe_error(error: BaseException) -> str:
    """The first line of an error, without what it may tell about the user."""
    line = next(iter(str(error).splitlines()), "")
    line = line.replace(str(Path.home()), "~")
    line = re.sub(r"(/Users|/home)/[^/\s'\"]+", "~", line)
    return f"{type(error).__name__}: {line}"[:300]
