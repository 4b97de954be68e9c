"""The rows of a BigQuery table to parts on disk, over the official Storage Read API client.

A stream is exact within its session alone, and a session lasts for six hours: no row is handed out
before all of them are on disk, so that a session that ends too early can be replaced.
"""

from __future__ import annotations

import datetime
import queue
import random
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import pyarrow
import pyarrow.ipc

from gemma_tuner.display import show_bytes
from gemma_tuner.errors import SourceError
from gemma_tuner.log import logger
from gemma_tuner.sources.bigquery.errors import explain_errors, quote, refuse_lasting
from gemma_tuner.sources.bigquery.parts import (
    DamagedBatchError,
    Part,
    PartFolder,
    ReadSession,
)
from gemma_tuner.sources.bigquery.query import refuse_excess

if TYPE_CHECKING:
    from google.cloud.bigquery import Client
    from google.cloud.bigquery_storage import BigQueryReadClient
    from google.cloud.bigquery_storage_v1.reader import ReadRowsStream

OpenClients = Callable[[], "tuple[Client, BigQueryReadClient]"]


_MAX_EXPIRED = 3
_MAX_DAMAGED = 3
_FIRST_WAIT_SECONDS = 0.1
_LONGEST_WAIT_SECONDS = 60.0
_CLOSING_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class ReadRequest:
    """What is read of a table."""

    project: str | None  # who pays; None is the client's
    fields: tuple[str, ...]
    row_restriction: str
    max_streams: int  # read at one time
    max_bytes: int | Literal[False] | None  # by BigQuery's estimate; None and False: no limit
    attempt_timeout_seconds: float  # of one call of ``ReadRows``; doubled while it brings nothing
    total_timeout_seconds: float  # for which a stream may bring nothing


class SessionExpiredError(SourceError):
    """A read session that BigQuery no longer knows."""


def spool_table(open_clients: OpenClients, parts: PartFolder, request: ReadRequest) -> list[Part]:
    """Read what is not yet on disk of the table of a record."""
    record = parts.record
    for _ in range(_MAX_EXPIRED):
        session = record.session or _open_session(*open_clients(), parts, request)
        opened = parts.open_parts()
        missing = [
            number
            for number, part in enumerate(opened)
            if session.whole.get(str(number)) != part.num_rows
        ]
        if not missing and not _count_lacking(opened, record.num_rows):
            return opened
        try:
            _refuse_expired(session)
            _, client = open_clients()
            _SpoolRun(client, parts, session, opened, request).run(missing)
        except SessionExpiredError:
            close_parts(opened)
            record.num_expired += 1
            logger.warning("the read session of %s expired; its rows are read anew", record.table)
            parts.drop_session()
        except BaseException:
            close_parts(opened)
            raise
        else:
            return opened
    raise SourceError(
        f"{record.table} was not read before its session expired, {_MAX_EXPIRED} times in a row; "
        "read fewer columns, restrict the rows, or read it where the network is faster"
    )


def _count_lacking(opened: Iterable[Part], num_promised: int | None) -> int:
    return max(0, (num_promised or 0) - sum(part.num_rows for part in opened))


def close_parts(opened: Iterable[Part]) -> None:
    """Close parts."""
    for part in opened:
        part.close()


