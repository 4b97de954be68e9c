"""Examples of local files: JSON lines, CSV, Parquet, and folders of media with captions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gemma_tuner.errors import DataError, SourceError, quote_name
from gemma_tuner.sources.columns import Keywords
from gemma_tuner.sources.examples import Outcome, is_in_bucket
from gemma_tuner.sources.files import DataFile, LocalFile
from gemma_tuner.sources.filesets import FileSet, FileSetReader
from gemma_tuner.sources.folders import Paths, find_files


class LocalSource:
    """The examples of local files, read each time it is iterated."""

    def __init__(
        self,
        paths: Paths,
        *,
        file_format: str | None = None,
        split: str | None = None,
        keywords: Keywords | None = None,
    ) -> None:
        self.found = find_files(paths, file_format)
        self.root = self.found.root
        self._reader = FileSetReader(keywords or {}, split)

    def read_identity(self) -> dict[str, Any]:
        """Return what decides the examples, as JSON: files, sizes, times, and the choices made."""
        files = []
        for path in (*self.found.files, *self.found.captions):
            try:
                state = path.stat()
            except OSError as error:
                if path in self.found.captions:
                    continue  # the example of a missing caption says so
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
        }

    def read_summary(self) -> dict[str, Any]:
        """Return what the last complete iteration met, as JSON."""
        return self._reader.summary

    def __iter__(self) -> Iterator[tuple[str, Outcome]]:
        """Read every row."""
        found = self.found
        captions: dict[str, DataFile] = {}
        for path, caption in zip(found.files, found.captions, strict=bool(found.captions)):
            if caption.is_file():
                captions[self._name(path)] = self._open(caption)
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
        if is_in_bucket(source, kind, key=key):
            return source
        path = Path(folder) / source
        name = quote_name(path.name.partition("?")[0])  # what follows may be a signature
        try:
            num_bytes = path.stat().st_size if path.is_file() else None
        except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
            reason = getattr(error, "strerror", None) or type(error).__name__
            raise DataError(
                f"{kind} {name} cannot be read ({reason}); check the path and its permissions",
                key=key,
            ) from None
        if num_bytes is None:
            raise DataError(
                f"{kind} {name} does not exist; paths are relative to the folder of the data "
                f"file ({Path(folder).name!r})",
                key=key,
            )
        if num_bytes == 0:
            raise DataError(f"{kind} {name} is empty (0 bytes); fetch it again", key=key)
        return _name_from(path, self.root)


def _name_from(path: Path, root: Path) -> str:
    """Name a path from the root where it lies below it, so that moving both changes nothing."""
    if path.is_relative_to(root):
        return path.relative_to(root).as_posix()
    return str(path)
