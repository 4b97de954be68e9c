"""A report as text, Markdown and HTML; whatever comes from data is text there, never markup."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterator
from io import StringIO
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gemma_tuner.display import element, escape, make_card, make_details, make_table

if TYPE_CHECKING:
    from gemma_tuner.evaluation.report import Answered, Report
    from gemma_tuner.evaluation.scores import ScoreResult

_MAX_CHARACTERS = 1500  # of one text; the JSON has all of it
_MARKDOWN = re.compile(r"([\\`*_\[\]|~$])")  # what means something within a line

Row = tuple[str, ...]


def write_text(report: Report) -> str:
    """Write the figures as wide as the terminal, or as 80 characters where there is none."""
    head, *rows = _make_rows(report)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for place, name in enumerate(head):
        table.add_column(Text(name), justify="right" if place else "left")
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console(file=StringIO(), highlight=False)
    with console.capture() as written:
        console.print(Text(f"Evaluation of {report.model}", style="bold"))
        console.print(table)
        lines = (line for line in _describe(report) if " version: " not in line)
        console.print(Text("\n".join(lines)))
    return "\n".join(line.rstrip() for line in written.get().splitlines())


def write_markdown(report: Report, num_worst: int) -> str:
    """Write figures and the worst examples as Markdown."""
    head, *rows = _make_rows(report)
    lines = [
        f"# Evaluation of {_escape_markdown(report.model)}",
        "",
        _join_row(head),
        _join_row(("---", *["---:"] * (len(head) - 1))),
        *(_join_row(tuple(map(_escape_markdown, row))) for row in rows),
        "",
        *(f"- {_escape_markdown(line)}" for line in _describe(report)),
    ]
    worst, title = _find_worst(report, num_worst)
    if worst:
        lines += ["", f"## The {title}"]
    for number, example in enumerate(worst, 1):
        lines += ["", f"### {number}. {_escape_markdown(example.key)}", ""]
        for path in report.media.get(example.key, ()):
            mark = "!" if path.endswith(".png") else ""
            lines += [f"{mark}[{path}]({path})", ""]
        lines += [f"- **{name}:** {_shorten(text)}" for name, text in _list_texts(report, example)]
    return "\n".join(lines) + "\n"


def write_html(report: Report, num_worst: int) -> str:
    """Write figures and the worst examples as HTML without scripts or links, for notebooks."""
    head, *rows = _make_rows(report)
    facts = "".join(element("li", escape(line)) for line in _describe(report))
    worst, title = _find_worst(report, num_worst)
    examples = [
        element("b", escape(example.key))
        + make_table((), [(escape(k), escape(text)) for k, text in _list_texts(report, example)])
        for example in worst
    ]
    return make_card(
        f"Evaluation of {report.model}",
        ", ".join(report.systems),
        make_table(head, [tuple(map(escape, row)) for row in rows]),
        make_details(f"the {title}", "".join(examples)) if worst else "",
        make_details("what was measured, and how", element("ul", facts)),
    )


def _make_rows(report: Report) -> list[Row]:
    """Figures in rows, the first row their names; a column for each system."""
    is_compared = len(report.systems) > 1
    extra = ("difference", "95 % interval") if is_compared else ()
    rows: list[Row] = [("", *report.systems, *extra)]
    for title, name, form in (
        ("held-out loss, nats a token (lower is better)", "loss", "{:.4f}"),
        ("perplexity (lower is better)", "perplexity", "{:.3f}"),
    ):
        values = [getattr(report.held_out[system], name) for system in report.systems]
        more = (f"{values[0] - values[1]:+.4f}", "") if is_compared else ()
        rows.append((title, *map(form.format, values), *more))
    return rows + [_make_score_row(report, score) for score in report.scores]


def _make_score_row(report: Report, score: ScoreResult) -> Row:
    better = "higher" if score.higher_is_better else "lower"
    values = [_show_number(score.values[system], "{:.4f}") for system in report.systems]
    row = (f"{score.name} ({better} is better)", *values)
    if score.difference is None:
        return row
    interval = "too few rows"
    if score.interval is not None:
        interval = "{:+.4f} to {:+.4f}".format(*score.interval)
    return (*row, _show_number(score.difference, "{:+.4f}"), interval)


def _show_number(value: float, form: str) -> str:
    return "undefined" if math.isnan(value) else form.format(value)


def _describe(report: Report) -> Iterator[str]:
    for name, count in report.counts.items():
        yield f"{name.replace('_', ' ')}: {count:,}"
    for name, value in report.settings.items():
        yield f"{name.replace('_', ' ')}: {value}"


def _find_worst(report: Report, count: int) -> tuple[tuple[Answered, ...], str]:
    worst = report.find_worst(count)
    by = f" by {report.scores[0].name}" if report.scores else ""
    return worst, f"{len(worst)} worst of {len(report.examples)} answers{by}"


def _list_texts(report: Report, example: Answered) -> Iterator[tuple[str, str]]:
    yield "prompt", example.prompt
    for reference in dict.fromkeys(example.references):
        yield "reference", reference
    for system in report.systems:
        answer = example.answers[system]
        shown = ", ".join(
            f"{name} {tallies[system].value:.4g}" for name, tallies in example.tallies.items()
        )
        yield f"{system} ({shown})", answer.text
        if answer.thinking:
            yield f"{system}, thinking", answer.thinking


def _shorten(text: str) -> str:
    if len(text) <= _MAX_CHARACTERS:
        return _escape_markdown(text) or "(empty)"
    return f"{_escape_markdown(text[:_MAX_CHARACTERS])} … ({len(text):,} characters)"


def _escape_markdown(text: str) -> str:
    return "<br>".join(_MARKDOWN.sub(r"\\\1", html.escape(text, quote=False)).splitlines())


def _join_row(cells: Row) -> str:
    return f"| {' | '.join(cells)} |"
