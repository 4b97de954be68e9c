"""A stream of examples: reshuffled each epoch, resumable at the exact next example.

A stream is a sequence of slots that runs on over the epochs. Which row a slot holds is computed
from its number (:mod:`gemma_tuner.streaming.order`), so that the state of a stream is one number
beside what it refers to; a row that cannot be used leaves its slot empty and moves no other.
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from functools import partial
from typing import Any

from gemma_tuner.checks import is_number, is_whole_number
from gemma_tuner.errors import ConfigError, DataError, GemmaTunerError
from gemma_tuner.modalities import MediaKind
from gemma_tuner.records import Example
from gemma_tuner.storage.config import FetchConfig
from gemma_tuner.streaming.order import Interleave
from gemma_tuner.streaming.quarantine import BadExample, Stage
from gemma_tuner.streaming.report import StreamPreview, StreamReport, report_view
from gemma_tuner.streaming.state import Place, identify, read_state
from gemma_tuner.streaming.view import DatasetView, Slot, list_bad, retry_bad
from gemma_tuner.streaming.window import Window

# An error holds a key and nothing else; the slots handed out last say which row it is of. These
# are more than an optimizer step holds.
_REMEMBERED_SLOTS = 4096
_NEVER = object()


class ExampleStream:
    """Examples with their media decoded, epoch after epoch, each in another order.

    One iteration is one epoch, and the next is the next epoch. An iteration left before its end
    is left for good: the next one begins the next epoch, unless a state was loaded in between.
    Only the latest iterator lives: an older one raises ConfigError when it is used again. Media
    are fetched and decoded ahead, in threads; what is counted, and saved, is what was handed out.

    An example that cannot be used is passed over, noted in the quarantine and counted, as far as
    its source's budget allows; beyond, DataError is raised and the example is not counted: asked
    again, the same iterator tries the same example.

    Args:
        views: The rows of each data set in the stream.
        weights: How much of each a mix takes; one, where there is one.
        fetch: How media are fetched and kept.
        shard: Which of how many equal shares this stream hands out.
    """

    def __init__(
        self,
        views: Sequence[DatasetView],
        weights: Sequence[Fraction] = (Fraction(1),),
        *,
        fetch: FetchConfig,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        self.views = tuple(views)
        self.fetch = fetch
        self._weights = tuple(weights)
        self._interleave = Interleave(self._weights)
        self._shard_index, self._num_shards = shard
        self._place = Place(len(self), len(self.views))
        self._consecutive_bad = 0
        self._num_handed_out = 0
        self._num_passed_over = 0
        self._wait_seconds = 0.0
        self._token = object()  # of the latest iterator
        self._window: Window | None = None
        self._recent: deque[tuple[str, Slot]] = deque(maxlen=_REMEMBERED_SLOTS)

    def __repr__(self) -> str:
        subsets = " + ".join(view.subset for view in self.views)
        return (
            f"ExampleStream({len(self):,} rows, {subsets}, seed={self.views[0].seed}, "
            f"shuffle={self.views[0].shuffle}, epoch={self._place.epoch}, "
            f"position={self._place.position:,})"
        )

    def _repr_html_(self) -> str:
        return self.report().to_html()

    @property
    def is_whole(self) -> bool:
        """Whether this is neither a mix nor a shard."""
        return len(self.views) == 1 and self._num_shards == 1

    @property
    def num_passed_over(self) -> int:
        """Examples that this object passed over because they could not be used."""
        return self._num_passed_over

    @property
    def media_kinds(self) -> frozenset[MediaKind]:
        """The kinds of media that its rows hold."""
        return frozenset().union(*(view.media_kinds for view in self.views))

    @property
    def num_allowed_bad(self) -> int:
        """Rows of an epoch that may be unusable."""
        return sum(view.quarantine.budget.count_allowed(len(view)) for view in self.views)

    def __len__(self) -> int:
        return sum(map(len, self.views))

    def __getitem__(self, index: int) -> Example:
        """Return a row of the data as it stands in the source, decoded; counts as nothing.

        Args:
            index: From 0; negative counts from the end. The streams of a mix follow each other.

        Returns:
            The example.

        Raises:
            DataError: It cannot be used.
            IndexError: There is no such row.
        """
        slot = self._find(index)
        return slot.view.load(slot.row)

    def find_row(self, index: int) -> tuple[int, DatasetView, int]:
        """Find a row as it stands in the sources, which follow each other.

        Args:
            index: As for ``stream[index]``.

        Returns:
            The number of its data set, that, and the row there.

        Raises:
            IndexError: There is no such row.
        """
        place = operator.index(index)
        if -len(self) <= place < len(self):
            place %= len(self)
            for number, view in enumerate(self.views):
                if place < len(view):
                    return number, view, int(view.rows[place])
                place -= len(view)
        raise IndexError(f"row {index} of a stream of {len(self)} rows")

    def read_rows(self, indices: Iterable[int]) -> Iterator[Example | None]:
        """Read rows as they stand in the source, ahead and in threads; counts as nothing.

        Args:
            indices: As for ``stream[index]``.

        Yields:
            The examples, None for one that was passed over.

        Raises:
            DataError: An example that cannot be used, beyond its source's budget.
        """
        bad = [0] * len(self.views)
        consecutive = 0
        window = Window(iter([self._find(index) for index in indices]), self.fetch)
        try:
            for slot, outcome in window:
                if isinstance(outcome, Example):
                    consecutive = 0
                    self._recent.append((outcome.key, slot))
                    yield outcome
                else:
                    consecutive += 1
                    bad[slot.index] += 1
                    self._count_bad(
                        slot, outcome.stage, outcome.error, bad[slot.index], consecutive
                    )
                    yield None
        finally:
            window.close()

    def __iter__(self) -> Iterator[Example]:
        return filter(None, self.read_slots())

    def read_slots(self) -> Iterator[Example | None]:
        """Begin an epoch, as iterating does, and hand it out slot by slot.

        Returns:
            An iterator of the examples, with None where one was passed over; so that every shard
            takes the same number of slots, whatever is in them.
        """
        self._place.begin_epoch()
        self._leave_iterator()
        # Not a generator, which one failing example would end.
        return iter(partial(self._hand_out, self._token), _NEVER)

    def shard(self, index: int, count: int) -> ExampleStream:
        """Return one of several streams that share the slots of this one evenly.

        Slot ``n`` goes to shard ``n % count``. The shards keep the state of the whole: taken when
        each has handed out as many slots as the others, it resumes any number of shards.

        Args:
            index: Which one, from 0.
            count: How many there are.

        Returns:
            A new stream at the place of this one, with the rows and length of the whole.

        Raises:
            ConfigError: No such shard, or a shard of a shard.
        """
        numbers = isinstance(index, int) and isinstance(count, int)
        if not numbers or not 0 <= index < count or self._num_shards > 1:
            raise ConfigError(f"shard({index!r}, {count!r}) of {self!r}; give 0 <= index < count")
        shard = self._with_views(self.views, shard=(index, count))
        shard.load_state_dict(self.state_dict())
        return shard

    def follow(self, shard: ExampleStream, num_slots: int) -> None:
        """Go on as if this stream had handed out what its shards did, over the ends of epochs.

        Args:
            shard: One of them; its bad rows stand for those of all.
            num_slots: Slots that all of them together have handed out since.
        """
        self._place.follow(num_slots, shard.state_dict()["bad"])
        self._leave_iterator()

    def state_dict(self) -> dict[str, Any]:
        """Return what resumes the stream after the last slot that was handed out.

        Returns:
            ``version``, what the stream is (``fingerprint rows subset seed shuffle locality``, of
            a mix for each stream), ``epoch position bad``: small, and JSON.
        """
        return {**self._identity(), **self._place.to_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where a state was taken: the next iteration is the rest of that epoch.

        Args:
            state: What :meth:`state_dict` returned for a stream of the same data, seed and subset.

        Raises:
            ResumeError: The state is of another stream; the message names what differs.
        """
        epoch, position, bad = read_state(state, self._identity(), num_rows=len(self))
        self._place.move(epoch, epoch * len(self) + position, bad)
        self._consecutive_bad = 0
        self._leave_iterator()

    def take(self, num_rows: int) -> ExampleStream:
        """Return a stream of the first rows in the order of the source.

        Args:
            num_rows: How many at most.

        Returns:
            A new stream, at its beginning.

        Raises:
            ConfigError: Not a whole number above 0, or a mix.
        """
        if not is_whole_number(num_rows) or num_rows < 1:
            raise ConfigError(f"take({num_rows!r}); give a whole number above 0")
        if not self.is_whole:
            raise ConfigError("take() of a mix or shard; take rows of the streams, then mix those")
        return ExampleStream([self.views[0].take(num_rows)], fetch=self.fetch)

    def split(self, fraction: float) -> tuple[ExampleStream, ExampleStream]:
        """Divide the rows in two by hashes of their keys; of a mix, those of each stream.

        A key falls on the same side whatever rows are added or removed and whatever the seed.

        Args:
            fraction: How much to hold out, between 0 and 1; met on average.

        Returns:
            The rest, and what is held out.

        Raises:
            ConfigError: ``fraction`` is not between 0 and 1.
            SourceError: One side would be empty.
        """
        if not is_number(fraction) or not 0 < fraction < 1:
            raise ConfigError(f"split({fraction!r}); give a number between 0 and 1, both left out")
        rest, held_out = zip(*(view.split(fraction) for view in self.views), strict=True)
        return self._with_views(rest), self._with_views(held_out)

    def preview(self, count: int = 3) -> StreamPreview:
        """Show the first rows of the data: keys, roles, text cut short, sizes of media.

        Args:
            count: How many rows.

        Returns:
            What a person reads: ``print`` it; notebooks show its images and play its clips.
            It holds contents of the data.

        Raises:
            DataError: Media that cannot be decoded.
        """
        return StreamPreview(tuple(self[index] for index in range(min(count, len(self)))))

    def report(self) -> StreamReport:
        """Say what the stream is made of, what it costs, what was chosen by itself, how far it is.

        Returns:
            Figures, which ``print`` shows as text.
        """
        weights = self._weights
        waited = self._wait_seconds + (self._window.wait_seconds if self._window else 0.0)
        return StreamReport(
            parts=tuple(
                report_view(
                    view,
                    share=float(weight / sum(weights)),
                    cache_bytes=self.fetch.cache_bytes,
                )
                for view, weight in zip(self.views, weights, strict=True)
            ),
            epoch=self._place.epoch,
            position=self._place.position,
            handed_out=self._num_handed_out,
            passed_over=self._num_passed_over,
            wait_seconds=waited,
        )

    def pass_over(self, error: DataError) -> None:
        """Note that an example that was handed out could not be used after all.

        Args:
            error: Why, with the example's key.

        Raises:
            DataError: The same, where its source's budget allows no more.
        """
        slot = next((slot for key, slot in reversed(self._recent) if key == error.key), None)
        if slot is None:
            raise error
        bad = self._place.bad
        bad[slot.index] += 1
        self._count_bad(slot, "collate", error, bad[slot.index], consecutive=1)

    def inspect_quarantine(self) -> list[BadExample]:
        """Return the examples that could not be used, of this run and those before it.

        Returns:
            What is wrong with each; of all rows of the data, those of other splits too.
        """
        return list_bad(self.views)

    def retry_quarantine(self) -> tuple[int, int]:
        """Try the examples in the quarantine again, and take out those that can be used now.

        Every epoch tries them by itself; this is for looking after a repair. Rows that could not
        be read at all are read again with ``refresh=True``; what a collator refused is not tried.

        Returns:
            How many can be used now, and how many remain.
        """
        return retry_bad(self.views)

    def close(self) -> None:
        """Stop fetching, for good: of this stream and of those split, mixed or sharded from it."""
        self._drop_window()
        for view in self.views:
            view.fetcher.close()

    def _with_views(
        self, views: Sequence[DatasetView], *, shard: tuple[int, int] = (0, 1)
    ) -> ExampleStream:
        return ExampleStream(views, self._weights, fetch=self.fetch, shard=shard)

    # --- one slot after the other -------------------------------------------------------------

    def _leave_iterator(self) -> None:
        """End the latest iterator, if there is one, and what was fetched for it."""
        self._token = object()
        self._drop_window()

    def _hand_out(self, token: object) -> Example | None:
        if token is not self._token:
            raise ConfigError(
                "this iterator was overtaken: the stream was iterated again or given a state; use "
                "one iterator at a time, or make a second stream"
            )
        if self._window is None:
            numbers = range(self._next_slot(), self._place.end, self._num_shards)
            self._window = Window(map(self._locate, numbers), self.fetch)
        try:
            slot, outcome = next(self._window)
        except StopIteration:
            self._place.is_begun = self._place.is_finished = True
            raise
        except BaseException:
            self._drop_window()
            raise
        example = None
        if isinstance(outcome, Example):
            example = outcome
            self._consecutive_bad = 0
            self._num_handed_out += 1
            self._recent.append((example.key, slot))
        else:
            bad, consecutive = self._place.bad[slot.index] + 1, self._consecutive_bad + 1
            try:
                self._count_bad(slot, outcome.stage, outcome.error, bad, consecutive)
            except GemmaTunerError:
                self._drop_window()  # the next one begins with this slot again
                raise
            self._place.bad[slot.index], self._consecutive_bad = bad, consecutive
        self._place.slot += self._num_shards
        self._place.is_begun = True
        return example

    def _locate(self, number: int) -> Slot:
        """Say which row a slot holds."""
        index, turn = self._interleave.locate(number) if len(self.views) > 1 else (0, number)
        view = self.views[index]
        return Slot(index, view, int(view.rows[view.orders[turn]]))

    def _find(self, index: int) -> Slot:
        return Slot(*self.find_row(index))

    def _next_slot(self) -> int:
        """The first slot of this shard that the whole has not come to."""
        slot = self._place.slot
        return slot + (self._shard_index - slot) % self._num_shards

    def _drop_window(self) -> None:
        if self._window is not None:
            self._wait_seconds += self._window.wait_seconds
            self._window.close()
            self._window = None

    def _identity(self) -> dict[str, Any]:
        """What epoch and position refer to."""
        return identify([view.describe() for view in self.views], self._weights)

    def _count_bad(
        self, slot: Slot, stage: Stage, error: DataError, bad: int, consecutive: int
    ) -> None:
        """Note a row in the quarantine, and raise its error where the budget allows no more."""
        # A mix may go through a small data set several times in one of its epochs.
        share = self._weights[slot.index] / sum(self._weights)
        slot.view.note_bad(
            slot.row,
            stage,
            error,
            bad=bad,
            consecutive=consecutive,
            epoch_rows=max(len(slot.view), int(share * len(self))),
            num_shards=self._num_shards,
        )
        self._num_passed_over += 1
