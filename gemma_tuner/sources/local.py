"""Examples of local files: JSON lines, CSV, Parquet, and folders of media with captions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gemma_tuner.disk import find_home, is_within
from gemma_tuner.errors import DataError, SourceError
from gemma_tuner.media.encoded import describe_source
from gemma_tuner.sources.columns import Keywords
from gemma_tuner.sources.examples import Outcome, is_in_bucket
from gemma_tuner.sources.formats.files import LocalFile
from gemma_tuner.sources.formats.filesets import FileSet, FileSetReader
from gemma_tuner.sources.formats.folders import Paths, find_files, list_below
from gemma_tuner.sources.formats.lines import DataFile
from gemma_tuner.sources.media_places import (
    MediaPlaces,
    check_media_root,
    find_file,
    list_tails,
)

_MAX_NAME_BYTES = 255  # of any file system


class LocalSource:
    """The examples of local files, read each time it is iterated."""

    def __init__(
        self,
        paths: Paths,
        *,
        file_format: str | None = None,
        split: str | None = None,
        keywords: Keywords | None = None,
        media_root: str | Path | None = None,
    ) -> None:
        self.found = find_files(paths, file_format)
        self.root = self.found.root
        self._media_root = check_media_root(media_root)
        self.reach = self.found.homes
        if isinstance(self._media_root, Path):
            self.reach = (find_home(self._media_root),)
        elif self.found.format == "captions":  # named by the listing, and never by a row
            self.reach = (Path("/"),)
        self._reader = FileSetReader(keywords or {}, split, self._media_root)
        self._places: MediaPlaces | None = None

    def read_identity(self) -> dict[str, Any]:
        """Return what decides the examples, as JSON: files, sizes, times, and the choices made."""
        files = []
        for path in (*self.found.files, *self.found.captions.values()):
            try:
                state = path.stat()
            except OSError as error:
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
            "split": self._reader.split,
            "keywords": dict(self._reader.keywords),
            **({"media_root": str(self._media_root)} if self._media_root else {}),
        }

    def read_summary(self) -> dict[str, Any]:
        """Return what the last complete iteration met, as JSON."""
        return self._reader.summary

    def __iter__(self) -> Iterator[tuple[str, Outcome]]:
        """Read every row."""
        found = self.found
        self._places = None
        captions: dict[str, DataFile] = {
            self._name(path): self._open(text) for path, text in found.captions.items()
        }
        notes = []
        if found.num_unread_texts:
            notes.append(f".txt files without media: {found.num_unread_texts:,}")
        files = [self._open(path) for path in found.files]
        yield from self._reader.read(
            FileSet(files, found.format, found.is_folder, captions, notes), self._locate
        )

    def _name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def _open(self, path: Path) -> LocalFile:
        return LocalFile(path, self._name(path))

    def _locate(self, kind: str, source: str, folder: str | Path, key: str) -> str:
        """Check that a media file is there, and name it relative to the root; leave gs: URIs."""
        if isinstance(folder, str):
            source = folder + source
        if is_in_bucket(source, kind, key=key):
            return source
        path = Path(folder) / source
        is_started = isinstance(self._media_root, Path) and self.found.format != "captions"
        # Behind a question mark may be a signature.
        name = describe_source(source.partition("?")[0], "image" if kind == "image" else "audio")
        if len(path.name.partition("?")[0]) > _MAX_NAME_BYTES:
            raise DataError(
                f"its {kind} is text of {len(source):,} characters and no path; give base64 as "
                '{"bytes": ...} or as a data: URI',
                key=key,
            )
        try:
            if is_started or not (path.is_file() and is_within(path, self.reach)):
                path = self._find_elsewhere(kind, source, path, key) or path
            num_bytes = path.stat().st_size if path.is_file() else None
        except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
            reason = getattr(error, "strerror", None) or type(error).__name__
            raise DataError(
                f"{name} cannot be read ({reason}); check the path and its permissions",
                key=key,
            ) from None
        if num_bytes is None:
            start = "the folder of the data file" if self._media_root is None else "media_root="
            place = Path(self._media_root or folder).name
            raise DataError(
                f"{name} does not exist; paths are relative to {start} ({place!r}): say where "
                "they start by media_root=",
                key=key,
            )
        if num_bytes == 0:
            raise DataError(f"{name} is empty (0 bytes); fetch it again", key=key)
        return _name_from(path, self.root)

    def _find_elsewhere(self, kind: str, source: str, path: Path, key: str) -> Path | None:
        """Find a file by the end of its path, below media_root= or the folder that was given."""
        found = None
        if isinstance(self._media_root, Path):
            if found := find_file((self._media_root / source, path), self.reach):
                return found
            found = find_file(map(self._media_root.joinpath, list_tails(source)), self.reach)
        elif self.found.is_folder:
            if self._places is None:
                below = list_below(self.root)
                self._places = MediaPlaces(
                    path.relative_to(self.root).as_posix() for path in below
                )
            name = self._places.find(kind, source, key)
            found = None if name is None else self.root / name
        if found is not None:
            self._reader.counts[f"{kind} files found by the end of their path"] += 1
        return found


def _name_from(path: Path, root: Path) -> str:
    """Name a path from the root where it lies below it, so that moving both changes nothing."""
    if path.is_relative_to(root):
        return path.relative_to(root).as_posix()
    return str(path)
