"""The local BigQuery server's Storage interface: ``BigQueryRead`` over gRPC.

google-cloud-bigquery-storage ships no servicer stubs, so a generic handler routes its published
message types. Rows keep their order within a stream, and streams are consecutive parts of the
table; BigQuery promises neither across sessions.
"""

from __future__ import annotations

import datetime
import itertools
import random
import re
import uuid
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass
from typing import Any, NoReturn, cast

import grpc
import pyarrow
import pyarrow.ipc
from google.cloud.bigquery_storage_v1 import types
from google.protobuf import any_pb2
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from gemma_tuner.testing.cloud.bigquery.tables import (
    REASONS,
    Call,
    Catalogue,
    RefusedError,
    TableName,
    now,
    refusing_sql_without_packages,
)

_SERVICE = "google.cloud.bigquery.storage.v1.BigQueryRead"
_TABLE_PATH = re.compile("projects/([^/]+)/datasets/([^/]+)/tables/([^/]+)")
_CODECS = {"LZ4_FRAME": "lz4", "ZSTD": "zstd"}
_MAX_THREADS = 32  # a stalled call holds one


@dataclass(slots=True)
class _Session:
    name: str
    table: TableName
    expires: datetime.datetime
    codec: str | None


@dataclass(slots=True)
class _Stream:
    session: _Session
    rows: pyarrow.Table


