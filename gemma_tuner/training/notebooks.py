"""Plans and the ends of runs as notebooks show them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from gemma_tuner.display import (
    ACCENT,
    QUIET,
    element,
    escape,
    make_bar,
    make_card,
    make_table,
    show_bytes,
)

if TYPE_CHECKING:
    from gemma_tuner.training.footprint import Footprint
    from gemma_tuner.training.metrics import EvalRecord

_MARGIN = "repeating-linear-gradient(45deg,#8888 0 4px,#8883 4px 8px)"
_SMALLEST_BUDGET_SHARE = 0.1  # of the peak, below which a bar of the budget shows nothing
_WIDTH, _HEIGHT, _INDENT = 360, 96, 10  # of the curve, in pixels


def write_plan(
    title: str,
    note: str,
    footprint: Footprint | None,
    reasons: Mapping[str, str],
    *,
    margin_bytes: int,
    budget_bytes: int,
) -> str:
    """Write a plan as HTML: a bar of what a step holds, its parts, and why.

    Args:
        title: What was planned.
        note: For what.
        footprint: What a step holds; None where no plan was needed.
        reasons: Why each choice was made, by its name.
        margin_bytes: What is left to the allocator.
        budget_bytes: What the device may hold.

    Returns:
        HTML, its texts escaped.
    """
    why = make_table((), [(escape(name), escape(reason)) for name, reason in reasons.items()])
    if footprint is None:
        return make_card(title, note, why)
    parts = _list_parts(footprint)
    peak = footprint.peak_bytes
    whole, scale = max(budget_bytes, peak + margin_bytes), "of the budget"
    if peak < _SMALLEST_BUDGET_SHARE * budget_bytes:
        whole, scale = peak, f"of the peak, which is {peak / budget_bytes:.1%} of the budget"
    pieces = [
        (held / whole, color, f"{name}: {show_bytes(held)}") for name, held, _, color in parts
    ]
    if whole > peak:
        pieces.append((margin_bytes / whole, _MARGIN, f"allocator: {show_bytes(margin_bytes)}"))
    rows = [
        (_swatch(color) + escape(name), show_bytes(held), kind)
        for name, held, kind, color in parts
    ]
    rows += [
        (element("b", "predicted peak"), element("b", show_bytes(peak)), ""),
        (_swatch(_MARGIN) + "left to the allocator", show_bytes(margin_bytes), ""),
    ]
    bar = make_bar(pieces, f"{show_bytes(peak)} at the peak, of {show_bytes(budget_bytes)}")
    caption = element("div", f"parts {scale}", f"{QUIET};font-size:85%")
    return make_card(title, note, bar, caption, make_table((), rows), why)


def _list_parts(footprint: Footprint) -> list[tuple[str, int, str, str]]:
    """Name, bytes, kind and colour of each part, largest first within what stays and what not."""
    found = []
    for kind, hue, parts in (
        ("stays", 205, footprint.resident),
        ("at the peak", 30, footprint.step),
    ):
        held = sorted(((n, held) for n, held in parts.items() if held), key=lambda part: -part[1])
        for index, (name, num_bytes) in enumerate(held):
            lightness = 38 + 42 * index / len(held)
            found.append((name, num_bytes, kind, f"hsl({hue} 75% {lightness:.0f}%)"))
    return found


def _swatch(color: str) -> str:
    style = f"display:inline-block;width:12px;height:12px;margin-right:8px;background:{color}"
    return element("span", "", style)


def write_result(step: int, stopped_by: str | None, held_out: Sequence[EvalRecord]) -> str:
    """Write the end of a run as HTML: its held-out losses, as a curve and in figures.

    Args:
        step: Optimizer steps done.
        stopped_by: The signal that stopped it early, or None.
        held_out: The held-out losses, in order.

    Returns:
        HTML, its texts escaped.
    """
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
