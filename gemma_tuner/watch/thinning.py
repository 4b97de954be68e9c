"""Lines as the page gets them: a bounded number of points, whatever the length of the run.

ECharts can thin too, but in the browser, from all points: of 100,000 records that is 16 MB a
drawing instead of 46 kB.
"""

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
    """Choose at most ``max_points`` (8 or more) of a line ``[points]``, the ends among them."""
    # Each of so many equal stretches keeps its smallest and its largest value, so that a single
    # spike among a hundred thousand steps is drawn. NaN is a gap, which only a short line shows.
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
    """Average each of ``[points]`` with those before it; NaN only where a window has no value."""
    is_finite = np.isfinite(values)
    sums = np.cumsum(np.where(is_finite, values, 0.0))
    counts = np.cumsum(is_finite)
    sums[window:], counts[window:] = (
        sums[window:] - sums[:-window],
        counts[window:] - counts[:-window],
    )
    return np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0)