class ReadService:
    """Answers CreateReadSession, ReadRows and SplitReadStream."""

    def __init__(
        self, catalogue: Catalogue, rows_per_message: int, session_lifetime: datetime.timedelta
    ) -> None:
        self._rows_per_message = rows_per_message
        self._catalogue = catalogue
        self._session_lifetime = session_lifetime
        self._sessions: list[_Session] = []
        self._streams: dict[str, _Stream] = {}

    def start(self) -> tuple[grpc.Server, int]:
        """Serve on a free port of 127.0.0.1; return the server and its port."""
        handlers: dict[str, Any] = {
            "CreateReadSession": grpc.unary_unary_rpc_method_handler(
                _refusing(self._create_session),
                types.CreateReadSessionRequest.deserialize,
                types.ReadSession.serialize,
            ),
            "ReadRows": grpc.unary_stream_rpc_method_handler(
                self._answer_read,
                types.ReadRowsRequest.deserialize,
                types.ReadRowsResponse.serialize,
            ),
            "SplitReadStream": grpc.unary_unary_rpc_method_handler(
                _refusing(self._split),
                types.SplitReadStreamRequest.deserialize,
                types.SplitReadStreamResponse.serialize,
            ),
        }
        server = grpc.server(
            futures.ThreadPoolExecutor(_MAX_THREADS, "bigquery-read"),
            handlers=[grpc.method_handlers_generic_handler(_SERVICE, handlers)],
            options=[("grpc.max_send_message_length", -1)],
        )
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        return server, port

    def expire_sessions(self) -> None:
        """End the life of every session that there is."""
        with self._catalogue.lock:
            for session in self._sessions:
                session.expires = min(session.expires, now())

    # --- the three methods ---

    def _create_session(self, request: types.CreateReadSessionRequest) -> types.ReadSession:
        asked = request.read_session
        options = asked.read_options
        path = _TABLE_PATH.fullmatch(asked.table)
        if path is None:
            raise RefusedError("invalid", f"request failed: invalid table '{asked.table}'")
        name = TableName(*path.groups())
        modifiers = asked.table_modifiers
        # proto-plus gives a datetime where its stubs say Timestamp.
        snapshot = cast("datetime.datetime | None", modifiers.snapshot_time)
        codec = options.arrow_serialization_options.buffer_compression.name
        call = Call(
            "CreateReadSession",
            str(name),
            selected_fields=tuple(options.selected_fields),
            row_restriction=options.row_restriction,
            snapshot_time=snapshot,
            sample_percentage=options.sample_percentage or None,
            compression=codec if codec in _CODECS else "",
        )
        self._catalogue.enter(call)
        self._check_permissions(name, request.parent, asked.table)
        if asked.data_format != types.DataFormat.ARROW:
            raise RefusedError("notImplemented", "this server reads in the format ARROW only")
        if options.response_compression_codec:
            raise RefusedError("notImplemented", "this server compresses buffers only")
        stored = self._catalogue.find(name)
        if stored.view_sql is not None:
            # The wording is ours, as far as we know.
            raise RefusedError(
                "invalid",
                "request failed: non-table entities cannot be read with the storage API",
            )
        rows = _choose(stored.version_at(snapshot).content, options)
        with self._catalogue.lock:
            return self._open(request, name, rows, _CODECS.get(codec))

    def _open(
        self,
        request: types.CreateReadSessionRequest,
        table: TableName,
        rows: pyarrow.Table,
        codec: str | None,
    ) -> types.ReadSession:
        asked = request.read_session
        name = f"{request.parent}/locations/us/sessions/{uuid.uuid4().hex}"
        session = _Session(name, table, now() + self._session_lifetime, codec)
        self._sessions.append(session)
        num_streams = min(request.max_stream_count or 1, rows.num_rows)
        ends = [rows.num_rows * i // max(num_streams, 1) for i in range(num_streams + 1)]
        streams = [
            self._add_stream(f"{name}/streams/{index}", session, rows.slice(start, end - start))
            for index, (start, end) in enumerate(itertools.pairwise(ends))
        ]
        return types.ReadSession(
            name=name,
            expire_time=session.expires,
            data_format=types.DataFormat.ARROW,
            arrow_schema=types.ArrowSchema(serialized_schema=_serialize_schema(rows.schema)),
            table=asked.table,
            table_modifiers=asked.table_modifiers,
            read_options=asked.read_options,
            streams=streams,
            estimated_total_bytes_scanned=rows.nbytes,
            estimated_row_count=rows.num_rows,
        )

    def _answer_read(
        self, request: types.ReadRowsRequest, context: grpc.ServicerContext
    ) -> Iterator[types.ReadRowsResponse]:
        try:
            for response in self._read(request):
                if not context.is_active():
                    return
                yield response
        except RefusedError as error:
            _refuse(context, error)

    def _read(self, request: types.ReadRowsRequest) -> Iterator[types.ReadRowsResponse]:
        name, offset = request.read_stream, request.offset
        stream = self._find(name)
        call = Call("ReadRows", str(stream.session.table), stream=name, offset=offset)
        faults = sorted(self._catalogue.log(call), key=lambda fault: fault.after_rows)
        if offset > stream.rows.num_rows:
            # Google's reference promises no code for this; the wording is ours as well.
            raise RefusedError(
                "outOfRange",
                f"there was an error operating on '{name}': offset {offset} is beyond its "
                f"{stream.rows.num_rows} rows",
            )
        schema = types.ArrowSchema(serialized_schema=_serialize_schema(stream.rows.schema))
        sent, end = 0, stream.rows.num_rows - offset
        while not self._catalogue.stopping.is_set():
            while faults and faults[0].after_rows <= sent:
                self._catalogue.strike(faults.pop(0))
            self._check_readable(name, stream)
            if sent >= end:
                return
            stop = min(sent + self._rows_per_message, end)
            if faults:
                stop = min(stop, faults[0].after_rows)
            batch = stream.rows.slice(offset + sent, stop - sent)
            yield types.ReadRowsResponse(
                row_count=batch.num_rows,
                # BigQuery sends the schema in the first response only.
                arrow_schema=None if sent else schema,
                arrow_record_batch=types.ArrowRecordBatch(
                    serialized_record_batch=_serialize(batch, stream.session.codec)
                ),
            )
            sent = stop

    def _split(self, request: types.SplitReadStreamRequest) -> types.SplitReadStreamResponse:
        name = request.name
        stream = self._find(name)
        call = Call("SplitReadStream", str(stream.session.table), stream=name)
        self._catalogue.enter(call)
        self._check_readable(name, stream)
        num_rows = stream.rows.num_rows
        cut = int(num_rows * (request.fraction or 0.5))
        if not 0 < cut < num_rows:  # documented: an empty response if it cannot be split
            return types.SplitReadStreamResponse()
        with self._catalogue.lock:
            first = self._add_stream(f"{name}.0", stream.session, stream.rows.slice(0, cut))
            second = self._add_stream(f"{name}.1", stream.session, stream.rows.slice(cut))
        return types.SplitReadStreamResponse(primary_stream=first, remainder_stream=second)

    # --- parts of them ---

    def _add_stream(self, name: str, session: _Session, rows: pyarrow.Table) -> types.ReadStream:
        self._streams[name] = _Stream(session, rows)
        return types.ReadStream(name=name)

    def _find(self, name: str) -> _Stream:
        with self._catalogue.lock:
            if name not in self._streams:
                raise RefusedError("notFound", f"there is no stream '{name}'")
            return self._streams[name]

    def _check_permissions(self, name: TableName, parent: str, table: str) -> None:
        project = parent.removeprefix("projects/")
        for resource, permission, path in (
            (project, "bigquery.readsessions.create", parent),
            (name, "bigquery.tables.getData", table),
        ):
            if self._catalogue.is_denied(resource, permission):
                # Source: github.com/PostHog/posthog/pull/99792, which quotes BigQuery.
                raise RefusedError(
                    "accessDenied",
                    f"request failed: the user does not have '{permission}' permission for "
                    f"'{path}'",
                )

    def _check_readable(self, name: str, stream: _Stream) -> None:
        if stream.session.expires <= now():
            # Source: github.com/GoogleCloudDataproc/spark-bigquery-connector/issues/684, which
            # quotes BigQuery; not verified against the service itself.
            raise RefusedError(
                "sessionExpired",
                f"there was an error operating on '{name}': session expired at "
                f"{stream.session.expires.isoformat(timespec='seconds')}",
            )
        if self._catalogue.is_denied(name.split("/")[1], "bigquery.readsessions.getData"):
            # Source: github.com/googleapis/google-cloud-go/pull/8666, which quotes BigQuery.
            raise RefusedError(
                "accessDenied",
                f"there was an error operating on '{name}': the user does not have "
                f"'bigquery.readsessions.getData' permission for '{name}'",
            )


def _refusing(answer: Callable[[Any], Any]) -> Callable[[Any, grpc.ServicerContext], Any]:
    def respond(request: Any, context: grpc.ServicerContext) -> Any:
        try:
            return answer(request)
        except RefusedError as error:
            _refuse(context, error)

    return respond


def _refuse(context: grpc.ServicerContext, error: RefusedError) -> NoReturn:
    """End the call with the gRPC status of a refusal."""
    code: grpc.StatusCode = getattr(grpc.StatusCode, REASONS[error.reason][1])
    details = []
    if error.retry_after_seconds is not None:
        delay = Duration()
        delay.FromTimedelta(datetime.timedelta(seconds=error.retry_after_seconds))
        details.append(any_pb2.Any())
        details[0].Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    status = status_pb2.Status(code=code.value[0], message=str(error), details=details)
    context.abort_with_status(rpc_status.to_status(status))


def _choose(content: pyarrow.Table, options: types.ReadSession.TableReadOptions) -> pyarrow.Table:
    """Return the rows and columns that a session reads, columns in the table's order."""
    if options.row_restriction:
        with refusing_sql_without_packages():
            from gemma_tuner.testing.cloud.bigquery.query import select_rows  # noqa: PLC0415
        content = select_rows(content, options.row_restriction)
    if options.sample_percentage:
        # BigQuery samples blocks, ours rows; the same ones each time, so that tests can count.
        draw = random.Random(0)
        share = options.sample_percentage / 100
        content = content.filter([draw.random() < share for _ in range(content.num_rows)])
    paths = [tuple(path.split(".")) for path in options.selected_fields]
    if paths:
        fields = _prune(list(content.schema), paths)
        content = content.select([field.name for field in fields]).cast(pyarrow.schema(fields))
    return content.combine_chunks()


def _prune(fields: list[pyarrow.Field], paths: list[tuple[str, ...]]) -> list[pyarrow.Field]:
    """Keep the fields that paths name, and beneath structs only what they name."""
    unknown = {path[0] for path in paths} - {field.name for field in fields}
    if unknown:
        # The wording is ours, as far as we know.
        raise RefusedError(
            "invalid",
            "request failed: the following selected fields do not exist in the table schema: "
            + ", ".join(sorted(unknown)),
        )
    kept = []
    for field in fields:
        below = [path[1:] for path in paths if path[0] == field.name]
        if not below:
            continue
        kept.append(field if () in below else field.with_type(_prune_type(field, below)))
    return kept


def _prune_type(field: pyarrow.Field, paths: list[tuple[str, ...]]) -> pyarrow.DataType:
    kind = field.type
    if pyarrow.types.is_list(kind):
        return pyarrow.list_(kind.value_field.with_type(_prune_type(kind.value_field, paths)))
    if pyarrow.types.is_struct(kind):
        return pyarrow.struct(_prune(list(kind), paths))
    raise RefusedError("invalid", f"request failed: field {field.name} has no fields of its own")


def _serialize_schema(schema: pyarrow.Schema) -> bytes:
    return schema.serialize().to_pybytes()


def _serialize(rows: pyarrow.Table, codec: str | None) -> bytes:
    """Serialize rows as one record batch message, without the schema message before it."""
    (batch,) = rows.combine_chunks().to_batches()
    sink = pyarrow.BufferOutputStream()
    options = pyarrow.ipc.IpcWriteOptions(compression=codec)
    with pyarrow.ipc.new_stream(sink, batch.schema, options=options) as writer:
        writer.write_batch(batch)
    messages = pyarrow.ipc.MessageReader.open_stream(sink.getvalue())
    messages.read_next_message()
    return messages.read_next_message().serialize().to_pybytes()
