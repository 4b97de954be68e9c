"""Time, memory and work of a step, all modes in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.compare_steps.models import Load, count_resident
from benchmarks.compare_steps.modes import PLAIN, PLAIN_ROUNDED, Mode
from benchmarks.live_bytes import LiveBytes
from gemma_tuner.batch import Batch
from gemma_tuner.device import empty_cache, is_out_of_memory, synchronize

TERA = 10**12


@dataclass(frozen=True, kw_only=True)
class Record:
    """What is known of one mode at one shape; None where it was not or cannot be measured.

    Args:
        shape: Rows x tokens a row x targets a row.
        mode: Its name.
        error: ``out of memory``, or empty.
        loss: Of the step that was measured.
        seconds: Median of a step, forward and backward, the device waited for.
        cpu_seconds: Likewise, of the process's CPU time.
        of_plain_seconds: Share of the plain step's; on a CPU of its CPU time, which a busy machine
            stretches less.
        of_rounded_plain_seconds: Share of that of the plain step with bfloat16 adapters.
        tokens_per_second, target_tokens_per_second: In wall time.
        peak_bytes: The most memory that was taken over what was there before the step.
        resident_bytes: Weights on the device, adapters included.
        load_peak_bytes: The most memory while the checkpoint was loaded.
        flops: Counted by torch in one step.
        of_plain_flops: Share of the plain step's.
        tflop_per_second: Work over time.
        of_peak: Share of the card's rate.
        allocator_retries: Times that CUDA's pool was emptied within timed steps: above 0, the
            time is not only the step's.
    """

    shape: str
    mode: str
    error: str = ""
    loss: float | None = None
    seconds: float | None = None
    cpu_seconds: float | None = None
    of_plain_seconds: float | None = None
    of_rounded_plain_seconds: float | None = None
    tokens_per_second: float | None = None
    target_tokens_per_second: float | None = None
    peak_bytes: int | None = None
    resident_bytes: int | None = None
    load_peak_bytes: int | None = None
    flops: int | None = None
    of_plain_flops: float | None = None
    tflop_per_second: float | None = None
    of_peak: float | None = None
    allocator_retries: int | None = None


COLUMNS = tuple(field.name for field in fields(Record))


def measure_shape(
    shape: str,
    batch: Batch,
    modes: Sequence[Mode],
    loads: Sequence[Load],
    *,
    rounds: int,
    peak_tflops: float | None,
    report: Callable[[Record], None],
) -> list[Record]:
    """Measure every mode with one batch; the rounds of all are interleaved.

    Args:
        shape: For the records.
        batch: On the models' device.
        modes: What to measure.
        loads: Of the checkpoint, with its table in each place that a mode uses.
        rounds: Timed steps of each mode.
        peak_tflops: The card's rate.
        report: Is told each mode's work and memory as they are found.
    """
    load_peaks = {load.per_layer_embeddings: load.peak_bytes for load in loads}
    records: dict[str, Record] = {}
    for mode in modes:
        found = _measure_work_and_memory(mode, batch)
        records[mode.name] = Record(
            shape=shape,
            mode=mode.name,
            resident_bytes=count_resident(mode.model),
            load_peak_bytes=load_peaks.get(mode.per_layer_embeddings),
            **(found or {"error": "out of memory"}),
        )
        report(records[mode.name])
    timed = _time_in_turn([m for m in modes if not records[m.name].error], batch, rounds)
    for name, seconds in timed.items():
        if seconds:
            records[name] = replace(records[name], **seconds)
        else:
            records[name] = Record(shape=shape, mode=name, error="out of memory")
    return _compare(list(records.values()), batch, peak_tflops)


def _measure_work_and_memory(mode: Mode, batch: Batch) -> dict[str, Any] | None:
    """Count a step's work and memory."""
    device = batch.labels.device
    mode.begin()
    try:
        live = LiveBytes() if device.type != "cuda" else None
        counter = FlopCounterMode(display=False, custom_mapping=_UNCOUNTED)
        with counter, live or nullcontext():
            loss = mode.step(batch)
        if live:
            peak_bytes = live.peak_bytes
        else:  # the allocator's own count, of a step that nothing watches
            mode.model.zero_grad(set_to_none=True)
            empty_cache(device)
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            loss = mode.step(batch)
            peak_bytes = torch.cuda.max_memory_allocated(device) - before
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    else:
        mode.model.zero_grad(set_to_none=True)
        flops = counter.get_total_flops()
        return {"loss": float(loss), "flops": flops, "peak_bytes": peak_bytes}
    # Here, as the error's traceback held the tensors of the step.
    mode.model.zero_grad(set_to_none=True)
    empty_cache(device)
    return None


