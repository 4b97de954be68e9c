"""Fewer points for the eye, with every peak that it would have seen."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Point = tuple[int, float | None]
"""A step and its value, as charts take them; None is a gap."""

MAX_POINTS = 400
"""Points of a line: one for every two pixels of the large chart on a laptop."""


def thin(
    steps: NDArray[np.int64], values: NDArray[np.float64], max_points: int = MAX_POINTS
) -> list[Point]:
    """Choose the points of a line."""
    # Each of so many equal stretches keeps its smallest and its largest value, so a single spike
    # among a hundred thousand steps is drawn. The first and the last point are kept.
    # steps: ``[points]``, in their order.
    # values: ``[points]``; NaN is a gap, which a line without thinning shows.
    chosen = np.arange(len(steps))
    if len(steps) > max_points:
        finite = np.flatnonzero(np.isfinite(values))
        stretches = np.array_split(finite, max_points // 2 - 1)
        extremes = [
            stretch[pick(values[stretch])]
            for stretch in stretches
            if len(stretch)
            for pick in (np.argmin, np.argmax)
        ]
        chosen = np.unique([0, *extremes, len(steps) - 1])
    return [
        (int(step), float(f"{value:.6g}") if np.isfinite(value) else None)
        for step, value in zip(steps[chosen], values[chosen], strict=True)
    ]


def smooth(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Average each value with those before it."""
    # values: ``[points]``; NaN counts for nothing.
    # Returns: ``[points]``; NaN where no value of the window is finite.
    is_finite = np.isfinite(values)
    sums = np.cumsum(np.where(is_finite, values, 0.0))
    counts = np.cumsum(is_finite)
    sums[window:], counts[window:] = (
        sums[window:] - sums[:-window],
        counts[window:] - counts[:-window],
    )
    return np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0)
