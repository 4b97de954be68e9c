"""Examples of local files: JSON lines, CSV, Parquet, and folders of media with captions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from gemma_tuner.errors import DataError, SourceError
from gemma_tuner.records import Audio, Example, Image, Part
from gemma_tuner.sources.columns import Columns, Keywords, recognise_columns
from gemma_tuner.sources.files import PEEKED_ROWS, list_columns, read_rows
from gemma_tuner.sources.folders import (
    NO_SPLIT,
    Paths,
    find_files,
    name_canonically,
    name_split,
)
from gemma_tuner.sources.rows import RowReader


class LocalSource:
    """The examples of local files, read anew each time it is iterated.

    Args:
        paths: As :func:`find_files`.
        file_format: As :func:`find_files`.
        split: Keeps the rows of this split alone; None keeps all.
        keywords: Column by part, as :func:`~gemma_tuner.sources.columns.recognise_columns`.
    """

    def __init__(
        self,
        paths: Paths,
        *,
        file_format: str | None = None,
        split: str | None = None,
        keywords: Keywords | None = None,
    ) -> None:
        self.found = find_files(paths, file_format)
        self.split = split
        self.keywords: Keywords = keywords or {}
        self._summary: dict[str, Any] = {}

    @property
    def root(self) -> Path:
        """The folder that media paths are relative to."""
        return self.found.root

    def read_identity(self) -> dict[str, Any]:
        """Return what decides the examples, as JSON: files, sizes, times, and the choices made.

        Returns:
            A dictionary that differs whenever the examples may.

        Raises:
            SourceError: A file that is there no longer.
        """
        files = []
        for path in (*self.found.files, *self.found.captions):
            try:
                state = path.stat()
            except OSError as error:
                if path in self.found.captions:
                    continue  # a missing caption is told of with its example
                raise SourceError(
                    f"{path.name!r} cannot be read ({error.strerror}); check that it is there and "
                    "readable"
                ) from None
            files.append([str(path), state.st_size, state.st_mtime_ns])
        return {
            "source": "local",
            "root": str(self.root),
            "files": files,
            "format": self.found.format,
            "is_folder": self.found.is_folder,
            "split": self.split,
            "keywords": dict(self.keywords),
        }

    def read_summary(self) -> dict[str, Any]:
        """Return what the last complete iteration met, as JSON.

        Returns:
            ``format layout columns unused splits notes num_files``.
        """
        return self._summary

    def __iter__(self) -> Iterator[tuple[str, Example]]:
        """Read every row.

        Yields:
            Where the row stands (file and number), and its example with media located.

        Raises:
            DataError: The first row that cannot be used.
            SourceError: Files or columns that cannot be read, or a split that is not there.
        """
        known = dict.fromkeys(list_columns(self.found.files, self.found.format))
        columns = recognise_columns(known, self.keywords)
        files, notes = self._choose_files(columns)
        reader = RowReader(columns)
        splits: Counter[str] = Counter()
        num_rows = 0
        try:
            for row in read_rows(files, self.found.format, self.root, columns):
                late = row.values.keys() - known.keys()
                if late:
                    known.update(dict.fromkeys(sorted(late)))
                    self._refuse_late_columns(known, late, columns, row.origin)
                if "split" in columns.names:
                    name = _read_split(row.values, columns)
                    splits[name] += 1
                    if self.split is not None and name_canonically(name) != name_canonically(
                        self.split
                    ):
                        continue
                key = reader.read_key(row.values, row.origin)
                example = reader.read_example(row.values, key)
                yield row.origin, _locate_media(example, row.folder, self.root)
                num_rows += 1
        except DataError as error:
            reason = str(error).removeprefix(f"example {error.key!r}: ")
            raise DataError(f"{reason} ({num_rows:,} rows were fine)", key=error.key) from None
        if num_rows == 0 and splits:
            raise SourceError(
                f"there is no split {self.split!r}; the splits are: {', '.join(sorted(splits))}"
            )
        notes += [f"{what}: {count:,}" for what, count in reader.read_notes().items()]
        self._summary = {
            "format": self.found.format,
            "layout": columns.layout,
            "columns": dict(columns.names),
            "unused": list(columns.unused),
            "splits": dict(splits),
            "notes": notes,
            "num_files": len(files),
        }

    def _choose_files(self, columns: Columns) -> tuple[tuple[Path, ...], list[str]]:
        """Choose files by the splits that their names tell, and say which are left out."""
        found = self.found
        notes = []
        if found.num_unread_texts:
            notes.append(f".txt files without media: {found.num_unread_texts:,}")
        by_split: dict[str, list[Path]] = {}
        for path in found.files:
            by_split.setdefault(name_split(path, found), []).append(path)
        if self.split is not None:
            if "split" in columns.names:
                return found.files, notes
            chosen = by_split.get(name_canonically(self.split))
            if chosen is None:
                raise SourceError(
                    f"there is no split {self.split!r}: there is no column 'split', and the files "
                    f"are of: {', '.join(sorted(by_split))}"
                )
            return tuple(chosen), notes
        held_out = sorted(by_split.keys() & {"test", "validation"})
        if not (found.is_folder and held_out and "train" in by_split):
            return found.files, notes
        left_out = [path for name in held_out for path in by_split[name]]
        notes.append(f"files of other splits not read ({', '.join(held_out)}): {len(left_out):,}")
        return tuple(path for path in found.files if path not in left_out), notes

    def _refuse_late_columns(
        self, known: Collection[str], late: set[str], columns: Columns, origin: str
    ) -> None:
        """Refuse a row whose new columns would have changed how the rows before it were read."""
        try:
            names = recognise_columns(known, self.keywords).names
        except SourceError:
            names = None
        if names != columns.names:
            raise DataError(
                f"the columns {', '.join(sorted(late))} come first here, after {PEEKED_ROWS:,} "
                "rows without them; name the columns to use by keyword, or give the file's first "
                "row all of them, empty ones as null",
                key=origin,
            )


def _read_split(values: Mapping[str, Any], columns: Columns) -> str:
    value = values.get(columns.names["split"])
    return NO_SPLIT if value in (None, "") else str(value)


def _locate_media(example: Example, folder: Path, root: Path) -> Example:
    """Check that each media file is there, and name it relative to the root."""
    if not any(True for _ in example.media):
        return example
    turns = tuple(
        replace(
            turn, parts=tuple(_locate_part(part, example.key, folder, root) for part in turn.parts)
        )
        for turn in example.turns
    )
    return replace(example, turns=turns)


def _locate_part(part: Part, key: str, folder: Path, root: Path) -> Part:
    if not isinstance(part, Image | Audio) or not isinstance(part.source, str):
        return part
    kind = "image" if isinstance(part, Image) else "audio"
    if "://" in part.source:
        scheme = part.source.partition(":")[0]
        raise DataError(
            f"its {kind} is a {scheme[:12]}: URI, and local data is not fetched; download the "
            "file and name it by its path",
            key=key,
        )
    path = folder / part.source
    name = path.name[:80]
    try:
        num_bytes = path.stat().st_size if path.is_file() else None
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise DataError(
            f"{kind} {name!r} cannot be read ({reason}); check the path and its permissions",
            key=key,
        ) from None
    if num_bytes is None:
        raise DataError(
            f"{kind} {name!r} does not exist; paths are relative to the folder of the data file "
            f"({folder.name!r})",
            key=key,
        )
    if num_bytes == 0:
        raise DataError(f"{kind} {name!r} is empty (0 bytes); fetch it again", key=key)
    return replace(part, source=_name_from(path, root))


def _name_from(path: Path, root: Path) -> str:
    """Name a path from the root where it lies below it, so that moving both changes nothing."""
    if path.is_relative_to(root):
        return path.relative_to(root).as_posix()
    return str(path)
