"""Which files a path, a glob or a folder means, and which split each is of.

A folder means, in this order:

1. its manifest, where it holds one: ``manifest.jsonl``, ``metadata.jsonl``, ``metadata.csv`` or
   ``metadata.parquet``
2. else its data files (``.jsonl .ndjson .json .csv .parquet``, the first three also ``.gz``), or,
   where it holds none itself, those of its subfolders; all of one kind
3. else every picture and sound in it and its subfolders, each with its text in a file of the same
   name ending in ``.txt``

Names that begin with a dot or an underscore are passed over. Where the files of a folder are
named by split (``train.jsonl``, ``data/test-00000-of-00002.parquet``, ``valid/metadata.csv``) and
none is asked for, those named test and validation are left out beside training files, and the
summary says so.
"""

from __future__ import annotations

import glob
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gemma_tuner.errors import ConfigError, SourceError
from gemma_tuner.sources.files import Format
from gemma_tuner.sources.messages import AUDIO_SUFFIXES, IMAGE_SUFFIXES

Paths = str | Path | Sequence[str | Path]
FORMATS: tuple[Format, ...] = ("jsonl", "csv", "parquet", "captions")

_MANIFESTS = ("manifest.jsonl", "metadata.jsonl", "metadata.csv", "metadata.parquet")
_FORMATS: Mapping[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".parquet": "parquet",
}
# What datasets saves beside its data files.
_NOT_DATA = frozenset({"dataset_info.json", "dataset_infos.json", "state.json"})
_SPLITS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "dev": "validation",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
}
_SHARD = re.compile(r"-\d+-of-\d+$")
NO_SPLIT = "(none)"
"""What rows and files without a split are counted as."""


@dataclass(frozen=True, slots=True)
class LocalFiles:
    """The files of one data set.

    Args:
        files: In the order in which they are read.
        format: What they hold; ``captions`` for media with text files beside them.
        root: The folder that keys and media paths are relative to.
        is_folder: Whether one folder was given, which may hold more splits than one.
        captions: Where the format is ``captions``, the text file of each file.
        num_unread_texts: Text files without a picture or sound beside them.
    """

    files: tuple[Path, ...]
    format: Format
    root: Path
    is_folder: bool = False
    captions: tuple[Path, ...] = ()
    num_unread_texts: int = 0


def find_files(paths: Paths, file_format: str | None = None) -> LocalFiles:
    """Find the data files that paths, globs and folders mean.

    Args:
        paths: A file, a glob, a folder, or a list of them.
        file_format: One of :data:`FORMATS`, to read files of another name as it, and to choose
            where a folder holds files of more than one; None to go by the names.

    Returns:
        The files, sorted within each folder and glob; one given twice is read once.

    Raises:
        ConfigError: A format that is not known.
        SourceError: Nothing found, or files of two formats.
    """
    if file_format is not None and file_format not in FORMATS:
        raise ConfigError(f"format={file_format!r}; give one of {', '.join(FORMATS)}, or none")
    given = [paths] if isinstance(paths, str | Path) else list(paths)
    if not given:
        raise SourceError("no paths were given; name a file, a glob or a folder")
    places = [place for item in given for place in _expand(item)]
    found: dict[Path, Format] = {}
    for place in places:
        if place.is_dir():
            found.update(_look_into(place, file_format))
        else:
            found[place] = _name_format(place, file_format)
    formats: dict[Format, Path] = {kind: path for path, kind in found.items()}
    if len(formats) > 1:
        names = " and ".join(repr(path.name) for path in formats.values())
        raise SourceError(
            f"{names} are of different formats; name the files to read, or set format= to one of "
            f"{', '.join(sorted(formats))}"
        )
    folders = [place if place.is_dir() else place.parent for place in places]
    root = _find_root(folders)
    is_folder = len(places) == 1 and places[0].is_dir()
    kind = next(iter(formats))
    if kind != "captions":
        return LocalFiles(tuple(found), kind, root, is_folder)
    captions = tuple(path.with_suffix(".txt") for path in found)
    texts = {path for folder in folders for path in _list_below(folder) if path.suffix == ".txt"}
    return LocalFiles(
        tuple(found), kind, root, is_folder, captions, len(texts.difference(captions))
    )


def name_canonically(split: str) -> str:
    """Return the one name of a split that has several (valid, val: validation)."""
    return _SPLITS.get(split.lower(), split)


