"""Charts as options of Apache ECharts.

Texts of users (a run's name) are only ever values, which ECharts draws on its canvas or escapes in
its tooltip. A key that begins with ":" holds our own JavaScript.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gemma_tuner.watch.thinning import Point

_MUTED = "#8b93a1"

Options = dict[str, Any]

# JavaScript that writes figures, in tooltips and on axes.
_FORMATS = {
    "loss": "v => v == null ? '–' : Number(v).toPrecision(4)",
    "rate": "v => v == null ? '–' : v === 0 ? '0' : Number(v).toExponential(2)",
    "norm": "v => v == null ? '–' : Number(v).toPrecision(3)",
    "speed": "v => v == null ? '–' : Math.round(v).toLocaleString('en') + ' /s'",
    "share": "v => v == null ? '–' : Number(v).toFixed(v < 10 ? 1 : 0) + ' %'",
    "memory": "v => v == null ? '–' : Number(v).toFixed(v < 10 ? 2 : 1) + ' GiB'",
}
_AXIS_FORMATS = {
    "rate": "v => v === 0 ? '0' : Number(v.toPrecision(2)).toExponential()",
    "speed": "v => v >= 1e4 ? (v / 1000) + ' k' : v.toLocaleString('en')",
    "share": "v => Number(v.toPrecision(3)) + ' %'",
    "memory": "v => Number(v.toPrecision(3)) + ' GiB'",
}


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a chart."""

    name: str
    points: Sequence[Point]
    color: str  # #rrggbb
    width: float = 1.8  # pixels
    opacity: float = 1.0
    is_dashed: bool = False
    has_dots: bool = False


@dataclass(frozen=True, slots=True)
class Limit:
    """A horizontal line with its name on it."""

    name: str
    value: float
    color: str = _MUTED


def draw(
    lines: Sequence[Line],
    figure: str,
    *,
    from_zero: bool = False,
    has_legend: bool = False,
    limits: Sequence[Limit] = (),
    max_step: int | None = None,
) -> Options:
    """Make a chart over steps, up to ``max_step`` or the last point; ``figure`` is a format."""
    axis_text = {"color": _MUTED, "fontSize": 11, "hideOverlap": True}
    y_axis: Options = {
        "type": "value",
        "scale": not from_zero,
        "splitNumber": 4,
        "axisLabel": axis_text
        | ({":formatter": _AXIS_FORMATS[figure]} if figure in _AXIS_FORMATS else {}),
        "axisLine": {"show": False},
        "axisTick": {"show": False},
        "splitLine": {"lineStyle": {"color": "rgba(139,147,161,0.16)"}},
    }
    if limits:
        highest = max(limit.value for limit in limits)
        values = [value for line in lines for _, value in line.points if value is not None]
        y_axis |= _round_axis(1.05 * max([highest, *values]))
    x_axis: Options = {
        "type": "value",
        "min": 0,
        "max": max_step or "dataMax",
        "axisLabel": axis_text,
        "axisLine": {"lineStyle": {"color": "rgba(139,147,161,0.35)"}},
        "axisTick": {"show": False},
        "splitLine": {"show": False},
        "minInterval": 1,
    }
    return {
        "animation": False,
        "grid": {"left": 8, "right": 14, "top": 30 if has_legend else 12, "bottom": 4}
        | {"containLabel": True},
        "legend": {
            "show": has_legend,
            "top": 0,
            "right": 6,
            "icon": "roundRect",
            "itemWidth": 14,
            "itemHeight": 3,
            "textStyle": {"color": _MUTED, "fontSize": 11},
        },
        "tooltip": {
            "trigger": "axis",
            "confine": True,
            "backgroundColor": "rgba(22,25,32,0.94)",
            "borderWidth": 0,
            "padding": [8, 10],
            "textStyle": {"color": "#eef1f5", "fontSize": 12},
            "axisPointer": {"lineStyle": {"color": _MUTED, "type": "solid", "opacity": 0.5}},
            ":valueFormatter": _FORMATS[figure],
        },
        "xAxis": x_axis,
        "yAxis": y_axis,
        "series": [_series(line, limits if i == 0 else ()) for i, line in enumerate(lines)],
    }


def _round_axis(highest: float) -> Options:
    """An axis from 0 beyond a value, in three to six round intervals."""
    magnitude = 10.0 ** math.floor(math.log10(highest / 3))
    interval = next(n * magnitude for n in (10, 5, 2, 1) if n * magnitude <= highest / 3)
    return {"interval": interval, "max": interval * math.ceil(highest / interval)}


def _series(line: Line, limits: Sequence[Limit]) -> Options:
    dash = "dashed" if line.is_dashed else "solid"
    series: Options = {
        "name": line.name,
        "type": "line",
        "data": line.points,
        "showSymbol": line.has_dots or len(line.points) == 1,
        "symbol": "circle",
        "symbolSize": 6,
        "connectNulls": False,
        "color": line.color,
        "lineStyle": {"width": line.width, "opacity": line.opacity, "type": dash},
        "emphasis": {"disabled": True},
    }
    if limits:
        data = [_mark(limit) for limit in limits]
        series["markLine"] = {"silent": True, "symbol": "none", "data": data}
    return series


def _mark(limit: Limit) -> Options:
    place = {"position": "insideEndTop", "color": limit.color, "fontSize": 11}
    return {
        "yAxis": limit.value,
        "lineStyle": {"color": limit.color, "type": "dashed", "width": 1},
        "label": {"formatter": limit.name, **place},
    }
