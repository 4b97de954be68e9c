"""The examples of data files in a store of objects, of whatever scheme."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from gemma_tuner.errors import DataError, SourceError, quote_name
from gemma_tuner.records import StoredObject
from gemma_tuner.sources.columns import Keywords
from gemma_tuner.sources.examples import Outcome, is_in_bucket
from gemma_tuner.sources.formats.files import Format
from gemma_tuner.sources.formats.filesets import FileSet, FileSetReader
from gemma_tuner.sources.formats.folders import (
    MANIFESTS,
    check_format,
    choose_files,
    choose_manifest,
    choose_one_format,
    name_format,
    pair_texts,
)
from gemma_tuner.sources.formats.lines import DataFile
from gemma_tuner.sources.media_places import MediaPlaces, check_media_root
from gemma_tuner.storage.fetch import Fetcher
from gemma_tuner.storage.objects import GLOB, ObjectChangedError, name_folder
from gemma_tuner.storage.stores import list_schemes, split_uri


@dataclass(frozen=True, slots=True)
class ObjectFile:
    """A data file in a bucket, in the version that was found."""

    stored: StoredObject
    name: str  # its path from the data's root
    fetcher: Fetcher

    @property
    def folder(self) -> str:
        """Where relative paths in it start: a URI ending in a slash."""
        return name_folder(self.stored.uri)

    def open(self) -> BinaryIO:
        """Open it for reading from its first byte."""
        return self.fetcher.open(self.stored)

    def cut(self, start: int, num_bytes: int) -> StoredObject:
        """Return a part of it, as examples refer to it."""
        return replace(self.stored, start=start, num_bytes=num_bytes, crc32c=None)


class BucketSource:
    """The examples of data files in buckets, found and read each time it is iterated.

    Each file is read in the version that was found: one that is overwritten meanwhile ends the
    reading with a SourceError. Texts beside images (``captions``) are read one after the other,
    some 40 ms each; a manifest is read at once.
    """

    root = Path()
    """Media have URIs of their own: no path starts here."""
    reach: tuple[Path, ...] = ()

    def __init__(
        self,
        uris: str | Sequence[str],
        fetcher: Fetcher,
        *,
        file_format: str | None = None,
        split: str | None = None,
        keywords: Keywords | None = None,
        media_root: str | Path | None = None,
    ) -> None:
        self.uris = (uris,) if isinstance(uris, str) else tuple(uris)
        if not self.uris:
            raise SourceError(
                f"no URIs were given; name an object, a folder or a glob ({list_schemes('...')})"
            )
        for uri in self.uris:
            split_uri(uri)
        self._format: Format | None = check_format(file_format)
        root = check_media_root(media_root, is_remote=True)
        self._reader = FileSetReader(keywords or {}, split, root)
        self._listed: frozenset[str] = frozenset()  # the URIs in a folder that was listed
        self._places = MediaPlaces(())
        self._fetcher = fetcher

    def read_identity(self) -> dict[str, Any]:
        """Return what was asked for, as JSON; nothing is asked of the service."""
        return {
            "source": "gcs",  # whatever the scheme: manifests are named after this
            "uris": list(self.uris),
            "format": self._format,
            "split": self._reader.split,
            "keywords": dict(self._reader.keywords),
            **({"media_root": self._reader.media_root} if self._reader.media_root else {}),
        }

    def read_summary(self) -> dict[str, Any]:
        """Return what the last complete iteration met, as JSON."""
        return self._reader.summary

    def __iter__(self) -> Iterator[tuple[str, Outcome]]:
        """Find the data files, and read every row."""
        formats: dict[str, Format] = {}
        objects: dict[str, StoredObject] = {}
        folders: list[str] = []
        is_folder = False
        for uri in self.uris:
            found, chosen, folder = self._find(uri)
            objects |= found
            formats |= chosen
            is_folder = folder is not None and len(self.uris) == 1
            folders += [folder] if folder is not None else [name_folder(uri) for uri in chosen]
        root = folders[0]
        while not all(folder.startswith(root) for folder in folders):
            root = name_folder(root[:-1])
        files = {
            uri: ObjectFile(stored, uri.removeprefix(root), self._fetcher)
            for uri, stored in objects.items()
        }
        self._listed = frozenset(objects) if is_folder else frozenset()
        self._places = MediaPlaces(self._listed)
        kind = choose_one_format({files[uri].name: formats[uri] for uri in formats})
        captions: dict[str, DataFile] = {}
        notes = []
        if kind == "captions":
            texts = {uri for uri in files if uri.endswith(".txt")}
            by_name = {file.name: file for file in files.values()}
            pairs = pair_texts([files[uri].name for uri in formats], by_name)
            captions = {medium: by_name[text] for medium, text in pairs.items()}
            num_unread = len({files[uri].name for uri in texts}.difference(pairs.values()))
            if num_unread:
                notes.append(f".txt files without media: {num_unread:,}")
        yield from self._reader.read(
            FileSet([files[uri] for uri in formats], kind, is_folder, captions, notes),
            self._locate,
        )

    def _find(self, uri: str) -> tuple[dict[str, StoredObject], dict[str, Format], str | None]:
        """Return the objects that a URI means, the formats of those that are data, its folder."""
        store = self._fetcher.stores.find(uri)
        if split_uri(uri)[2] and not uri.endswith("/"):
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
        """Return the URI of media whose path may start from the folder of their data file."""
        # Names in a bucket are no paths: only . and .. mean something.
        if is_in_bucket(source, kind, key=key):
            return source
        scheme, bucket, name = split_uri(str(folder))
        parts = name.split("/")[:-1]
        for part in source.split("/"):
            if part == ".." and parts:
                parts.pop()
            elif part == ".." or (source.startswith("/") and not part):
                # What follows the question mark may be a signature.
                last = quote_name(_last(source.partition("?")[0]))
                raise DataError(
                    f"its {kind} {last} lies outside the bucket {bucket!r}; name "
                    f"it by a path from the folder of its data file, or by its {scheme}:// URI",
                    key=key,
                )
            elif part != ".":
                parts.append(part)
        uri = f"{scheme}://{bucket}/{'/'.join(parts)}"
        if self._listed and self._reader.media_root is None and uri not in self._listed:
            found = self._places.find(kind, source, key)
            self._reader.counts[f"{kind} files found by the end of their path"] += (
                found is not None
            )
            return found or uri
        return uri


def _last(uri: str) -> str:
    return uri.rpartition("/")[2]
