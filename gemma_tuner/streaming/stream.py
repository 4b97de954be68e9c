"""A stream of examples: shuffled anew each epoch, resumable at the exact next example.

The rows are in a manifest (:mod:`gemma_tuner.streaming.manifest`) and their order is computed
(:mod:`gemma_tuner.streaming.order`), so that the state of a stream is two numbers, epoch and
position, beside what they refer to.
"""

from __future__ import annotations

import hashlib
import json
import logging
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from gemma_tuner.errors import ConfigError, ResumeError, SourceError
from gemma_tuner.media.load import load_media
from gemma_tuner.records import Example
from gemma_tuner.sources.columns import KEYWORDS, Keywords
from gemma_tuner.sources.folders import Paths
from gemma_tuner.sources.local import LocalSource
from gemma_tuner.streaming.manifest import FORMAT_VERSION, Manifest, hash_keys, write_manifest
from gemma_tuner.streaming.order import Order
from gemma_tuner.streaming.report import StreamReport, show_example

logger = logging.getLogger(__name__)

STATE_VERSION = 1
"""Raise it whenever a saved state would mean another order."""


def stream_local(
    paths: Paths,
    *,
    format: str | None = None,  # noqa: A002 - the name of the public contract
    messages: str | Literal[False] | None = None,
    prompt: str | Literal[False] | None = None,
    response: str | Literal[False] | None = None,
    text: str | Literal[False] | None = None,
    system: str | Literal[False] | None = None,
    image: str | Literal[False] | None = None,
    audio: str | Literal[False] | None = None,
    id: str | Literal[False] | None = None,  # noqa: A002 - the name of the public contract
    split: str | None = None,
    seed: int = 0,
    shuffle: bool = True,
    cache_dir: str | Path | None = None,
) -> ExampleStream:
    """Stream the examples of local files.

    Each of ``messages prompt response text system image audio id`` names the column that plays
    this part; None takes the conventional one (:mod:`gemma_tuner.sources.columns` lists them),
    False takes none. All rows are checked before the first example is handed out, and kept in a
    manifest that is read again as long as the files do not change.

    Args:
        paths: A file (``.jsonl .json .csv .parquet``), a glob, a folder, or a list of them;
            :mod:`gemma_tuner.sources.folders` says what a folder means.
        format: ``jsonl csv parquet captions``, for files of another name or mixed folders.
        messages: Conversations.
        prompt: What is asked; rows with media and no such column get a default prompt, which
            ``report()`` states.
        response: What the model shall learn to answer.
        text: Plain documents, trained on as a whole.
        system: System turns.
        image: A picture, or a list of them: a path relative to the data file, or bytes.
        audio: A sound, or a list of them.
        id: Keys; False numbers the rows (``train.jsonl:7``).
        split: Keeps the rows whose column ``split`` has this value, or, where there is no such
            column, the files named by it. ``valid``, ``val`` and ``validation`` are one.
        seed: Decides the order, with the epoch.
        shuffle: False hands out the rows as they stand.
        cache_dir: Where the manifest is kept; None is ``~/.cache/gemma_tuner/manifests``.

    Returns:
        The stream.

    Raises:
        ConfigError: A setting that cannot work.
        DataError: The first row that cannot be used, with its key.
        SourceError: Files, columns or splits that are not there or cannot be read.
    """
    chosen = (messages, prompt, response, text, system, image, audio, id)
    keywords: Keywords = dict(zip(KEYWORDS, chosen, strict=True))
    for part, column in keywords.items():
        if column is not None and column is not False and not isinstance(column, str):
            raise ConfigError(f"{part}={column!r}; give a column's name, False for none, or None")
    source = LocalSource(paths, file_format=format, split=split, keywords=keywords)
    folder = Path.home() / ".cache" / "gemma_tuner" / "manifests"
    if cache_dir is not None:
        folder = Path(cache_dir).expanduser()
    return ExampleStream(_spool(source, folder), seed=seed, shuffle=shuffle)


def _spool(source: LocalSource, folder: Path) -> Manifest:
    """Open the manifest of a source, after writing it if there is none or it is damaged."""
    identity = json.dumps([FORMAT_VERSION, source.read_identity()], sort_keys=True)
    path = folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.arrow"
    if path.exists():
        try:
            return Manifest(path)
        except SourceError as error:
            logger.warning("%s; it is written anew", error)
    write_manifest(path, source, root=source.root, read_summary=source.read_summary)
    return Manifest(path)