def _count_addmm(_: Any, one: Sequence[int], other: Sequence[int], *__: Any, **___: Any) -> int:
    return 2 * one[0] * one[1] * other[1]


# torch's own fails at an addmm with an output dtype, which TRL's loss has.
_UNCOUNTED = {torch.ops.aten.addmm: _count_addmm}


def _time_in_turn(
    modes: Sequence[Mode], batch: Batch, rounds: int
) -> dict[str, dict[str, Any] | None]:
    """Time every mode once a round, so that what else the machine does falls on all alike."""
    timings: dict[str, list[_Timing]] = {mode.name: [] for mode in modes}
    left = list(modes)
    for _ in range(rounds):
        for mode in list(left):
            timing = _time_step(mode, batch)
            if timing:
                timings[mode.name].append(timing)
            else:
                left.remove(mode)
    found: dict[str, dict[str, Any] | None] = dict.fromkeys(timings)
    for mode in left:
        each = timings[mode.name]
        found[mode.name] = {
            "seconds": statistics.median(timing.seconds for timing in each),
            "cpu_seconds": statistics.median(timing.cpu_seconds for timing in each),
            "allocator_retries": sum(timing.retries for timing in each),
        }
    return found


@dataclass(frozen=True)
class _Timing:
    seconds: float
    cpu_seconds: float
    retries: int


def _time_step(mode: Mode, batch: Batch) -> _Timing | None:
    """Time a step; None where it runs out of memory."""
    device = batch.labels.device
    mode.begin()
    try:
        if device.type != "cpu":  # a pool that holds what this mode needs, nothing of the last's
            empty_cache(device)
            mode.step(batch)
            mode.model.zero_grad(set_to_none=True)
        retries = _count_retries(device)
        synchronize(device)
        started = time.perf_counter(), time.process_time()
        mode.step(batch)
        synchronize(device)
        ended = time.perf_counter(), time.process_time()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        timing = None
    else:
        seconds, cpu_seconds = ended[0] - started[0], ended[1] - started[1]
        timing = _Timing(seconds, cpu_seconds, _count_retries(device) - retries)
    mode.model.zero_grad(set_to_none=True)
    if timing is None:
        empty_cache(device)
    return timing


def _count_retries(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    return torch.cuda.memory_stats(device).get("num_alloc_retries", 0)


def _compare(records: Sequence[Record], batch: Batch, peak_tflops: float | None) -> list[Record]:
    """Fill in what follows from several figures."""
    by_name = {record.mode: record for record in records}
    plain, rounded = by_name.get(PLAIN), by_name.get(PLAIN_ROUNDED)
    on_cpu = batch.labels.device.type == "cpu"

    def share(record: Record, of: Record | None, field: str) -> float | None:
        whole = getattr(of, field) if of else None
        part = getattr(record, field)
        return part / whole if whole and part is not None else None

    clock = "cpu_seconds" if on_cpu else "seconds"
    compared = []
    for record in records:
        rate = record.flops / TERA / record.seconds if record.flops and record.seconds else None
        compared.append(
            replace(
                record,
                of_plain_seconds=share(record, plain, clock),
                of_rounded_plain_seconds=share(record, rounded, clock),
                of_plain_flops=share(record, plain, "flops"),
                tokens_per_second=batch.num_tokens / record.seconds if record.seconds else None,
                target_tokens_per_second=(
                    batch.num_target_tokens / record.seconds if record.seconds else None
                ),
                tflop_per_second=rate,
                of_peak=rate / peak_tflops if rate and peak_tflops else None,
            )
        )
    return compared
