"""The examples of data files in Google Cloud Storage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from gemma_tuner.errors import DataError, SourceError
from gemma_tuner.records import StoredObject
from gemma_tuner.sources.columns import Keywords
from gemma_tuner.sources.examples import Outcome, is_in_bucket
from gemma_tuner.sources.files import DataFile, Format
from gemma_tuner.sources.filesets import FileSet, FileSetReader
from gemma_tuner.sources.folders import (
    MANIFESTS,
    check_format,
    choose_files,
    choose_manifest,
    choose_one_format,
    name_format,
)
from gemma_tuner.storage.gcs import GLOB, GcsStore, name_folder, split_uri
from gemma_tuner.storage.objects import ObjectChangedError, ObjectStore

__all__ = ["GcsSource", "GcsStore", "ObjectFile"]


@dataclass(frozen=True, slots=True)
class ObjectFile:
    """A data file in a bucket.

    Args:
        stored: The object, in the version that was found.
        name: Its path from the data's root.
        open_object: Opens an object as a seekable file.
    """

    stored: StoredObject
    name: str
    open_object: Callable[[StoredObject], BinaryIO]

    @property
    def folder(self) -> str:
        """Where relative paths in it start: a URI ending in a slash."""
        return name_folder(self.stored.uri)

    def open(self) -> BinaryIO:
        """Open it for reading from its first byte."""
        return self.open_object(self.stored)

    def cut(self, start: int, num_bytes: int) -> StoredObject:
        """Return a part of it, as examples refer to it."""
        return replace(self.stored, start=start, num_bytes=num_bytes, crc32c=None)


class GcsSource:
    """The examples of data files in Google Cloud Storage, read anew each time it is iterated.

    Each file is read in the version that was found: one that is overwritten meanwhile ends the
    reading with a SourceError. Texts beside pictures (``captions``) are read one after the other,
    some 40 ms each; a manifest is read at once.

    Args:
        uris: ``gs://bucket/name``, a folder, a glob, or a list of them; a folder means what
            :mod:`gemma_tuner.sources.folders` says.
        file_format: As :func:`~gemma_tuner.sources.folders.find_files`.
        split: Keeps the rows, or files, of this split alone; None keeps all.
        keywords: Column by part, as :func:`~gemma_tuner.sources.columns.recognise_columns`.
        open_store: Returns the store; called when it is iterated.
        open_object: Opens an object as a seekable file.

    Raises:
        ConfigError: A format that is not known.
        SourceError: Not ``gs://`` URIs.
    """

    root = Path()
    """Media have URIs of their own: no path starts here."""

    def __init__(
        self,
        uris: str | Sequence[str],
        *,
        file_format: str | None = None,
        split: str | None = None,
        keywords: Keywords | None = None,
        open_store: Callable[[], ObjectStore],
        open_object: Callable[[StoredObject], BinaryIO],
    ) -> None:
        self.uris = (uris,) if isinstance(uris, str) else tuple(uris)
        if not self.uris:
            raise SourceError("no URIs were given; name an object, a folder or a glob (gs://...)")
        for uri in self.uris:
            split_uri(uri)
        self._format: Format | None = check_format(file_format)
        self._reader = FileSetReader(keywords or {}, split)
        self._open_store = open_store
        self._open_object = open_object

    def read_identity(self) -> dict[str, Any]:
        """Return what was asked for, as JSON; nothing is asked of the service."""
        return {
            "source": "gcs",
            "uris": list(self.uris),
            "format": self._format,
            "split": self._reader.split,
            "keywords": dict(self._reader.keywords),
        }

    def read_summary(self) -> dict[str, Any]:
        """Return what the last complete iteration met, as JSON."""
        return self._reader.summary

    def __iter__(self) -> Iterator[tuple[str, Outcome]]:
        """Find the data files, and read every row."""
        store = self._open_store()
        formats: dict[str, Format] = {}
        objects: dict[str, StoredObject] = {}
        folders: list[str] = []
        is_folder = False
        for uri in self.uris:
            found, chosen, folder = self._find(store, uri)
            objects |= found
            formats |= chosen
            is_folder = folder is not None and len(self.uris) == 1
            folders += [folder] if folder is not None else [name_folder(uri) for uri in chosen]
        root = folders[0]
        while not all(folder.startswith(root) for folder in folders):
            root = name_folder(root[:-1])
        files = {
            uri: ObjectFile(stored, uri.removeprefix(root), self._open_object)
            for uri, stored in objects.items()
        }
        kind = choose_one_format({files[uri].name: formats[uri] for uri in formats})
        captions: dict[str, DataFile] = {}
        notes = []
        if kind == "captions":
            texts = {uri for uri in files if uri.endswith(".txt")}
            for uri in formats:
                text = f"{uri.rpartition('.')[0]}.txt"
                if text in texts:
                    captions[files[uri].name] = files[text]
            if len(texts) > len(captions):
                notes.append(f".txt files without media: {len(texts) - len(captions):,}")
        yield from self._reader.read(
            FileSet([files[uri] for uri in formats], kind, is_folder, captions, notes),
            self._locate,
        )

    def _find(
        self, store: ObjectStore, uri: str
    ) -> tuple[dict[str, StoredObject], dict[str, Format], str | None]:
        """Return the objects that a URI means, the formats of those that are data, its folder."""
        if split_uri(uri)[1] and not uri.endswith("/"):
            try:
                found = {stored.uri: stored for stored in store.list_objects(uri)}
            except ObjectChangedError:
                if GLOB.search(uri):
                    raise
            else:
                return (
                    found,
                    {name: name_format(_last(name), self._format) for name in found},
                    None,
                )
        folder = f"{uri.rstrip('/')}/"
        pinned = store.pin_objects([folder + name for name in MANIFESTS])
        found = {stored.uri: stored for stored in pinned if isinstance(stored, StoredObject)}
        chosen = choose_manifest([_last(uri) for uri in found], self._format)
        if not chosen:
            found = {stored.uri: stored for stored in store.list_objects(folder)}
            names = [uri.removeprefix(folder) for uri in found]
            chosen = choose_files(names, self._format, folder=_last(folder.rstrip("/")))
        return found, {folder + name: kind for name, kind in chosen.items()}, folder

    def _locate(self, kind: str, source: str, folder: str | Path, key: str) -> str:
        """Return the URI of a picture or sound whose path may start from its data file's folder.

        Names in a bucket are no paths: only ``.`` and ``..`` mean something.

        Raises:
            DataError: It leads out of the bucket, or is a URI of another kind.
        """
        if is_in_bucket(source, kind, key=key):
            return source
        bucket, name = split_uri(str(folder))
        parts = name.split("/")[:-1]
        for part in source.split("/"):
            if part == ".." and parts:
                parts.pop()
            elif part == ".." or (source.startswith("/") and not part):
                last = _last(source.partition("?")[0])[:80]  # what follows may be a signature
                raise DataError(
                    f"its {kind} {last!r} lies outside the bucket {bucket!r}; name "
                    "it by a path from the folder of its data file, or by its gs:// URI",
                    key=key,
                )
            elif part != ".":
                parts.append(part)
        return f"gs://{bucket}/{'/'.join(parts)}"


def _last(uri: str) -> str:
    return uri.rpartition("/")[2]
