"""What an evaluation found, side by side for an adapter and its base: the figures alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from gemma_tuner.evaluation.answers import Generation
from gemma_tuner.evaluation.scores import Score, Tally, combine
from gemma_tuner.training.metrics import EvalRecord

_NUM_RESAMPLES = 2000
_INTERVAL_PERCENT = 95


@dataclass(frozen=True, slots=True)
class ScoreResult:
    """One score of each system.

    Args:
        name: The score's.
        higher_is_better: False for error rates.
        values: By system; NaN where no reference had anything to count in.
        difference: Adapter less base; None where there is one system.
        interval: Where the difference lies with 95 % confidence, from resampling rows in pairs;
            None for fewer than two rows.
    """

    name: str
    higher_is_better: bool
    values: Mapping[str, float]
    difference: float | None = None
    interval: tuple[float, float] | None = None


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
class Results:
    """Everything that was measured. It holds contents of the evaluated data.

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

    def __getitem__(self, name: str) -> ScoreResult:
        """Return a score by its name."""
        for score in self.scores:
            if score.name == name:
                return score
        raise KeyError(f"{name}; the report has {', '.join(s.name for s in self.scores)}")

    def find_worst(self, count: int) -> tuple[Answered, ...]:
        """List the examples that the first system answers worst, by the first score."""
        if not self.scores:
            return self.examples[:count]
        score = self.scores[0]
        sign = -1 if score.higher_is_better else 1

        def rank(example: Answered) -> tuple[float, float]:
            badness = [sign * example.tallies[score.name][s].value for s in self.systems]
            return (-badness[0], badness[-1])

        return tuple(sorted(self.examples, key=rank)[:count])


def compare(score: Score, tallies: Mapping[str, Sequence[Tally]]) -> ScoreResult:
    """Score each system, and the first against the second."""
    values = {system: combine(rows) for system, rows in tallies.items()}
    result = ScoreResult(score.name, score.higher_is_better, values)
    if len(tallies) < 2:
        return result
    first, second = (_as_array(rows) for rows in tallies.values())
    one, other = values.values()
    interval = _bootstrap(first, second) if len(first) > 1 else None
    return replace(result, difference=one - other, interval=interval)


def _as_array(rows: Sequence[Tally]) -> np.ndarray:
    return np.array([(row.amount, row.out_of) for row in rows], dtype=np.float64)


def _bootstrap(first: np.ndarray, second: np.ndarray) -> tuple[float, float] | None:
    """Resample rows, the same of both systems, and see how far the difference moves."""
    # first: ``[rows, 2]``: amount and what it is out of.
    rng = np.random.default_rng(0)
    differences = np.empty(_NUM_RESAMPLES)
    for index in range(_NUM_RESAMPLES):
        rows = rng.integers(0, len(first), len(first))
        (amount, out_of), (other_amount, other_out_of) = first[rows].sum(0), second[rows].sum(0)
        if not (out_of and other_out_of):
            differences[index] = math.nan
        else:
            differences[index] = amount / out_of - other_amount / other_out_of
    if np.isnan(differences).all():
        return None
    margin = (100 - _INTERVAL_PERCENT) / 2
    low, high = np.nanpercentile(differences, [margin, 100 - margin])
    return float(low), float(high)
