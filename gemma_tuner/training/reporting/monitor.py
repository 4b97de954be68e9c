"""Watching what a run does to the machine: shapes, pooled memory, growth, swap, speed.

A Mac slows down and swaps long before it says that memory has run out, and a run of days should
say so itself. Everything here reads counters that the host has; nothing waits for the device,
except giving pooled memory back, which is rare.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from dataclasses import dataclass
from statistics import median

import torch

from gemma_tuner.device import (
    empty_cache,
    memory_driver_bytes,
    memory_private_bytes,
    memory_used_bytes,
    swap_used_bytes,
    take_peak_bytes,
)
from gemma_tuner.training.reporting.metrics import DeviceRecord, StepRecord
from gemma_tuner.training.reporting.reports import Reports

_GIB = 2**30

# Metal keeps a compiled graph for each operator and shape, about 55 KB, until the process ends; a
# new shape of micro-batches adds some 90, as most lengths in it have been met before. Source:
# pyg-team/pytorch_geometric#10689; graphs counted on the pretend device. 128 are then 0.7 GB.
MANY_SHAPES = 128


class RunMonitor:
    """Watch one run on one device, and give pooled memory back when that is due.

    Attributes:
        shapes: The shapes of micro-batches that reached the device.
        num_emptied: How often pooled memory was given back, by reason: "length" (the padded
            length changed), "evaluation", "limit" (little memory was left).
    """

    def __init__(self, device: torch.device, budget_bytes: int) -> None:
        self.shapes: set[tuple[object, ...]] = set()
        self.num_emptied: Counter[str] = Counter()
        self._device = device
        # CUDA's pools are of memory that nobody else uses, and it frees them by itself before it
        # gives up; what Metal pools, the whole machine lacks.
        self._is_mps = device.type == "mps"
        self._pools = PoolPolicy(budget_bytes)
        self._length: int | None = None
        self._num_steps = 0
        self._next_warning = MANY_SHAPES
        self._peak_bytes = 0
        self._swap = SwapWatch(swap_used_bytes())
        self._speed = SpeedWatch()
        self._growth = {"the process (host memory)": GrowthWatch()}
        if device.type != "cpu":
            self._growth["tensors on the device"] = GrowthWatch()
        if self._is_mps:
            self._growth["the device's driver (tensors, pools and graphs)"] = GrowthWatch()

    def note_shape(self, length: int, shape: tuple[object, ...]) -> None:
        """Note the padded length and ``Batch.shape`` of a micro-batch on the device."""
        if self._is_mps and self._length not in (None, length):
            self._empty_if_due("length")
        self._length = length
        self.shapes.add(shape)

    def after_step(self, step: int, reports: Reports) -> None:
        """Look at the memory that a step has left."""
        self._num_steps += 1
        if self._is_mps:
            self._empty_if_due("limit")
        elif self._device.type == "cpu":
            self._peak_bytes = max(self._peak_bytes, memory_used_bytes(self._device))
        # On other devices a new shape costs nothing that stays.
        if self._is_mps and len(self.shapes) >= self._next_warning:
            self._next_warning = 2 * len(self.shapes)
            reports.event(
                step,
                "many_shapes",
                f"micro-batches have had {len(self.shapes)} shapes so far; Metal keeps compiled "
                "graphs for each, some 5 MB, until the process ends. Fewer lengths help: a lower "
                "max_tokens or max_seconds, one number of images an example; or stop now and "
                "then and go on with fit(resume=True) in a new process",
            )

    def after_evaluation(self) -> None:
        """Give back what evaluating has pooled, where that is much."""
        if self._is_mps:
            self._empty_if_due("evaluation")

    def read_memory(self) -> DeviceRecord:
        """What to log of the device; the peak is since the last call."""
        driver_bytes = memory_driver_bytes(self._device)
        counted = take_peak_bytes(self._device)
        peak_bytes = max(self._peak_bytes, driver_bytes) if counted is None else counted
        self._peak_bytes = 0
        return DeviceRecord(
            driver_bytes=driver_bytes,
            peak_bytes=peak_bytes,
            num_shapes=len(self.shapes),
            num_emptied=dict(self.num_emptied),
        )

    def after_record(self, record: StepRecord, reports: Reports) -> None:
        """Look at what changes slowly: growth of memory, swap, speed."""
        readings = [memory_private_bytes()]
        if self._device.type != "cpu":
            readings.append(record.memory_bytes)
        if self._is_mps:
            readings.append(memory_driver_bytes(self._device))
        for (name, watch), num_bytes in zip(self._growth.items(), readings, strict=True):
            if message := watch.observe(num_bytes):
                reports.event(
                    record.step,
                    "memory_growth",
                    f"memory held by {name} {message}. If it goes on, stop and continue with "
                    "fit(resume=True) in a new process, and report it",
                )
        if message := self._swap.observe(swap_used_bytes()):
            reports.event(record.step, "swap", message)
        now_seconds = time.monotonic()
        if message := self._speed.observe(
            now_seconds, record.tokens_per_second, record.data_wait_seconds
        ):
            reports.event(record.step, "speed", message)

    def _empty_if_due(self, occasion: str) -> None:
        used_bytes = memory_used_bytes(self._device)
        driver_bytes = memory_driver_bytes(self._device)
        self._peak_bytes = max(self._peak_bytes, driver_bytes)
        if self._pools.is_due(occasion, self._num_steps, used_bytes, driver_bytes):
            empty_cache(self._device)
            self.num_emptied[occasion] += 1


class PoolPolicy:
    """When to give pooled memory back.

    It costs a wait for the device and the allocations of the next step, so there are steps
    between two times, and much must be idle. Near the limit it may follow at once; where a step
    needs that much every time, less and less often.
    """

    MIN_IDLE_SHARE = 0.25
    """Of the budget, pooled and in no tensor, from which it is worth its cost."""
    LIMIT_SHARE = 0.9
    """Of the budget, in tensors and pools, from which little is left."""
    MIN_IDLE_SHARE_AT_LIMIT = 0.05
    """Of the budget, from which giving it back can help."""
    STEPS_BETWEEN = 20

    def __init__(self, budget_bytes: int) -> None:
        self._budget_bytes = budget_bytes
        self._last_step = self._last_limit_step = -self.STEPS_BETWEEN
        self._wait_steps = 1

    def is_due(self, occasion: str, step: int, used_bytes: int, driver_bytes: int) -> bool:
        """Decide, and remember that it was done; "limit" is asked after each step."""
        idle_share = (driver_bytes - used_bytes) / self._budget_bytes
        if occasion != "limit":
            is_due = (
                idle_share >= self.MIN_IDLE_SHARE and step - self._last_step >= self.STEPS_BETWEEN
            )
        else:
            steps_since = step - self._last_limit_step
            is_due = (
                idle_share >= self.MIN_IDLE_SHARE_AT_LIMIT
                and driver_bytes > self.LIMIT_SHARE * self._budget_bytes
                and steps_since >= self._wait_steps
            )
            if is_due:
                # There again at the first look: it is what a single step needs.
                longer = min(2 * self._wait_steps, self.STEPS_BETWEEN)
                self._wait_steps = longer if steps_since == self._wait_steps else 1
                self._last_limit_step = step
        if is_due:
            self._last_step = step
        return is_due


class SwapWatch:
    """Notice that the machine swaps more than when the run began."""

    FIRST_BYTES = 2 * _GIB
    FURTHER_BYTES = _GIB

    def __init__(self, used_bytes: int) -> None:
        self._begin_bytes = used_bytes
        self._limit_bytes = used_bytes + self.FIRST_BYTES

    def observe(self, used_bytes: int) -> str | None:
        """Take a reading; a sentence for the user where it has grown much."""
        if used_bytes < self._limit_bytes:
            return None
        self._limit_bytes = used_bytes + self.FURTHER_BYTES
        return (
            f"the machine's swap has grown by {(used_bytes - self._begin_bytes) / _GIB:.1f} GiB "
            f"since the run began, to {used_bytes / _GIB:.1f} GiB: steps get slower. What helps: "
            "close other programs; a smaller batch_size, or a lower max_tokens, image_tokens or "
            "max_seconds"
        )


@dataclass(frozen=True, slots=True)
class _Interval:
    """What was logged of an interval, and when."""

    end_seconds: float
    tokens_per_second: float
    wait_seconds: float


class SpeedWatch:
    """Notice that a run has become slower than it was, and that it is over.

    Medians of several log intervals are compared, over a minute at least: single intervals differ
    by what their examples are, and short ones by chance.
    """

    MIN_INTERVALS = 5
    MIN_SECONDS = 60.0
    FALL = 0.3

    def __init__(self) -> None:
        self._intervals: deque[_Interval] = deque()
        self._best = 0.0
        self._is_slow = False

    def observe(
        self, now_seconds: float, tokens_per_second: float, wait_seconds: float
    ) -> str | None:
        """Take an interval's speed; a sentence for the user where it begins or ends to be slow."""
        window = self._intervals
        window.append(_Interval(now_seconds, tokens_per_second, wait_seconds))
        # The first has no beginning: it is there for its end.
        while (
            len(window) > self.MIN_INTERVALS + 1
            and now_seconds - window[1].end_seconds >= self.MIN_SECONDS
        ):
            window.popleft()
        seconds = now_seconds - window[0].end_seconds
        if len(window) <= self.MIN_INTERVALS or seconds < self.MIN_SECONDS:
            return None
        inside = list(window)[1:]
        speed = median(interval.tokens_per_second for interval in inside)
        waited = sum(interval.wait_seconds for interval in inside) / seconds
        self._best = max(self._best, speed)
        # Two edges, so that a speed near one is not reported again and again.
        edge = (1 - self.FALL / 2 if self._is_slow else 1 - self.FALL) * self._best
        if (speed < edge) == self._is_slow:
            return None
        self._is_slow = not self._is_slow
        if not self._is_slow:
            return f"back to {speed:.0f} tokens/s (best so far {self._best:.0f})"
        cause = (
            f"{waited:.0%} of the time it waits for data: look at the network or the disk"
            if waited > self.FALL / 2
            else "data are there in time: a hot or throttled machine, swap, or other programs"
        )
        return (
            f"slower for the last {seconds:.0f} s: {speed:.0f} tokens/s against {self._best:.0f} "
            f"at best; {cause}"
        )