def name_split(path: Path, found: LocalFiles) -> str:
    """Tell which split a file is of.

    Args:
        path: One of ``found.files``.
        found: The data set.

    Returns:
        ``train``, ``test`` or ``validation`` where a folder above the file or a word of its name
        says so; else the file's name without ending and shard number (nothing of the name, where
        it names a picture or sound).
    """
    relative = path.relative_to(found.root)
    for part in reversed(relative.parts[:-1]):
        if part.lower() in _SPLITS:
            return _SPLITS[part.lower()]
    stem = _SHARD.sub("", path.name.partition(".")[0])
    if found.format == "captions":
        return NO_SPLIT  # what a picture's name tells is what it shows
    words = {_SPLITS[word] for word in re.split(r"[-_ ]", stem.lower()) if word in _SPLITS}
    return words.pop() if len(words) == 1 else stem


def _expand(item: str | Path) -> list[Path]:
    """List what a path or glob names. Links are kept: caches link names to files without one."""
    text = str(item)
    if "://" in text:
        scheme = text.partition("://")[0]
        raise SourceError(f"stream_local reads local files, and one path is a {scheme}: URI")
    path = Path(text).expanduser().absolute()
    if path.exists():
        return [path]
    matches = sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207 - Path has no ** from /
    if not matches:
        raise SourceError(
            f"there is no file, folder or match of {path.name!r}; check the path, which starts "
            "from the working directory where it is relative"
        )
    return [Path(match) for match in matches]


def _look_into(folder: Path, wanted: str | None) -> dict[Path, Format]:
    """Find what a folder means; see the head of this module."""
    if wanted != "captions":
        for name in _MANIFESTS:
            kind = _FORMATS[Path(name).suffix]
            if wanted in (None, kind) and (folder / name).is_file():
                return {folder / name: kind}
        for files in (sorted(folder.iterdir()), _list_below(folder)):
            data: dict[Path, Format] = {}
            for path in files:
                kind = _guess_format(path)
                if kind is not None and wanted in (None, kind):
                    data[path] = kind
            if data:
                return data
    if wanted in (None, "captions"):
        suffixes = IMAGE_SUFFIXES | AUDIO_SUFFIXES
        media = [path for path in _list_below(folder) if path.suffix.lower() in suffixes]
        if media:
            _refuse_shared_captions(media)
            found: dict[Path, Format] = dict.fromkeys(media, "captions")
            return found
    counts = Counter(path.suffix.lower() or "without ending" for path in _list_below(folder))
    held = ", ".join(f"{count} {name}" for name, count in counts.most_common(5)) or "no files"
    raise SourceError(
        f"the folder {folder.name!r} holds {held}, and no "
        f"{wanted or 'JSON lines, CSV, Parquet, or media with .txt captions'}; name the files, or "
        "set format="
    )


def _list_below(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and not any(part.startswith((".", "_")) for part in path.relative_to(folder).parts)
    )


def _refuse_shared_captions(media: Iterable[Path]) -> None:
    owners: dict[Path, Path] = {}
    for path in media:
        other = owners.setdefault(path.with_suffix(".txt"), path)
        if other != path:
            raise SourceError(
                f"{other.name!r} and {path.name!r} share the caption file "
                f"{path.with_suffix('.txt').name!r}; rename one, or write a manifest.jsonl"
            )


def _guess_format(path: Path) -> Format | None:
    if not path.is_file() or path.name.startswith((".", "_")) or path.name in _NOT_DATA:
        return None
    is_zipped = path.suffix.lower() == ".gz"
    kind = _FORMATS.get((Path(path.stem) if is_zipped else path).suffix.lower())
    return None if is_zipped and kind != "jsonl" else kind


def _name_format(path: Path, file_format: str | None) -> Format:
    if file_format == "captions":
        raise SourceError(
            "format='captions' reads a folder of media with captions; give the folder"
        )
    for known in FORMATS:
        if known == file_format:
            return known
    kind = _guess_format(path)
    if kind is None:
        raise SourceError(
            f"{path.name!r} is of no known format; known endings are {', '.join(_FORMATS)} and "
            ".jsonl.gz, or set format="
        )
    return kind


def _find_root(folders: list[Path]) -> Path:
    root = folders[0]
    for folder in folders[1:]:
        while not folder.is_relative_to(root):
            root = root.parent
    return root
