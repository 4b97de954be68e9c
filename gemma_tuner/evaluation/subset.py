"""Rows spread evenly over a stream, which an evaluation reads several times."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from gemma_tuner.checks import check_value
from gemma_tuner.errors import DataError
from gemma_tuner.records import Example
from gemma_tuner.streaming.quarantine import BadExample
from gemma_tuner.training.feed import Stream, check_stream

_NEEDED = ("__len__", "read_rows", "pass_over", "num_passed_over", "inspect_quarantine")


class Subset:
    """Rows spread evenly over a stream, which is not moved; it stands in for the stream.

    A row that cannot be used is not read again, so that it counts once against the stream's
    budget however often the rest is read.
    """

    def __init__(self, stream: Stream, max_rows: int | None) -> None:
        check_stream("the stream", stream, _NEEDED)
        check_value("max_examples", max_rows, int | None, at_least=1)
        self._stream = stream
        count = len(stream) if max_rows is None else min(max_rows, len(stream))
        # The first rows alone may be of one kind: data is often sorted by its answers.
        self._rows = [position * len(stream) // count for position in range(count)]
        self._positions: dict[str, int] = {}
        self._bad: set[int] = set()

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def num_passed_over(self) -> int:
        """Examples that the stream passed over so far."""
        return self._stream.num_passed_over

    @property
    def num_rows_of_stream(self) -> int:
        """Rows of the whole stream."""
        return len(self._stream)

    @property
    def num_bad(self) -> int:
        """Rows that could not be used."""
        return len(self._bad)

    def read_rows(self, indices: Iterable[int]) -> Iterator[Example | None]:
        """Read rows by their place in the subset; None for each that cannot be used."""
        wanted = list(indices)
        good = [position for position in wanted if position not in self._bad]
        examples = self._stream.read_rows([self._rows[position] for position in good])
        for position in wanted:
            if position in self._bad:
                yield None
                continue
            example = next(examples)
            if example is None:
                self._bad.add(position)
            else:
                self._positions[example.key] = position
            yield example

    def pass_over(self, error: DataError) -> None:
        """Note that an example cannot be used, or raise the error at the stream's budget."""
        self._stream.pass_over(error)
        if error.key in self._positions:
            self._bad.add(self._positions[error.key])

    def inspect_quarantine(self) -> Sequence[BadExample]:
        """Return what the stream could not use, and why."""
        return self._stream.inspect_quarantine()

    def find_position(self, key: str) -> int:
        """Return the place of an example that was read."""
        return self._positions[key]
