"""The report of an examination: JSON for an issue, and a table for a person."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from gemma_tuner.disk import disk_errors_explained, replaced
from gemma_tuner.doctor import Part
from gemma_tuner.doctor.checks import Check
from gemma_tuner.errors import ConfigError

SCHEMA = 1
"""Raised when a name of the JSON changes its meaning or goes; not when one is added."""

_STYLES = {"ok": "green", "wrong": "bold red", "skipped": "yellow"}


@dataclasses.dataclass(slots=True)
class Report:
    """The findings of an examination so far."""

    machine: dict[str, Any]
    device: dict[str, Any]
    evidence: dict[str, Any]
    parts: tuple[Part, ...]  # those asked for
    checks: list[Check] = dataclasses.field(default_factory=list)
    calibration: dict[str, Any] | None = None
    calibration_skipped: str | None = None  # the reason
    # The check that is running. In the file of a process that ended, the one that ended it.
    unfinished: str | None = None

    @property
    def counts(self) -> dict[str, int]:
        """The number of checks with each result."""
        return {result: sum(check.result == result for check in self.checks) for result in _STYLES}

    @property
    def exit_status(self) -> int:
        """1 if something is wrong, else 0."""
        return int(self.counts["wrong"] > 0)

    def to_dict(self) -> dict[str, Any]:
        """The report as it is written."""
        found = dataclasses.asdict(self)
        checks = found.pop("checks")
        return {"schema": SCHEMA, **found, "counts": self.counts, "checks": checks}

    def write(self, path: Path) -> None:
        """Write the JSON, replacing an older one at once."""
        text = json.dumps(self.to_dict(), indent=2) + "\n"
        with (
            disk_errors_explained(
                lambda reason: ConfigError(
                    f"the report cannot be written to {str(path)!r} ({reason}); give --output a "
                    "file in a folder that exists and that you may write to"
                )
            ),
            replaced(path) as temporary,
        ):
            temporary.write_text(text, encoding="utf-8")


def render_report(report: Report) -> RenderableType:
    """Lay a report out for a terminal."""
    machine, device = report.machine, report.device
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    counts = report.counts
    parts: list[RenderableType] = [
        f"{machine['system']}, {machine['chip']}, {machine['memory_total_bytes'] / 2**30:.1f} GiB "
        f"({machine['swap_used_bytes'] / 2**30:.1f} GiB swapped)",
        f"{device['type']} ({device['reason']}), {device['memory_total_bytes'] / 2**30:.1f} GiB, "
        f"{device['dtype']}",
        packages,
        "",
        _tabulate(report.checks),
        *_render_speeds(report),
        "",
        *_render_faults(report.checks),
        report.evidence["statement"],
        f"{counts['ok']} ok, {counts['wrong']} WRONG, {counts['skipped']} skipped",
    ]
    return Group(*parts)


def _tabulate(checks: Iterable[Check]) -> Table:
    """Make a table with a row for each kernel and one for all steps of a family."""
    groups: dict[tuple[str, str], list[Check]] = {}
    for check in checks:
        family, _, case = check.name.partition(", ")
        name = f"steps of {family}" if check.part == "parity" and case else check.name
        groups.setdefault((check.part, name), []).append(check)
    table = Table(box=None, pad_edge=False)
    table.add_column("check", ratio=1)
    table.add_column("result")
    table.add_column("seconds", justify="right")
    for (_, name), members in groups.items():
        results = [check.result for check in members]
        worst = next(each for each in ("wrong", "skipped", "ok") if each in results)
        label = "WRONG" if worst == "wrong" else worst
        if len(members) > 1:
            label += f" ({results.count(worst)} of {len(members)})"
        seconds = sum(check.seconds for check in members)
        table.add_row(name, Text(label, _STYLES[worst]), f"{seconds:.1f}")
    return table


def _render_faults(checks: Iterable[Check]) -> Iterator[RenderableType]:
    for check in checks:
        if check.result == "ok":
            continue
        label = "WRONG" if check.result == "wrong" else "skipped"
        source = f" (known from {check.source})" if check.source else ""
        text = f"{label}: {check.name}: {check.reason}{source if label == 'WRONG' else ''}"
        yield Text(text, _STYLES[check.result])
        yield ""


def _render_speeds(report: Report) -> Iterator[RenderableType]:
    if report.calibration_skipped is not None:
        yield f"\nspeeds: not measured: {report.calibration_skipped}"
    if report.calibration is None:
        return
    measured = report.calibration
    yield "\nspeeds"
    for matmul in measured["matmuls"] or ():
        shape = f"{matmul['rows']} x {matmul['inner']} x {matmul['columns']}"
        yield f"  matmul {shape}, {matmul['dtype']}: {matmul['tflop_per_second']:.3g} TFLOP/s"
    if measured["copy_gb_per_second"] is not None:
        yield f"  copy: {measured['copy_gb_per_second']:.3g} GB/s, read and written"
    if measured["small_op_seconds"] is not None:
        yield f"  a small operator: {1e6 * measured['small_op_seconds']:.3g} microseconds"
    if (unpacking := measured["unpacking"]) is not None:
        yield (
            f"  unpacking {unpacking['rows']} x {unpacking['columns']}, {unpacking['grid']}, "
            f"{unpacking['dtype']}: {1e3 * unpacking['seconds']:.3g} ms as training does it, "
            f"{1e3 * unpacking['plain_seconds']:.3g} ms by torch's operators"
        )
    if (layer := measured["layer"]) is not None:
        speed = measured["e2b_tokens_per_second"]
        yield (
            f"  one layer of E2B, {layer['tokens']} tokens, {layer['dtype']}: "
            f"{layer['seconds']:.3g} s"
        )
        yield (
            f"  E2B by that: {speed['all_targets_low']:.3g} to {speed['all_targets_high']:.3g} "
            f"tokens/s with targets everywhere, {speed['tenth_targets_low']:.3g} to "
            f"{speed['tenth_targets_high']:.3g} with a tenth of them"
        )
    for name, reason in measured["refused"].items():
        yield f"  {name}: {reason}"
    for reason in report.evidence["speeds_not_quotable"]:
        yield f"  not to be quoted: {reason}"
