"""Where media lie whose paths start elsewhere: below the data's folder, or ``media_root=``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

from gemma_tuner.disk import find_home, is_within
from gemma_tuner.errors import DataError, SourceError, quote_name
from gemma_tuner.modalities import kind_of_suffix
from gemma_tuner.records import StoredObject
from gemma_tuner.sources.examples import Locate
from gemma_tuner.storage.stores import is_stored


class MediaPlaces:
    """Finds images and clips by the end of their path, or by their name without its ending."""

    def __init__(self, names: Iterable[str]) -> None:
        self._by_last: dict[str, list[str]] = {}
        for name in names:
            path = PurePosixPath(name)
            if kind_of_suffix(path.suffix.lower()):
                for last in (path.name, path.stem):
                    self._by_last.setdefault(last, []).append(name)

    def find(self, kind: str, source: str, key: str) -> str | None:
        """Return the only file that a path can mean; None where there is none."""
        wanted = PurePosixPath(*(part for part in source.split("/") if part not in (".", "..")))
        found = [
            name
            for name in self._by_last.get(wanted.name, ())
            if kind_of_suffix(PurePosixPath(name).suffix.lower()) == kind
            and f"/{PurePosixPath(name).with_name(wanted.name)}".endswith(f"/{wanted}")
        ]
        if len(found) > 1:
            raise DataError(
                f"{kind} {wanted.name[:80]!r} may be any of {len(found)} files below the data's "
                "folder; say where its path starts by media_root=",
                key=key,
            )
        return found[0] if found else None


def check_media_root(
    media_root: str | Path | None, *, is_remote: bool = False
) -> str | Path | None:
    """Return what relative paths of media start from: a folder, or a URI that ends in a slash."""
    if media_root is None:
        return None
    if is_stored(str(media_root)):
        return f"{str(media_root).rstrip('/')}/"
    folder = Path(media_root).expanduser().absolute()
    if is_remote or not folder.is_dir():
        raise SourceError(
            f"media_root= names no folder that is there ({folder.name!r}); give "
            f"{'' if is_remote else 'a folder, or '}a URI such as gs://bucket/media/"
        )
    return folder


def start_at(media_root: str | Path | None, locate: Locate) -> Locate:
    """Let the paths of rows that lie in no file start at a folder or prefix, and stay below it."""
    if media_root is None:
        return locate
    homes = () if isinstance(media_root, str) else (find_home(media_root),)

    def find(kind: str, source: str, folder: str | Path, key: str) -> str | StoredObject:
        if "://" in source:
            return locate(kind, source, folder, key)
        path = PurePosixPath(source)
        if isinstance(media_root, str):
            if not path.is_absolute() and ".." not in path.parts:
                return media_root + source
        else:
            starts = (media_root, *([Path(folder)] if folder else []))
            if place := find_file((start / path for start in starts), homes):
                return str(place)
        raise DataError(
            f"{kind} {quote_name(path.name)} does not exist below media_root= "
            f"({Path(media_root).name!r})",
            key=key,
        )

    return find


def find_file(places: Iterable[Path], homes: Iterable[Path]) -> Path | None:
    """Return the first path that is a file's, and lies where rows may name files."""
    for place in places:
        # A name may be too long, or hold a NUL character.
        with suppress(OSError, ValueError):
            if place.is_file() and is_within(place, homes):
                return place
    return None


def list_tails(source: str) -> Iterator[str]:
    """Yield a path without its first folder, then without two, to its name."""
    parts = [part for part in source.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    for start in range(len(parts)):
        yield "/".join(parts[start:])
