"""Figures as people read them."""

from __future__ import annotations

import math


def show_count(value: float) -> str:
    """A count in at most four digits: 940, 12.3 k, 4.56 M; "–" where it is not known."""
    if not math.isfinite(value):
        return "–"
    for divisor, unit in ((1e9, " G"), (1e6, " M"), (1e4, " k")):
        if value >= divisor:
            scaled = value / (1e3 if unit == " k" else divisor)
            return f"{scaled:.2f}{unit}" if scaled < 10 else f"{scaled:.1f}{unit}"
    return f"{value:,.0f}"


def show_seconds(seconds: float | None) -> str:
    """A length of time in its two largest units; "–" where it is not known."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02} min"
    return f"{hours // 24} days {hours % 24} h"


def show_loss(loss: float) -> str:
    """A loss in nats; "–" where it is not known."""
    return f"{loss:.4f}" if math.isfinite(loss) else "–"


def show_share(share: float) -> str:
    """A share as a percentage; "–" where it is not known."""
    if not math.isfinite(share):
        return "–"
    return f"{share:.1%}" if share < 0.1 else f"{share:.0%}"
