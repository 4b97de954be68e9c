"""Tables and queries over the official BigQuery client: what is there, and what it would cost."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from gemma_tuner.display import show_bytes
from gemma_tuner.errors import ConfigError, SourceError
from gemma_tuner.sources.bigquery.errors import LOG_IN, explain_errors, quote, read_reason
from gemma_tuner.sources.bigquery.parts import Column
from gemma_tuner.storage.objects import AccessDeniedError
from gemma_tuner.threads import DaemonPool

if TYPE_CHECKING:
    from google.cloud.bigquery import Client, QueryJob, SchemaField, TableReference
    from google.cloud.bigquery_storage import BigQueryReadClient

_LEAST_BILLED = 10 << 20  # for each table that a query reads
# Source: https://cloud.google.com/bigquery/pricing#on_demand_pricing
_READABLE = ("TABLE", "SNAPSHOT")
_QUERY_INSTEAD = 'read it by query="SELECT ... FROM `{}`", with max_bytes_billed='


def open_clients(project: str | None) -> tuple[Client, BigQueryReadClient]:
    """Make the official clients with the application-default credentials."""
    try:
        import google.auth
        import google.auth.exceptions
        from google.cloud.bigquery import Client
        from google.cloud.bigquery_storage import BigQueryReadClient
    except ImportError as error:
        raise SourceError(
            f"reading BigQuery needs a package that is not there ({error.name}); run `pip install "
            "google-cloud-bigquery google-cloud-bigquery-storage`"
        ) from None
    try:
        credentials, found = google.auth.default(scopes=Client.SCOPE)
    except google.auth.exceptions.DefaultCredentialsError:
        raise AccessDeniedError(f"there are no Google Cloud credentials; {LOG_IN}") from None
    project = project or found
    if not project:
        raise SourceError("no Google Cloud project is known; name the one that pays by project=")
    return (
        Client(project=project, credentials=credentials),
        BigQueryReadClient(credentials=credentials),
    )


def describe_table(
    client: Client, table: str, *, seconds: float, is_result: bool = False
) -> tuple[list[Column], int | None, bool]:
    """Ask for the columns and rows of a table; True where there are no more rows than those."""
    with explain_errors("looking up", table, "bigquery.tables.get"):
        found = _ask(seconds, client.get_table, table)
    if not is_result and found.table_type not in _READABLE:
        raise SourceError(
            f"{table} is of the type {found.table_type}, which has no snapshots and cannot be "
            f"read as a table; {_QUERY_INSTEAD.format(table)}"
        )
    # A streaming buffer's rows are not counted.
    return list_columns(found.schema), found.num_rows, found.streaming_buffer is None


def _ask(seconds: float, request: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Make a request, which no server can draw out by answering byte by byte."""
    from google.cloud.bigquery import DEFAULT_RETRY

    retry = DEFAULT_RETRY.with_timeout(seconds)
    request = partial(request, *arguments, timeout=seconds, retry=retry, **options)
    return DaemonPool("gemma-tuner-bigquery", 1).submit(request).result(seconds)


def list_columns(schema: Sequence[SchemaField]) -> list[Column]:
    """Return the top-level columns of a schema."""
    return [Column(field.name, field.field_type, field.mode) for field in schema]


