"""A local server for the official BigQuery clients: tables and queries, costs and faults.

Read in this order: ``tables`` and ``values`` (what is kept), ``rest`` and ``read_service`` (how it
is asked for), ``jobs``, ``query`` and ``dialect`` (how SQL is run), and this. It is not BigQuery:
``tests/cloud/README.md`` says what it cannot prove.
"""

from __future__ import annotations

import datetime
import threading

import grpc
import pyarrow
from google.api_core.client_options import ClientOptions
from google.auth.credentials import AnonymousCredentials
from google.cloud import bigquery, bigquery_storage
from google.cloud.bigquery_storage_v1.services.big_query_read.transports import (
    BigQueryReadGrpcTransport,
)

from gemma_tuner.errors import ConfigError
from gemma_tuner.testing.cloud.bigquery.read_service import ReadService
from gemma_tuner.testing.cloud.bigquery.rest import RestService
from gemma_tuner.testing.cloud.bigquery.tables import BigQueryFault, Call, Catalogue, TableName

_PROJECT_PERMISSIONS = tuple(
    f"bigquery.{name}" for name in ("jobs.create", "readsessions.create", "readsessions.getData")
)
_TABLE_PERMISSIONS = tuple(
    f"bigquery.tables.{name}" for name in ("getData", "get", "updateData", "update", "delete")
)

__all__ = ["BigQueryFault", "BigQueryServer", "Call"]


class BigQueryServer:
    """A local stand-in for BigQuery, on free ports of 127.0.0.1.

    Example::

        with BigQueryServer() as server:
            server.put_table("project.dataset.table", pyarrow.table({"id": [1, 2]}))
            rows = server.client("project").query_and_wait("SELECT id FROM dataset.table")

    Queries and row restrictions are run by DuckDB: ``pip install 'gemma_tuner[cloud]'``.

    Args:
        rows_per_message: At most so many rows in one response of ``ReadRows``.
        session_lifetime_seconds: How long a read session lives; BigQuery's lives six hours.
    """

    def __init__(
        self, *, rows_per_message: int = 1000, session_lifetime_seconds: float = 6 * 3600.0
    ) -> None:
        self._catalogue = Catalogue()
        self._rest = RestService(self._catalogue)
        self._read = ReadService(
            self._catalogue,
            rows_per_message,
            datetime.timedelta(seconds=session_lifetime_seconds),
        )
        self._read_server, self._read_port = self._read.start()
        self._thread = threading.Thread(
            target=self._rest.serve_forever,
            kwargs={"poll_interval": 0.05},
            name="bigquery-rest",
            daemon=True,
        )
        self._thread.start()
        self._clients: list[bigquery.Client | grpc.Channel] = []

    def __enter__(self) -> BigQueryServer:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Close the clients that it gave, end stalls, stop serving."""
        self._catalogue.stopping.set()
        for client in self._clients:
            client.close()
        self._read_server.stop(grace=None).wait()
        self._rest.shutdown()
        self._rest.server_close()
        self._thread.join()

    # --- clients ---

    @property
    def endpoint(self) -> str:
        """Where REST is, for ``client_options.api_endpoint``."""
        return f"http://127.0.0.1:{self._rest.server_port}"

    @property
    def read_endpoint(self) -> str:
        """Where gRPC is, without TLS: ``host:port``."""
        return f"127.0.0.1:{self._read_port}"

    def client(self, project: str) -> bigquery.Client:
        """Return an official client of this server; it closes with the server."""
        client = bigquery.Client(
            project=project,
            credentials=AnonymousCredentials(),
            client_options=ClientOptions(api_endpoint=self.endpoint),
        )
        self._clients.append(client)
        return client

    def read_client(self) -> bigquery_storage.BigQueryReadClient:
        """Return an official Storage client of this server; it closes with the server.

        Its messages may have any length, as with BigQuery: by grpc's own limit of 4 MiB a longer
        one would fail as if a quota were exhausted.
        """
        channel = grpc.insecure_channel(
            self.read_endpoint, options=[("grpc.max_receive_message_length", -1)]
        )
        self._clients.append(channel)
        return bigquery_storage.BigQueryReadClient(
            transport=BigQueryReadGrpcTransport(channel=channel)
        )

    # --- tables ---

    def put_table(
        self, name: str, table: pyarrow.Table, *, at: datetime.datetime | None = None
    ) -> datetime.datetime:
        """Make ``table`` the newest version of a table, whose dataset is made with it.

        Args:
            name: ``project.dataset.table``.
            table: Any columns that BigQuery can hold. Integers become INT64, floats FLOAT64,
                decimals NUMERIC; text is JSON where the field is :func:`json_field`'s.
            at: Since when the version holds, with a time zone; now by default.

        Returns:
            Since when it holds: a snapshot of this moment has it, one before does not.

        Raises:
            ConfigError: A name that is not whole, a type that BigQuery does not have, a time that
                is not after the version before.
        """
        return self._catalogue.put(TableName.parse(name), table, at).latest.at

    def put_view(self, name: str, sql: str) -> None:
        """Make a view of ``sql``, a query of GoogleSQL whose tables are named in full.

        Raises:
            ConfigError: A name that is not whole.
        """
        self._catalogue.put_view(TableName.parse(name), sql)

    def read_table(self, name: str) -> pyarrow.Table:
        """Return a table's newest content, as BigQuery's types.

        Raises:
            ConfigError: There is no such table.
        """
        stored = self._catalogue.tables.get(TableName.parse(name))
        if stored is None:
            raise ConfigError(f"this server has no table {name!r}")
        return stored.latest.content

    # --- what was asked ---

    @property
    def calls(self) -> list[Call]:
        """What was asked so far, in order; retries and resumed reads are calls of their own."""
        with self._catalogue.lock:
            return list(self._catalogue.calls)

    @property
    def bytes_billed(self) -> int:
        """What all queries so far would be billed for; reads through Storage are not in it."""
        with self._catalogue.lock:
            return sum(job.bytes_billed for job in self._rest.jobs.values())

    # --- what goes wrong ---

    def add_fault(self, fault: BigQueryFault) -> None:
        """Let a call go wrong; faults add up."""
        self._catalogue.add_fault(fault)

    def deny(self, resource: str, permission: str = "bigquery.tables.getData") -> None:
        """Take a permission away from whoever asks.

        Args:
            resource: ``project.dataset.table``, or a project for ``bigquery.jobs.create``,
                ``bigquery.readsessions.create`` and ``bigquery.readsessions.getData``.
            permission: One of those, or of a table: ``bigquery.tables.getData`` (queries,
                sessions, ``tabledata.list``), ``bigquery.tables.get``,
                ``bigquery.tables.updateData``, ``bigquery.tables.update``,
                ``bigquery.tables.delete``.

        Raises:
            ConfigError: A permission that this server does not check.
        """
        known = _PROJECT_PERMISSIONS if "." not in resource else _TABLE_PERMISSIONS
        if permission not in known:
            raise ConfigError(
                f"this server does not check {permission!r} of {resource!r}; it checks "
                f"{', '.join(known)}"
            )
        self._catalogue.deny(resource, permission)

    def expire_sessions(self) -> None:
        """End every read session now, in the middle of its streams too."""
        self._read.expire_sessions()
