"""The lower part of the page: the memory plan, events, the quarantine and the settings."""

from __future__ import annotations

import math
from collections import Counter

from nicegui import ui

from gemma_tuner.display import show_memory
from gemma_tuner.streaming.quarantine import BadExample
from gemma_tuner.watch.charts import RUN_COLORS
from gemma_tuner.watch.elements import Section, block, heading, text
from gemma_tuner.watch.history import Event, MemoryPlan
from gemma_tuner.watch.run import Run, show_setting

SHOWN_EVENTS = 100
SHOWN_BAD = 50
SHOWN_SETTINGS = 300
SMALL_SHARE = 0.02
"""Parts of the plan below this share of its bar are drawn as one."""


class Details:
    """The cards of one run below the charts."""

    def __init__(self, run: Run) -> None:
        self._run = run
        with block("details"):
            with block("details-column"):
                with block("card"):
                    heading("Memory plan", "predicted before the first step")
                    self._plan = Section(self._read_plan, _show_plan)
                with block("card"):
                    heading("Quarantine", "examples that could not be used")
                    self._bad = Section(self._read_quarantine, _show_quarantine)
            with block("details-column"):
                with block("card").props("id=events"):
                    heading("Events", "the newest first")
                    self._events = Section(lambda: list(self._run.history.events), _show_events)
                with block("card"):
                    heading("Settings", "of the run")
                    self._settings = Section(self._read_settings, _show_settings, "scroll")

    def select(self, run: Run) -> None:
        """Show another run."""
        self._run = run
        self.follow()

    def follow(self) -> None:
        """Show what there is now."""
        for section in (self._plan, self._events, self._bad, self._settings):
            section.follow()

    def _read_plan(self) -> tuple[MemoryPlan | None, float | None, bool]:
        """The plan, the bytes of the largest peak so far, and whether that is on the CPU."""
        history = self._run.history
        measured = history.highest("peak_bytes")
        is_known = math.isfinite(measured)
        return history.plan, measured if is_known else None, history.device == "cpu"

    def _read_quarantine(self) -> tuple[list[BadExample], int]:
        return list(self._run.quarantine), self._run.history.counts.get("passed_over", 0)

    def _read_settings(self) -> list[tuple[str, str]]:
        return [(name, show_setting(value)) for name, value in self._run.settings.items()]


def _show_plan(content: tuple[MemoryPlan | None, float | None, bool]) -> None:
    plan, measured, is_cpu = content
    if plan is None:
        text("No plan in the log yet: it is made with the first step.", "empty")
        return
    sums = [f"budget {show_memory(plan.budget_bytes)}"]
    if measured is not None:
        whole = ", of the whole process" if is_cpu else ""
        sums.insert(0, f"measured so far {show_memory(measured)}{whole}")
    if plan.parts:
        _show_parts(plan, measured)
        sums.insert(0, f"predicted peak {show_memory(plan.peak_bytes)}")
    else:
        text("There is ample room, so nothing was tried before the first step.", "empty")
    text(" · ".join(sums), "quiet")
    if plan.summary:
        with ui.expansion("the plan in words").props("dense").classes("quiet"):
            text(plan.summary, "plan-words")


def _show_parts(plan: MemoryPlan, measured: float | None) -> None:
    """Show a plan's parts as one bar, as long as the budget where that is near."""
    total = sum(plan.parts.values())
    if not total:
        return
    large = {name: held for name, held in plan.parts.items() if held >= SMALL_SHARE * total}
    rest = total - sum(large.values())
    parts = sorted(large.items(), key=lambda part: -part[1]) + ([("other", rest)] if rest else [])
    length = max(total, measured or 0, plan.budget_bytes if plan.budget_bytes <= 3 * total else 0)
    colors = [RUN_COLORS[i % len(RUN_COLORS)] for i in range(len(parts))]
    with block("plan-bar"):
        for (name, held), color in zip(parts, colors, strict=True):
            piece = block("plan-part").style(f"width: {held / length:.3%}; background: {color}")
            piece.props["title"] = f"{name}: {show_memory(held)}"
        if measured is not None:
            block("plan-measured").style(f"left: {min(99.6, 100 * measured / length):.2f}%")
    with block("plan-legend"):
        for (name, held), color in zip(parts, colors, strict=True):
            with block("run-cell"):
                block("swatch").style(f"background: {color}")
                text(name)
                text(show_memory(held), "quiet")


def _show_events(events: list[Event]) -> None:
    if not events:
        text("Nothing out of the ordinary yet.", "empty")
        return
    with block("events"):
        for event in events[: -SHOWN_EVENTS - 1 : -1]:
            with block("event event-warning" if event.is_warning else "event"):
                text(f"step {event.step:,}", "event-step")
                text(event.name.replace("_", " "), "event-name")
                text(event.message, "event-message")
    if len(events) > SHOWN_EVENTS:
        text(f"{len(events) - SHOWN_EVENTS:,} older ones are in log.jsonl.", "empty")


def _show_quarantine(content: tuple[list[BadExample], int]) -> None:
    bad, passed_over = content
    if not bad:
        text(
            f"{passed_over:,} examples were passed over; the run's folder does not name them."
            if passed_over
            else "Empty: no example so far was passed over.",
            "empty",
        )
        return
    stages = Counter(example.stage for example in bad)
    text(" · ".join(f"{stage}: {count:,}" for stage, count in stages.most_common(10)), "quiet")
    with block("events"):
        for example in bad[: -SHOWN_BAD - 1 : -1]:
            with block("event"):
                text(example.stage, "event-step")
                text(example.key, "event-name")
                text(example.reason, "event-message")
    if len(bad) > SHOWN_BAD:
        text(f"{len(bad) - SHOWN_BAD:,} more are in the quarantine file.", "empty")


def _show_settings(settings: list[tuple[str, str]]) -> None:
    if not settings:
        text("The log does not hold the run's settings.", "empty")
        return
    with block("settings"):
        for name, value in settings[:SHOWN_SETTINGS]:
            with block("setting"):
                text(name, "quiet")
                text(value)
    if len(settings) > SHOWN_SETTINGS:
        text(f"{len(settings) - SHOWN_SETTINGS:,} more are in the run's files.", "empty")
