"""The report of an evaluation: figures, every answer, and the worst of them to read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from gemma_tuner.evaluation.answers import Generation
from gemma_tuner.evaluation.report_text import write_html, write_markdown, write_text
from gemma_tuner.evaluation.scores import ScoreResult, Tally
from gemma_tuner.training.metrics import EvalRecord

_FORMAT = 1
_SHOWN_IN_NOTEBOOKS = 5


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
        return write_text(self)

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
        return write_markdown(self, num_worst)

    def _repr_html_(self) -> str:
        return write_html(self, _SHOWN_IN_NOTEBOOKS)


def _as_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _as_json(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
