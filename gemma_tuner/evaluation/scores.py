"""Scores of predictions against references: each a sum over rows divided by a sum over rows.

A row's part is a :class:`Tally`: so many errors in so many words, so many points of so many. A
corpus is scored by the sums, never by the mean of its rows' rates, so that every word weighs the
same.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jiwer
import numpy as np
from rapidfuzz.distance import Levenshtein

from gemma_tuner.checks import suggest
from gemma_tuner.errors import ConfigError
from gemma_tuner.evaluation.normalizers import Normalizer, normalizer_for
from gemma_tuner.evaluation.vqa import vqa_accuracy

UserScore = Callable[[str, Sequence[str]], float]
"""A function of a prediction and its references, to a number; a corpus has the mean."""

_NUM_RESAMPLES = 2000
_INTERVAL_PERCENT = 95
_ANLS_THRESHOLD = 0.5  # Source: Biten et al. 2019 (ST-VQA), section 4.2


@dataclass(frozen=True, slots=True)
class Tally:
    """What one row adds to a score.

    Args:
        amount: Errors or points.
        out_of: Words, characters or rows that they are counted in.
    """

    amount: float
    out_of: float

    @property
    def value(self) -> float:
        """The row's own score; where there is nothing to count in, 0 or infinitely many errors."""
        if self.out_of:
            return self.amount / self.out_of
        return math.inf if self.amount else 0.0


@dataclass(frozen=True, slots=True)
class Score:
    """One way of scoring.

    Args:
        name: What it is called in reports.
        tally: Makes a row's part of a prediction and at least one reference.
        higher_is_better: False for error rates.
    """

    name: str
    tally: Callable[[str, Sequence[str]], Tally]
    higher_is_better: bool = True

    def measure(self, predictions: Sequence[str], references: Sequence[Any]) -> float:
        """Score a corpus.

        Args:
            predictions: One for each row.
            references: For each row a text, or a list of texts that are equally right.

        Returns:
            The sum of what the rows add over the sum of what they are counted in; NaN where all
            references are empty of what is counted.

        Raises:
            ConfigError: No rows, lists of different lengths, or a row without references.
        """
        if not predictions or len(predictions) != len(references):
            raise ConfigError(
                f"{self.name} is given {len(predictions)} predictions and {len(references)} rows "
                "of references; give at least one of each, and as many"
            )
        return combine(
            [
                self.tally(prediction, _as_references(row))
                for prediction, row in zip(predictions, references, strict=True)
            ]
        )


def combine(tallies: Sequence[Tally]) -> float:
    """Score a corpus from its rows' parts; NaN where there is nothing to count in."""
    out_of = math.fsum(tally.out_of for tally in tallies)
    return math.fsum(tally.amount for tally in tallies) / out_of if out_of else math.nan


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


def compare(score: Score, tallies: Mapping[str, Sequence[Tally]]) -> ScoreResult:
    """Score each system, and the first against the second; both have the same rows."""
    values = {system: combine(rows) for system, rows in tallies.items()}
    result = ScoreResult(score.name, score.higher_is_better, values)
    if len(values) < 2:
        return result
    first, second = values.values()
    return replace(result, difference=first - second, interval=_bootstrap(*tallies.values()))


def exact_match() -> Score:
    """Make the share of predictions that equal a reference, spaces around them left out."""

    def tally(prediction: str, references: Sequence[str]) -> Tally:
        return Tally(float(prediction.strip() in {text.strip() for text in references}), 1)

    return Score("exact_match", tally)


def word_error_rate(normalizer: Normalizer | None = None) -> Score:
    """Make the word error rate."""
    # Words to replace, delete and insert, per word of the references.
    # A row without words in its reference adds what must be deleted from the prediction to the
    # errors, and no words. Of several references the one with the lowest rate counts.
    return Score("wer", _edits(normalizer, _count_word_edits), higher_is_better=False)


def character_error_rate(normalizer: Normalizer | None = None) -> Score:
    """Make the character error rate; like :func:`word_error_rate`, with spaces as characters."""
    return Score("cer", _edits(normalizer, _count_character_edits), higher_is_better=False)


def anls() -> Score:
    """Make the average normalised Levenshtein similarity of document question answering."""
    # The likeness to the nearest reference, ``1 - edits / longer length``, in lower case; below
    # one half it counts as none.

    def tally(prediction: str, references: Sequence[str]) -> Tally:
        answer = _fold(prediction)
        distance = min(Levenshtein.normalized_distance(answer, _fold(text)) for text in references)
        return Tally(1 - distance if distance < _ANLS_THRESHOLD else 0.0, 1)

    return Score("anls", tally)


