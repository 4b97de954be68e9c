"""All rows of the data looked at before the first step, as far as the time allows.

Each row is collated as it will be in training, its media empty ones of the size that their headers
say, so that every length is the true one and nothing is decoded but a sample. Nothing is counted,
quarantined or downloaded, and the stream stays where it is.
"""

from __future__ import annotations

import copy
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import PIL.Image

from gemma_tuner.display import quote_line
from gemma_tuner.errors import DataError
from gemma_tuner.media.audio import SAMPLE_RATE_HZ
from gemma_tuner.media.load import load_media
from gemma_tuner.modalities import Modality, kind_of
from gemma_tuner.models.families import loaded_modalities
from gemma_tuner.models.lora import unwrap_peft
from gemma_tuner.records import Audio, Example, Image, StoredObject
from gemma_tuner.streaming.order import Order
from gemma_tuner.streaming.quarantine import read_reason
from gemma_tuner.streaming.stream import ExampleStream
from gemma_tuner.training.checks import check_inputs, check_media_kinds

if TYPE_CHECKING:
    from peft import PeftModel

    from gemma_tuner.collators.text import TextCollator
    from gemma_tuner.training.feed import Stream

_DECODED = 8
_SHOWN = 20
_BAR = 30


@dataclass(slots=True, repr=False)
class DataCheck:
    """What was found in data before training; ``print`` it.

    Args:
        rows: Rows of the data, or of this process's share.
        max_tokens: The longest row that the collator takes.
        allowed: Rows that may be bad; None where the stream does not say.
        checked: Rows that were looked at.
        decoded: Those of them whose media were decoded.
        unread: Media in buckets, which were not looked at.
        media: Images and clips, by kind.
        lengths: Rows by their tokens before anything is cut.
        counts: What the collator would cut or split, by name.
        bad: Why rows cannot be used, by their keys.
        bad_elsewhere: How many more the other processes of the run have found.
        seconds: How long it took.
    """

    rows: int
    max_tokens: int
    allowed: int | None = None
    checked: int = 0
    decoded: int = 0
    unread: int = 0
    media: Counter[str] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    bad: dict[str, str] = field(default_factory=dict)
    bad_elsewhere: int = 0
    seconds: float = 0.0

    @property
    def summary(self) -> str:
        """One line."""
        found = [f"checked {self.checked:,} of {self.rows:,} rows in {self.seconds:.1f} s"]
        if self.lengths:
            found.append(f"{min(self.lengths):,} to {max(self.lengths):,} tokens a row")
        found += [f"{name} {count:,}" for name, count in self.counts.items() if count]
        if self.unread:
            found.append(f"{self.unread:,} media in buckets not looked at, small ones in place")
        if self.bad:
            found.append(f"{len(self.bad):,} cannot be used")
        return ", ".join(found)

    def __str__(self) -> str:
        lines = [self.summary, *self._draw_lengths()]
        if self.media:
            found = ", ".join(f"{count:,} {kind}" for kind, count in self.media.items())
            lines.append(f"media: {found}; decoded: those of {self.decoded:,} rows")
        if self.bad:
            lines.append("cannot be used:")
            lines += [quote_line(f"  {key}: {reason}") for key, reason in self.bad.items()]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"DataCheck({self.summary})"

    @property
    def is_remarkable(self) -> bool:
        """Whether anything is bad, cut, or was not looked at."""
        return bool(self.bad or self.counts or self.unread or self.checked < self.rows)

    def refuse_beyond_budget(self) -> None:
        """Raise where more rows are bad than the stream allows, with all reasons."""
        num_bad = len(self.bad) + self.bad_elsewhere
        # Of several processes those that have found some raise, and the others hear of it.
        if self.allowed is None or num_bad <= self.allowed or not self.bad:
            return
        (key, first), *others = self.bad.items()
        listed = [f"{other!r}: {reason}" for other, reason in others[:_SHOWN]]
        if len(others) > _SHOWN:
            listed.append(f"{len(others) - _SHOWN:,} more, which Trainer.check() lists")
        raise DataError(
            f"{first}. Nothing was trained: of {self.checked:,} rows checked before "
            f"the first step {num_bad:,} cannot be used, and max_bad_fraction allows "
            f"{self.allowed:,} of {self.rows:,}{'. ' * bool(listed)}{'; '.join(listed)}",
            key=key,
        )

    def _draw_lengths(self) -> Iterator[str]:
        """A histogram whose bars are of powers of two."""
        bars: Counter[int] = Counter()
        for length, count in self.lengths.items():
            bars[length.bit_length()] += count
        for bits in range(min(bars, default=0), max(bars, default=-1) + 1):
            bar = "▇" * -(-_BAR * bars[bits] // max(bars.values()))
            yield f"{2 ** (bits - 1):>8,} to {2**bits - 1:>7,} tokens  {bars[bits]:>8,} {bar}"
        too_long = sum(n for length, n in self.lengths.items() if length > self.max_tokens)
        if self.lengths:
            yield f"longer than max_tokens={self.max_tokens:,}: {too_long:,}"


def check_run(
    model: PeftModel,
    stream: Stream,
    collator: TextCollator,
    *,
    shard: tuple[int, int],
    is_over: Callable[[], bool],
) -> DataCheck:
    """Check what a run would train on: that its media are there, then its rows."""
    is_known = isinstance(stream, ExampleStream)
    if is_known:
        check_media_kinds(model, collator, stream, stream.media_kinds)
    modalities = loaded_modalities(unwrap_peft(model))
    found = check_rows(stream, collator, modalities, shard=shard, is_over=is_over)
    if not is_known and found.checked == found.rows:
        check_media_kinds(model, collator, stream, found.media)
    return found


def check_rows(
    stream: Stream,
    collator: TextCollator,
    modalities: Collection[Modality],
    *,
    shard: tuple[int, int] = (0, 1),
    is_over: Callable[[], bool] = lambda: False,
) -> DataCheck:
    """Look at the rows of a stream, spread over all of it, until the time is over."""
    started = time.monotonic()
    turns = range(shard[0], len(stream), shard[1])
    check = DataCheck(len(turns), collator.max_tokens)
    if isinstance(stream, ExampleStream):
        check.allowed = stream.num_allowed_bad
    roomy = copy.copy(collator)
    roomy.max_tokens = sys.maxsize
    order = Order(len(stream), seed=0, epoch=0)
    for turn in turns:
        if is_over():
            break
        try:
            _check_row(stream, order[turn], collator, roomy, modalities, check)
        except DataError as error:
            check.bad[error.key] = read_reason(error)
        check.checked += 1
    check.seconds = time.monotonic() - started
    return check


def _check_row(
    stream: Stream,
    place: int,
    collator: TextCollator,
    roomy: TextCollator,
    modalities: Collection[Modality],
    check: DataCheck,
) -> None:
    if isinstance(stream, ExampleStream):
        _, view, row = stream.find_row(place)
        is_sample = check.decoded < _DECODED
        example = view.manifest.read_example(row)
        stored = [part.source for part in example.media if isinstance(part.source, StoredObject)]
        unread = sum("://" in each.uri for each in stored)
        check.unread += unread
        kinds = [kind_of(part) for part in example.media]
        if unread:  # small ones stand for them: a row that is too long even so is
            example = example.replace_media(_make_small)
        elif stored:
            example = view.fetch(example)
        example = load_media(example, root=view.manifest.root, is_blank=not is_sample)
        check.decoded += bool(is_sample and kinds and not unread)
    else:
        example = stream[place]
        kinds = [kind_of(part) for part in example.media]
        check.decoded += bool(kinds)
    for kind in kinds:
        check.media[kind] += 1
    _check_length(example, collator, roomy, modalities, check)


def _make_small(part: Image | Audio) -> Image | Audio:
    if isinstance(part, Image):
        return Image(PIL.Image.new("RGB", (48, 48)))
    return Audio(np.zeros(SAMPLE_RATE_HZ // 2, np.float32), SAMPLE_RATE_HZ)


def _check_length(
    example: Example,
    collator: TextCollator,
    roomy: TextCollator,
    modalities: Collection[Modality],
    check: DataCheck,
) -> None:
    encoded = roomy.encode(example)
    check_inputs(encoded.media, modalities, example.key)
    length = len(encoded.input_ids)
    check.lengths[length] += 1
    if length > collator.max_tokens:
        encoded = collator.encode(example)
    check.counts.update(encoded.counts)