def _open_session(
    tables: Client, client: BigQueryReadClient, parts: PartFolder, request: ReadRequest
) -> ReadSession:
    """Open a session, and keep it in the record."""
    import google.api_core.exceptions as api
    from google.api_core.retry import Retry, if_exception_type
    from google.cloud.bigquery_storage_v1 import types

    record = parts.record
    project, dataset, table = record.table.rsplit(".", 2)
    asked = types.ReadSession(
        table=f"projects/{project}/datasets/{dataset}/tables/{table}",
        data_format=types.DataFormat.ARROW,
        read_options=types.ReadSession.TableReadOptions(
            selected_fields=request.fields,
            row_restriction=request.row_restriction,
            arrow_serialization_options=types.ArrowSerializationOptions(
                buffer_compression=types.ArrowSerializationOptions.CompressionCodec.ZSTD
            ),
        ),
    )
    if record.snapshot_time:
        asked.table_modifiers = types.ReadSession.TableModifiers(
            snapshot_time=datetime.datetime.fromisoformat(record.snapshot_time)
        )
    with explain_errors(
        "opening a read session of",
        record.table,
        "bigquery.readsessions.create",
        remedy="check row_restriction= and snapshot_time=, and start again",
    ):
        try:
            session = client.create_read_session(
                parent=f"projects/{request.project or tables.project}",
                read_session=asked,
                max_stream_count=request.max_streams,
                timeout=request.total_timeout_seconds,
                retry=Retry(
                    predicate=if_exception_type(
                        *(api.InternalServerError, api.ServiceUnavailable, api.GatewayTimeout),
                        *(api.Unknown, api.TooManyRequests),
                    ),
                    timeout=request.total_timeout_seconds,
                ),
            )
        except (api.NotFound, api.BadRequest):
            # A snapshot or a result that is gone would stop every further start as well.
            parts.reset()
            raise
    refuse_excess(record.table, session.estimated_total_bytes_scanned, request.max_bytes)
    # Serialized again, without what follows: some servers send the end of a stream with it.
    schema = pyarrow.ipc.read_schema(pyarrow.py_buffer(session.arrow_schema.serialized_schema))
    # proto-plus gives a datetime where its annotations say Timestamp.
    expires = cast("datetime.datetime | None", session.expire_time)
    record.session = ReadSession(
        streams=[stream.name for stream in session.streams],
        schema=schema.serialize().to_pybytes().hex(),
        expires=expires.isoformat() if expires else "",
        num_rows=session.estimated_row_count,
        num_bytes=session.estimated_total_bytes_scanned,
    )
    parts.save_record()
    logger.info(
        "reading about %s rows of %s: BigQuery scans %s in %d columns",
        f"{record.session.num_rows:,}",
        record.table,
        show_bytes(record.session.num_bytes, binary=True),
        len(request.fields),
    )
    return record.session


def _refuse_expired(session: ReadSession) -> None:
    now = datetime.datetime.now(datetime.UTC)
    if session.expires and datetime.datetime.fromisoformat(session.expires) <= now:
        raise SessionExpiredError("the read session has expired")


