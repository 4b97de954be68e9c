"""Opening a data set by the ``datasets`` library: its rows in Arrow form, and why there are none.

Rows are asked for as Arrow tables, which ``datasets`` hands out as they are stored: it decodes no
image and no clip, so that a damaged one cannot end the iteration. Code that a data set brings
along is never run: ``trust_remote_code`` is never passed. Messages of ``datasets`` name URLs and
contents, so that none of them is passed on.
"""

from __future__ import annotations

import logging
import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow

from gemma_tuner.errors import ConfigError, SourceError
from gemma_tuner.sources.formats.folders import name_canonically

_SAVED = ("state.json", "dataset_dict.json")  # of save_to_disk: of one split, of several
# How datasets names the subsets there are: of a data set, and of the copies on this machine.
_SUBSETS = re.compile(r"[Aa]vailable[^:\[]*: \[(.*?)\]|configurations in the cache: (.*)")
_PACKAGE = re.compile(r"install '?([\w-]+)")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class HubName:
    """What names the rows of one data set."""

    name: str
    folder: Path | None  # None for a data set on the Hub
    subset: str | None
    split: str
    revision: str | None

    @property
    def label(self) -> str:
        """What origins and errors call it: nothing of the path above a folder."""
        return self.name if self.folder is None else self.folder.name


@dataclass(frozen=True, slots=True)
class OpenedSplit:
    """One split, ready to be read."""

    tables: Any  # datasets.Dataset or IterableDataset that hands out Arrow tables
    features: Any  # type by column, as datasets names them
    subset: str
    split: str
    base: str | None  # the folder or URI below which its files lie
    num_files: int
    notes: tuple[str, ...]


def open_split(wanted: HubName, *, streaming: bool) -> OpenedSplit:
    """Open one split of a data set."""
    with quiet_libraries():
        try:
            is_saved = wanted.folder and any((wanted.folder / name).exists() for name in _SAVED)
            return _open_saved(wanted) if is_saved else _open_loaded(wanted, streaming)
        except ConfigError:
            raise
        except list_failures() as error:
            reason = _explain(error, wanted, streaming=streaming)
            raise SourceError(f"{wanted.label!r} {reason}") from None


def list_failures() -> tuple[type[BaseException], ...]:
    """Return what ``datasets`` raises where data, network or a setting is at fault."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.utils import httpx

    return (
        *(OSError, ValueError, TypeError, LookupError, RuntimeError, EOFError, ImportError),
        *(AssertionError, pyarrow.ArrowException, zlib.error, zipfile.BadZipFile),
        *(DatasetsError, httpx.HTTPError),
    )


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep progress bars and logs of datasets and huggingface_hub silent for a while."""
    import datasets.config
    import datasets.utils
    import huggingface_hub.constants
    import huggingface_hub.utils

    libraries = (
        (datasets.utils, datasets.config.HF_DATASETS_DISABLE_PROGRESS_BARS),
        (huggingface_hub.utils, huggingface_hub.constants.HF_HUB_DISABLE_PROGRESS_BARS),
    )
    # Where the environment decides on bars, the libraries let no one else, and warn.
    bars = [
        utils
        for utils, environment in libraries
        if environment is None and not utils.are_progress_bars_disabled()
    ]
    levels = [(utils.logging, utils.logging.get_verbosity()) for utils, _ in libraries]
    for utils in bars:
        utils.disable_progress_bars()
    for log, _ in levels:
        log.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        for utils in bars:
            utils.enable_progress_bars()
        for log, level in levels:
            log.set_verbosity(level)


def _open_saved(wanted: HubName) -> OpenedSplit:
    """Open what ``save_to_disk`` wrote."""
    import datasets

    if wanted.subset is not None:
        raise ConfigError(
            f"subset={wanted.subset!r}: {wanted.label!r} was written by save_to_disk, which keeps "
            "no subsets; leave it out"
        )
    loaded: Any = datasets.load_from_disk(str(wanted.folder))
    if isinstance(loaded, datasets.Dataset):
        loaded = {str(loaded.split or "train"): loaded}
    split = _choose_split(list(loaded), wanted)
    rows = loaded[split]
    notes = [f"read from the local folder {wanted.label!r}"]
    if rows.info.license:
        notes.append(f"licence of the data set: {rows.info.license}")
    return OpenedSplit(
        tables=rows.with_format("arrow"),
        features=rows.features,
        subset=rows.info.config_name or "default",
        split=split,
        base=None,
        num_files=len(rows.cache_files),
        notes=tuple(notes),
    )