class GrowthWatch:
    """Notice that memory grows from step to step, as it does where something is never freed."""

    WARM_UP = 5
    """Readings before the first that counts."""
    WINDOW = 10
    """Readings that are compared: all of the last with the median of the first."""
    MIN_GROWTH = 0.1
    MIN_GROWTH_BYTES = _GIB // 4

    def __init__(self) -> None:
        self._num_readings = 0
        self._first: list[int] = []
        self._last: deque[int] = deque(maxlen=self.WINDOW)
        self._reported_bytes = 0.0

    def observe(self, num_bytes: int) -> str | None:
        """Take a reading; what has grown, as the rest of a sentence, or None."""
        self._num_readings += 1
        if self._num_readings <= self.WARM_UP:
            return None
        if len(self._first) < self.WINDOW:
            self._first.append(num_bytes)
            self._reported_bytes = median(self._first)
            return None
        self._last.append(num_bytes)
        # Not a median: while it jumps from one level to another, it has not yet grown.
        now_bytes, first_bytes = min(self._last), median(self._first)
        grown_bytes = now_bytes - self._reported_bytes
        least_bytes = max(self.MIN_GROWTH * first_bytes, self.MIN_GROWTH_BYTES)
        if len(self._last) < self.WINDOW or grown_bytes < least_bytes:
            return None
        self._reported_bytes = now_bytes
        return (
            f"has grown from {first_bytes / _GIB:.2f} to {now_bytes / _GIB:.2f} GiB in the last "
            f"{self._num_readings - self.WARM_UP} log intervals"
        )