def visual_question_accuracy() -> Score:
    """Make the accuracy of the VQA challenge (:mod:`gemma_tuner.evaluation.vqa`)."""
    return Score("vqa_accuracy", lambda p, references: Tally(vqa_accuracy(p, references), 1))


SCORES: dict[str, Callable[[Normalizer], Score]] = {
    "exact_match": lambda _: exact_match(),
    "wer": word_error_rate,
    "cer": character_error_rate,
    "anls": lambda _: anls(),
    "vqa_accuracy": lambda _: visual_question_accuracy(),
}
"""The scores that have a name."""


def find_scores(
    scores: Sequence[str | Score | UserScore], language: str | None = None
) -> tuple[Score, ...]:
    """Find scores by name."""
    if isinstance(scores, str):
        raise ConfigError(f"scores is the string {scores!r}; write [{scores!r}]")
    normalizer = normalizer_for(language)
    found = tuple(_find_score(score, normalizer) for score in scores)
    names = [score.name for score in found]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two scores are called {name!r}; give each another name")
    return found


def _find_score(score: Any, normalizer: Normalizer) -> Score:
    if isinstance(score, Score):
        return score
    if isinstance(score, str):
        if score in SCORES:
            return SCORES[score](normalizer)
        hint = suggest(score.lower(), SCORES, cutoff=0.4)
        raise ConfigError(
            f"there is no score {score!r}{hint}; there are {', '.join(SCORES)}, and functions of "
            "your own: (prediction, references) -> float"
        )
    if not callable(score):
        raise ConfigError(
            f"a score is a {type(score).__name__}; give a name ({', '.join(SCORES)}), a Score or "
            "a function (prediction, references) -> float"
        )
    name = getattr(score, "__name__", type(score).__name__)

    def tally(prediction: str, references: Sequence[str]) -> Tally:
        points = score(prediction, references)
        if not isinstance(points, numbers.Real) or not math.isfinite(points):
            raise ConfigError(
                f"the score {name!r} returned {type(points).__name__}, or a number without end; "
                "it must return a finite number"
            )
        return Tally(float(points), 1)

    return Score(name, tally)


def _edits(
    normalizer: Normalizer | None, count: Callable[[str, str], Tally]
) -> Callable[[str, Sequence[str]], Tally]:
    normalize = normalizer or normalizer_for(None)

    def tally(prediction: str, references: Sequence[str]) -> Tally:
        answer = normalize(prediction)
        counted = (count(normalize(reference), answer) for reference in references)
        return min(counted, key=lambda row: (row.value, row.amount))

    return tally


def _count_word_edits(reference: str, prediction: str) -> Tally:
    # jiwer takes a single tab or newline for a letter.
    reference, prediction = (" ".join(text.split()) for text in (reference, prediction))
    return _tally_alignment(jiwer.process_words(reference, prediction))


def _count_character_edits(reference: str, prediction: str) -> Tally:
    return _tally_alignment(jiwer.process_characters(reference, prediction))


def _tally_alignment(output: Any) -> Tally:
    length = output.hits + output.substitutions + output.deletions
    return Tally(output.substitutions + output.deletions + output.insertions, length)


def _bootstrap(
    tallies: Sequence[Tally], other_tallies: Sequence[Tally]
) -> tuple[float, float] | None:
    """Resample rows, the same of both systems, and see how far the difference moves."""
    # Source: Efron & Tibshirani 1993, the percentile interval.
    if len(tallies) < 2:
        return None
    first, second = (  # [rows, 2] float64
        np.array([(row.amount, row.out_of) for row in of_system], dtype=np.float64)
        for of_system in (tallies, other_tallies)
    )
    rng = np.random.default_rng(0)
    differences = np.full(_NUM_RESAMPLES, math.nan)
    for index in range(_NUM_RESAMPLES):
        rows = rng.integers(0, len(first), len(first))
        (amount, out_of), (other_amount, other_out_of) = first[rows].sum(0), second[rows].sum(0)
        if out_of and other_out_of:
            differences[index] = amount / out_of - other_amount / other_out_of
    if np.isnan(differences).all():
        return None
    margin = (100 - _INTERVAL_PERCENT) / 2
    low, high = np.nanpercentile(differences, [margin, 100 - margin])
    return float(low), float(high)


def _fold(text: str) -> str:
    return " ".join(text.lower().split())


def _as_references(row: str | Sequence[str]) -> Sequence[str]:
    references = [row] if isinstance(row, str) else list(row)
    if not references:
        raise ConfigError("a row has no references; give at least one text, which may be empty")
    return references
