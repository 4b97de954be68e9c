"""Plans as notebooks show them: a bar of what a step holds, its parts, and why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from gemma_tuner.display import QUIET, element, escape, make_bar, make_card, make_table, show_bytes

if TYPE_CHECKING:
    from gemma_tuner.planning.trace import Footprint

_MARGIN = "repeating-linear-gradient(45deg,#8888 0 4px,#8883 4px 8px)"
_SMALLEST_BUDGET_SHARE = 0.1  # of the peak, below which a bar of the budget shows nothing


def write_plan(
    title: str,
    note: str,
    footprint: Footprint | None,
    reasons: Mapping[str, str],
    *,
    margin_bytes: int,
    budget_bytes: int,
) -> str:
    """Write a plan as HTML: a bar of what a step holds, its parts, and why."""
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
