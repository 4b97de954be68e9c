"""The charts of runs: one as it is, or several over one another."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from gemma_tuner.watch.chart_options import Limit, Line, Options, draw
from gemma_tuner.watch.history import History
from gemma_tuner.watch.run import Run
from gemma_tuner.watch.thinning import Point, smooth, thin
from gemma_tuner.watch.units import GIB, show_bytes

RUN_COLORS = (
    "#4f8ff7",
    "#f59e42",
    "#2bb58a",
    "#c678dd",
    "#e5636a",
    "#7fb0c8",
    "#b8a03c",
    "#9a8cf0",
)
TRAIN, HELD_OUT, SECOND = RUN_COLORS[:3]
_LIMIT = "#e5636a"

SMALL_CHART_POINTS = 160
"""Points of a line in all charts but the large one; browsers redraw them while others compute."""


def draw_loss(runs: Sequence[Run]) -> Options:
    """Draw the losses: of training as logged and averaged, and held out (dashed between runs)."""
    is_one = len(runs) == 1
    window = max(smoothing_window(run.history) for run in runs)
    lines = []
    for run, color in zip(runs, _colors(runs), strict=True):
        history = run.history
        steps, losses = history.steps, history.column("loss")
        name = "train" if window == 1 else f"train, mean of {window} records"
        if window > 1 and is_one:
            lines.append(Line("each record", thin(steps, losses), color, 1.0, 0.4))
        averaged = thin(steps, smooth(losses, window))
        lines.append(Line(_name_line(runs, run, name), averaged, color, 2.0))
        held_out = thin(
            np.array([record.step for record in history.held_out], dtype=np.int64),
            np.array([record.loss for record in history.held_out], dtype=np.float64),
        )
        if held_out:
            lines.append(
                Line(
                    _name_line(runs, run, "held-out"),
                    held_out,
                    HELD_OUT if is_one else color,
                    is_dashed=not is_one,
                    has_dots=True,
                )
            )
    return draw(lines, "loss", has_legend=is_one, max_step=_max_step(runs))


def draw_learning_rate(runs: Sequence[Run]) -> Options:
    """Draw the learning rate, a line a run."""
    return _draw_each(runs, lambda history: history.column("learning_rate"), "rate")


def draw_grad_norm(runs: Sequence[Run]) -> Options:
    """Draw the gradient's norm before clipping, a line a run."""
    return _draw_each(runs, lambda history: history.column("grad_norm"), "norm")


def draw_wait(runs: Sequence[Run]) -> Options:
    """Draw the share of time that was spent waiting for data, a line a run."""
    return _draw_each(runs, lambda history: 100 * history.wait_shares(), "share")


def _draw_each(
    runs: Sequence[Run], read: Callable[[History], NDArray[np.float64]], figure: str
) -> Options:
    lines = [
        Line(run.name, _thin_small(run.history.steps, read(run.history)), color)
        for run, color in zip(runs, _colors(runs), strict=True)
    ]
    return draw(lines, figure, from_zero=True, max_step=_max_step(runs))


def draw_speed(runs: Sequence[Run]) -> Options:
    """Draw tokens a second: of all tokens, and of those trained on (dashed between runs)."""
    is_one = len(runs) == 1
    lines = []
    for run, color in zip(runs, _colors(runs), strict=True):
        steps = run.history.steps
        tokens = _thin_small(steps, run.history.column("tokens_per_second"))
        targets = _thin_small(steps, run.history.column("target_tokens_per_second"))
        lines += [
            Line(_name_line(runs, run, "tokens"), tokens, color),
            Line(
                _name_line(runs, run, "target tokens"),
                targets,
                SECOND if is_one else color,
                is_dashed=not is_one,
            ),
        ]
    return draw(lines, "speed", from_zero=True, has_legend=is_one, max_step=_max_step(runs))


def draw_memory(runs: Sequence[Run]) -> Options:
    """Draw peaks of memory; of one run also what is in use after steps, and its plan."""
    is_one = len(runs) == 1
    lines = []
    for run, color in zip(runs, _colors(runs), strict=True):
        steps = run.history.steps
        if is_one:
            in_use = _thin_small(steps, run.history.column("memory_bytes") / GIB)
            lines.append(Line("in use after a step", in_use, color))
        peaks = _thin_small(steps, run.history.column("peak_bytes") / GIB)
        lines.append(Line(_name_line(runs, run, "peak"), peaks, HELD_OUT if is_one else color))
    return draw(
        lines,
        "memory",
        from_zero=True,
        has_legend=is_one,
        limits=find_memory_limits(runs[0].history) if is_one else [],
        max_step=_max_step(runs),
    )


def _thin_small(steps: NDArray[np.int64], values: NDArray[np.float64]) -> list[Point]:
    return thin(steps, values, SMALL_CHART_POINTS)


def find_memory_limits(history: History) -> list[Limit]:
    """Choose what of the plan is drawn: a limit far above everything else would flatten it."""
    plan = history.plan
    if plan is None:
        return []
    limits = []
    if plan.peak_bytes:
        name = f"planned peak {show_bytes(plan.peak_bytes)}"
        limits.append(Limit(name, plan.peak_bytes / GIB))
    peaks = history.column("peak_bytes")
    measured = float(np.nanmax(peaks)) if np.isfinite(peaks).any() else 0.0
    if 0 < plan.budget_bytes <= 3 * max(measured, plan.peak_bytes):
        name = f"budget {show_bytes(plan.budget_bytes)}"
        limits.append(Limit(name, plan.budget_bytes / GIB, _LIMIT))
    return limits


def smoothing_window(history: History) -> int:
    """Records that the loss is averaged over: a twenty-fifth of those there are, 1 of a few."""
    return len(history) // 25 if len(history) >= 50 else 1


def _name_line(runs: Sequence[Run], run: Run, name: str) -> str:
    return name if len(runs) == 1 else f"{run.name}: {name}"


def _colors(runs: Sequence[Run]) -> list[str]:
    return [RUN_COLORS[i % len(RUN_COLORS)] for i in range(len(runs))]


def _max_step(runs: Sequence[Run]) -> int | None:
    """Where the axis ends: at the planned end of the longest run, if all have one."""
    ends = [run.history.max_steps for run in runs]
    return max(end for end in ends if end is not None) if all(ends) else None
