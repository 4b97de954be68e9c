"""From a source to a stream: its rows are read once into a manifest, which the stream reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, Unpack

from gemma_tuner.errors import ConfigError
from gemma_tuner.records import Example
from gemma_tuner.sources.bigquery.source import BigQuerySource
from gemma_tuner.sources.buckets import BucketSource
from gemma_tuner.sources.examples import Source
from gemma_tuner.sources.formats.folders import Paths
from gemma_tuner.sources.hub import HubSource
from gemma_tuner.sources.local import LocalSource
from gemma_tuner.sources.memory import MemorySource, holds_rows
from gemma_tuner.storage.fetch import Fetcher
from gemma_tuner.storage.objects import StoreOptions
from gemma_tuner.storage.stores import Stores
from gemma_tuner.streaming.options import StreamKeywords, StreamOptions, spell_out
from gemma_tuner.streaming.spool import name_source, open_manifest
from gemma_tuner.streaming.stream import ExampleStream
from gemma_tuner.streaming.view import DatasetView

if TYPE_CHECKING:
    from gemma_tuner.sources.bigquery.source import BigQueryReadClient
    from gemma_tuner.sources.bigquery.source import Client as BigQueryClient

Rows = Iterable[Mapping[str, Any] | Example] | Any
"""Rows in memory; tables and data sets are of libraries that need not be there."""


@spell_out(max_bad_fraction=None)
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
        paths: A file (``.jsonl .json .csv .tsv .parquet .arrow .tar .txt .md``), a glob, a
            folder, or a list of them; :mod:`gemma_tuner.sources.formats.folders` says what a
            folder means.
        format: ``jsonl csv parquet arrow text webdataset captions transcripts kaldi``, for files
            of another name or mixed folders.
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
    _refuse_rows("paths", paths)
    source = LocalSource(
        paths,
        file_format=format,
        split=split,
        keywords=options.columns,
        media_root=options.media_root,
    )
    return _open_stream(options, source, _make_fetcher(options))


@spell_out()
def stream_gcs(
    uris: str | Sequence[str],
    *,
    format: str | None = None,  # noqa: A002 - the name of the public contract
    split: str | None = None,
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
        format: As of :func:`stream_local`.
        split: Keeps the rows whose column ``split`` has this value, or the files named by it.
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
    _refuse_rows("uris", uris)
    fetcher = _make_fetcher(options)
    source = BucketSource(
        uris,
        fetcher,
        file_format=format,
        split=split,
        keywords=options.columns,
        media_root=options.media_root,
    )
    return _open_stream(options, source, fetcher)


@spell_out()
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
        query: GoogleSQL. A dry run says first how many bytes it reads.
        query_parameters: The official client's parameters of the query.
        project: Who pays; None is the project of the credentials or of the table.
        row_restriction: Of a table, a condition as after WHERE.
        snapshot_time: Of a table, the time whose rows are read; None is now.
        max_bytes_billed: The most that the query may bill; False waives the limit.
        destination: Rarely needed: ``project.dataset.table`` for the query's result, which must
            not exist; None is a temporary table of BigQuery's.
        split: Keeps the rows whose column ``split`` has this value.
        bigquery_client: A ``google.cloud.bigquery.Client``; None makes one with the
            application-default credentials.
        bigquery_read_client: A ``google.cloud.bigquery_storage.BigQueryReadClient``; give both
            clients or neither.
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
    source = BigQuerySource(
        table,
        query,
        folder=options.folder / "parts",
        query_parameters=query_parameters,
        project=project,
        row_restriction=row_restriction,
        snapshot_time=snapshot_time,
        max_bytes_billed=max_bytes_billed,
        destination=destination,
        split=split,
        keywords=options.columns,
        media_root=options.media_root,
        client=bigquery_client,
        read_client=bigquery_read_client,
        attempt_timeout_seconds=options.fetch.attempt_timeout_seconds,
        total_timeout_seconds=options.fetch.total_timeout_seconds,
    )
    source.folder /= name_source(source)
    return _open_stream(options, source, _make_fetcher(options), discard=source.discard)


@spell_out()
def stream_hub(
    name: str,
    *,
    subset: str | None = None,
    split: str = "train",
    revision: str | None = None,
    streaming: bool = False,
    max_rows: int | None = None,
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
        max_rows: Rarely needed: read no more than the first so many.
        **keywords: As :class:`StreamOptions`.

    Returns:
        The stream.

    Raises:
        ConfigError: A setting that cannot work.
        DataError: More rows than ``max_bad_fraction`` allows cannot be used; the last of them.
        SourceError: A data set, subset, split or columns that are not there or cannot be read.
    """
    options = StreamOptions.read(stream_hub, keywords)
    _refuse_rows("name", name)
    source = HubSource(
        name,
        subset=subset,
        split=split,
        revision=revision,
        streaming=streaming,
        max_rows=max_rows,
        keywords=options.columns,
        media_root=options.media_root,
    )
    return _open_stream(options, source, _make_fetcher(options))


