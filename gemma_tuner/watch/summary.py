"""A run in a few figures."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from gemma_tuner.display import show_memory
from gemma_tuner.watch.history import number
from gemma_tuner.watch.run import Phase, Run
from gemma_tuner.watch.thinning import smooth
from gemma_tuner.watch.units import show_count, show_loss, show_seconds, show_share

RECENT = 20
"""Records whose mean stands for now."""


class Tile(NamedTuple):
    """A figure with its title and a line below it."""

    title: str
    figure: str
    below: str


def list_tiles(run: Run, phase: Phase) -> list[Tile]:
    """Choose the figures of one run."""
    history = run.history
    targets = show_count(history.newest("target_tokens_per_second"))
    return [
        Tile("Loss", show_loss(history.newest("loss")), _describe_loss(run)),
        Tile("Held-out loss", *_describe_held_out(run)),
        Tile(
            "Tokens a second",
            show_count(history.newest("tokens_per_second")),
            f"{targets} trained on · {show_seconds(phase.seconds_per_step)} a step"
            if len(history)
            else "no step yet",
        ),
        Tile("Data wait", _recent_wait(run), "of the time, last records"),
        Tile("Peak memory", show_memory(history.highest("peak_bytes")), _describe_plan(run)),
        Tile("Tokens read", show_count(history.newest("tokens")), _describe_progress(run)),
    ]


def list_figures(run: Run, phase: Phase) -> list[str]:
    """Choose the figures by which runs are compared, as :data:`FIGURES` names them."""
    history = run.history
    steps = f"{history.step:,}" + (f" of {history.max_steps:,}" if history.max_steps else "")
    return [
        steps,
        _mean_loss(run),
        show_loss(history.held_out[-1].loss) if history.held_out else "–",
        show_loss(best.loss) if (best := history.best_held_out) else "–",
        show_count(history.newest("tokens_per_second")),
        show_seconds(phase.seconds_per_step),
        show_memory(history.highest("peak_bytes")),
        show_count(history.newest("tokens")),
    ]


FIGURES = (
    "step",
    "loss",
    "held-out loss",
    "best held-out",
    "tokens/s",
    "a step",
    "peak memory",
    "tokens read",
)


def _mean_loss(run: Run) -> str:
    losses = smooth(run.history.column("loss"), RECENT)
    return show_loss(float(losses[-1])) if len(losses) else "–"


def _describe_loss(run: Run) -> str:
    window = min(RECENT, len(run.history))
    if window < 2:
        return "no step yet" if not window else "of the first record"
    return f"mean of the last {window}: {_mean_loss(run)}"


def _describe_held_out(run: Run) -> tuple[str, str]:
    records = run.history.held_out
    if not records:
        return "–", "no held-out loss yet: Trainer measures it where it has an eval_stream"
    best = run.history.best_held_out
    below = f"best {show_loss(best.loss)} at step {best.step:,}" if best else "not finite"
    return show_loss(records[-1].loss), below


def _recent_wait(run: Run) -> str:
    seconds = run.history.interval_seconds()[-RECENT:]
    waits = run.history.column("data_wait_seconds")[-RECENT:]
    known = np.isfinite(seconds) & np.isfinite(waits)
    total = float(seconds[known].sum())
    return show_share(min(1.0, float(waits[known].sum()) / total)) if total > 0 else "–"


def _describe_plan(run: Run) -> str:
    plan = run.history.plan
    if plan is None:
        return "the log has no plan"
    if not plan.peak_bytes:
        return f"budget {show_memory(plan.budget_bytes)}"
    return f"planned {show_memory(plan.peak_bytes)} of {show_memory(plan.budget_bytes)}"


def _describe_progress(run: Run) -> str:
    epoch = number(run.history.last.get("epoch"))
    parts = [f"{epoch:.2f} epochs"] if math.isfinite(epoch) else []
    parts += [f"{n:,} {name.replace('_', ' ')}" for name, n in run.history.counts.items() if n]
    return " · ".join(parts)
