"""A run as people see it: progress on a terminal or in a notebook, and its result there."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Column

from gemma_tuner.display import (
    ACCENT,
    QUIET,
    element,
    escape,
    make_bar,
    make_card,
    make_table,
    quote_text,
)
from gemma_tuner.training.interrupt import EARLY_STOPPING
from gemma_tuner.training.reporting.metrics import EvalRecord, StepRecord

_SECONDS_BETWEEN_DRAWINGS = 0.25
_WIDTH, _HEIGHT, _INDENT = 360, 96, 10  # of the curve, in pixels


class _Stderr(Console):
    """A console on stderr that falls silent when nobody reads it any more.

    rich would end the process; a run of hours must not end because ``| head`` did.
    """

    def __init__(self) -> None:
        super().__init__(stderr=True)

    def on_broken_pipe(self) -> None:
        self.quiet = True


class Progress:
    """Show a run on stderr: a live bar on a terminal or in a notebook, else a line a record.

    Use as a context manager.
    """

    def __init__(
        self,
        total_steps: int,
        enabled: bool = True,  # noqa: FBT001, FBT002 - Progress(total_steps, enabled)
        done_steps: int = 0,
        console: Console | None = None,
    ) -> None:
        self._total_steps = total_steps
        self._enabled = enabled
        self._console = console or _Stderr()
        self._held_out_loss = ""
        self._bar: RichProgress | None = None
        self._notebook: NotebookBar | None = None
        if enabled and self._console.is_jupyter:
            self._notebook = NotebookBar(total_steps, done_steps)
        elif enabled and self._console.is_terminal:
            self._bar = RichProgress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=20),
                TimeRemainingColumn(),
                # Wrapped where the terminal is narrow, so that no figure is cut off.
                TextColumn("{task.description}", markup=False, table_column=Column(ratio=1)),
                console=self._console,
                expand=True,
            )
            self._task = self._bar.add_task("", total=total_steps, completed=done_steps)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        if self._notebook is not None:
            self._notebook.draw()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._notebook is not None:
            self._notebook.draw()

    def advance(self, step: int) -> None:
        """Move the live bar; where there is none, a line a record is enough."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)
        if self._notebook is not None:
            self._notebook.advance(step)

    def step(self, record: StepRecord) -> None:
        """Show a step's record."""
        text = _describe(record)
        if self._bar is not None:
            text += self._held_out_loss
            self._bar.update(self._task, completed=record.step, description=text)
        elif self._notebook is not None:
            self._notebook.advance(record.step, text)
        else:
            self._print(f"step {record.step}/{self._total_steps}  {text}")

    def evaluation(self, record: EvalRecord) -> None:
        """Show a held-out loss; a live bar keeps showing the last one."""
        self._held_out_loss = f"  held-out {record.loss:.4f}"
        self._print(
            f"step {record.step}/{self._total_steps}  held-out loss {record.loss:.4f}  "
            f"perplexity {record.perplexity:.2f}  ({record.target_tokens} target tokens, "
            f"{record.examples} examples)"
            + "".join(f"  {name} {count}" for name, count in record.counts.items())
        )

    def message(self, text: str) -> None:
        """Show a line of text, above the bar where there is one."""
        self._print(text)

    def _print(self, text: str) -> None:
        if self._notebook is not None:
            self._notebook.add_line(text)
        elif self._enabled:
            # No markup: a path may hold square brackets. No wrapping: a line is a record.
            self._console.print(quote_text(text), markup=False, highlight=False, soft_wrap=True)


def _describe(record: StepRecord) -> str:
    """What a reader watches, in one line and in units fit for reading."""
    text = (
        f"loss {record.loss:.4f}  lr {record.learning_rate:.2e}  "
        f"{record.tokens_per_second:.0f} tokens/s  {record.memory_bytes / 2**30:.2f} GiB  "
        f"data wait {record.data_wait_seconds:.1f} s"
    )
    counts = {"skipped": record.skipped_steps, **record.counts}
    return text + "".join(f"  {name} {count}" for name, count in counts.items() if count)


class NotebookBar:
    """A run under way in a notebook: one output, drawn again and again, that stays as it was last.

    It needs no widgets, so that it looks the same wherever the notebook is opened.
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


def write_result(
    step: int, stopped_by: str | None, held_out: Sequence[EvalRecord], notes: Sequence[str]
) -> str:
    """Write the end of a run as HTML: its held-out losses, as a curve and in figures."""
    title = f"{step:,} optimizer steps done"
    stopped = "finished" if stopped_by is None else f"stopped by {stopped_by.replace('_', ' ')}"
    if stopped_by not in (None, EARLY_STOPPING):
        stopped += "; fit(resume=True) goes on"
    note = ". ".join([stopped, *notes])
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
