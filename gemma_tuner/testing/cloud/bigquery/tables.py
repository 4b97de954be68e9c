"""Versioned tables, the log of calls and the script of faults of the local BigQuery server."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow

from gemma_tuner.errors import ConfigError
from gemma_tuner.testing.cloud.bigquery.values import normalise

LOCATION = "US"


def now() -> datetime.datetime:
    """Return the time, in UTC."""
    return datetime.datetime.now(datetime.UTC)


class RefusedError(Exception):
    """A call that BigQuery would refuse; ``reason`` is a key of ``REASONS``."""

    def __init__(
        self, reason: str, message: str, *, retry_after_seconds: float | None = None
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after_seconds = retry_after_seconds


@contextlib.contextmanager
def refusing_sql_without_packages() -> Iterator[None]:
    """Turn an import that fails into a refusal: SQL alone needs duckdb and sqlglot."""
    try:
        yield
    except ImportError as error:
        raise RefusedError(
            "notImplemented",
            f"the local BigQuery server runs SQL by the package {error.name}, which is not "
            "installed; run `pip install 'gemma_tuner[cloud]'`",
        ) from error


# Each reason with its HTTP status and its gRPC code.
# Source: https://cloud.google.com/bigquery/docs/error-messages
REASONS: dict[str, tuple[int, str]] = {
    "accessDenied": (403, "PERMISSION_DENIED"),
    "notFound": (404, "NOT_FOUND"),
    "duplicate": (409, "ALREADY_EXISTS"),
    "invalid": (400, "INVALID_ARGUMENT"),
    "invalidQuery": (400, "INVALID_ARGUMENT"),
    "bytesBilledLimitExceeded": (400, "INVALID_ARGUMENT"),
    "rateLimitExceeded": (403, "RESOURCE_EXHAUSTED"),
    "backendError": (503, "UNAVAILABLE"),
    "internalError": (500, "INTERNAL"),
    "notImplemented": (501, "UNIMPLEMENTED"),
    # The two below have no reason of BigQuery's own: only the Storage interface gives them.
    "sessionExpired": (400, "FAILED_PRECONDITION"),
    "outOfRange": (400, "OUT_OF_RANGE"),
}

FaultCode = Literal["UNAVAILABLE", "INTERNAL", "RESOURCE_EXHAUSTED", "PERMISSION_DENIED"]


@dataclass(frozen=True, slots=True)
class Call:
    """One call that the server answered or refused: what was asked for."""

    method: str  # as Google's reference names it: ``tables.get``, ``jobs.insert``, ``ReadRows``
    table: str | None = None  # ``project.dataset.table`` where the call is about one table
    selected_fields: tuple[str, ...] = ()  # empty for all
    row_restriction: str = ""
    snapshot_time: datetime.datetime | None = None
    sample_percentage: float | None = None
    compression: str = ""  # of a read session: ``LZ4_FRAME``, ``ZSTD`` or none
    stream: str | None = None
    offset: int | None = None  # the first row, of ``ReadRows`` or ``tabledata.list``
    query: str | None = None
    dry_run: bool = False


@dataclass(frozen=True, slots=True)
class BigQueryFault:
    """Something that goes wrong in one call, or in every call, of a method.

    Args:
        method: Which method, named as in :class:`Call`.
        code: What the client gets: over REST ``UNAVAILABLE`` is 503, ``INTERNAL`` 500,
            ``RESOURCE_EXHAUSTED`` and ``PERMISSION_DENIED`` 403 with BigQuery's reasons. None:
            no error, only the stall.
        nth: Which of the matching calls, from 1; None: every one.
        table: Only calls about this ``project.dataset.table``.
        after_rows: ``ReadRows`` delivers this many rows of the call first.
        stall_seconds: The server is silent for so long before it fails or goes on.
        retry_after_seconds: Sent as ``RetryInfo`` with ``RESOURCE_EXHAUSTED``: the official
            reader waits for so long and resumes; without it, it gives up.
        message: The error's message. The official reader resumes after ``INTERNAL`` only if the
            message contains ``RST_STREAM``.
    """

    method: str
    code: FaultCode | None = "UNAVAILABLE"
    nth: int | None = 1
    table: str | None = None
    after_rows: int = 0
    stall_seconds: float = 0.0
    retry_after_seconds: float | None = None
    message: str = "injected fault"


@dataclass(frozen=True, slots=True)
class TableName:
    """A table's full name."""

    project: str
    dataset: str
    table: str

    @classmethod
    def parse(cls, name: str) -> TableName:
        """Read ``project.dataset.table``."""
        parts = name.split(".")
        if len(parts) != 3 or not all(parts):
            raise ConfigError(f"a table is named 'project.dataset.table'; got {name!r}")
        return cls(*parts)

    def __str__(self) -> str:
        return f"{self.project}.{self.dataset}.{self.table}"

    @property
    def legacy(self) -> str:
        """The form that BigQuery's messages use: ``project:dataset.table``."""
        return f"{self.project}:{self.dataset}.{self.table}"

    @property
    def reference(self) -> dict[str, str]:
        """The form of REST: ``TableReference``."""
        return {"projectId": self.project, "datasetId": self.dataset, "tableId": self.table}