class ExampleStream:
    """Examples with their media decoded, epoch after epoch, each in an order of its own.

    One iteration is one epoch, and the next is the next epoch. An iteration left before its end
    is left for good: the next one begins the next epoch, unless a state was loaded in between.
    Only the latest iterator lives: an older one raises ConfigError when it is used again. An
    example that cannot be decoded raises DataError and is not counted: asked again, the same
    iterator tries the same example.

    Args:
        manifest: The rows.
        seed: Decides the order, with the epoch.
        shuffle: False hands out the rows as they stand.
        rows: Those of the manifest's rows that are in this stream, in order; None for all.
        subset: What ``rows`` are, in words; part of the state.
        num_splits: How many times :meth:`split` led here; each divides by hashes of its own.

    Raises:
        ConfigError: ``seed`` or ``shuffle`` of another type.
        SourceError: No rows.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        seed: int = 0,
        shuffle: bool = True,
        rows: Sequence[int] | np.ndarray | None = None,
        subset: str = "all",
        num_splits: int = 0,
    ) -> None:
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ConfigError(f"seed={seed!r}; give a whole number")
        if not isinstance(shuffle, bool):
            raise ConfigError(f"shuffle={shuffle!r}; give True or False")
        self.manifest = manifest
        self.seed = seed
        self.shuffle = shuffle
        self._rows = range(len(manifest)) if rows is None else rows
        if len(self._rows) == 0:
            raise SourceError(
                f"the stream ({subset}) holds no rows; check paths, split and subset"
            )
        self._subset = subset
        self._num_splits = num_splits
        self._epoch = 0
        self._position = 0
        self._num_handed_out = 0
        self._token = object()  # of the latest iterator
        self._is_begun = False  # whether that has handed out anything

    def __repr__(self) -> str:
        return (
            f"ExampleStream({len(self):,} rows, {self._subset}, seed={self.seed}, "
            f"shuffle={self.shuffle}, epoch={self._epoch}, position={self._position:,})"
        )

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        """Return a row of the data as it stands in the files, decoded; counts as nothing.

        Args:
            index: From 0; negative counts from the end.

        Returns:
            The example.

        Raises:
            DataError: Its media cannot be decoded.
            IndexError: There is no such row.
        """
        place = operator.index(index)
        if not -len(self) <= place < len(self):
            raise IndexError(f"row {place} of a stream of {len(self)} rows")
        return self._read(place % len(self))

    def __iter__(self) -> Iterator[Example]:
        if self._is_begun or self._position == len(self):
            self._epoch += 1
            self._position = 0
        self._is_begun = False
        self._token = object()
        order = Order(len(self), seed=self.seed, epoch=self._epoch, shuffle=self.shuffle)
        return _Epoch(partial(self._hand_out, self._token, order))

    def state_dict(self) -> dict[str, Any]:
        """Return what resumes the stream after the last example that was handed out.

        Returns:
            ``version fingerprint rows subset seed shuffle epoch position``: small, and JSON.
        """
        return {**self._identity(), "epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where a state was taken: the next iteration is the rest of that epoch.

        Args:
            state: What :meth:`state_dict` returned for a stream of the same data, seed and subset.

        Raises:
            ResumeError: The state is of another stream; the message names what differs.
        """
        if not isinstance(state, Mapping):
            raise ResumeError(f"the stream's state is {type(state).__name__} and not a dictionary")
        here = self._identity()
        missing = [name for name in (*here, "epoch", "position") if name not in state]
        if missing:
            raise ResumeError(f"the stream's state lacks {', '.join(missing)}; it is not a state")
        differing = [
            f"{name} was {state[name]!r} and is {here[name]!r}"
            for name in here
            if state[name] != here[name]
        ]
        if differing:
            raise ResumeError(
                f"the saved state is of another stream: {'; '.join(differing)}; give the run the "
                "same data, seed and subset, or start a new one"
            )
        epoch, position = state["epoch"], state["position"]
        for value in (epoch, position):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ResumeError(f"the stream's state has epoch {epoch!r}, position {position!r}")
        if position > len(self):
            raise ResumeError(f"the stream's state is at position {position} of {len(self)} rows")
        self._epoch, self._position = epoch, position
        self._token = object()
        self._is_begun = False

    def take(self, num_rows: int) -> Self:
        """Return a stream of the first rows in the order of the files.

        Args:
            num_rows: How many at most.

        Returns:
            A stream of its own, at its beginning.

        Raises:
            ConfigError: Not a whole number above 0.
        """
        if isinstance(num_rows, bool) or not isinstance(num_rows, int) or num_rows < 1:
            raise ConfigError(f"take({num_rows!r}); give a whole number above 0")
        return self._select(self._rows[:num_rows], f"take {num_rows}", self._num_splits)

    def split(self, fraction: float) -> tuple[Self, Self]:
        """Divide the rows in two by hashes of their keys.

        A key falls on the same side whatever rows are added or removed and whatever the seed.

        Args:
            fraction: How much to hold out, between 0 and 1; met on average.

        Returns:
            The rest, and what is held out.

        Raises:
            ConfigError: ``fraction`` is not between 0 and 1.
            SourceError: One side would be empty.
        """
        if isinstance(fraction, bool) or not isinstance(fraction, int | float):
            raise ConfigError(f"split({fraction!r}); give a number between 0 and 1")
        if not 0 < fraction < 1:
            raise ConfigError(f"split({fraction}); give a number between 0 and 1, both left out")
        hashes = hash_keys(self.manifest.read_keys(), salt=f"split {self._num_splits}")
        rows = np.asarray(self._rows)
        is_held_out = hashes[rows] < np.uint64(min(int(fraction * 2**64), 2**64 - 1))
        sides = []
        for name, chosen in (("rest", rows[~is_held_out]), ("held out", rows[is_held_out])):
            if not len(chosen):
                raise SourceError(
                    f"split({fraction}) of {len(self)} rows leaves none {name}; give another "
                    "fraction, or more rows"
                )
            sides.append(self._select(chosen, f"split {fraction:g} {name}", self._num_splits + 1))
        return sides[0], sides[1]

    def preview(self, count: int = 3) -> str:
        """Show the first rows of the data: keys, roles, text cut short, sizes of media.

        Args:
            count: How many rows.

        Returns:
            Text for the eye. It holds contents of the data.

        Raises:
            DataError: Media that cannot be decoded.
        """
        return "\n\n".join(show_example(self[index]) for index in range(min(count, len(self))))

    def report(self) -> StreamReport:
        """Say what the stream is made of, what was chosen by itself, and how far it is."""
        summary = self.manifest.summary
        return StreamReport(
            rows=len(self),
            subset=self._subset,
            files=summary["num_files"],
            format=summary["format"],
            layout=summary["layout"],
            columns=summary["columns"],
            unused_columns=tuple(summary["unused"]),
            rows_by_split=summary["splits"],
            notes=tuple(summary["notes"]),
            manifest=self.manifest.path,
            manifest_bytes=self.manifest.num_bytes,
            fingerprint=self.manifest.fingerprint,
            seed=self.seed,
            shuffle=self.shuffle,
            epoch=self._epoch,
            position=self._position,
            handed_out=self._num_handed_out,
        )

    def _identity(self) -> dict[str, Any]:
        """What epoch and position refer to."""
        return {
            "version": STATE_VERSION,
            "fingerprint": self.manifest.fingerprint,
            "rows": len(self),
            "subset": self._subset,
            "seed": self.seed,
            "shuffle": self.shuffle,
        }

    def _select(self, rows: Sequence[int] | np.ndarray, name: str, num_splits: int) -> Self:
        return type(self)(
            self.manifest,
            seed=self.seed,
            shuffle=self.shuffle,
            rows=rows,
            subset=f"{self._subset}, {name}",
            num_splits=num_splits,
        )

    def _read(self, place: int) -> Example:
        example = self.manifest.read_example(int(self._rows[place]))
        return load_media(example, root=self.manifest.root)

    def _hand_out(self, token: object, order: Order) -> Example:
        if token is not self._token:
            raise ConfigError(
                "this iterator was overtaken: the stream was iterated again or given a state; use "
                "one iterator at a time, or make a second stream"
            )
        if self._position == len(self):
            raise StopIteration
        example = self._read(order[self._position])
        self._position += 1
        self._num_handed_out += 1
        self._is_begun = True
        return example


class _Epoch:
    """The rest of one epoch; not a generator, which one failing example would end."""

    def __init__(self, read_next: Callable[[], Example]) -> None:
        self._read_next = read_next

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Example:
        return self._read_next()
