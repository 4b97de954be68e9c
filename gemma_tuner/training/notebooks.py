"""The end of a run as notebooks show it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gemma_tuner.display import ACCENT, make_card, make_table

if TYPE_CHECKING:
    from gemma_tuner.training.metrics import EvalRecord

_WIDTH, _HEIGHT, _INDENT = 360, 96, 10  # of the curve, in pixels


def write_result(step: int, stopped_by: str | None, held_out: Sequence[EvalRecord]) -> str:
    """Write the end of a run as HTML: its held-out losses, as a curve and in figures."""
    title = f"{step:,} optimizer steps done"
    note = f"stopped by {stopped_by}; fit(resume=True) goes on" if stopped_by else "finished"
    if not held_out:
        return make_card(title, f"{note}; no held-out loss was measured")
    head = ("after step", "held-out loss, nats a token", "perplexity")
    rows = [(f"{r.step:,}", f"{r.loss:.4f}", f"{r.perplexity:,.3f}") for r in held_out]
    curve = _draw_curve([(r.step, r.loss) for r in held_out]) if len(held_out) > 1 else ""
    return make_card(title, note, curve, make_table(head, rows))


def _draw_curve(points: Sequence[tuple[int, float]]) -> str:
    """Draw losses over steps, from 0 up."""
    first, last = points[0][0], max(points[-1][0], points[0][0] + 1)
    most = max(loss for _, loss in points) or 1.0
    places = [
        (
            _INDENT + (step - first) / (last - first) * (_WIDTH - 2 * _INDENT),
            _HEIGHT - _INDENT - loss / most * (_HEIGHT - 2 * _INDENT),
        )
        for step, loss in points
    ]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in places)
    base = _HEIGHT - _INDENT
    return (
        f'<svg width="{_WIDTH}" height="{_HEIGHT}" role="img" aria-label="held-out loss over '
        f'steps" fill="{ACCENT}" stroke="{ACCENT}">'
        f'<line x1="0" x2="{_WIDTH}" y1="{base}" y2="{base}" stroke="#8886"/>'
        f'<polyline points="{line}" fill="none" stroke-width="2"/>{dots}</svg>'
    )