def _open_loaded(wanted: HubName, streaming: bool) -> OpenedSplit:  # noqa: FBT001
    """Open data files below a folder or on the Hub, by the builder that datasets has for them."""
    import datasets
    from datasets.packaged_modules.cache.cache import Cache

    path = str(wanted.folder or wanted.name)
    builder = datasets.load_dataset_builder(path, wanted.subset, revision=wanted.revision)
    if wanted.folder is None and builder.repo_id is None:
        raise SourceError(
            f"{wanted.name!r} is the name of a file format to datasets, and not a data set; read "
            "local files with stream_local"
        )
    is_copy = isinstance(builder, Cache)
    commit = builder.hash if wanted.folder is None else None
    if is_copy and wanted.revision not in (None, commit):
        raise SourceError(
            f"the Hub does not give {wanted.name!r}, and the copy on this machine is of commit "
            f"{commit}, which may not be the revision {wanted.revision!r}; go online, or give "
            "that commit as revision="
        )
    if streaming:
        loaded: Any = builder.as_streaming_dataset()
    else:
        builder.download_and_prepare()
        loaded = builder.as_dataset()
    split = _choose_split(list(loaded), wanted)
    rows = loaded[split]
    if streaming and rows.features is not None:
        rows = rows.decode(False)  # noqa: FBT003 - what is remote would be decoded by threads
    tables = rows.with_format("arrow")
    by_split = {str(name): files for name, files in (builder.config.data_files or {}).items()}
    return OpenedSplit(
        tables=tables,
        features=rows.features or _peek_features(tables, wanted),
        subset=builder.config.name,
        split=split,
        base=builder.base_path,
        num_files=len(by_split.get(split, ())) or 1,
        notes=tuple(_describe_origin(wanted, commit, is_copy=is_copy)),
    )


def _choose_split(splits: list[str], wanted: HubName) -> str:
    if wanted.split in splits:
        return wanted.split
    canonical = name_canonically(wanted.split)
    found = [split for split in splits if name_canonically(split) == canonical]
    if len(found) != 1:
        raise SourceError(
            f"{wanted.label!r} has no split {wanted.split!r}; its splits are: "
            f"{', '.join(sorted(splits))} (for some rows of one, give max_rows=)"
        )
    return found[0]


def _peek_features(tables: Any, wanted: HubName) -> Any:
    """Tell the types from the first row, where datasets knows them only as it reads."""
    import datasets

    first = next(iter(tables.iter(batch_size=1)), None)
    if first is None:
        raise SourceError(
            f"{wanted.label!r} holds no rows in its split {wanted.split!r}; name another split"
        )
    return datasets.Features.from_arrow_schema(first.schema)


def _describe_origin(wanted: HubName, commit: str | None, *, is_copy: bool) -> Iterator[str]:
    from huggingface_hub import DatasetCard, try_to_load_from_cache

    if wanted.folder is not None:
        yield f"read from the local folder {wanted.label!r}"
    elif commit is not None and _COMMIT.fullmatch(commit):
        yield f"commit on the Hub: {commit}"
    if is_copy:
        yield "read from the copy on this machine, as the Hub did not give it"
    if wanted.folder is not None:
        card: Any = wanted.folder / "README.md"
    else:
        card = try_to_load_from_cache(
            wanted.name, "README.md", repo_type="dataset", revision=commit
        )
    if isinstance(card, str | Path) and Path(card).is_file():
        licence = DatasetCard.load(card).data.to_dict().get("license")
        if licence:
            yield f"licence of the data set: {licence}"


def _explain(error: BaseException, wanted: HubName, *, streaming: bool) -> str:
    """Say what is wrong and what would mend it; the library's own text may hold URLs and data."""
    import datasets.config
    from datasets.data_files import EmptyDatasetError
    from datasets.exceptions import (
        DataFilesNotFoundError,
        DatasetGenerationError,
        DatasetNotFoundError,
    )

    text = str(error)
    if isinstance(error, RuntimeError) and "scripts are no longer supported" in text:
        return (
            "needs a loading script of its own, and such code is never run; the Hub keeps most of "
            "these as Parquet too: give revision='refs/convert/parquet'"
        )
    if isinstance(error, DatasetNotFoundError) and "is a gated dataset" in text:
        return (
            "is gated: accept its terms on its page on the Hub, and log in by `hf auth login` "
            "with a token that may read it"
        )
    if isinstance(error, DatasetNotFoundError) and text.startswith("Revision"):
        return f"has no revision {wanted.revision!r}; give a branch, a tag or a whole commit"
    if isinstance(error, EmptyDatasetError | DataFilesNotFoundError):
        return (
            "holds no data files that datasets can read; check the name and revision, or download "
            "it and read its files with stream_local"
        )
    if isinstance(error, ConnectionError) and datasets.config.HF_HUB_OFFLINE:
        return (
            "is neither a folder nor kept on this machine, and HF_HUB_OFFLINE forbids to ask the "
            "Hub; unset it, or read the data set once while online"
        )
    if isinstance(error, ConnectionError):
        return "cannot be asked for, as the Hub does not answer; check the network and try again"
    if isinstance(error, FileNotFoundError):
        return (
            "is neither a folder nor a data set on the Hub that you may read; check the name "
            "(owner/name), and log in by `hf auth login` if it is private"
        )
    named = _SUBSETS.search(text) if isinstance(error, ValueError) else None
    if named:
        subsets = ", ".join(sorted(set((named[1] or named[2]).replace("'", "").split(", "))))
        if wanted.subset is None:
            return f"has several subsets; choose by subset= one of: {subsets}"
        return f"has no subset {wanted.subset!r}; its subsets are: {subsets}"
    cause = error.__cause__ if isinstance(error, DatasetGenerationError) else None
    reason = f"cannot be read by datasets ({explain_failure(cause or error)})"
    if streaming:
        return reason
    return f"{reason}; streaming=True converts less, and tells after how many rows it fails"


def explain_failure(error: BaseException) -> str:
    """Name what datasets met as it read, without the contents that its own text may hold."""
    package = _PACKAGE.search(str(error)) if isinstance(error, ImportError) else None
    if package:
        return f"it needs the package {package[1]!r} for such files: install that"
    return f"{type(error).__name__}: check the network, and that its files are whole and alike"
