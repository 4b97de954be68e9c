"""From a path, a glob or a folder to its files, and the split of each.

A folder, on this machine or in a bucket, means, in this order:

1. its manifest, where it holds one: ``manifest.jsonl``, ``metadata.jsonl``, ``metadata.csv`` or
   ``metadata.parquet``
2. else its transcripts (``corpora``), with the clips anywhere
   below it
3. else its data files (``.jsonl .ndjson .json .csv .tsv .parquet .arrow .tar``, those of text also
   packed: ``.gz .bz2 .xz .zst``), or, where it holds none itself, those of its subfolders; all of
   one kind; of COCO's annotations, those named ``captions_``
4. else every image and clip in it and its subfolders, each with its text in a file of the same
   name ending in ``.txt`` or ``.json``, beside it or in a folder beside its own (``key/``)
5. else every text (``.txt .md``), each one document

Names that begin with a dot or an underscore are passed over. Subfolders that are links are read
too, each folder once. Where the files of a folder are named by split (``train.jsonl``,
``data/test-00000-of-00002.parquet``, ``valid/metadata.csv``) and none is asked for, those named
test and validation are left out beside training files, and the summary says so.
"""

from __future__ import annotations

import glob
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from gemma_tuner.disk import find_home, is_within
from gemma_tuner.errors import ConfigError, SourceError
from gemma_tuner.modalities import kind_of_suffix
from gemma_tuner.sources.formats.corpora import KALDI_FILES, is_transcript
from gemma_tuner.sources.formats.files import Format
from gemma_tuner.sources.formats.lines import PACKED

Paths = str | Path | Sequence[str | Path]
FORMATS: tuple[Format, ...] = (
    *("jsonl", "csv", "parquet", "arrow", "text", "webdataset", "captions"),
    *("transcripts", "kaldi"),
)
MANIFESTS: Mapping[str, Format] = {
    "manifest.jsonl": "jsonl",
    "metadata.jsonl": "jsonl",
    "metadata.csv": "csv",
    "metadata.parquet": "parquet",
}
"""The manifests that a folder may have, first choice first."""
NO_SPLIT = "(none)"
"""The name under which rows and files without a split are counted."""

