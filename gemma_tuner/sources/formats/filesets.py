"""The examples of a set of data files, of any format and wherever the files lie."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemma_tuner.errors import DataError
from gemma_tuner.sources.columns import Columns, Keywords
from gemma_tuner.sources.examples import ExampleReader, Locate, Outcome
from gemma_tuner.sources.formats.files import (
    Format,
    Row,
    list_columns,
    peek_columns,
    read_rows,
)
from gemma_tuner.sources.formats.folders import choose_split
from gemma_tuner.sources.formats.lines import DataFile, read_text
from gemma_tuner.sources.formats.tars import TarReader, list_tar_columns
from gemma_tuner.sources.json_text import parse_json

_CAPTION_COLUMNS = ("file_name", "text")


@dataclass(frozen=True, slots=True)
class FileSet:
    """Data files that make one data set."""

    files: Sequence[DataFile]  # in reading order; of captions each is an image or a clip
    format: Format
    is_folder: bool = False  # one folder was given, which may hold several splits
    captions: Mapping[str, DataFile] = field(default_factory=dict)  # by the name of its file
    notes: Sequence[str] = ()  # on files that are left out


@dataclass(slots=True)
class FileSetReader:
    """Reads the examples of data files, and keeps what it met on the way."""

    keywords: Keywords
    split: str | None
    media_root: str | Path | None = None  # where relative paths start; None: at their data file
    counts: Counter[str] = field(default_factory=Counter)  # of what was chosen for media
    summary: dict[str, Any] = field(default_factory=dict)  # of the last complete reading

    def read(self, found: FileSet, locate: Locate) -> Iterator[tuple[str, Outcome]]:
        """Read every row of the files."""
        reader = ExampleReader(self._list_columns(found), self.keywords, split=self.split)
        if isinstance(self.media_root, Path):
            reader.guard.start = self.media_root
        files, notes = found.files, list(found.notes)
        left_out: list[str] = []
        self.counts.clear()
        if self.split is None or "split" not in reader.columns.names:
            names, left_out = choose_split(
                [file.name for file in files],
                found.format,
                split=self.split,
                is_folder=found.is_folder,
            )
            files = [file for file in files if file.name in names]
        if left_out:
            num_files = len(found.files) - len(files)
            notes.append(f"files of other splits not read ({', '.join(left_out)}): {num_files:,}")
        for file in files:
            for column, value in peek_columns(file, found.format, reader.guard.list_unread()):
                reader.guard.look_at(column, value, file.folder)
        tars = TarReader()
        rows = (row for file in files for row in self._read(file, found, reader.columns, tars))
        yield from reader.read(rows, locate)
        summary = reader.read_summary()
        counts = sorted((tars.counts + self.counts).items())
        notes += [f"{what}: {count:,}" for what, count in counts]
        self.summary = {
            **summary,
            "format": found.format,
            "notes": notes + summary["notes"],
            "num_files": len(files),
            "left_out": left_out,
        }

    def _list_columns(self, found: FileSet) -> Sequence[str]:
        if found.format == "captions":
            return _CAPTION_COLUMNS
        if found.format == "webdataset":
            return list_tar_columns(found.files)
        named = [column for column in self.keywords.values() if isinstance(column, str)]
        return list_columns(found.files, found.format, named)

    def _read(
        self, file: DataFile, found: FileSet, columns: Columns, tars: TarReader
    ) -> Iterator[Row]:
        folder = self.media_root if isinstance(self.media_root, str) else file.folder
        if found.format == "captions":
            yield Row(file.name, _read_caption(file, found.captions), file.folder)
            return
        if found.format == "webdataset":
            numbered = tars.read_samples(file)
        else:
            numbered = read_rows(file, found.format, columns, found.files)
        for number, values in numbered:
            yield Row(f"{file.name}:{number}", values, folder)


def _read_caption(
    file: DataFile, captions: Mapping[str, DataFile]
) -> Mapping[str, Any] | DataError:
    last = file.name.rpartition("/")[2]
    if file.name not in captions:
        return DataError(
            f"it has no text: there is no {last.rpartition('.')[0] + '.txt'!r} beside it; write "
            "one, or move the file",
            key=file.name,
        )
    text = read_text(captions[file.name]).strip()
    if captions[file.name].name.endswith(".json"):  # as SROIE's keys
        value = parse_json(text, "its text", key=file.name)
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return dict(zip(_CAPTION_COLUMNS, (last, text), strict=True))
