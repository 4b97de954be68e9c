"""The examination: its parts in their order, each written down before the next begins."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from gemma_tuner.device import choose_device
from gemma_tuner.doctor import Part
from gemma_tuner.doctor.calibration import calibrate
from gemma_tuner.doctor.checks import Check
from gemma_tuner.doctor.kernels import KERNELS, check_kernel
from gemma_tuner.doctor.machine import describe_device, describe_machine, find_evidence, is_pretend
from gemma_tuner.doctor.memory import TABLE, check_large_table, check_memory
from gemma_tuner.doctor.parity import check_family
from gemma_tuner.doctor.report import Report
from gemma_tuner.doctor.unpacking import UNPACKING, check_unpacking
from gemma_tuner.testing import FAMILIES


def examine(
    output: Path,
    device: str | None = None,
    parts: Sequence[Part] = tuple(Part),
    *,
    announce: Callable[[str], None] = lambda name: None,
) -> Report:
    """Examine this machine."""
    # The report is written before each check too, with its name, so that it names the check that
    # was running if the device ends the process.
    chosen, reason = choose_device(device)
    machine = describe_machine()
    report = Report(
        machine=machine,
        device=describe_device(chosen, reason),
        evidence=find_evidence(chosen, machine),
        parts=tuple(part for part in Part if part in parts),
    )
    for name, run in _list_steps(report, chosen):
        announce(name)
        report.unfinished = name
        report.write(output)
        report.checks.extend(run())
    report.unfinished = None
    report.write(output)
    return report


def _list_steps(
    report: Report, device: torch.device
) -> Iterator[tuple[str, Callable[[], list[Check]]]]:
    if Part.KERNELS in report.parts:
        for kernel in KERNELS:
            yield kernel.name, lambda kernel=kernel: [check_kernel(kernel, device)]
        yield UNPACKING, lambda: [check_unpacking(device)]
    if Part.PARITY in report.parts:
        for family in FAMILIES:
            yield f"steps of {family}", partial(check_family, family, device)
    if Part.MEMORY in report.parts:
        yield "memory", lambda: [check_memory(device)]
    if Part.CALIBRATION in report.parts:
        yield "calibration", lambda: _calibrate(report, device)
    if Part.LARGE_TABLE in report.parts:
        yield TABLE, lambda: [check_large_table(device)]


def _calibrate(report: Report, device: torch.device) -> list[Check]:
    if is_pretend(device):
        report.calibration_skipped = "the device is a pretence"
    else:
        report.calibration = calibrate(device)
    return []