@dataclass(frozen=True, slots=True)
class Version:
    """A table's content from a moment on."""

    at: datetime.datetime
    content: pyarrow.Table


@dataclass(slots=True)
class StoredTable:
    """A table with its versions, or a view with its SQL."""

    name: TableName
    created: datetime.datetime
    versions: list[Version] = field(default_factory=list)
    view_sql: str | None = None
    properties: dict[str, Any] = field(default_factory=dict)

    @property
    def latest(self) -> Version:
        """The newest version."""
        return self.versions[-1]

    @property
    def etag(self) -> str:
        """What changes whenever the content or the properties do."""
        state = f"{self.name} {len(self.versions)} {self.latest.at} {self.properties}"
        return hashlib.sha256(state.encode()).hexdigest()[:22]

    def version_at(self, moment: datetime.datetime | None) -> Version:
        """Return the content as it was at ``moment``, or the newest."""
        if moment is None:
            return self.latest
        for version in reversed(self.versions):
            if version.at <= moment:
                return version
        asked, first = (round(t.timestamp() * 1000) for t in (moment, self.versions[0].at))
        raise RefusedError(
            "invalid",
            f"Invalid snapshot time {asked} for table {self.name.legacy}@{asked}. "
            f"Cannot read before {first}.",
        )


class Catalogue:
    """All that both interfaces share; every method may be called from any thread."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.stopping = threading.Event()
        self.datasets: dict[tuple[str, str], datetime.datetime] = {}
        self.tables: dict[TableName, StoredTable] = {}
        self.calls: list[Call] = []
        self._faults: list[tuple[BigQueryFault, list[int]]] = []
        self._denied: set[tuple[str, str]] = set()

    # --- tables ---

    def put(
        self, name: TableName, content: pyarrow.Table, at: datetime.datetime | None = None
    ) -> StoredTable:
        """Make ``content`` the table's newest version."""
        content, moment = normalise(content), at or now()
        if moment.tzinfo is None:
            raise ConfigError(f"a version's time needs a time zone; got {moment}")
        with self.lock:
            stored = self.tables.get(name)
            if stored is None or stored.view_sql is not None:
                stored = self.tables[name] = StoredTable(name, moment)
                self.datasets.setdefault((name.project, name.dataset), moment)
            elif at is not None and at <= stored.latest.at:
                raise ConfigError(
                    f"table {name} has a version of {stored.latest.at}; the next must be later "
                    f"than that, and {at} is not"
                )
            elif moment <= stored.latest.at:
                moment = stored.latest.at + datetime.timedelta(microseconds=1)
            stored.versions.append(Version(moment, content))
            return stored

    def put_view(self, name: TableName, sql: str) -> StoredTable:
        """Make a view; it has no rows of its own."""
        with self.lock:
            view = self.tables[name] = StoredTable(name, now(), view_sql=sql)
            view.versions.append(Version(view.created, pyarrow.table({})))
            self.datasets.setdefault((name.project, name.dataset), view.created)
            return view

    def find(self, name: TableName) -> StoredTable:
        """Return a table or a view."""
        with self.lock:
            if name in self.tables:
                return self.tables[name]
            if (name.project, name.dataset) in self.datasets:
                missing = f"Table {name.legacy}"
            else:
                missing = f"Dataset {name.project}:{name.dataset}"
        raise RefusedError(
            "notFound", f"Not found: {missing} was not found in location {LOCATION}"
        )

    # --- permissions ---

    def deny(self, resource: str, permission: str) -> None:
        """Take a permission away, on a table or on a project."""
        with self.lock:
            self._denied.add((resource, permission))

    def is_denied(self, resource: TableName | str, permission: str) -> bool:
        """True if the permission was taken away."""
        with self.lock:
            return (str(resource), permission) in self._denied

    # --- calls and faults ---

    def add_fault(self, fault: BigQueryFault) -> None:
        """Add to the script of faults."""
        with self.lock:
            self._faults.append((fault, [0]))

    def enter(self, call: Call) -> None:
        """Log a call, and let the faults that are due happen."""
        for fault in self.log(call):
            self.strike(fault)

    def log(self, call: Call) -> Sequence[BigQueryFault]:
        """Log a call and return the faults that strike it."""
        with self.lock:
            self.calls.append(call)
            due = []
            for fault, seen in self._faults:
                if fault.method == call.method and fault.table in (None, call.table):
                    seen[0] += 1
                    if fault.nth in (None, seen[0]):
                        due.append(fault)
            return due

    def strike(self, fault: BigQueryFault) -> None:
        """Let a fault happen: stall, then fail, unless the server stops meanwhile."""
        if fault.stall_seconds:
            self.stopping.wait(fault.stall_seconds)
        if fault.code is not None:
            reason = next(reason for reason, (_, code) in REASONS.items() if code == fault.code)
            wait_seconds = fault.retry_after_seconds
            raise RefusedError(reason, fault.message, retry_after_seconds=wait_seconds)
