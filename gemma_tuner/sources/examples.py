"""Rows of any source to examples, with what was met on the way.

What is wrong with one row comes out in its place, as the DataError that says it: whoever reads on
decides whether it ends the reading. What is wrong with the data as a whole is raised.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from gemma_tuner.errors import DataError, SourceError, quote_name
from gemma_tuner.modalities import kind_of
from gemma_tuner.records import Audio, Example, Image, StoredObject
from gemma_tuner.sources.columns import Columns, Keywords, read_ignored, recognise_columns
from gemma_tuner.sources.formats.files import Row
from gemma_tuner.sources.formats.folders import NO_SPLIT, name_canonically, name_split
from gemma_tuner.sources.guard import MediaGuard
from gemma_tuner.sources.json_text import refuse_depth
from gemma_tuner.sources.rows import RowReader
from gemma_tuner.storage.stores import is_stored, list_schemes

Outcome = Example | DataError
"""An example, or what is wrong with its row."""

Locate = Callable[[str, str, str | Path, str], str | StoredObject]
"""Finds one image or clip: ``(kind, source, folder, key)`` to what the manifest keeps."""


class Source(Protocol):
    """A data set that can be read from its beginning to its end."""

    root: Path
    """The folder that relative media paths start from."""

    @property
    def reach(self) -> tuple[Path, ...]:
        """Below which folders of this machine, links followed, rows may name files."""
        ...

    def read_identity(self) -> dict[str, Any]:
        """Return what decides the examples, as JSON."""
        ...

    def read_summary(self) -> dict[str, Any]:
        """Return what the last complete iteration met, as JSON."""
        # format layout columns unused splits notes num_files
        ...

    def __iter__(self) -> Iterator[tuple[str, Outcome]]:
        """Read every row: where it stands, and its example or what is wrong with it."""
        ...


class ExampleReader:
    """Makes examples of the rows of one data set."""

    def __init__(
        self,
        available: Collection[str],
        keywords: Keywords,
        *,
        split: str | None = None,
        default_split: str = "train",
    ) -> None:
        self.columns: Columns = recognise_columns(available, keywords)
        self._known = dict.fromkeys(available)
        self._keywords = keywords
        self._split = split
        self._default_split = name_canonically(default_split)
        self.guard = MediaGuard(self.columns, available)
        self._reader = RowReader(self.columns)
        self._splits: Counter[str] = Counter()

    def read(self, rows: Iterable[Row], locate: Locate) -> Iterator[tuple[str, Outcome]]:
        """Make an example of each row of the split."""
        # Raises DataError for a row that shows that those before it were misread.
        num_rows = 0
        for row in rows:
            if isinstance(row.values, DataError):
                yield row.origin, row.values
                continue
            try:  # what follows goes as deep as a row does
                refuse_depth(row.values, "its values", key=row.origin)
            except DataError as error:
                yield row.origin, error
                continue
            self._refuse_late_columns(row.values, row.origin)
            self.guard.look(row.values, row.folder)
            if "split" in self.columns.names and not self._is_of_split(row.values):
                continue
            num_rows += 1
            try:
                key = self._reader.read_key(row.values, row.origin)
                example = self._reader.read_example(row.values, key)
                outcome: Outcome = _locate_media(example, row.folder, locate)
            except DataError as error:
                outcome = error
            self._reader.refuse_rows_before()  # of no one row: no budget passes over it
            yield row.origin, outcome
        if num_rows == 0 and self._splits:
            raise SourceError(self._describe_splits())
        if unknown := set(read_ignored(self._keywords)) - self._known.keys():
            raise SourceError(
                f"ignore= names what is not there: {', '.join(sorted(map(repr, unknown)))}; the "
                f"columns are {', '.join(sorted(map(repr, self._known)))}"
            )

    def _describe_splits(self) -> str:
        splits = ", ".join(map(quote_name, sorted(self._splits)))
        if self._split is not None:
            return (
                f"there is no split {self._split!r}; the splits are: {splits}; give one of these"
            )
        column = self.columns.names["split"]
        return (
            f"no row is of the split {self._default_split!r} by the column {column!r}; the splits "
            f"are: {splits}; give one of these as split=, or leave the column out by "
            f"ignore=({column!r},)"
        )

    def read_summary(self) -> dict[str, Any]:
        """Return what the rows read so far made, as JSON."""
        return {
            "layout": self.columns.layout,
            "columns": dict(self.columns.names),
            "unused": list(self.columns.unused),
            "splits": dict(self._splits),
            "notes": [
                *self._list_notes(),
                *(f"{what}: {count:,}" for what, count in self._reader.read_notes().items()),
            ],
        }

    def _list_notes(self) -> Iterator[str]:
        if self.columns.ignored:
            yield f"columns left out by ignore=: {', '.join(map(repr, self.columns.ignored))}"
        left_out = {name: n for name, n in self._splits.items() if not self._is_wanted(name)}
        if left_out and self._split is None:
            yield (
                f"rows of other splits not read ({', '.join(sorted(left_out))}): "
                f"{sum(left_out.values()):,}"
            )

    def _is_of_split(self, values: Mapping[str, Any]) -> bool:
        value = values.get(self.columns.names["split"])
        name = NO_SPLIT if value in (None, "") else str(value)
        self._splits[name] += 1
        return self._is_wanted(name)

    def _is_wanted(self, name: str) -> bool:
        """Whether rows of a split are read: where none is asked for, what is for training."""
        if self._split is not None:
            return name_canonically(name) == name_canonically(self._split)
        return name == NO_SPLIT or name_split(name, "jsonl") == self._default_split

    def _refuse_late_columns(self, values: Mapping[str, Any], origin: str) -> None:
        """Refuse a row whose new columns would have changed how the rows before it were read."""
        late = values.keys() - self._known.keys()
        if not late:
            return
        self._known.update(dict.fromkeys(sorted(late)))
        remedy = "name the columns to use by keyword"
        try:
            columns = recognise_columns(self._known, self._keywords)
        except SourceError as error:
            columns, remedy = None, str(error)
        if columns is None or columns.names != self.columns.names:
            raise DataError(
                f"the columns {', '.join(map(quote_name, sorted(late)))} come first here, after "
                f"the rows that decided which columns there are; {remedy}, or give the first row "
                "all of them, empty ones as null",
                key=origin,
            )
        self.columns = columns
        self.guard.add(columns, late)


def is_in_bucket(source: str, kind: str, *, key: str) -> bool:
    """Tell the URI of an object from a path."""
    scheme, is_uri, _ = source.partition("://")
    if is_uri and not is_stored(source):
        shown = f"{scheme}: " if re.fullmatch(r"[a-z0-9+.]{1,12}", scheme) else ""
        raise DataError(
            f"its {kind} is a {shown}URI, which is not fetched; download the file and "
            f"name it by its path, or keep it in a bucket ({list_schemes()})",
            key=key,
        )
    return bool(is_uri)


def _locate_media(example: Example, folder: str | Path, locate: Locate) -> Example:
    def find(part: Image | Audio) -> Image | Audio:
        if not isinstance(part.source, str):
            return part
        kind = kind_of(part)
        return replace(part, source=locate(kind, part.source, folder, example.key))

    return example.replace_media(find)