class BigQueryQuery:
    """One query: estimated without cost, then run once, however often the run is started again."""

    def __init__(
        self,
        client: Client,
        sql: str,
        *,
        parameters: Sequence[Any],
        max_bytes_billed: int | Literal[False] | None,
        destination: TableReference | None,  # None: BigQuery's temporary table, for a day
        seconds: float,  # of each question, and of the wait for the end
    ) -> None:
        self._client = client
        self._seconds = seconds
        self._sql = sql
        self._parameters = parameters
        self._max_bytes_billed = max_bytes_billed
        self._destination = destination
        self.has_failed = False
        """True where the job came to its end without a result: its id is of no more use."""

    def estimate(self) -> tuple[QueryJob, list[Column]]:
        """Ask what the query would read, without running it."""
        from google.cloud.bigquery import QueryJobConfig

        config = QueryJobConfig(
            dry_run=True, use_query_cache=False, query_parameters=list(self._parameters)
        )
        with explain_errors(
            "the dry run of", "the query", "bigquery.jobs.create", remedy="mend query="
        ):
            job = _ask(self._seconds, self._client.query, self._sql, job_config=config)
        if job.statement_type not in (None, "SELECT"):
            raise ConfigError(f"query= is a {job.statement_type} statement; give a SELECT")
        num_bytes = job.total_bytes_processed or 0
        limit = self._max_bytes_billed
        if limit is None:
            size = show_bytes(num_bytes, binary=True)
            raise ConfigError(
                f"the query would read {size} ({num_bytes:,} bytes), which "
                f"BigQuery bills; allow it by max_bytes_billed={max(num_bytes, _LEAST_BILLED)} or "
                "more (10 MiB at least for each table), or waive the limit by "
                "max_bytes_billed=False"
            )
        refuse_excess("the query", num_bytes, limit)
        return job, list_columns(job.schema or [])

    def run(self, job_id: str, location: str) -> tuple[str, int]:
        """Run the query, or wait for the run that was begun under this id."""
        import google.api_core.exceptions as api
        from google.cloud.bigquery import QueryJob

        with explain_errors("running", "the query", "bigquery.jobs.create"):
            try:
                job = _ask(self._seconds, self._client.get_job, job_id, location=location or None)
            except api.NotFound:
                job = self._begin(job_id, location)
            if not isinstance(job, QueryJob):
                raise SourceError(f"the job {job_id} is of another kind; start again")
            self._wait_for(job)
        return str(job.destination), job.total_bytes_billed or 0

    def _begin(self, job_id: str, location: str) -> QueryJob:
        from google.cloud.bigquery import QueryJobConfig

        config = QueryJobConfig(query_parameters=list(self._parameters))
        if self._max_bytes_billed:
            config.maximum_bytes_billed = self._max_bytes_billed
        if self._destination is not None:
            config.destination = self._destination
            config.write_disposition = "WRITE_EMPTY"
        return _ask(
            self._seconds,
            self._client.query,
            self._sql,
            job_config=config,
            job_id=job_id,
            location=location or None,
            job_retry=None,  # an id is good for one job
        )

    def _wait_for(self, job: QueryJob) -> None:
        """Wait for the end of a job; what it can fail with on its own is explained here."""
        import google.api_core.exceptions as api

        try:
            _ask(self._seconds, job.result)
        except TimeoutError:
            raise SourceError(
                f"the query has not ended after {self._seconds:g} s; start again to go on waiting "
                "for it, which bills nothing anew, or raise FetchConfig's total_timeout_seconds"
            ) from None
        except api.GoogleAPICallError as error:
            self.has_failed = job.error_result is not None
            if isinstance(error, api.Conflict):
                raise SourceError(
                    f"the table {self._destination} holds rows already, and is not overwritten; "
                    "name another by destination=, or read it by table="
                ) from None
            if read_reason(error) == "bytesBilledLimitExceeded":
                raise ConfigError(
                    f"the query would bill more than max_bytes_billed={self._max_bytes_billed} "
                    f"allows ({quote(error)}); allow more, or read fewer columns or partitions"
                ) from None
            raise


def make_job_id() -> str:
    """Return a new id for a job."""
    return f"gemma-tuner-{uuid.uuid4()}"


def refuse_excess(what: str, num_bytes: int, limit: int | Literal[False] | None) -> None:
    """Refuse to read more than is allowed."""
    if limit and num_bytes > limit:
        raise ConfigError(
            f"{what} would read {show_bytes(num_bytes, binary=True)} ({num_bytes:,} bytes), and "
            f"max_bytes_billed={limit} allows {show_bytes(limit, binary=True)}; allow more, or "
            "read fewer columns or partitions"
        )
