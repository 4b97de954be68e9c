"""The report of an evaluation: figures, every answer, and the worst of them to read.

In its text, Markdown and HTML, whatever comes from data is text, never markup.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from io import StringIO
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gemma_tuner.display import element, escape, make_card, make_details, make_table, quote_line
from gemma_tuner.evaluation.answers import Generation
from gemma_tuner.evaluation.scores import ScoreResult, Tally
from gemma_tuner.training.reporting.metrics import EvalRecord

_FORMAT = 1
_SHOWN_IN_NOTEBOOKS = 5
_MAX_CHARACTERS = 1500  # of one text; the JSON has all of it
_MARKDOWN = re.compile(r"([\\`*_\[\]|~$])")  # what means something within a line

Row = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Answered:
    """One example with what each system answered.

    Args:
        key: The example's.
        prompt: The conversation before the answer, for a person to read.
        references: The right answers.
        answers: By system.
        tallies: What the row adds to each score, by score and then by system.
    """

    key: str
    prompt: str
    references: tuple[str, ...]
    answers: Mapping[str, Generation]
    tallies: Mapping[str, Mapping[str, Tally]]


@dataclass(frozen=True, slots=True)
class Report:
    """What ``gemma_tuner.evaluate`` returns; ``print`` shows the figures.

    ``report["wer"]`` is one score by its name; KeyError where it was not measured. The report
    holds contents of the evaluated data, and is written only where ``output`` said.

    Args:
        model: The base's name, without a path.
        systems: ``("adapter", "base")``, or ``("model",)`` where nothing is compared.
        held_out: Loss in nats and perplexity by system, over every target token.
        scores: In the order asked for.
        examples: Every row that was answered, in the order of the data.
        counts: Rows of the stream, rows read, and what was passed over, cut or left unfinished.
        settings: How the answers were made, and the versions of what made them.
        media: Files beside the report, by key; of the worst examples, where it was written.
    """

    model: str
    systems: tuple[str, ...]
    held_out: Mapping[str, EvalRecord]
    scores: tuple[ScoreResult, ...]
    examples: tuple[Answered, ...]
    counts: Mapping[str, int]
    settings: Mapping[str, Any]
    media: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __str__(self) -> str:
        # As wide as the terminal, or 80 characters where there is none.
        head, *rows = _make_rows(self)
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for place, name in enumerate(head):
            table.add_column(Text(quote_line(name)), justify="right" if place else "left")
        for row in rows:
            table.add_row(*(Text(quote_line(cell)) for cell in row))
        console = Console(file=StringIO(), highlight=False, force_terminal=False)
        with console.capture() as written:
            console.print(Text(f"Evaluation of {quote_line(self.model)}"))
            console.print(table)
            lines = (quote_line(line) for line in _describe(self) if " version: " not in line)
            console.print(Text("\n".join(lines)))
        return "\n".join(line.rstrip() for line in written.get().splitlines())

    def __getitem__(self, name: str) -> ScoreResult:
        for score in self.scores:
            if score.name == name:
                return score
        raise KeyError(f"{name}; the report has {', '.join(s.name for s in self.scores)}")

    def find_worst(self, count: int) -> tuple[Answered, ...]:
        """List the examples that the first system answers worst, by the first score.

        Args:
            count: How many at most.

        Returns:
            The worst first; of equally bad ones those that the other system answers better.
        """
        if not self.scores:
            return self.examples[:count]
        score = self.scores[0]
        sign = -1 if score.higher_is_better else 1

        def rank(example: Answered) -> tuple[float, float]:
            badness = [sign * example.tallies[score.name][s].value for s in self.systems]
            return (-badness[0], badness[-1])

        return tuple(sorted(self.examples, key=rank)[:count])

    def to_json(self) -> str:
        """Write everything as JSON; what is no number (no words to count in) is null.

        Returns:
            The text: figures, counts, settings and every answer.
        """
        document = {
            "format": _FORMAT,
            "model": self.model,
            "systems": self.systems,
            "held_out": {system: asdict(record) for system, record in self.held_out.items()},
            "scores": [asdict(score) for score in self.scores],
            "counts": self.counts,
            "settings": self.settings,
            "examples": [
                {**asdict(example), "media": self.media.get(example.key, ())}
                for example in self.examples
            ],
        }
        return json.dumps(_as_json(document), ensure_ascii=False, indent=1, allow_nan=False) + "\n"

    def to_markdown(self, num_worst: int = 20) -> str:
        """Write figures and the worst examples as Markdown, texts of the data escaped.

        Args:
            num_worst: How many examples to show.

        Returns:
            The text; media are linked where the report was written with them.
        """
        head, *rows = _make_rows(self)
        lines = [
            f"# Evaluation of {_escape_markdown(self.model)}",
            "",
            _join_row(head),
            _join_row(("---", *["---:"] * (len(head) - 1))),
            *(_join_row(tuple(map(_escape_markdown, row))) for row in rows),
            "",
            *(f"- {_escape_markdown(line)}" for line in _describe(self)),
        ]
        worst, title = _find_worst(self, num_worst)
        if worst:
            lines += ["", f"## The {title}"]
        for number, example in enumerate(worst, 1):
            lines += ["", f"### {number}. {_escape_markdown(example.key)}", ""]
            for path in self.media.get(example.key, ()):
                mark = "!" if path.endswith(".png") else ""
                lines += [f"{mark}[{path}]({path})", ""]
            lines += [
                f"- **{name}:** {_shorten(text)}" for name, text in _list_texts(self, example)
            ]
        return "\n".join(lines) + "\n"

    def _repr_html_(self) -> str:
        head, *rows = _make_rows(self)
        facts = "".join(element("li", escape(line)) for line in _describe(self))
        worst, title = _find_worst(self, _SHOWN_IN_NOTEBOOKS)
        examples = [
            element("b", escape(example.key))
            + make_table((), [(escape(k), escape(text)) for k, text in _list_texts(self, example)])
            for example in worst
        ]
        return make_card(
            f"Evaluation of {self.model}",
            ", ".join(self.systems),
            make_table(head, [tuple(map(escape, row)) for row in rows]),
            make_details(f"the {title}", "".join(examples)) if worst else "",
            make_details("what was measured, and how", element("ul", facts)),
        )


def _as_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _as_json(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


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
