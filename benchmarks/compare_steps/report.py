"""What was measured, as CSV for programs and as Markdown for people."""

from __future__ import annotations

import csv
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

from benchmarks.compare_steps.agreement import Agreement
from benchmarks.compare_steps.measure import COLUMNS, Record
from benchmarks.compare_steps.models import Load

PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate")
GB = 10**9
_EXPLANATION = """\
A step is forward and backward, without the optimizer's. Seconds are the median of {rounds} steps,
all modes in turn, after at least two that were not timed; their share is of {clock}. Peak is over
what is resident before the step: {peak}. Plain is transformers + PEFT as HF's Trainer runs it:
float32 adapters, non-reentrant checkpointing, the model's own loss over all positions. TRL is one
`SFTTrainer.training_step` with the documented defaults{autocast}, metrics included. "Partly
checkpointed" checkpoints only the layers that run at all positions. Work is what torch's flop
counter counts; "of peak" is the share of {rate}. Weights are random.
"""


def describe_machine(device: torch.device) -> dict[str, str]:
    """Name the device and the versions of what computed on it."""
    facts = {"date": datetime.now(UTC).date().isoformat(), "device": _name_device(device)}
    facts["python"] = platform.python_version()
    for package in PACKAGES:
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            facts[package] = "not installed"
    facts["torch"] = torch.__version__  # with the CUDA it was built for
    return facts


def _name_device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


def name_files(folder: Path, model: str, facts: Mapping[str, str]) -> tuple[Path, Path]:
    """The CSV and the report of a run."""
    device = facts["device"].split(" (")[0]
    stem = f"compare_steps_{model}_{device}_{facts['date']}"
    stem = re.sub(r"[^\w.-]+", "-", stem).lower()
    return folder / f"{stem}.csv", folder / f"{stem}.md"


def write_csv(path: Path, facts: Mapping[str, str], records: Sequence[Record]) -> None:
    """Write a line for each mode at each shape, with what computed it."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*facts, *COLUMNS])
        writer.writeheader()
        writer.writerows({**facts, **asdict(record)} for record in records)


def write_report(
    path: Path,
    model: str,
    facts: Mapping[str, str],
    settings: Mapping[str, object],
    loads: Sequence[Load],
    agreements: Sequence[Agreement],
    records: Sequence[Record],
) -> None:
    """Write a page that stands by itself."""
    on_cpu = facts["device"].startswith("cpu")
    rate = settings.get("peak_tflops")
    lines = [
        f"# LoRA steps, {model}, {facts['device']}, {facts['date']}",
        "",
        ", ".join(f"{name} {value}" for name, value in facts.items() if name != "date"),
        "",
        ", ".join(f"{name} {value}" for name, value in settings.items()),
        "",
        _EXPLANATION.format(
            rounds=settings["rounds"],
            clock="the process's CPU time" if on_cpu else "wall time",
            peak="live tensor bytes at every operator"
            if not facts["device"].startswith("NVIDIA")
            else "CUDA's `max_memory_allocated`",
            autocast=" (bfloat16 autocast)" if settings["dtype"] == "bfloat16" else ", in float32",
            rate=f"{rate} TFLOP/s" if rate else "a rate that was not given",
        ),
        "## Loading",
        "",
        *(
            ["Peak is what the process took for itself, without weights mapped from files.", ""]
            if on_cpu
            else []
        ),
        *_table(
            ("per-layer table", "seconds", "peak GB", "resident GB"),
            [
                (
                    load.per_layer_embeddings,
                    f"{load.seconds:.1f}",
                    _gigabytes(load.peak_bytes),
                    _gigabytes(load.resident_bytes),
                )
                for load in loads
            ],
        ),
        "## Steps",
        "",
        *_table(_HEADINGS, [_format(record) for record in records]),
        "## Agreement with plain, checked before anything was measured",
        "",
        "In float32 the worst tensor of the worst step; in bfloat16, where modes are held to the",
        "spread of plain's own variants, the mean over the batches of all tensors together.",
        "",
        *_table(
            ("check", "mode", "loss, relative difference", "gradients' cosine"),
            [(a.check, a.mode, f"{a.loss_difference:.1e}", f"{a.cosine:.7f}") for a in agreements],
        ),
    ]
    path.write_text("\n".join(lines), encoding="utf-8")


_HEADINGS = (
    "rows × tokens × targets",
    "step",
    "seconds",
    "of plain",
    "of bf16-adapter plain",
    "tokens/s",
    "targets/s",
    "peak GB",
    "resident GB",
    "load peak GB",
    "TFLOP",
    "of plain's",
    "TFLOP/s",
    "of peak",
    "loss",
)


def _format(record: Record) -> tuple[str, ...]:
    def show(value: float | None, digits: int, scale: float = 1) -> str:
        return "" if value is None else f"{value / scale:.{digits}f}"

    retried = " (pool emptied)" if record.allocator_retries else ""
    return (
        record.shape.replace("x", " × "),
        record.mode,
        record.error or show(record.seconds, 3) + retried,
        show(record.of_plain_seconds, 2),
        show(record.of_rounded_plain_seconds, 2),
        show(record.tokens_per_second, 0),
        show(record.target_tokens_per_second, 0),
        _gigabytes(record.peak_bytes),
        _gigabytes(record.resident_bytes),
        _gigabytes(record.load_peak_bytes),
        show(record.flops, 3, 10**12),
        show(record.of_plain_flops, 3),
        show(record.tflop_per_second, 2),
        show(record.of_peak, 3),
        show(record.loss, 5),
    )


def _gigabytes(num_bytes: int | None) -> str:
    return "" if num_bytes is None else f"{num_bytes / GB:.3f}"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [headings, ["---"] * len(headings), *rows]
    return [*(f"| {' | '.join(line)} |" for line in lines), ""]