class _SpoolRun:
    """Reads the streams of one session at once, one thread for each, until all are whole."""

    def __init__(
        self,
        client: BigQueryReadClient,
        parts: PartFolder,
        session: ReadSession,
        opened: list[Part],
        request: ReadRequest,
    ) -> None:
        self._client = client
        self._parts = parts
        self._session = session
        self._opened = opened
        self._request = request
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._calls: dict[int, ReadRowsStream] = {}
        self._outcomes: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def run(self, missing: list[int]) -> None:
        """Read the rest of the streams of these numbers; fewer rows than promised are an error."""
        self._read_streams(missing)
        record = self._parts.record
        if _count_lacking(self._opened, max(record.num_rows or 0, self._session.num_rows)):
            # The end of a call is not always that of its stream: each is asked for more, once.
            self._count_repeat()
            self._read_streams(list(range(len(self._opened))))
        if _count_lacking(self._opened, record.num_rows):
            num_rows = sum(part.num_rows for part in self._opened)
            raise SourceError(
                f"BigQuery sent {num_rows:,} rows of {record.table}, which holds "
                f"{record.num_rows:,}; start again, and what is read already is kept. If a row "
                "access policy hides the others from you, give row_restriction='TRUE'"
            )
        num_rows = sum(part.num_rows for part in self._opened)
        if record.is_exact and num_rows > (record.num_rows or 0):
            # A table is counted anew: rows may have been added just then.
            (self._parts.drop_session if record.job else self._parts.reset)()
            raise SourceError(
                f"BigQuery sent {num_rows:,} rows of a table that held {record.num_rows:,}, so "
                "that some came twice or were added just then; start again: it is read anew"
            )

    def _read_streams(self, missing: list[int]) -> None:
        self._stopped.clear()
        # Daemons: a thread that waits for a silent server would keep the interpreter alive.
        threads = [
            threading.Thread(target=self._work, args=(number,), daemon=True) for number in missing
        ]
        for thread in threads:
            thread.start()
        try:
            for _ in threads:
                outcome = self._outcomes.get()
                if outcome is not None:
                    raise outcome
        finally:
            with self._lock:
                self._stopped.set()
                calls = list(self._calls.values())
            for call in calls:
                call.cancel()
            end = time.monotonic() + _CLOSING_SECONDS
            for thread in threads:
                thread.join(max(0.0, end - time.monotonic()))

    def _work(self, number: int) -> None:
        try:
            with explain_errors(
                "reading", self._parts.record.table, "bigquery.readsessions.getData"
            ):
                self._read_stream(number)
        except BaseException as error:  # noqa: BLE001 - raised again in the reading thread
            self._outcomes.put(error)
        else:
            self._outcomes.put(None)

    def _read_stream(self, number: int) -> None:
        """Read one stream to its end, taking it up again where it broke off."""
        import google.api_core.exceptions as api

        part = self._opened[number]
        num_damaged = 0
        wait_seconds = _FIRST_WAIT_SECONDS
        request = self._request
        call_seconds = request.attempt_timeout_seconds
        last_news = time.monotonic()
        while not self._stopped.is_set():
            num_rows = part.num_rows
            left_seconds = max(0.001, last_news + request.total_timeout_seconds - time.monotonic())
            try:
                if self._read_on(number, part, min(call_seconds, left_seconds)):
                    return
            except (api.ServerError, api.TooManyRequests, api.Aborted) as error:
                refuse_lasting(error)
                call_seconds *= 2
                if part.num_rows > num_rows:
                    wait_seconds, last_news = _FIRST_WAIT_SECONDS, time.monotonic()
                    call_seconds = request.attempt_timeout_seconds
                if time.monotonic() - last_news >= request.total_timeout_seconds:
                    raise
            except (api.OutOfRange, api.InvalidArgument):
                if self._session.whole.get(str(number)) != part.num_rows:
                    raise
                return  # asked for more at its end
            except DamagedBatchError:
                num_damaged = 1 if part.num_rows > num_rows else num_damaged + 1
                if num_damaged == _MAX_DAMAGED:
                    raise SourceError(
                        f"what BigQuery sends of {self._parts.record.table} after row "
                        f"{part.num_rows:,} of a stream is damaged, {_MAX_DAMAGED} times in a "
                        "row; look for a proxy on the way, or update pyarrow, and start again: "
                        "what is read already is kept"
                    ) from None
            except (api.NotFound, api.FailedPrecondition) as error:
                # Seen as FAILED_PRECONDITION "session expired at ..." by users of other clients:
                # Source: https://github.com/GoogleCloudDataproc/spark-bigquery-connector/issues/1316
                if isinstance(error, api.NotFound) or "expired" in quote(error):
                    raise SessionExpiredError("the read session has expired") from None
                raise
            self._count_repeat()
            self._stopped.wait(min(random.uniform(0, wait_seconds), left_seconds))
            wait_seconds = min(2 * wait_seconds, _LONGEST_WAIT_SECONDS)

    def _read_on(self, number: int, part: Part, seconds: float) -> bool:
        """Read on from where the part ends; True at the end of the stream."""
        import google.api_core.exceptions as api

        until = time.monotonic() + seconds

        def check_time(*wait: Any) -> None:
            if wait:
                self._count_repeat()
            if time.monotonic() > until:  # the client begins further calls by itself
                raise api.DeadlineExceeded("the calls that are one attempt took too long")

        # Without its own retry, which would wait for a day: the client still takes up a stream
        # that breaks off after it has brought rows.
        call = self._client.read_rows(
            self._session.streams[number],
            part.num_rows,
            retry=None,
            timeout=seconds,
            retry_delay_callback=check_time,
        )
        with self._lock:
            self._calls[number] = call
        for response in call:
            with self._lock:
                if self._stopped.is_set():
                    return True
            check_time()
            if response.row_count:
                part.append(
                    response.arrow_record_batch.serialized_record_batch, response.row_count
                )
        if not self._stopped.is_set():
            part.sync()
            with self._lock:
                self._session.whole[str(number)] = part.num_rows
                self._parts.save_record()
        return True

    def _count_repeat(self) -> None:
        with self._lock:
            self._parts.record.num_repeats += 1
