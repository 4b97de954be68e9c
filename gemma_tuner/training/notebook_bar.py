"""A run under way as notebooks show it."""

from __future__ import annotations

import time
from typing import Any

from gemma_tuner.display import ACCENT, QUIET, element, escape, make_bar, make_card

_SECONDS_BETWEEN_DRAWINGS = 0.25


class NotebookBar:
    """A run under way in a notebook: one output that is drawn anew, and stays as it was last.

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
