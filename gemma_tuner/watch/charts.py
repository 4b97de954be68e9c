"""The charts of runs: one run in detail, or several over one another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from gemma_tuner.display import GIB, show_memory
from gemma_tuner.watch.chart_options import Limit, Line, Options, draw
from gemma_tuner.watch.history import History
from gemma_tuner.watch.run import Run
from gemma_tuner.watch.thinning import Point, smooth, thin

RUN_COLORS = (
    "#4f8ff7", "#f59e42", "#2bb58a", "#c678dd", "#e5636a", "#7fb0c8", "#b8a03c", "#9a8cf0",
)  # fmt: skip
HELD_OUT, SECOND = RUN_COLORS[1:3]
_LIMIT = "#e5636a"

SMALL_CHART_POINTS = 160
"""Points of a line in all charts but the large one; browsers redraw them while others compute."""


def draw_loss(runs: Sequence[Run]) -> Options:
    """Draw the losses: of training as logged and averaged, and held out (dashed between runs)."""
    is_one = len(runs) == 1
    window = max(smoothing_window(run.history) for run in runs)
    name = "train" if window == 1 else f"train, mean of {window} records"
    lines = []
    for prefix, history, color in _list_runs(runs):
        steps, losses = history.steps, history.column("loss")
        if window > 1 and is_one:
            lines.append(Line("each record", thin(steps, losses), color, 1.0, 0.4))
        averaged = thin(steps, smooth(losses, window))
        lines.append(Line(f"{prefix}{name}", averaged, color, 2.0))
        held_out = thin(
            np.array([record.step for record in history.held_out], dtype=np.int64),
            np.array([record.loss for record in history.held_out], dtype=np.float64),
        )
        if held_out:
            line = Line(f"{prefix}held-out", held_out, HELD_OUT if is_one else color)
            lines.append(replace(line, is_dashed=not is_one, has_dots=True))
    return draw(lines, "loss", has_legend=is_one, max_step=_max_step(runs))


def _draw_each(
    read: Callable[[History], NDArray[np.float64]], figure: str, runs: Sequence[Run]
) -> Options:
    """Draw one column, a line a run."""
    lines = [
        Line(run.name, _thin_small(history, read(history)), color)
        for run, (_, history, color) in zip(runs, _list_runs(runs), strict=True)
    ]
    return draw(lines, figure, from_zero=True, max_step=_max_step(runs))


draw_learning_rate = partial(_draw_each, lambda history: history.column("learning_rate"), "rate")
draw_grad_norm = partial(_draw_each, lambda history: history.column("grad_norm"), "norm")
draw_wait = partial(_draw_each, lambda history: 100 * history.wait_shares(), "share")


def draw_speed(runs: Sequence[Run]) -> Options:
    """Draw tokens a second: of all tokens, and of those trained on (dashed between runs)."""
    is_one = len(runs) == 1
    lines = []
    for prefix, history, color in _list_runs(runs):
        tokens = _thin_small(history, history.column("tokens_per_second"))
        targets = _thin_small(history, history.column("target_tokens_per_second"))
        second = SECOND if is_one else color
        lines.append(Line(f"{prefix}tokens", tokens, color))
        lines.append(Line(f"{prefix}target tokens", targets, second, is_dashed=not is_one))
    return draw(lines, "speed", from_zero=True, has_legend=is_one, max_step=_max_step(runs))


def draw_memory(runs: Sequence[Run]) -> Options:
    """Draw peaks of memory; of one run also what is in use after steps, and its plan."""
    is_one = len(runs) == 1
    lines = []
    for prefix, history, color in _list_runs(runs):
        if is_one:
            in_use = _thin_small(history, history.column("memory_bytes") / GIB)
            lines.append(Line("in use after a step", in_use, color))
        peaks = _thin_small(history, history.column("peak_bytes") / GIB)
        lines.append(Line(f"{prefix}peak", peaks, HELD_OUT if is_one else color))
    return draw(
        lines,
        "memory",
        from_zero=True,
        has_legend=is_one,
        limits=find_memory_limits(runs[0].history) if is_one else [],
        max_step=_max_step(runs),
    )


def _thin_small(history: History, values: NDArray[np.float64]) -> list[Point]:
    return thin(history.steps, values, SMALL_CHART_POINTS)


def find_memory_limits(history: History) -> list[Limit]:
    """Choose what of the plan is drawn: a limit far above everything else would flatten it."""
    plan = history.plan
    if plan is None:
        return []
    limits = []
    if plan.peak_bytes:
        name = f"planned peak {show_memory(plan.peak_bytes)}"
        limits.append(Limit(name, plan.peak_bytes / GIB))
    highest = np.fmax(history.highest("peak_bytes"), plan.peak_bytes)
    if 0 < plan.budget_bytes <= 3 * highest:
        name = f"budget {show_memory(plan.budget_bytes)}"
        limits.append(Limit(name, plan.budget_bytes / GIB, _LIMIT))
    return limits


def smoothing_window(history: History) -> int:
    """Records that the loss is averaged over: a twenty-fifth of those there are, 1 of a few."""
    return len(history) // 25 if len(history) >= 50 else 1


def _list_runs(runs: Sequence[Run]) -> Iterator[tuple[str, History, str]]:
    """Of each run the prefix of its lines' names, its log and its colour."""
    for i, run in enumerate(runs):
        prefix = f"{run.name}: " if len(runs) > 1 else ""
        yield prefix, run.history, RUN_COLORS[i % len(RUN_COLORS)]


def _max_step(runs: Sequence[Run]) -> int | None:
    """The planned end of the longest run, if all have one: there the axis ends."""
    ends = [run.history.max_steps for run in runs]
    return max(end for end in ends if end is not None) if all(ends) else None
