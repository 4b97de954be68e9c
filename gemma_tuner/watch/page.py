"""The page of one run or several: its parts, and how they follow what is logged.

Every text from a run's files goes through a label, which a browser takes as text, or is the value
of a property; none becomes HTML, a key, a style or part of a script.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nicegui import ui
from nicegui.events import GenericEventArguments

from gemma_tuner.watch import charts
from gemma_tuner.watch.charts import RUN_COLORS, Options
from gemma_tuner.watch.details import SHOWN_SETTINGS, Details
from gemma_tuner.watch.elements import Section, block, cell, heading, text
from gemma_tuner.watch.run import Phase, Run, list_setting_differences
from gemma_tuner.watch.sample_cards import SampleCards
from gemma_tuner.watch.summary import FIGURES, Tile, list_figures, list_tiles
from gemma_tuner.watch.units import show_seconds
from gemma_tuner.watch.watched import Pace, Watched

REFRESH_SECONDS = 2.0
"""The time between two looks for something new."""
STYLE = Path(__file__).with_name("page.css")

# A page that nobody sees draws nothing.
_TELL_VISIBILITY = """<script>
document.addEventListener("visibilitychange", () => emitEvent("visibility", document.hidden));
</script>"""

_ICONS = {None: "brightness_auto", True: "dark_mode", False: "light_mode"}


class _Status(NamedTuple):
    """A run's figures in the bar."""

    phase: Phase
    step: int
    max_steps: int | None
    num_warnings: int


class Page:
    """The page in one browser; the server reads the files of the runs."""

    def __init__(self, watched: Watched) -> None:
        self._watched = watched
        self._runs = watched.runs
        self._pace = Pace(watched, time.monotonic())
        self._is_hidden = False
        self._sections: list[Section[Any]] = []
        self._charts: list[tuple[ui.echart, Callable[[Sequence[Run]], Options]]] = []
        ui.add_css(STYLE.read_text(encoding="utf-8"))
        ui.page_title(f"{' · '.join(run.name for run in self._runs)} – gemma-tuner")
        ui.colors(primary=RUN_COLORS[0])
        self._dark = ui.dark_mode(None)
        self._build_bar()
        with block("page"):
            self._add(self._read_notices, _show_notices)
            if len(self._runs) == 1:
                (run,) = self._runs
                self._add(lambda: watched.make(list_tiles, run, watched.phases[0]), _show_tiles)
            else:
                self._build_comparison()
            self._build_charts()
            self._build_details()
        ui.add_head_html(_TELL_VISIBILITY)
        ui.on("visibility", self._hide)
        ui.timer(REFRESH_SECONDS, self.follow)

    def follow(self) -> None:
        """Show what has changed, if it is time and anybody sees it."""
        if not self._is_hidden and self._pace.is_due(time.monotonic()):
            self._draw()

    def _hide(self, event: GenericEventArguments) -> None:
        self._is_hidden = event.args is True
        if not self._is_hidden:
            self._draw()

    def _draw(self) -> None:
        for section in self._sections:
            section.follow()
        for chart, draw in self._charts:
            chart.props["options"] = self._watched.make(draw, self._runs)
        self._samples.follow()
        self._details.follow()

    def _add(
        self, read: Callable[[], object], show: Callable[[Any], None], classes: str = ""
    ) -> None:
        self._sections.append(Section(read, show, classes))

    # --- the bar -----------------------------------------------------------------------------

    def _build_bar(self) -> None:
        is_one = len(self._runs) == 1
        with block("bar"), block("bar-inner"):
            text(self._runs[0].name if is_one else f"{len(self._runs)} runs", "run-name")
            if is_one:
                self._add(self._read_status, _show_status, "status")
            block("grow")
            button = ui.button(icon=_ICONS[None], on_click=lambda: self._switch_theme(button))
            button.props(
                "flat round dense size=md color=grey aria-label='light, dark, or as the system'"
            )

    def _switch_theme(self, button: ui.button) -> None:
        self._dark.value = {None: True, True: False, False: None}[self._dark.value]
        button.set_icon(_ICONS[self._dark.value])

    def _read_status(self) -> _Status:
        history = self._runs[0].history
        warnings = sum(event.is_warning for event in history.events)
        return _Status(self._watched.phases[0], history.step, history.max_steps, warnings)

    def _read_notices(self) -> list[str]:
        notices = self._watched.problem.splitlines()
        notices += [
            f"{run.name} failed at step {run.history.step:,}. {run.history.failure}"
            for run in self._runs
            if run.history.failure
        ]
        if self._watched.has_parent_ended:
            notices.append(
                "The process that trained has ended, and so does this page: what you see stays, "
                "but nothing new comes. `gemma-tuner watch` opens the run again."
            )
        if not any(run.history.step or run.history.held_out for run in self._runs):
            notices.append("Nothing is logged yet: the first record comes after the first step.")
        return notices

    # --- runs beside each other --------------------------------------------------------------

    def _build_comparison(self) -> None:
        with block("card"):
            heading("Runs", "loss is the mean of the last 20 records")
            self._add(
                lambda: [
                    (run.name, phase, list_figures(run, phase))
                    for run, phase in zip(self._runs, self._watched.phases, strict=True)
                ],
                _show_runs,
                "scroll",
            )
        with block("card"):
            heading("Settings that differ")
            self._add(self._read_differences, self._show_differences, "scroll")

    def _read_differences(self) -> tuple[bool, list[tuple[str, list[str]]]]:
        return any(run.settings for run in self._runs), list_setting_differences(self._runs)

    def _show_differences(self, content: tuple[bool, list[tuple[str, list[str]]]]) -> None:
        is_known, differences = content
        if not is_known:
            text("The logs of these runs do not hold their settings.", "empty")
        elif not differences:
            text("None: these runs have the same settings.", "empty")
        else:
            with ui.element("table"):
                with ui.element("tr"):
                    cell("setting", tag="th")
                    for i, run in enumerate(self._runs):
                        with ui.element("th"):
                            _show_name(i, run.name)
                for name, values in differences[:SHOWN_SETTINGS]:
                    with ui.element("tr"):
                        for value in (name, *values):
                            cell(value)
            if len(differences) > SHOWN_SETTINGS:
                text(f"{len(differences) - SHOWN_SETTINGS:,} more differ.", "empty")

    # --- charts ------------------------------------------------------------------------------

    def _build_charts(self) -> None:
        with block("charts"):
            is_one = len(self._runs) == 1
            held_out, targets = ("", "") if is_one else (", dashed: held-out", ", dashed: targets")
            self._add_chart("Loss", f"nats a token{held_out}", charts.draw_loss, "wide")
            self._add_chart("Speed", f"tokens a second{targets}", charts.draw_speed)
            memory = "on the device" if is_one else "peak on the device"
            self._add_chart("Memory", memory, charts.draw_memory)
            self._add_chart("Data wait", "share of the time", charts.draw_wait)
            self._add_chart("Gradient norm", "before clipping", charts.draw_grad_norm)
            self._add_chart("Learning rate", "", charts.draw_learning_rate)

    def _add_chart(
        self, title: str, unit: str, draw: Callable[[Sequence[Run]], Options], size: str = ""
    ) -> None:
        with block(f"card {size}"):
            heading(title, unit)
            chart = ui.echart(self._watched.make(draw, self._runs)).classes("chart")
        self._charts.append((chart, draw))

    # --- one run's details -------------------------------------------------------------------

    def _build_details(self) -> None:
        if len(self._runs) > 1:
            with block("select-run"):
                text("Details of", "quiet")
                options = {i: run.name for i, run in enumerate(self._runs)}
                toggle = ui.toggle(options, value=0, on_change=lambda e: self._select(e.value))
                toggle.props("no-caps unelevated dense padding='3px 14px'")
        self._samples = SampleCards(self._runs[0], 0)
        self._details = Details(self._runs[0])

    def _select(self, index: int) -> None:
        self._samples.select(self._runs[index], index)
        self._details.select(self._runs[index])