@spell_out(max_bad_fraction=0.0)
def stream_rows(
    rows: Rows,
    *,
    split: str | None = None,
    **keywords: Unpack[StreamKeywords],
) -> ExampleStream:
    """Stream the examples of rows that the program holds itself.

    Rows are kept in a manifest as those of files are, images and samples among them too, so that
    a run resumes in a program that makes the same rows again. Images may be paths, encoded bytes
    or PIL images; clips paths, bytes or ``{"array", "sampling_rate"}``. Relative paths start from
    the working directory, and others lead below it, unless ``media_root`` says where.

    Args:
        rows: A list of dictionaries or of ``Example``, a DataFrame of pandas or polars, a pyarrow
            Table, a ``datasets.Dataset`` (whose media are never decoded by ``datasets``), or a
            generator of up to 100,000 rows.
        split: Keeps the rows whose column ``split`` has this value.
        **keywords: As :class:`StreamOptions`.

    Returns:
        The stream.

    Raises:
        ConfigError: A setting that cannot work, or rows of another kind.
        DataError: The first row that cannot be used, with its key.
        SourceError: Columns or splits that are not there, or no rows.
    """
    options = StreamOptions.read(stream_rows, keywords)
    source = MemorySource(
        rows, split=split, keywords=options.columns, media_root=options.media_root
    )
    return _open_stream(options, source, _make_fetcher(options))


def _refuse_rows(argument: str, given: object) -> None:
    """Answer one who gives rows where their place is asked for."""
    if holds_rows(given):
        raise ConfigError(
            f"{argument} is a {type(given).__name__} that holds rows itself, and names no place "
            "to read them from; stream_rows(rows) takes what is in memory"
        )


def _make_fetcher(options: StreamOptions) -> Fetcher:
    config = options.fetch
    # An attempt that was abandoned holds its connection until it ends.
    stores = Stores(StoreOptions(options.gcs_client, 8 * config.io_threads, config))
    return Fetcher(stores, options.folder / "media", config)


def _open_stream(
    options: StreamOptions,
    source: Source,
    fetcher: Fetcher,
    *,
    discard: Callable[[], None] = lambda: None,
) -> ExampleStream:
    """Open the manifest of a source, after writing it where there is none that can be used."""
    budget, budget_in_run = options.budgets
    manifest, quarantine = open_manifest(
        source,
        fetcher.stores,
        folder=options.folder,
        budget=budget,
        refresh=options.refresh,
        discard=discard,
    )
    quarantine.budget = budget_in_run
    view = DatasetView(
        manifest,
        fetcher,
        quarantine,
        range(len(manifest)),
        seed=options.seed,
        shuffle=options.shuffle,
        locality=options.locality,
    )
    return ExampleStream([view], fetch=options.fetch)
