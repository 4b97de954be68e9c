"""Rows of one manifest in each epoch's order: how they are read, fetched, decoded and refused."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Self

import numpy as np

from gemma_tuner.errors import DataError, SourceError
from gemma_tuner.media.load import load_media
from gemma_tuner.modalities import MEDIA, MediaKind
from gemma_tuner.records import Example
from gemma_tuner.storage.fetch import Fetcher
from gemma_tuner.streaming.manifest import Manifest, hash_keys, list_stored
from gemma_tuner.streaming.options import Locality
from gemma_tuner.streaming.order import EpochOrders, Order, ShardOrder
from gemma_tuner.streaming.quarantine import BadExample, Quarantine, Stage, read_reason


@dataclass(eq=False, repr=False)
class DatasetView:
    """Some rows of a manifest, how they are shuffled, and what loads them."""

    manifest: Manifest
    fetcher: Fetcher
    quarantine: Quarantine
    rows: Sequence[int] | np.ndarray  # those of the manifest that are in it, ascending
    seed: int = 0
    shuffle: bool = True
    locality: Locality | None = None
    subset: str = "all"  # what the rows are, in words
    num_splits: int = 0  # how often split() led here: each divides by other hashes

    def __post_init__(self) -> None:
        if len(self.rows) == 0:
            raise SourceError(
                f"the stream ({self.subset}) holds no rows; check paths, split and subset"
            )
        self.orders = EpochOrders(len(self.rows), self._make_order)
        self.fetch = partial(self.fetcher.fetch_media, root=self.manifest.root)
        self.decode = partial(load_media, root=self.manifest.root)
        # The same rows may lie in other files, which changes their order and no fingerprint.
        shards = np.asarray(self.manifest.shards, dtype="<i8").tobytes()
        digest = hashlib.sha256(shards).hexdigest()[:16]
        self._layout = {} if self.locality is None else {"shards": digest}

    def __len__(self) -> int:
        return len(self.rows)

    def _make_order(self, epoch: int) -> Order | ShardOrder:
        if self.locality is None or not self.shuffle:
            return Order(len(self), seed=self.seed, epoch=epoch, shuffle=self.shuffle)
        starts = np.searchsorted(np.asarray(self.rows), self.manifest.shards)
        starts = [int(start) for start in np.unique(starts) if start < len(self)]
        return ShardOrder(starts, len(self), seed=self.seed, epoch=epoch)

    def describe(self) -> dict[str, Any]:
        """Return what decides the rows and their order, as JSON."""
        return {
            "fingerprint": self.manifest.fingerprint,
            "rows": len(self),
            "subset": self.subset,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "locality": self.locality,
            **self._layout,
        }

    def take(self, num_rows: int) -> Self:
        """Return the first rows, in the order of the source."""
        subset = f"{self.subset}, take {num_rows}"
        return replace(self, rows=self.rows[:num_rows], subset=subset)

    def split(self, fraction: float) -> tuple[Self, Self]:
        """Divide the rows by hashes of their keys."""
        hashes = hash_keys(self.manifest.read_keys(), salt=f"split {self.num_splits}")
        rows = np.asarray(self.rows)
        is_held_out = hashes[rows] < np.uint64(min(int(fraction * 2**64), 2**64 - 1))
        sides = []
        for name, chosen in (("rest", rows[~is_held_out]), ("held out", rows[is_held_out])):
            if not len(chosen):
                raise SourceError(
                    f"split({fraction}) of {len(self)} rows leaves none {name}: each row falls by "
                    f"chance of its key; {_suggest_fraction(hashes[rows])}, or give more rows"
                )
            subset = f"{self.subset}, split {fraction:g} {name}"
            sides.append(replace(self, rows=chosen, subset=subset, num_splits=self.num_splits + 1))
        return sides[0], sides[1]

    @cached_property
    def media_kinds(self) -> frozenset[MediaKind]:
        """The kinds of media that its rows hold."""
        return frozenset(
            medium.modality
            for medium in MEDIA
            if self.manifest.find_media(medium.modality, self.rows) is not None
        )

    # --- one row ------------------------------------------------------------------------------

    def load(self, row: int) -> Example:
        """Read, fetch and decode the example of a row of the manifest."""
        return self.decode(self.fetch(self.manifest.read_example(row)))

    def note_bad(
        self,
        row: int,
        stage: Stage,
        error: DataError,
        *,
        bad: int,
        consecutive: int,
        epoch_rows: int,
        num_shards: int,
    ) -> None:
        """Note a row in the quarantine, and raise its error where the budget allows no more."""
        # bad: bad rows of the epoch with this one; consecutive: those since the last good one.
        quarantine = self.quarantine
        if quarantine.budget.max_bad_fraction:
            stored = list_stored(self.manifest.read_example(row))
            origin = self.manifest.read_origin(row)
            quarantine.add(BadExample.explain(error, origin, stage, row=row, stored=stored))
        quarantine.budget.check(
            error,
            bad=bad,
            consecutive=consecutive,
            rows=epoch_rows,
            num_shards=num_shards,
            read_records=quarantine.inspect,
        )


@dataclass(frozen=True, slots=True)
class Slot:
    """A place in a stream's order, and the row that it holds."""

    index: int  # of the view among those of the stream
    view: DatasetView
    row: int  # of the view's manifest


def list_bad(views: Sequence[DatasetView]) -> list[BadExample]:
    """List what some data sets have in quarantine."""
    return [record for view in _by_file(views) for record in view.quarantine.inspect()]


def retry_bad(views: Sequence[DatasetView]) -> tuple[int, int]:
    """Load what is in quarantine again, and take out what can be used now."""
    # Returns: how many can be used now, and how many remain.
    num_mended = num_bad = 0
    for view in _by_file(views):
        tried: dict[BadExample, BadExample | None] = {}
        for record in view.quarantine.inspect():
            if record.row is None or record.stage == "collate":
                num_bad += 1
                continue
            try:
                view.load(record.row)
            except DataError as error:
                num_bad += 1
                tried[record] = replace(record, reason=read_reason(error))
            else:
                num_mended += 1
                tried[record] = None
        remaining = (tried.get(record, record) for record in view.quarantine.inspect())
        view.quarantine.replace([record for record in remaining if record is not None])
    return num_mended, num_bad


def _by_file(views: Sequence[DatasetView]) -> Iterable[DatasetView]:
    """One data set for each quarantine; streams that were opened apart may share a file."""
    return {view.quarantine.path: view for view in views}.values()


def _suggest_fraction(hashes: np.ndarray) -> str:
    """Name a fraction that holds out at least one row and leaves at least one."""
    if len(hashes) < 2:
        return "use all of them to train, without split()"
    first, second = np.sort(hashes)[:2].astype(float) / 2**64
    return f"split({(first + second) / 2:.2g}) holds out one"