def _show_notices(notices: list[str]) -> None:
    for notice in notices:
        text(notice, "notice")


def _show_status(status: _Status) -> None:
    _show_phase(status.phase)
    if status.max_steps:
        with block("progress"):
            block("progress-done").style(f"width: {min(1, status.step / status.max_steps):.2%}")
        text(f"step {status.step:,} of {status.max_steps:,}", "quiet")
    elif status.step:
        text(f"step {status.step:,}", "quiet").tooltip(
            "the log does not say how many steps the run is to have"
        )
    if status.phase.seconds_left is not None:
        text(f"{show_seconds(status.phase.seconds_left)} left", "quiet").tooltip(
            "at the pace of the last records, without evaluating and saving"
        )
    if status.num_warnings:
        words = "1 warning" if status.num_warnings == 1 else f"{status.num_warnings:,} warnings"
        ui.link(words, "#events").classes("warnings")


def _show_tiles(tiles: list[Tile]) -> None:
    with block("tiles"):
        for tile in tiles:
            with block("tile"):
                text(tile.title, "tile-title")
                text(tile.figure, "tile-figure")
                text(tile.below, "tile-below")


def _show_runs(rows: list[tuple[str, Phase, list[str]]]) -> None:
    with ui.element("table"):
        with ui.element("tr"):
            for head in ("run", "", *FIGURES):
                cell(head, tag="th")
        for i, (name, phase, figures) in enumerate(rows):
            with ui.element("tr"):
                with ui.element("td"):
                    _show_name(i, name)
                with ui.element("td"):
                    _show_phase(phase)
                for figure in figures:
                    cell(figure)


def _show_name(index: int, name: str) -> None:
    with block("run-cell"):
        block("swatch").style(f"background: {RUN_COLORS[index % len(RUN_COLORS)]}")
        text(name)


def _show_phase(phase: Phase) -> None:
    with block(f"phase phase-{phase.name}"):
        block("phase-dot")
        if phase.name != "silent":
            text("waiting for the first record" if phase.name == "waiting" else phase.name)
            return
        label = text(f"silent for {show_seconds(phase.silent_seconds)}")
        label.tooltip("nothing has been logged for so long: the process may have ended")