_FORMATS: Mapping[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".tar": "webdataset",
}
_TEXTS = (".txt", ".md")
_OF_FOLDERS = ("captions", "transcripts", "kaldi")
# What people bring that is read by other programs, and what to do with it.
_REFUSED: Mapping[str, str] = {
    suffix: remedy
    for suffixes, remedy in (
        (".zip .7z .rar", "is an archive; unpack it and give the folder"),
        (".xlsx .xls .xlsm .ods .numbers", "is a workbook; save its sheet as CSV in UTF-8"),
        (".pkl .pickle .pt .pth .joblib", "may run code when read; write Parquet or JSON lines"),
        (".npy .npz .h5 .hdf5 .mat", "holds arrays; write Parquet, or media and a manifest.jsonl"),
        (".tfrecord .tfrecords .orc .avro .xml .yaml .yml", "is not read; write Parquet"),
        (".db .sqlite .sqlite3 .duckdb", "is a database; export the table as Parquet or CSV"),
        (".pdf .doc .docx .odt .rtf .epub .html .htm", "is not plain text; save it as .txt"),
        (".srt .vtt .eaf .textgrid .ctm", "is not read; write rows with start and end"),
    )
    for suffix in suffixes.split()
}
_COMPRESSED_TARS = (".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
# What datasets saves beside its data files.
_NOT_DATA = frozenset(
    {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
)
# Common Voice's files beside its splits: what these are chosen from, and what is about it.
_NOT_SPLITS = frozenset(
    {"validated.tsv", "invalidated.tsv", "other.tsv", "reported.tsv", "clip_durations.tsv"}
    | {"validated_sentences.tsv", "unvalidated_sentences.tsv"}
)
_NOT_TEXTS = re.compile(r"(readme|licen[cs]e|notice|copying|changelog|citation)\b", re.IGNORECASE)
# Folders beside those of media that hold their texts. Source: SROIE and its copies.
_TEXT_FOLDERS = ("key", "keys", "entities", "captions", "texts", "text", "labels", "transcripts")
_SPLITS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "dev": "validation",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    **dict.fromkeys(("eval", "evaluation", "holdout", "heldout"), "validation"),
}
# What is cut off a file's name before it is read as that of a split.
_ENDINGS = frozenset({*_FORMATS, *_TEXTS, *PACKED})
_YEAR = re.compile(r"(?<=[a-z])\d{4}$")  # COCO's train2017
_SHARD = re.compile(r"[-.]\d+-of-\d+$")


@dataclass(frozen=True, slots=True)
class LocalFiles:
    """The files of one data set."""

    files: tuple[Path, ...]
    format: Format
    root: Path  # which keys and media paths are relative to
    homes: tuple[Path, ...]  # below which rows may name files
    is_folder: bool = False  # one folder was given, which may hold several splits
    # The text file of each that has one, where the format is captions.
    captions: Mapping[Path, Path] = field(default_factory=dict)
    num_unread_texts: int = 0  # text files without an image or a clip beside them


def find_files(paths: Paths, file_format: str | None = None) -> LocalFiles:
    """Find the data files that paths, globs and folders mean; one given twice is read once."""
    wanted = check_format(file_format)
    given = [paths] if isinstance(paths, str | Path) else list(paths)
    if not given:
        raise SourceError("no paths were given; name a file, a glob or a folder")
    for item in given:
        if not isinstance(item, str | Path):
            raise ConfigError(
                f"paths are text or Path, and one is a {type(item).__name__}; write the rows as "
                "JSON lines and give that file"
            )
    places = [place for item in given for place in _expand(item)]
    found: dict[Path, Format] = {}
    for place in places:
        if place.is_dir():
            found.update(_look_into(place, wanted))
        else:
            found[place] = name_format(place.name, wanted)
    kind = choose_one_format({path.name: found[path] for path in found})
    folders = [place if place.is_dir() else place.parent for place in places]
    root = _find_root(folders)
    is_folder = len(places) == 1 and places[0].is_dir()
    homes = tuple(sorted({find_home(each) for each in {*folders, *(p.parent for p in found)}}))
    if kind != "captions":
        _refuse_links([*found] if kind == "text" else [], homes)
        return LocalFiles(tuple(found), kind, root, homes, is_folder)
    below = {path.as_posix(): path for folder in folders for path in list_below(folder)}
    pairs = pair_texts((path.as_posix() for path in found), below)
    captions = {Path(medium): below[text] for medium, text in pairs.items()}
    _refuse_links(captions.values(), homes)
    texts = {path for name, path in below.items() if name.endswith(".txt")}
    num_unread = len(texts.difference(captions.values()))
    return LocalFiles(tuple(found), kind, root, homes, is_folder, captions, num_unread)


def check_format(file_format: str | None) -> Format | None:
    """Return the format that the user asks for."""
    if file_format is None:
        return None
    for known in FORMATS:
        if known == file_format:
            return known
    raise ConfigError(f"format={file_format!r}; give one of {', '.join(FORMATS)}, or none")


def choose_manifest(names: Collection[str], wanted: Format | None) -> dict[str, Format]:
    """Choose a folder's manifest."""
    for name, kind in MANIFESTS.items():
        if wanted in (None, kind) and name in names:
            return {name: kind}
    return {}


def choose_files(
    names: Collection[str], wanted: Format | None, *, folder: str
) -> dict[str, Format]:
    """Choose the files that a folder without a manifest means."""
    shown = sorted((name for name in names if not _is_hidden(name)), key=_split_path)
    spoken = _choose_corpus(shown, wanted)
    if spoken:
        return spoken
    media = [name for name in shown if kind_of_suffix(_suffix(name)) is not None]
    if wanted != "captions" and (data := _choose_data(shown, media, wanted)):
        return data
    if wanted in (None, "captions") and media:
        _refuse_shared_captions(media)
        found: dict[str, Format] = dict.fromkeys(media, "captions")
        return found
    if wanted in (None, "text"):
        texts = [name for name in shown if _suffix(name) in _TEXTS]
        texts = [name for name in texts if not _NOT_TEXTS.match(_last(name))]
        if texts:
            documents: dict[str, Format] = dict.fromkeys(texts, "text")
            return documents
    for name in shown:
        _refuse_unreadable(name)
    counts = Counter(_suffix(name) or "without ending" for name in shown)
    held = ", ".join(f"{count} {name}" for name, count in counts.most_common(5)) or "no files"
    sought = wanted or "JSON lines, CSV, Parquet, tars, texts, or media with .txt captions"
    raise SourceError(
        f"the folder {folder!r} holds {held}, and no {sought}; name the files, or set format="
    )


def _choose_data(
    names: Sequence[str], media: Sequence[str], wanted: Format | None
) -> dict[str, Format]:
    """Choose the files of rows, those of the folder itself first."""
    stems = {PurePosixPath(name).stem for name in media}
    parts = {part for name in names for part in name.split("/")}
    ignored = _NOT_DATA | (_NOT_SPLITS if {"clips", "train.tsv"} <= parts else frozenset())
    rows = [name for name in names if _guess_format(name) and _last(name) not in ignored]
    if all(_suffix(name) == ".json" and PurePosixPath(name).stem in stems for name in rows):
        rows = []  # each is what one image or clip shows
    for level in ([name for name in rows if "/" not in name], rows):
        data: dict[str, Format] = {}
        for name in _prefer_captions(level):
            kind = _guess_format(name)
            if kind is not None and wanted in (None, kind):
                data[name] = kind
        if data:
            return data
    return {}


def pair_texts(media: Iterable[str], names: Collection[str]) -> dict[str, str]:
    """Find the text of each image or clip: beside it, or in a folder of texts beside its own."""
    found: dict[str, str] = {}
    for medium in media:
        path = PurePosixPath(medium)
        folders = [path.parent, *(path.parent.parent / name for name in _TEXT_FOLDERS)]
        for text in (folder / path.stem for folder in folders):
            for candidate in (f"{text}.txt", f"{text}.json"):
                if candidate in names:
                    found.setdefault(medium, candidate)
    return found


def name_format(name: str, wanted: Format | None) -> Format:
    """Tell what one file holds."""
    if wanted in _OF_FOLDERS or is_transcript(name):
        raise SourceError(
            f"format={wanted or 'transcripts'!r} reads a folder of media and their texts; give "
            "the folder"
        )
    kind = wanted or _guess_format(name) or ("text" if _suffix(name) in _TEXTS else None)
    if kind is None:
        _refuse_unreadable(name)
        if medium := kind_of_suffix(_suffix(name)):
            raise SourceError(
                f"{name!r} is one {medium}; give its folder, or rows that name it and its text"
            )
    if kind is None:
        raise SourceError(
            f"{name!r} is of no known format; known endings are "
            f"{', '.join((*_FORMATS, *_TEXTS))} and .jsonl.gz, or set format="
        )
    return kind


def choose_one_format(found: Mapping[str, Format]) -> Format:
    """Return the one format of all files."""
    formats: dict[Format, str] = {kind: name for name, kind in found.items()}
    if len(formats) > 1:
        names = " and ".join(repr(name) for name in formats.values())
        raise SourceError(
            f"{names} are of different formats; name the files to read, or set format= to one of "
            f"{', '.join(sorted(formats))}"
        )
    return next(iter(formats))


def name_canonically(split: str) -> str:
    """Return the one name of a split that has several (valid, val: validation)."""
    return _SPLITS.get(split.lower(), split)


def name_split(name: str, file_format: Format) -> str:
    """Tell which split a file is of, by a folder above it or a word of its name."""
    *folders, last = name.split("/")
    for part in reversed(folders):
        word = part.lower() if file_format != "transcripts" else part.lower().partition("-")[0]
        if word in _SPLITS:
            return _SPLITS[word]  # of LibriSpeech's train-clean-100 its first word
    if file_format in ("captions", "text", "kaldi", "transcripts"):
        return NO_SPLIT  # an image's name says what it shows
    path = PurePosixPath(last)
    while path.suffix.lower() in _ENDINGS:  # and at no other dot: snli_1.0_test.jsonl.gz
        path = path.with_suffix("")
    stem = _SHARD.sub("", path.name)
    found = (_YEAR.sub("", word) for word in re.split(r"[-_. ]", stem.lower()))
    words = {_SPLITS[word] for word in found if word in _SPLITS}
    return words.pop() if len(words) == 1 else stem


def choose_split(
    names: Iterable[str], file_format: Format, *, split: str | None, is_folder: bool
) -> tuple[frozenset[str], list[str]]:
    """Choose files by the splits that their names tell; return them, and the splits left out."""
    by_split: dict[str, list[str]] = {}
    for name in names:
        by_split.setdefault(name_split(name, file_format), []).append(name)
    everything = frozenset(name for chosen in by_split.values() for name in chosen)
    if split is not None:
        chosen = by_split.get(name_canonically(split))
        if chosen is None:
            raise SourceError(
                f"there is no split {split!r}: there is no column 'split', and the files are of: "
                f"{', '.join(sorted(by_split))}; give one of these as split=, or none and hold "
                "out a fraction"
            )
        return frozenset(chosen), []
    held_out = sorted(by_split.keys() & {"test", "validation"})
    if not (is_folder and held_out and "train" in by_split):
        return everything, []
    left_out = [name for part in held_out for name in by_split[part]]
    return everything.difference(left_out), held_out


def _expand(item: str | Path) -> list[Path]:
    """List what a path or glob names. Links are kept: caches link names to files without one."""
    text = str(item)
    if "://" in text:
        scheme = text.partition("://")[0]
        raise SourceError(f"stream_local reads local files, and one path is a {scheme}: URI")
    path = Path(text).expanduser().absolute()
    if path.exists():
        return [path]
    matches = _list_matches(path)
    if not matches:
        raise SourceError(
            f"there is no file, folder or match of {path.name!r}; check the path, which starts "
            "from the working directory where it is relative"
        )
    return matches


def _list_matches(pattern: Path) -> list[Path]:
    """List what a glob names, each file once however many links lead to its folder."""
    parts = pattern.parts
    if "**" not in parts:
        found = sorted(map(Path, glob.glob(str(pattern))))  # noqa: PTH207 - Path's has no / first
    else:  # glob.glob would follow a link to its own folder until the system refuses
        start = next(place for place, part in enumerate(parts) if glob.has_magic(part))
        below = list_below(Path(*parts[:start])) if Path(*parts[:start]).is_dir() else []
        found = [path for path in below if _fits(path.parts[start:], parts[start:])]
    places = {(path.parent.resolve(), path.name): path for path in reversed(found)}
    return sorted(places.values())


def _fits(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_fits(parts[skipped:], pattern[1:]) for skipped in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _fits(parts[1:], pattern[1:])


def _look_into(folder: Path, wanted: Format | None) -> dict[Path, Format]:
    """Find what a folder means; see the head of this module."""
    chosen = choose_manifest({name for name in MANIFESTS if (folder / name).is_file()}, wanted)
    if not chosen:
        names = [path.relative_to(folder).as_posix() for path in list_below(folder)]
        chosen = choose_files(names, wanted, folder=folder.name)
    return {folder / name: kind for name, kind in chosen.items()}


def list_below(folder: Path) -> list[Path]:
    """List the files in a folder and its subfolders, links among them, each folder once."""
    found: list[Path] = []
    seen: set[tuple[int, int]] = set()
    folders, links = [folder], list[Path]()  # links last: files keep their own names
    while folders or links:
        parent = folders.pop() if folders else links.pop(0)
        status = parent.stat()
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        try:
            paths = sorted(path for path in parent.iterdir() if not _is_hidden(path.name))
        except PermissionError:  # such as lost+found
            continue
        for path in paths:
            if path.is_dir():
                (links if path.is_symlink() else folders).append(path)
            elif path.is_file():
                found.append(path)
    return sorted(found)


def _is_hidden(name: str) -> bool:
    return any(part.startswith((".", "_")) for part in name.split("/"))


def _split_path(name: str) -> list[str]:
    return name.split("/")


def _choose_corpus(names: Sequence[str], wanted: Format | None) -> dict[str, Format]:
    """Choose the files of a corpus of speech."""
    found: dict[str, Format] = {}
    folders = {name.removesuffix("wav.scp") for name in names if name.endswith("wav.scp")}
    if wanted in (None, "kaldi"):
        for folder in sorted(folders):
            if f"{folder}text" in names:
                kaldi = [folder + last for last in KALDI_FILES if folder + last in names]
                found.update(dict.fromkeys(kaldi, "kaldi"))
    if not found and wanted in (None, "transcripts"):
        found = dict.fromkeys(filter(is_transcript, names), "transcripts")
    return found


def _prefer_captions(names: Sequence[str]) -> Sequence[str]:
    """Of COCO's annotations, take the captions: beside them lie boxes of the same images."""
    captions = [name for name in names if _last(name).startswith("captions_")]
    return captions if all(_suffix(name) == ".json" for name in names) and captions else names


def _refuse_unreadable(name: str) -> None:
    remedy = _REFUSED.get(_suffix(name))
    if remedy:
        raise SourceError(f"{PurePosixPath(name).name!r} {remedy}")
    if name.lower().endswith(_COMPRESSED_TARS):
        raise SourceError(
            f"{PurePosixPath(name).name!r} is a compressed tar, in which nothing can be found "
            "without unpacking what comes before it; unpack it to a plain .tar (images and "
            "clips are compressed already)"
        )


def _last(name: str) -> str:
    return name.rpartition("/")[2]


def _refuse_links(texts: Iterable[Path], homes: Collection[Path]) -> None:
    """Refuse texts that lie elsewhere: whoever made a folder could have any file trained on."""
    for path in texts:
        if path.is_symlink() and not is_within(path, homes):
            raise SourceError(
                f"{path.name!r} is a link that leads out of its folder; put the text itself there"
            )


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _refuse_shared_captions(media: Iterable[str]) -> None:
    owners: dict[PurePosixPath, PurePosixPath] = {}
    for path in map(PurePosixPath, media):
        other = owners.setdefault(path.with_suffix(".txt"), path)
        if other != path:
            raise SourceError(
                f"{other.name!r} and {path.name!r} share the caption file "
                f"{path.with_suffix('.txt').name!r}; rename one, or write a manifest.jsonl"
            )


def _guess_format(name: str) -> Format | None:
    path = PurePosixPath(name)
    if path.name.startswith((".", "_")):
        return None
    is_packed = path.suffix.lower() in PACKED
    kind = _FORMATS.get(_suffix(path.stem if is_packed else path.name))
    return None if is_packed and kind not in ("jsonl", "csv") else kind


def _find_root(folders: list[Path]) -> Path:
    root = folders[0]
    for folder in folders[1:]:
        while not folder.is_relative_to(root):
            root = root.parent
    return root
