"""The report of an evaluation: figures, every answer, and the worst of them to read."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

from gemma_tuner.evaluation.report_text import write_html, write_markdown, write_text
from gemma_tuner.evaluation.results import Results

_FORMAT = 1
_SHOWN_IN_NOTEBOOKS = 5


@dataclass(frozen=True, slots=True)
class Report(Results):
    """What ``gemma_tuner.evaluate`` returns; ``print`` shows the figures.

    ``report["wer"]`` is one score by its name; KeyError where it was not measured. The report
    holds contents of the evaluated data, and is written only where ``output`` said.
    """

    def __str__(self) -> str:
        return write_text(self)

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
