"""Examples of a data set on the Hugging Face Hub, or of a folder as ``datasets`` reads it.

Media stay encoded: bytes that the rows hold go on as they are, and an image or a clip in its own
file goes on as the file's path, or, where the data set is streamed, as its bytes.

A column of class labels holds numbers, and what they stand for is kept beside them: the rows get
the names, so that a response is ``cat`` and not ``3``. The summary counts them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from gemma_tuner.checks import is_whole_number
from gemma_tuner.disk import find_home, is_within
from gemma_tuner.errors import ConfigError, DataError, SourceError, quote_name
from gemma_tuner.sources.columns import Keywords
from gemma_tuner.sources.examples import ExampleReader, Outcome, is_in_bucket
from gemma_tuner.sources.formats.files import Row
from gemma_tuner.sources.hub_loading import (
    HubName,
    OpenedSplit,
    explain_failure,
    list_failures,
    open_split,
    quiet_libraries,
)
from gemma_tuner.sources.json_text import parse_json
from gemma_tuner.sources.media_places import check_media_root, start_at

_BLOCK_ROWS = 16  # small, as rows may hold media


class HubSource:
    """The examples of one split, read each time it is iterated.

    Origins are ``<name>/<subset>/<split>:<number>``, from 1.
    """

    def __init__(
        self,
        name: str,
        *,
        subset: str | None = None,
        split: str = "train",
        revision: str | None = None,
        streaming: bool = False,  # reads over the network and keeps nothing
        max_rows: int | None = None,
        keywords: Keywords | None = None,
        media_root: str | Path | None = None,
    ) -> None:
        _check_arguments(
            {"name": name, "subset": subset, "split": split, "revision": revision}, max_rows
        )
        folder = Path(name).expanduser().absolute()
        if folder.is_file():
            raise ConfigError(
                f"{folder.name!r} is a file; stream_local reads files, and here a folder or a "
                "data set on the Hub is named"
            )
        if not folder.is_dir() and (name[0] in "/.~" or name.count("/") > 1):
            raise SourceError(
                f"there is no folder {folder.name!r}; check the path, which starts from the "
                "working directory where it is relative"
            )
        if folder.is_dir() and revision is not None:
            raise ConfigError(
                f"revision={revision!r}: {folder.name!r} is a folder, which has none; leave it out"
            )
        self.wanted = HubName(name, folder if folder.is_dir() else None, subset, split, revision)
        # Nothing is relative to it where there is no folder: paths from the Hub are whole.
        self.root = self.wanted.folder or Path.home()
        self.streaming = streaming
        self.max_rows = max_rows
        self.keywords: Keywords = keywords or {}
        self.media_root = check_media_root(media_root)
        self._summary: dict[str, Any] = {}

    @property
    def reach(self) -> tuple[Path, ...]:
        """Where rows may name files."""
        return list_reach(self.media_root or self.wanted.folder)

    def read_identity(self) -> dict[str, Any]:
        """Return what decides the examples, as JSON: the arguments, and the files of a folder."""
        # A data set on the Hub is taken to be what it was: asking for its present commit would
        # need the network at every start, and a run could not go on after an upload. Naming
        # another revision reads it again.
        return {
            "source": "hub",
            "name": self.wanted.name if self.wanted.folder is None else str(self.wanted.folder),
            "files": [] if self.wanted.folder is None else _list_states(self.wanted.folder),
            "subset": self.wanted.subset,
            "split": self.wanted.split,
            "revision": self.wanted.revision,
            "max_rows": self.max_rows,
            "keywords": dict(self.keywords),
            **({"media_root": str(self.media_root)} if self.media_root else {}),
        }

    def read_summary(self) -> dict[str, Any]:
        """Return what the last complete iteration met, as JSON."""
        return self._summary

    def __iter__(self) -> Iterator[tuple[str, Outcome]]:
        """Read every row of the split, up to ``max_rows``."""
        opened = open_split(self.wanted, streaming=self.streaming)
        reader = ExampleReader(
            list(opened.features), self.keywords, default_split=self.wanted.split
        )
        rows = HubRows(opened, self.wanted)
        needed = set(reader.columns.names.values())
        if self.streaming:  # in which nothing can be looked at beforehand
            needed |= reader.guard.waiting.keys()
        else:
            for column, value in rows.peek(reader.guard.list_unread()):
                reader.guard.look_at(column, value, self.wanted.folder or "")
        stored = rows.read(needed, self.max_rows)
        yield from reader.read(
            stored, start_at(self.media_root, partial(locate_file, self.wanted))
        )
        summary = reader.read_summary()
        self._summary = {
            **summary,
            "format": "hub data set",
            "notes": [*opened.notes, *rows.list_notes(self.max_rows), *summary["notes"]],
            "num_files": opened.num_files,
        }


class HubRows:
    """Reads the rows of one split, and gives stored values the form that they stand for."""

    def __init__(self, opened: OpenedSplit, wanted: HubName) -> None:
        self._opened = opened
        self._wanted = wanted
        self._num_labels: Counter[str] = Counter()
        self._num_rows = 0

    def list_notes(self, max_rows: int | None) -> list[str]:
        """List what was met, in words."""
        notes = [
            f"class labels of {column!r} read as their names: {count:,}"
            for column, count in self._num_labels.items()
        ]
        if self._num_rows == max_rows:
            notes.append(f"stopped at max_rows: {max_rows:,}")
        return notes

    def peek(self, columns: Mapping[str, int]) -> Iterator[tuple[str, Any]]:
        """Read the first values of columns that are not null, so many of each."""
        for column, count in columns.items():
            valid = (v.as_py() for v in self._opened.tables.data.column(column) if v.is_valid)
            yield from ((column, value) for value in islice(valid, count))

    def read(self, columns: Collection[str], max_rows: int | None) -> Iterator[Row]:
        """Read the rows, of these columns alone."""
        opened = self._opened
        tables = opened.tables
        if tables.features is not None:
            tables = tables.select_columns([name for name in tables.features if name in columns])
        label = f"{self._wanted.label}/{opened.subset}/{opened.split}"
        for number, stored in enumerate(self._read_stored(tables, max_rows), 1):
            origin = f"{label}:{number}"
            values: Mapping[str, Any] | DataError
            try:
                values = {
                    name: self._restore(value, opened.features.get(name), name, origin)
                    for name, value in stored.items()
                }
            except DataError as error:
                values = error
            yield Row(origin, values, self._wanted.folder or "")

    def _read_stored(self, tables: Any, max_rows: int | None) -> Iterator[dict[str, Any]]:
        """Read rows in blocks: the libraries are kept quiet for a block, not while it is used."""
        failures = list_failures()
        one_by_one = islice(tables.iter(batch_size=1), max_rows)
        failure = None
        is_at_end = False
        while not is_at_end:
            block: list[dict[str, Any]] = []
            with quiet_libraries():
                try:
                    for table in islice(one_by_one, _BLOCK_ROWS):
                        block += table.to_pylist()
                except failures as error:
                    failure = explain_failure(error)
            self._num_rows += len(block)
            yield from block
            is_at_end = failure is not None or not block
        if failure is not None:
            raise SourceError(
                f"{self._wanted.label!r} cannot be read further than {self._num_rows:,} rows of "
                f"its split {self._opened.split!r} ({failure}); max_rows= reads those alone"
            )

    def _restore(self, value: Any, feature: Any, column: str, key: str) -> Any:
        """Give a stored value its form: of labels the names, of JSON objects, of files bytes."""
        import datasets

        if value is None or isinstance(feature, datasets.Value):
            return value
        if isinstance(feature, datasets.ClassLabel):
            return self._name_label(value, feature, column, key)
        if isinstance(feature, datasets.Json):
            return parse_json(value, f"its column {column!r}", key=key)
        if isinstance(feature, datasets.Image | datasets.Audio):
            return self._fetch(value, column, key)
        if isinstance(feature, dict):
            return {
                name: self._restore(value[name], inner, column, key)
                for name, inner in feature.items()
                if value[name] is not None  # a struct has the fields that any row has
            }
        if isinstance(feature, datasets.List | datasets.LargeList):
            if isinstance(feature.feature, datasets.Value):
                return value
            return [self._restore(item, feature.feature, column, key) for item in value]
        return value

    def _name_label(self, value: int, feature: Any, column: str, key: str) -> str:
        if not 0 <= value < len(feature.names):
            raise DataError(
                f"its column {column!r} holds {value}, which is none of the {len(feature.names)} "
                "class labels (-1 means that there is none); remove the row",
                key=key,
            )
        self._num_labels[column] += 1
        return feature.names[value]

    def _fetch(self, value: Mapping[str, Any], column: str, key: str) -> Mapping[str, Any]:
        """Read a file of the data set that is not on this machine, or lies in an archive."""
        path = value.get("path")
        if value.get("bytes") or not isinstance(path, str) or "://" not in path:
            return value
        import fsspec

        inner, _, outer = path.rpartition("::")
        base = self._opened.base
        is_plain = not inner or (inner.startswith("zip://") and "::" not in inner)
        is_within = base is not None and outer.startswith(f"{base}/") and ".." not in outer
        if not (is_plain and is_within):
            raise DataError(
                f"its column {column!r} names a file outside of the data set, which is not read",
                key=key,
            )
        try:
            filesystem, within = fsspec.url_to_fs(path)
            return {"bytes": filesystem.cat_file(within)}
        except list_failures() as error:
            raise DataError(
                f"the file that its column {column!r} names cannot be fetched "
                f"({type(error).__name__}); try again, or set streaming=False",
                key=key,
            ) from None


def _check_arguments(texts: Mapping[str, Any], max_rows: Any) -> None:
    for argument, value in texts.items():
        may_be_none = argument in ("subset", "revision")
        if not (value is None and may_be_none) and not (isinstance(value, str) and value):
            raise ConfigError(
                f"{argument}={value!r}; give text{', or None' if may_be_none else ''}"
            )
    if "://" in texts["name"]:
        raise ConfigError(
            "a data set is named as on its page on the Hub (owner/name), or is a folder; got a URL"
        )
    if max_rows is not None and (not is_whole_number(max_rows) or max_rows < 1):
        raise ConfigError(f"max_rows={max_rows!r}; give a whole number above 0, or None")


def _list_states(folder: Path) -> list[list[Any]]:
    """List the files of a folder with their sizes and times."""
    states = []
    for path in sorted(folder.rglob("*")):
        try:
            if path.is_file():
                state = path.stat()
                name = path.relative_to(folder).as_posix()
                states.append([name, state.st_size, state.st_mtime_ns])
        except OSError as error:
            raise SourceError(
                f"{path.name!r} cannot be read ({error.strerror}); check its permissions"
            ) from None
    return states


def locate_file(wanted: HubName, kind: str, source: str, folder: str | Path, key: str) -> str:
    """Check that a media file is there, and that it is the user's or of the data set."""
    if is_in_bucket(source, kind, key=key):
        return source
    path = Path(folder) / source
    try:
        is_there = path.is_file()
    except (OSError, ValueError):  # too long, a NUL character, a folder that may not be entered
        is_there = False
    if wanted.folder is None and not (is_there and is_within(path, list_reach(None))):
        raise DataError(
            f"its {kind} is the name of a file, which the rows of {wanted.name!r} do not hold; "
            "download the data set's files (hf download --repo-type dataset) and read them with "
            "stream_local, or say where they lie by media_root=",
            key=key,
        )
    if not is_there:
        raise DataError(
            f"{kind} {quote_name(path.name)} does not exist; paths are relative to the folder "
            f"{wanted.label!r}: say where they start by media_root=",
            key=key,
        )
    if wanted.folder is not None and path.is_relative_to(wanted.folder):
        return path.relative_to(wanted.folder).as_posix()
    return str(path)


def list_reach(start: str | Path | None) -> tuple[Path, ...]:
    """List where rows may name files: below a folder, and in the caches of downloads."""
    import datasets.config
    import huggingface_hub.constants

    caches = (datasets.config.HF_DATASETS_CACHE, huggingface_hub.constants.HF_HUB_CACHE)
    homes = [Path(cache).resolve() for cache in caches]
    return (*homes, find_home(start)) if isinstance(start, Path) else tuple(homes)
