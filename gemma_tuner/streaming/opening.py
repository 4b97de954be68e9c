"""From a source to a stream: its rows are read once into a manifest, which the stream reads."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar, Unpack

from gemma_tuner.errors import ConfigError
from gemma_tuner.sources.bigquery import BigQuerySource
from gemma_tuner.sources.columns import KEYWORDS, Keywords
from gemma_tuner.sources.examples import Source
from gemma_tuner.sources.folders import Paths
from gemma_tuner.sources.gcs import GcsSource, GcsStore
from gemma_tuner.sources.hub import HubSource
from gemma_tuner.sources.local import LocalSource
from gemma_tuner.streaming.cache import MediaCache
from gemma_tuner.streaming.config import FetchConfig
from gemma_tuner.streaming.fetch import Fetcher
from gemma_tuner.streaming.portion import Locality, Portion
from gemma_tuner.streaming.quarantine import Budget
from gemma_tuner.streaming.spool import name_source, open_manifest
from gemma_tuner.streaming.stream import ExampleStream

if TYPE_CHECKING:
    from gemma_tuner.sources.bigquery import BigQueryReadClient
    from gemma_tuner.sources.bigquery import Client as BigQueryClient
    from gemma_tuner.sources.gcs_store import storage

Column = str | Literal[False] | None
F = TypeVar("F", bound=Callable[..., Any])


class StreamKeywords(TypedDict, total=False):
    """The keywords of every ``stream_`` function; :class:`StreamOptions` says what they mean."""

    messages: Column
    prompt: Column
    response: Column
    text: Column
    system: Column
    image: Column
    audio: Column
    id: Column
    seed: int
    shuffle: bool
    locality: Locality | None
    max_bad_fraction: float
    max_consecutive_bad: int
    cache_dir: str | Path | None
    fetch: FetchConfig
    gcs_client: storage.Client | None


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamOptions:
    """What every ``stream_`` function takes, as keywords.

    Each of ``messages prompt response text system image audio id`` names the column that plays
    this part; None takes the conventional one (:mod:`gemma_tuner.sources.columns` lists them),
    False takes none.

    Args:
        messages: Conversations.
        prompt: What is asked; rows with media and no such column get a default prompt, which
            ``report()`` states.
        response: What the model shall learn to answer.
        text: Plain documents, trained on as a whole.
        system: System turns.
        image: A picture, or a list of them: a path relative to the data file, a ``gs://`` URI,
            or bytes.
        audio: A sound, or a list of them.
        id: Keys; False numbers the rows (``train.jsonl:7``).
        seed: Decides the order, with the epoch.
        shuffle: False hands out the rows as they stand.
        locality: "shard" shuffles whole files, and the rows within each, instead of all rows.
        max_bad_fraction: How much of an epoch's rows may be unusable: they are passed over, noted
            in the quarantine and counted. 0 raises the first as DataError.
        max_consecutive_bad: How many unusable rows may follow each other.
        cache_dir: Where manifests, media and quarantines are kept, for this user alone; None is
            ``~/.cache/gemma_tuner``.
        fetch: How media are fetched and kept.
        gcs_client: A ``google.cloud.storage.Client``; None makes one with the application-default
            credentials when the first ``gs://`` is met.

    Raises:
        ConfigError: A value that cannot work.
    """

    messages: Column = None
    prompt: Column = None
    response: Column = None
    text: Column = None
    system: Column = None
    image: Column = None
    audio: Column = None
    id: Column = None
    seed: int = 0
    shuffle: bool = True
    locality: Locality | None = None
    max_bad_fraction: float = 0.01
    max_consecutive_bad: int = 100
    cache_dir: str | Path | None = None
    fetch: FetchConfig = FetchConfig()  # noqa: RUF009 - it is frozen
    gcs_client: storage.Client | None = None

    def __post_init__(self) -> None:
        for part, column in self.columns.items():
            if column is not None and column is not False and not isinstance(column, str):
                raise ConfigError(
                    f"{part}={column!r}; give a column's name, False for none, or None"
                )
        if not isinstance(self.fetch, FetchConfig):
            raise ConfigError(f"fetch={self.fetch!r}; give a FetchConfig")
        if self.cache_dir is not None and not isinstance(self.cache_dir, str | Path):
            raise ConfigError(f"cache_dir={self.cache_dir!r}; give a folder's path")

    @classmethod
    def read(cls, function: Callable[..., Any], keywords: Mapping[str, Any]) -> StreamOptions:
        """Make options of a function's keywords.

        Args:
            function: Made by :func:`_spell_out`; where its default is another, that holds.
            keywords: What the user gave.

        Returns:
            The options.

        Raises:
            ConfigError: A keyword that does not exist, or a value that cannot work.
        """
        parameters = inspect.signature(function).parameters
        known = [option.name for option in fields(cls)]
        for name in keywords:
            if name not in known:
                nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
                hint = (
                    f"did you mean {nearest[0]}=?" if nearest else f"it takes {', '.join(known)}"
                )
                raise ConfigError(f"{function.__name__}() takes no {name}=; {hint}")
        return cls(**{name: keywords.get(name, parameters[name].default) for name in known})

    @property
    def columns(self) -> Keywords:
        """The column by part."""
        return {part: getattr(self, part) for part in KEYWORDS}

    @property
    def folder(self) -> Path:
        """Where everything is kept."""
        if self.cache_dir is None:
            return Path.home() / ".cache" / "gemma_tuner"
        return Path(self.cache_dir).expanduser()


def _spell_out(**defaults: Any) -> Callable[[F], F]:
    """Show the keywords of a ``stream_`` function one by one, as help() and notebooks read them.

    Args:
        **defaults: Where the function's default is another than that of :class:`StreamOptions`.

    Returns:
        The decorator.
    """

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        named = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        options = [
            option.replace(default=defaults.get(option.name, option.default))
            for option in inspect.signature(StreamOptions).parameters.values()
        ]
        shown = signature.replace(parameters=[*named, *options])
        function.__signature__ = shown
        return function

    return decorate


@_spell_out(max_bad_fraction=0.0)
def stream_local(
    paths: Paths,
    *,
    format: str | None = None,  # noqa: A002 - the name of the public contract
    split: str | None = None,
    **keywords: Unpack[StreamKeywords],
) -> ExampleStream:
    """Stream the examples of local files.

    All rows are checked before the first example is handed out, and kept in a manifest that is
    read again as long as the files do not change. A row that cannot be used is an error unless
    ``max_bad_fraction`` allows some: a file at hand is best mended.

    Args:
        paths: A file (``.jsonl .json .csv .parquet .tar``), a glob, a folder, or a list of them;
            :mod:`gemma_tuner.sources.folders` says what a folder means.
        format: ``jsonl csv parquet webdataset captions``, for files of another name or mixed
            folders.
        split: Keeps the rows whose column ``split`` has this value, or, where there is no such
            column, the files named by it. ``valid``, ``val`` and ``validation`` are one.
        **keywords: As :class:`StreamOptions`.

    Returns:
        The stream.

    Raises:
        ConfigError: A setting that cannot work.
        DataError: The first row that cannot be used, with its key.
        SourceError: Files, columns or splits that are not there or cannot be read.
    """
    options = StreamOptions.read(stream_local, keywords)
    source = LocalSource(paths, file_format=format, split=split, keywords=options.columns)
    return _open_stream(options, lambda store, fetcher: source)


@_spell_out()
def stream_gcs(
    uris: str | Sequence[str],
    *,
    format: str | None = None,  # noqa: A002 - the name of the public contract
    split: str | None = None,
    refresh: bool = False,
    **keywords: Unpack[StreamKeywords],
) -> ExampleStream:
    """Stream the examples of data files in Google Cloud Storage.

    The rows are read once into a manifest, in which every object has the version that it had
    then; media are downloaded when their turn comes, and kept within the cache's budget.

    Args:
        uris: ``gs://bucket/name``, a prefix that ends in a slash, a glob, or a list of them: JSON
            lines, CSV, Parquet (only the columns that are needed are read), webdataset tars, or
            a prefix of media with a ``manifest.jsonl`` or ``metadata.*`` that names them, or with
            a ``.txt`` beside each.
        format: ``jsonl csv parquet webdataset captions``, for files of another name or mixed
            prefixes.
        split: Keeps the rows whose column ``split`` has this value, or the files named by it.
        refresh: Read the bucket anew, even if there is a manifest of it; a run that was begun
            with the old one does not continue with a new one that differs.
        **keywords: As :class:`StreamOptions`.

    Returns:
        The stream.

    Raises:
        ConfigError: A setting that cannot work.
        DataError: More rows than ``max_bad_fraction`` allows cannot be used; the last of them.
        SourceError: Objects, columns or splits that are not there or cannot be read; a permission
            or credentials that are missing.
    """
    options = StreamOptions.read(stream_gcs, keywords)

    def make_source(store: GcsStore, fetcher: Fetcher) -> GcsSource:
        return GcsSource(
            uris,
            file_format=format,
            split=split,
            keywords=options.columns,
            open_store=lambda: store,
            open_object=fetcher.open,
        )

    return _open_stream(options, make_source, refresh=refresh)


@_spell_out()
def stream_bigquery(
    table: str | None = None,
    *,
    query: str | None = None,
    query_parameters: Sequence[Any] = (),
    project: str | None = None,
    row_restriction: str | None = None,
    snapshot_time: datetime | None = None,
    max_bytes_billed: int | Literal[False] | None = None,
    destination: str | None = None,
    split: str | None = None,
    refresh: bool = False,
    bigquery_client: BigQueryClient | None = None,
    bigquery_read_client: BigQueryReadClient | None = None,
    **keywords: Unpack[StreamKeywords],
) -> ExampleStream:
    """Stream the examples of a BigQuery table or query.

    The columns that are needed, and no others, are read once through the Storage Read API into a
    manifest; a reading that was killed goes on where it was. Columns of media hold ``gs://``
    URIs, ``ObjectRef`` values or ``BYTES``.

    Args:
        table: ``project.dataset.table``. Give this or ``query``.
        query: GoogleSQL. It is tried without running first, and its bytes are told.
        query_parameters: The official client's parameters of the query.
        project: Who pays; None is the project of the credentials or of the table.
        row_restriction: Of a table, a condition as after WHERE.
        snapshot_time: Of a table, the time whose rows are read; None is now.
        max_bytes_billed: The most that the query may bill; False waives the limit.
        destination: ``project.dataset.table`` for the query's result, which must not exist; None
            is a temporary table of BigQuery's.
        split: Keeps the rows whose column ``split`` has this value.
        refresh: Read the table anew, even if there is a manifest of it.
        bigquery_client: A ``google.cloud.bigquery.Client``; None makes one with the
            application-default credentials.
        bigquery_read_client: A ``google.cloud.bigquery_storage.BigQueryReadClient``, likewise.
        **keywords: As :class:`StreamOptions`.

    Returns:
        The stream.

    Raises:
        ConfigError: A setting that cannot work, or a query without ``max_bytes_billed``.
        DataError: More rows than ``max_bad_fraction`` allows cannot be used; the last of them.
        SourceError: A table or columns that are not there or cannot be read; a permission or
            credentials that are missing.
    """
    options = StreamOptions.read(stream_bigquery, keywords)
    make_source = partial(
        BigQuerySource,
        table,
        query,
        query_parameters=query_parameters,
        project=project,
        row_restriction=row_restriction,
        snapshot_time=snapshot_time,
        max_bytes_billed=max_bytes_billed,
        destination=destination,
        split=split,
        keywords=options.columns,
        client=bigquery_client,
        read_client=bigquery_read_client,
    )
    name = name_source(make_source(folder=options.folder))
    source = make_source(folder=options.folder / "parts" / name)
    return _open_stream(
        options, lambda store, fetcher: source, refresh=refresh, discard=source.discard
    )


@_spell_out()
def stream_hub(
    name: str,
    *,
    subset: str | None = None,
    split: str = "train",
    revision: str | None = None,
    streaming: bool = False,
    max_rows: int | None = None,
    refresh: bool = False,
    **keywords: Unpack[StreamKeywords],
) -> ExampleStream:
    """Stream the examples of a data set on the Hugging Face Hub.

    Media are never decoded by ``datasets``. Those that the rows hold themselves are kept in the
    manifest, which is then as large as they are.

    Args:
        name: ``owner/name``, or a folder that ``datasets`` can load.
        subset: The data set's configuration, where it has several.
        split: Which of its splits.
        revision: A branch, tag or commit; None is the newest when the manifest is written, whose
            commit ``report()`` names.
        streaming: Read rows as they are downloaded instead of keeping the data set's files.
        max_rows: Read no more than the first so many.
        refresh: Read the data set anew, even if there is a manifest of it.
        **keywords: As :class:`StreamOptions`.

    Returns:
        The stream.

    Raises:
        ConfigError: A setting that cannot work.
        DataError: More rows than ``max_bad_fraction`` allows cannot be used; the last of them.
        SourceError: A data set, subset, split or columns that are not there or cannot be read.
    """
    options = StreamOptions.read(stream_hub, keywords)

    def make_source(store: GcsStore, fetcher: Fetcher) -> HubSource:
        return HubSource(
            name,
            subset=subset,
            split=split,
            revision=revision,
            streaming=streaming,
            max_rows=max_rows,
            keywords=options.columns,
        )

    return _open_stream(options, make_source, refresh=refresh)


def _open_stream(
    options: StreamOptions,
    make_source: Callable[[GcsStore, Fetcher], Source],
    *,
    refresh: bool = False,
    discard: Callable[[], None] = lambda: None,
) -> ExampleStream:
    """Open the manifest of a source, after writing it where there is none that can be used."""
    config = options.fetch
    # An attempt that was abandoned holds its connection until it ends.
    store = GcsStore(options.gcs_client, num_connections=8 * config.io_threads)
    open_cache = partial(
        MediaCache,
        options.folder / "media",
        max_bytes=config.cache_bytes,
        min_free_bytes=config.min_free_disk_bytes,
    )
    fetcher = Fetcher(lambda: store, open_cache, config)
    manifest, quarantine = open_manifest(
        make_source(store, fetcher),
        lambda: store,
        folder=options.folder,
        budget=Budget(options.max_bad_fraction, options.max_consecutive_bad),
        refresh=refresh,
        discard=discard,
    )
    portion = Portion(
        manifest,
        fetcher,
        quarantine,
        seed=options.seed,
        shuffle=options.shuffle,
        locality=options.locality,
    )
    return ExampleStream([portion], fetch=config)
