"""Examples of a BigQuery table or query.

The columns that make examples, and no others, are read once to a folder, and examples are made of
what lies there. A run that is killed goes on where it stopped: the query is not run again, and no
batch is read twice.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gemma_tuner.disk import find_home
from gemma_tuner.display import show_bytes
from gemma_tuner.errors import ConfigError, SourceError
from gemma_tuner.log import logger
from gemma_tuner.sources.bigquery.parts import Column, Part, PartFolder, Record
from gemma_tuner.sources.bigquery.query import (
    BigQueryQuery,
    describe_table,
    make_job_id,
    open_clients,
)
from gemma_tuner.sources.bigquery.rows import check_kinds, note_kinds, read_rows, refuse_paths
from gemma_tuner.sources.bigquery.spool import ReadRequest, close_parts, spool_table
from gemma_tuner.sources.columns import Columns, Keywords
from gemma_tuner.sources.examples import ExampleReader, Outcome
from gemma_tuner.sources.media_places import check_media_root, start_at

if TYPE_CHECKING:
    from google.cloud.bigquery import Client, TableReference
    from google.cloud.bigquery_storage import BigQueryReadClient


_FORMAT_VERSION = 2


class BigQuerySource:
    """The examples of a BigQuery table or query, spooled to a folder and read from there.

    ``stream_bigquery`` documents the arguments. The folder is made for the user alone, of no other
    use, and holds the rows until :meth:`discard`.
    """

    root = Path()

    def __init__(
        self,
        table: str | None = None,
        query: str | None = None,
        *,
        folder: Path,
        query_parameters: Sequence[Any] = (),
        project: str | None = None,
        row_restriction: str | None = None,
        snapshot_time: datetime.datetime | None = None,
        max_bytes_billed: int | Literal[False] | None = None,
        destination: str | None = None,
        split: str | None = None,
        keywords: Keywords | None = None,
        media_root: str | Path | None = None,
        client: Client | None = None,  # None makes both clients when they are first needed
        read_client: BigQueryReadClient | None = None,
        max_streams: int = 4,
        attempt_timeout_seconds: float = 300.0,
        total_timeout_seconds: float = 600.0,
    ) -> None:
        self._table = table
        self._query = query
        self._query_parameters = query_parameters
        self._project = project
        self._row_restriction = row_restriction
        self._snapshot_time = snapshot_time
        self._max_bytes_billed: int | Literal[False] | None = max_bytes_billed
        self._destination = destination
        self._split = split
        self._keywords: Keywords = keywords or {}
        self._media_root = check_media_root(media_root)
        root = self._media_root
        self.reach = (find_home(root),) if isinstance(root, Path) else ()
        self.folder = folder
        self._client = client
        self._read_client = read_client
        self._max_streams = max_streams
        self._attempt_timeout_seconds = attempt_timeout_seconds
        self._total_timeout_seconds = total_timeout_seconds
        self._summary: dict[str, Any] = {}
        self._check_arguments()
        # What is named without its project is another table to another client.
        is_named_whole = table is not None and table.count(".") > 1
        self._given_project = None if client is None or is_named_whole else client.project

    def read_identity(self) -> dict[str, Any]:
        """Return what decides the examples, as JSON: the arguments, without asking BigQuery."""
        snapshot = self._snapshot_time
        given = {} if self._given_project is None else {"client_project": self._given_project}
        return {
            "source": "bigquery",
            "table": self._table,
            "query": self._query,
            "query_parameters": [value.to_api_repr() for value in self._query_parameters],
            "project": self._project,
            "row_restriction": self._row_restriction,
            "snapshot_time": snapshot.astimezone(datetime.UTC).isoformat() if snapshot else None,
            "split": self._split,
            "keywords": dict(self._keywords),
            **({"media_root": str(self._media_root)} if self._media_root else {}),
            **given,
        }

    def read_summary(self) -> dict[str, Any]:
        """Return what the last complete iteration met, as JSON."""
        return self._summary

    def discard(self) -> None:
        """Delete the rows that lie in the folder; the next iteration asks BigQuery again."""
        if self.folder.is_dir():
            with self._open_folder() as parts:
                parts.delete()

    def __iter__(self) -> Iterator[tuple[str, Outcome]]:
        """Read every row; those that lie in the folder already without asking BigQuery."""
        with self._open_folder() as parts:
            try:
                if not parts.record.table:
                    self._find_table(parts)
                reader = self._make_reader(parts.record.columns)
                opened = self._spool(parts, reader.columns)
            except OSError as error:
                raise self._explain_folder(error) from None
            try:
                # A temporary table has another name each time, and keys are to stay the same.
                origin = parts.record.table if self._table or self._destination else "query"
                rows = read_rows(opened, reader.columns, origin)
                yield from reader.read(rows, start_at(self._media_root, refuse_paths))
            finally:
                close_parts(opened)
            self._summary = self._summarise(parts.record, reader)

    def _check_arguments(self) -> None:
        if bool(self._table) == bool(self._query):
            raise ConfigError("give either table= or query=, and not both")
        if self._query and (self._row_restriction or self._snapshot_time):
            raise ConfigError(
                "row_restriction= and snapshot_time= are of table=; in a query write WHERE and "
                "FOR SYSTEM_TIME AS OF"
            )
        if self._table and (self._destination or self._query_parameters):
            raise ConfigError("destination= and query_parameters= are of query=, not of table=")
        if self._snapshot_time is not None and self._snapshot_time.tzinfo is None:
            raise ConfigError(
                "snapshot_time= has no time zone; give one, such as datetime.timezone.utc"
            )
        if (self._client is None) != (self._read_client is None):
            raise ConfigError(
                "give bigquery_client= and bigquery_read_client= together, or neither"
            )
        limit = self._max_bytes_billed
        if limit is not None and limit is not False and (limit is True or limit < 1):
            raise ConfigError(f"max_bytes_billed={limit!r}; give bytes from 1 up, or False")
        if self._max_streams < 1:
            raise ConfigError(f"max_streams={self._max_streams}; give a whole number from 1 up")

    def _open_folder(self) -> PartFolder:
        asked = {"version": _FORMAT_VERSION, **self.read_identity(), "to": self._destination}
        identity = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
        try:
            return PartFolder(self.folder, identity)
        except OSError as error:
            raise self._explain_folder(error) from None

    def _explain_folder(self, error: OSError) -> SourceError:
        return SourceError(
            f"the rows cannot be kept in the folder {self.folder.name!r} ({error.strerror}); "
            "free some space there, or choose another by cache_dir="
        )

    def _open_clients(self) -> tuple[Client, BigQueryReadClient]:
        if self._client is None or self._read_client is None:
            self._client, self._read_client = open_clients(self._project)
        return self._client, self._read_client

    def _make_reader(self, columns: Sequence[Column]) -> ExampleReader:
        reader = ExampleReader(
            [column.name for column in columns], self._keywords, split=self._split
        )
        check_kinds(columns, reader.columns)
        return reader

    # --- from BigQuery to the folder ---

    def _find_table(self, parts: PartFolder) -> None:
        """Find out what is to be read, and have the query run that makes it."""
        client, _ = self._open_clients()
        record = parts.record
        if self._query is not None:
            self._run_query(client, self._query, parts)
            return
        table = str(_parse_table(client, self._table or ""))
        columns, num_rows, is_exact = describe_table(
            client, table, seconds=self._total_timeout_seconds
        )
        self._make_reader(columns)
        if not (self._row_restriction or self._snapshot_time):
            record.num_rows, record.is_exact = num_rows, is_exact
        # The table as it is now, and as it was then for a run that goes on tomorrow.
        snapshot = self._snapshot_time or datetime.datetime.now(datetime.UTC)
        record.snapshot_time = snapshot.astimezone(datetime.UTC).isoformat()
        record.table, record.columns = table, columns
        parts.save_record()

    def _run_query(self, client: Client, sql: str, parts: PartFolder) -> None:
        record = parts.record
        destination = self._destination
        query = BigQueryQuery(
            client,
            sql,
            parameters=self._query_parameters,
            max_bytes_billed=self._max_bytes_billed,
            destination=_parse_table(client, destination) if destination else None,
            seconds=self._total_timeout_seconds,
        )
        if not record.job:
            estimate, columns = query.estimate()
            if columns:
                self._make_reader(columns)
            num_bytes = estimate.total_bytes_processed or 0
            logger.info(
                "the query reads %s, by BigQuery's dry run", show_bytes(num_bytes, binary=True)
            )
            record.job = [make_job_id(), estimate.location or ""]
            parts.save_record()
        try:
            table, record.num_billed_bytes = query.run(*record.job)
        finally:
            if query.has_failed:
                parts.reset()
        record.columns, record.num_rows, record.is_exact = describe_table(
            client, table, seconds=self._total_timeout_seconds, is_result=True
        )
        record.table = table
        parts.save_record()

    def _spool(self, parts: PartFolder, columns: Columns) -> list[Part]:
        names = set(columns.names.values())
        request = ReadRequest(
            project=self._project,
            fields=tuple(column.name for column in parts.record.columns if column.name in names),
            row_restriction=self._row_restriction or "",
            max_streams=self._max_streams,
            max_bytes=self._max_bytes_billed if self._table else None,
            attempt_timeout_seconds=self._attempt_timeout_seconds,
            total_timeout_seconds=self._total_timeout_seconds,
        )
        return spool_table(self._open_clients, parts, request)

    def _summarise(self, record: Record, reader: ExampleReader) -> dict[str, Any]:
        summary = reader.read_summary()
        notes = []
        if record.session is not None:
            notes.append(
                f"by BigQuery's estimate {record.session.num_rows:,} rows, bytes scanned: "
                f"{record.session.num_bytes:,}"
            )
        if self._query:
            notes.append(f"bytes billed for the query: {record.num_billed_bytes:,}")
        if record.snapshot_time:
            notes.append(f"read as of {record.snapshot_time}")
        for num, what in (
            (record.num_expired, "read sessions that expired and were begun anew"),
            (record.num_repeats, "reads that broke off and were taken up again"),
        ):
            if num:
                notes.append(f"{what}: {num:,}")
        notes += note_kinds(record.columns, reader.columns)
        return {
            **summary,
            "format": "bigquery",
            "notes": notes + summary["notes"],
            "num_files": 1,
        }


def _parse_table(client: Client, name: str) -> TableReference:
    from google.cloud.bigquery import TableReference

    try:
        return TableReference.from_string(name, default_project=client.project)
    except ValueError:
        raise ConfigError(f"{name!r} names no table; write project.dataset.table") from None
