"""Which row each slot of a stream holds, and how that row is loaded."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from gemma_tuner.records import Example
from gemma_tuner.streaming.order import Interleave
from gemma_tuner.streaming.view import DatasetView


@dataclass(frozen=True, slots=True)
class Slot:
    """One slot's row.

    Args:
        index: Which of the stream's data sets it is from.
        row: Its row of that data set's manifest.
        view: The data set.
    """

    index: int
    row: int
    view: DatasetView

    def read(self) -> Example:
        """Read it from the manifest."""
        return self.view.manifest.read_example(self.row)

    def fetch(self, example: Example) -> Example:
        """Replace its stored objects by their bytes."""
        return self.view.fetch(example)

    def decode(self, example: Example) -> Example:
        """Replace its encoded media by decoded."""
        return self.view.decode(example)

    def load(self) -> Example:
        """Read, fetch and decode it, one after the other."""
        return self.decode(self.fetch(self.read()))


class Slots:
    """The slots of a stream, numbered on over its epochs.

    Args:
        views: The data sets.
        weights: How much of each a mix takes; one, where there is one.
    """

    def __init__(self, views: Sequence[DatasetView], weights: Sequence[Fraction]) -> None:
        self.views = tuple(views)
        self.weights = tuple(weights)
        self._interleave = Interleave(self.weights)

    def __len__(self) -> int:
        """Slots of an epoch: as many as there are rows."""
        return sum(map(len, self.views))

    def locate(self, number: int) -> Slot:
        """Say what a slot holds."""
        index, turn = self._interleave.locate(number)
        view = self.views[index]
        return Slot(index, view.find_row(turn), view)

    def find(self, index: int) -> Slot:
        """Find a row as it stands in the sources, which follow each other."""
        place = operator.index(index)
        if not -len(self) <= place < len(self):
            raise IndexError(f"row {place} of a stream of {len(self)} rows")
        place %= len(self)
        for number, view in enumerate(self.views):
            if place < len(view):
                return Slot(number, int(view.rows[place]), view)
            place -= len(view)
        raise IndexError(f"row {index} of a stream of {len(self)} rows")

    def count_rows(self, index: int) -> int:
        """Count the rows of a data set that an epoch has, which budgets are shares of."""
        share = self.weights[index] / sum(self.weights)
        return max(len(self.views[index]), int(share * len(self)))
