"""Results as text, Markdown and HTML; whatever comes from data is text there, never markup."""

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
    from gemma_tuner.evaluation.results import Answered, Results, ScoreResult

_MAX_CHARACTERS = 1500  # of one text; the JSON has all of it
_MARKDOWN = re.compile(r"([\\`*_\[\]|~$])")  # what means something within a line
_PICTURES = (".png",)

Row = tuple[str, ...]


def write_text(results: Results) -> str:
    """Write the figures as a terminal shows them."""
    head, *rows = _make_table(results)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for place, name in enumerate(head):
        table.add_column(Text(name), justify="right" if place else "left")
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console(file=StringIO(), highlight=False)
    with console.capture() as written:
        console.print(Text(f"Evaluation of {results.model}", style="bold"))
        console.print(table)
        lines = (line for line in _describe(results) if " version: " not in line)
        console.print(Text("\n".join(lines)))
    return "\n".join(line.rstrip() for line in written.get().splitlines())


def write_markdown(results: Results, num_worst: int) -> str:
    """Write figures and the worst examples as Markdown."""
    head, *rows = _make_table(results)
    lines = [
        f"# Evaluation of {_escape_markdown(results.model)}",
        "",
        _join_row(head),
        _join_row(("---", *["---:"] * (len(head) - 1))),
        *(_join_row(tuple(map(_escape_markdown, row))) for row in rows),
        "",
        *(f"- {_escape_markdown(line)}" for line in _describe(results)),
    ]
    worst = results.find_worst(num_worst)
    if worst:
        by = f" by {results.scores[0].name}" if results.scores else ""
        lines += ["", f"## The {len(worst)} worst of {len(results.examples)} answers{by}"]
    for number, example in enumerate(worst, 1):
        lines += ["", f"### {number}. {_escape_markdown(example.key)}", ""]
        for path in results.media.get(example.key, ()):
            mark = "!" if path.endswith(_PICTURES) else ""
            lines += [f"{mark}[{path}]({path})", ""]
        lines += [
            f"- **{title}:** {_shorten(text)}" for title, text in _list_texts(results, example)
        ]
    return "\n".join(lines) + "\n"


def write_html(results: Results, num_worst: int) -> str:
    """Write figures and the worst examples as HTML, for notebooks."""
    head, *rows = _make_table(results)
    facts = "".join(element("li", escape(line)) for line in _describe(results))
    worst = results.find_worst(num_worst)
    by = f" by {results.scores[0].name}" if results.scores else ""
    examples = [
        element("b", escape(example.key))
        + make_table((), [(escape(k), escape(text)) for k, text in _list_texts(results, example)])
        for example in worst
    ]
    title = f"the {len(worst)} worst of {len(results.examples)} answers{by}"
    return make_card(
        f"Evaluation of {results.model}",
        ", ".join(results.systems),
        make_table(head, [tuple(map(escape, row)) for row in rows]),
        make_details(title, "".join(examples)) if worst else "",
        make_details("what was measured, and how", element("ul", facts)),
    )


def _make_table(results: Results) -> list[Row]:
    """Figures in rows, the first row their names; a column for each system."""
    is_compared = len(results.systems) > 1
    extra = ("difference", "95 % interval") if is_compared else ()
    rows: list[Row] = [("", *results.systems, *extra)]
    for title, name, form in (
        ("held-out loss, nats a token (lower is better)", "loss", "{:.4f}"),
        ("perplexity (lower is better)", "perplexity", "{:.3f}"),
    ):
        values = [getattr(results.held_out[system], name) for system in results.systems]
        more = (f"{values[0] - values[1]:+.4f}", "") if is_compared else ()
        rows.append((title, *map(form.format, values), *more))
    rows += [_make_score_row(results, score) for score in results.scores]
    return rows


def _make_score_row(results: Results, score: ScoreResult) -> Row:
    better = "higher" if score.higher_is_better else "lower"
    row = (
        f"{score.name} ({better} is better)",
        *(_show_number(score.values[system], "{:.4f}") for system in results.systems),
    )
    if score.difference is None:
        return row
    interval = "too few rows"
    if score.interval is not None:
        low, high = score.interval
        interval = f"{low:+.4f} to {high:+.4f}"
    return (*row, _show_number(score.difference, "{:+.4f}"), interval)


def _show_number(value: float, form: str) -> str:
    return "undefined" if math.isnan(value) else form.format(value)


def _describe(results: Results) -> Iterator[str]:
    for name, count in results.counts.items():
        yield f"{name.replace('_', ' ')}: {count:,}"
    for name, value in results.settings.items():
        yield f"{name.replace('_', ' ')}: {value}"


def _list_texts(results: Results, example: Answered) -> Iterator[tuple[str, str]]:
    yield "prompt", example.prompt
    for reference in dict.fromkeys(example.references):
        yield "reference", reference
    for system in results.systems:
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
