"""A run as notebooks show it: a bar while it trains, and its result."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gemma_tuner.display import ACCENT, QUIET, element, escape, make_bar, make_card, make_table

if TYPE_CHECKING:
    from gemma_tuner.training.metrics import EvalRecord

_SECONDS_BETWEEN_DRAWINGS = 0.25
_WIDTH, _HEIGHT, _INDENT = 360, 96, 10  # of the curve, in pixels


class NotebookBar:
    """A run under way in a notebook: one output, drawn again and again, that stays as it was last.

    It needs no widgets, so that it looks the same wherever the notebook is opened.

    Args:
        total_steps: Optimizer steps of the whole run.
        done_steps: Those of an earlier run that this one resumes.
    """

    def __init__(self, total_steps: int, done_steps: int) -> None:
        self._total_steps = total_steps
        self._step = done_steps
        self._text = ""
        self._lines: list[str] = []
        self._handle: Any = None
        self._drawn = 0.0

    def advance(self, step: int, text: str | None = None) -> None:
        """Move the bar."""
        self._step = step
        self._text = self._text if text is None else text
        if time.monotonic() - self._drawn >= _SECONDS_BETWEEN_DRAWINGS:
            self.draw()

    def add_line(self, text: str) -> None:
        """Show a line of text below the bar, for good."""
        self._lines.append(text)
        self.draw()

    def draw(self) -> None:
        """Draw everything as it is now."""
        from IPython.display import HTML, display  # noqa: PLC0415 - only a kernel has it

        done = (self._step / max(1, self._total_steps), ACCENT, f"{self._step} steps done")
        lines = "".join(element("div", escape(line), QUIET) for line in self._lines)
        html = HTML(
            make_card(
                f"step {self._step:,} of {self._total_steps:,}",
                self._text,
                make_bar([done], f"{self._step} of {self._total_steps} steps"),
                lines,
            )
        )
        if self._handle is None:
            self._handle = display(html, display_id=True)
        else:
            self._handle.update(html)
        self._drawn = time.monotonic()


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
