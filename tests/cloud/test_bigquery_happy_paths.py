"""Plain calls of the official clients, against our local server and one that we did not write.

Our server would pass its own idea of BigQuery; the independent emulator checks that idea where it
can. It has an environment of its own, whose Python ``GEMMA_TUNER_BQEMULATOR_PYTHON`` names;
``README.md`` beside this file says how to make it. Where the two differ, ``KNOWN_DIFFERENCES``
says how, tests hold both to it, and the README shows it as a table.
"""

import base64
import contextlib
import datetime
import json
import os
import queue
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pyarrow
import pyarrow.ipc
import pytest
from google.api_core import exceptions
from google.api_core.client_options import ClientOptions
from google.auth.credentials import AnonymousCredentials
from google.cloud import bigquery, bigquery_storage
from google.cloud.bigquery import SchemaField
from google.cloud.bigquery_storage_v1 import types
from google.cloud.bigquery_storage_v1.services.big_query_read.transports import (
    BigQueryReadGrpcTransport,
)

from gemma_tuner.testing.cloud.bigquery.server import BigQueryServer
from tests.read_sessions import open_session

PYTHON = "GEMMA_TUNER_BQEMULATOR_PYTHON"
MISSING = (
    "NOT TESTED AGAINST AN INDEPENDENT SERVER: "
    f"{PYTHON} does not name the Python of an environment with bqemulator"
)
SETUP = "import bqemulator, duckdb_extensions; duckdb_extensions.import_extension('spatial')"
START_SECONDS = 60

TABLE = "proj.ds.t"
NUM_ROWS = 1000
SCHEMA = [
    SchemaField("id", "INT64"),
    SchemaField("text", "STRING"),
    SchemaField("uri", "STRING"),
    SchemaField("ts", "TIMESTAMP"),
    SchemaField("score", "FLOAT64"),
    SchemaField("blob", "BYTES"),
    SchemaField("tags", "STRING", mode="REPEATED"),
    SchemaField(
        "msg",
        "RECORD",
        mode="REPEATED",
        fields=[SchemaField("role", "STRING"), SchemaField("content", "STRING")],
    ),
    SchemaField("meta", "JSON"),
]


@dataclass
class Clients:
    rest: bigquery.Client
    read: bigquery_storage.BigQueryReadClient


@contextlib.contextmanager
def run_ours():
    pytest.importorskip("duckdb", reason="NOT TESTED: SQL needs the package duckdb")
    with BigQueryServer() as server:
        yield Clients(server.client("proj"), server.read_client())


@contextlib.contextmanager
def run_emulator(home):
    python = os.environ.get(PYTHON)
    if not python or not Path(python).is_file():
        pytest.skip(MISSING)
    # A home of its own: DuckDB keeps the extension there that the emulator would download.
    environment = {"HOME": str(home), "PATH": os.environ.get("PATH", "")}
    subprocess.run([python, "-c", SETUP], env=environment, check=True, capture_output=True)
    process = subprocess.Popen(
        [python, "-m", "bqemulator", "start", "--rest-port", "0", "--grpc-port", "0"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    channel = None
    try:
        ports = wait_for_ports(process)
        client = bigquery.Client(
            project="proj",
            credentials=AnonymousCredentials(),
            client_options=ClientOptions(api_endpoint=f"http://127.0.0.1:{ports['rest.listen']}"),
        )
        channel = grpc.insecure_channel(
            f"127.0.0.1:{ports['grpc.listen']}",
            options=[("grpc.max_receive_message_length", -1)],
        )
        transport = BigQueryReadGrpcTransport(channel=channel)
        yield Clients(client, bigquery_storage.BigQueryReadClient(transport=transport))
        client.close()
    finally:
        if channel is not None:
            channel.close()
        process.terminate()
        process.wait()
        process.stdout.close()


def wait_for_ports(process):
    """Read the ports from what the emulator logs; go on reading, so that its pipe never fills."""
    lines = queue.Queue()

    def drain():
        with contextlib.suppress(ValueError):  # closed while it was read
            for line in process.stdout:
                lines.put(line)

    threading.Thread(target=drain, daemon=True).start()
    ports, said, deadline = {}, [], time.monotonic() + START_SECONDS
    while len(ports) < 2:
        try:
            line = lines.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            pytest.fail(f"bqemulator did not start in {START_SECONDS} s: {''.join(said)[-2000:]}")
        said.append(line)
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            if entry["event"] in ("rest.listen", "grpc.listen"):
                ports[entry["event"]] = entry["port"]
    return ports


@pytest.fixture(scope="module", params=["ours", "bqemulator"])
def server_and_clients(request, tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    with run_ours() if request.param == "ours" else run_emulator(home) as clients:
        clients.rest.create_dataset("ds")
        clients.rest.create_table(bigquery.Table(TABLE, schema=SCHEMA))
        rows = [make_row(index) for index in range(NUM_ROWS)]
        assert clients.rest.insert_rows_json(TABLE, rows) == []
        yield request.param, clients


def make_row(index):
    return {
        "id": index,
        "text": f"row {index} " + "x" * 200,
        "uri": f"gs://b/{index}.jpg",
        "ts": "2026-01-01T00:00:00Z",
        "score": index / 7,
        "blob": base64.b64encode(bytes([index % 256]) * 8).decode(),
        "tags": ["a", "b"],
        "msg": [{"role": "user", "content": "hi"}, {"role": "model", "content": "yo"}],
        "meta": json.dumps({"k": index}),
    }


# --- calls -----------------------------------------------------------------------------------


def answer(function, *arguments, **keywords) -> Any:
    """What a call returns, or the name of its error."""
    try:
        return function(*arguments, **keywords)
    except exceptions.GoogleAPIError as error:
        return type(error).__name__


def query(clients, sql, **config):
    return clients.rest.query(sql, job_config=bigquery.QueryJobConfig(**config))


def values(clients, sql, **config):
    return answer(
        lambda: [tuple(row.values()) for row in query(clients, sql, **config).result(retry=None)]
    )


def read(clients, stream, offset=0):
    messages = clients.read.read_rows(stream.name, offset=offset)
    batches, schema = [], None
    for message in messages:
        if schema is None:
            schema = pyarrow.ipc.read_schema(
                pyarrow.py_buffer(message.arrow_schema.serialized_schema)
            )
        packed = pyarrow.py_buffer(message.arrow_record_batch.serialized_record_batch)
        batches.append(pyarrow.ipc.read_record_batch(packed, schema))
    return pyarrow.Table.from_batches(batches, schema)


def count_rows(clients, session):
    return sum(read(clients, stream).num_rows for stream in session.streams)


def session_of_columns(clients):
    session = open_session(
        clients.read, TABLE, selected_fields=["uri", "id"], row_restriction='text LIKE "row 99%"'
    )
    table = read(clients, session.streams[0])
    return sorted(table.column_names), sorted(table["id"].to_pylist())


def measure_pages(clients):
    listing = clients.rest.list_rows(TABLE, page_size=300)
    return [page.num_items for page in listing.pages]


def list_few(clients):
    rows = clients.rest.list_rows(
        TABLE, start_index=990, max_results=2, selected_fields=SCHEMA[:2]
    )
    return [(row["id"], row["text"][:7], len(row)) for row in rows]


def read_one_row(clients):
    (row,) = clients.rest.list_rows(TABLE, start_index=3, max_results=1)
    return row["ts"], row["blob"], row["tags"], row["msg"][1], row["meta"]


def describe_table(clients):
    table = clients.rest.get_table(TABLE)
    return table.num_rows, table.num_bytes > 0, bool(table.etag), [f.name for f in table.schema]


def insert_wrong_row(clients):
    clients.rest.create_table(bigquery.Table("proj.ds.wrong", schema=SCHEMA[:1]))
    errors = answer(clients.rest.insert_rows_json, "proj.ds.wrong", [{"nope": 1}])
    return [error["index"] for error in errors] if isinstance(errors, list) else errors


def read_arrow_types(clients):
    schema = open_session(clients.read, TABLE).arrow_schema.serialized_schema
    schema = pyarrow.ipc.read_schema(pyarrow.py_buffer(schema))
    return {field.name: str(field.type) for field in schema}


def name_extension(clients):
    schema = open_session(clients.read, TABLE).arrow_schema.serialized_schema
    field = pyarrow.ipc.read_schema(pyarrow.py_buffer(schema)).field("meta")
    return (field.metadata or {}).get(b"ARROW:extension:name")


def read_from_offset(clients):
    (stream,) = open_session(clients.read, TABLE, selected_fields=["id"]).streams
    return read(clients, stream, 100).num_rows


def read_nested(clients):
    session = answer(open_session, clients.read, TABLE, selected_fields=["msg.role"])
    if isinstance(session, str):
        return session
    return read(clients, session.streams[0])["msg"][0].as_py()


def compress(clients, codec):
    def measure(session):
        messages = clients.read.read_rows(session.streams[0].name)
        return sum(len(m.arrow_record_batch.serialized_record_batch) for m in messages)

    packed = open_session(
        clients.read, TABLE, codec=types.ArrowSerializationOptions.CompressionCodec[codec]
    )
    return measure(packed) < measure(open_session(clients.read, TABLE)) / 2


def split(clients):
    (stream,) = open_session(clients.read, TABLE, selected_fields=["id"]).streams
    parts = clients.read.split_read_stream(
        types.SplitReadStreamRequest(name=stream.name, fraction=0.5)
    )
    both = (parts.primary_stream, parts.remainder_stream)
    ids = [row for part in both for row in read(clients, part)["id"].to_pylist()]
    return len(ids), len(set(ids))


def count_streams(clients):
    session = open_session(clients.read, TABLE, streams=2, selected_fields=["id"])
    return len(session.streams) <= 2, count_rows(clients, session)  # it may be fewer


def estimate_session(clients):
    session = open_session(clients.read, TABLE)
    return session.estimated_row_count, session.estimated_total_bytes_scanned > 0


def see_expiry(clients):
    expires = open_session(clients.read, TABLE).expire_time
    return bool(expires and expires > datetime.datetime.now(datetime.UTC))


def add_row_after_a_moment(clients, table):
    """Make a table of one row, and add another later; return a moment between."""
    clients.rest.create_table(bigquery.Table(table, schema=SCHEMA[:1]))
    clients.rest.insert_rows_json(table, [{"id": 1}])
    time.sleep(0.5)
    between = datetime.datetime.now(datetime.UTC)
    time.sleep(0.5)
    clients.rest.insert_rows_json(table, [{"id": 2}])
    return between


def read_snapshot(clients):
    between = add_row_after_a_moment(clients, "proj.ds.snapshot")
    session = open_session(clients.read, "proj.ds.snapshot", snapshot=between)
    return count_rows(clients, session)


def travel_in_time(clients):
    between = add_row_after_a_moment(clients, "proj.ds.travel")
    return values(
        clients,
        "SELECT COUNT(*) FROM `proj.ds.travel` FOR SYSTEM_TIME AS OF "
        f"TIMESTAMP '{between.isoformat()}'",
    )


def read_result(clients):
    job = query(clients, "SELECT id FROM `proj.ds.t` WHERE MOD(id, 2) = 0")
    job.result()
    kept = job.destination
    table = f"{kept.project}.{kept.dataset_id}.{kept.table_id}"
    return answer(lambda: count_rows(clients, open_session(clients.read, table)))


def read_destination(clients):
    query(clients, "SELECT id FROM `proj.ds.t` WHERE id < 7", destination="proj.ds.kept").result()
    return answer(lambda: count_rows(clients, open_session(clients.read, "proj.ds.kept")))


def dry_run(clients):
    job = query(clients, "SELECT text FROM `proj.ds.t`", dry_run=True, use_query_cache=False)
    return job.state, job.total_bytes_processed > 200 * NUM_ROWS


def query_with_parameters(clients):
    return values(
        clients,
        "SELECT id FROM ds.t WHERE id IN UNNEST(@ids) AND score > @least ORDER BY id",
        default_dataset="proj.ds",
        query_parameters=[
            bigquery.ArrayQueryParameter("ids", "INT64", [3, 5, 0]),
            bigquery.ScalarQueryParameter("least", "FLOAT64", 0.1),
        ],
    )


# What to do, and what BigQuery answers by its documentation.
PATHS = {
    "metadata of a table": (
        describe_table,
        (NUM_ROWS, True, True, [field.name for field in SCHEMA]),
    ),
    "a table that is not there": (
        lambda clients: answer(clients.rest.get_table, "proj.ds.none"),
        "NotFound",
    ),
    "make a dataset twice": (
        lambda clients: answer(clients.rest.create_dataset, "ds"),
        "Conflict",
    ),
    "pages of 300 rows": (measure_pages, [300, 300, 300, 100]),
    "rows by index, some columns": (list_few, [(990, "row 990", 2), (991, "row 991", 2)]),
    "values of all types": (
        read_one_row,
        (
            datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC),
            bytes([3]) * 8,
            ["a", "b"],
            {"role": "model", "content": "yo"},
            {"k": 3},
        ),
    ),
    "insert a row with an unknown column": (insert_wrong_row, [0]),
    "query": (
        lambda clients: values(clients, "SELECT SUM(id), COUNT(*) FROM `proj.ds.t`"),
        [(sum(range(NUM_ROWS)), NUM_ROWS)],
    ),
    "query with parameters": (query_with_parameters, [(3,), (5,)]),
    "positional parameters": (
        lambda clients: values(
            clients,
            "SELECT id FROM ds.t WHERE id = ?",
            query_parameters=[bigquery.ScalarQueryParameter(None, "INT64", 4)],
        ),
        [(4,)],
    ),
    "UNNEST of a column": (
        lambda clients: values(
            clients, "SELECT m.role FROM ds.t AS t, UNNEST(t.msg) AS m WHERE t.id = 1"
        ),
        [("user",), ("model",)],
    ),
    "STRUCT and array literals": (
        lambda clients: values(
            clients, "SELECT [STRUCT('user' AS role, uri AS content)] AS m FROM ds.t WHERE id = 1"
        ),
        [([{"role": "user", "content": "gs://b/1.jpg"}],)],
    ),
    "* EXCEPT, SAFE_CAST, OFFSET": (
        lambda clients: values(
            clients,
            "SELECT tags[OFFSET(1)], SAFE_CAST(text AS INT64) "
            "FROM (SELECT * EXCEPT (blob) FROM ds.t) WHERE id = 1",
        ),
        [("b", None)],
    ),
    "JSON_VALUE": (
        lambda clients: values(clients, "SELECT JSON_VALUE(meta, '$.k') FROM ds.t WHERE id = 9"),
        [("9",)],
    ),
    "an unknown column": (
        lambda clients: values(clients, "SELECT nope FROM ds.t"),
        "BadRequest",
    ),
    "an unknown table": (lambda clients: values(clients, "SELECT 1 FROM ds.none"), "NotFound"),
    "FOR SYSTEM_TIME AS OF": (travel_in_time, [(1,)]),
    "a dry run counts bytes": (dry_run, ("DONE", True)),
    "maximum_bytes_billed": (
        lambda clients: values(
            clients, "SELECT text FROM ds.t WHERE id < 0", maximum_bytes_billed=1
        ),
        "InternalServerError",
    ),
    "a query's destination, through Storage": (read_destination, 7),
    "a query's own result, through Storage": (read_result, NUM_ROWS // 2),
    "a session of some rows and columns": (
        session_of_columns,
        (["id", "uri"], [99, *range(990, 1000)]),
    ),
    "a session of an unknown table": (
        lambda clients: answer(open_session, clients.read, "proj.ds.none"),
        "NotFound",
    ),
    "a session of an unknown column": (
        lambda clients: answer(open_session, clients.read, TABLE, selected_fields=["nope"]),
        "InvalidArgument",
    ),
    "estimates of a session": (estimate_session, (NUM_ROWS, True)),
    "expiry of a session": (see_expiry, True),
    "streams asked for and rows in them": (count_streams, (True, NUM_ROWS)),
    "Arrow types": (
        read_arrow_types,
        {
            "id": "int64",
            "text": "string",
            "uri": "string",
            "ts": "timestamp[us, tz=UTC]",
            "score": "double",
            "blob": "binary",
            "tags": "list<item: string>",
            "msg": "list<item: struct<role: string, content: string>>",
            "meta": "string",
        },
    ),
    "JSON is marked as JSON": (name_extension, b"google:sqlType:json"),
    "read from an offset": (read_from_offset, NUM_ROWS - 100),
    "nested columns": (read_nested, [{"role": "user"}, {"role": "model"}]),
    "LZ4": (lambda clients: compress(clients, "LZ4_FRAME"), True),
    "ZSTD": (lambda clients: compress(clients, "ZSTD"), True),
    "a sample of a tenth": (
        lambda clients: (
            50 < count_rows(clients, open_session(clients.read, TABLE, sample_percentage=10)) < 150
        ),
        True,
    ),
    "a snapshot": (read_snapshot, 1),
    "split a stream": (split, (NUM_ROWS, NUM_ROWS)),
}

# What bqemulator 1.4.0 answers instead, and in words.
KNOWN_DIFFERENCES = {
    "metadata of a table": (
        (NUM_ROWS, False, True, [field.name for field in SCHEMA]),
        "`numBytes` is 0",
    ),
    "insert a row with an unknown column": ([], "it is taken"),
    "a dry run counts bytes": (("DONE", False), "no bytes are counted"),
    "maximum_bytes_billed": ([], "the limit is ignored"),
    "a query's destination, through Storage": ("NotFound", "the table is not made"),
    "a query's own result, through Storage": ("NotFound", "Storage does not find it"),
    "a session of an unknown column": ("NotFound", "it is `NOT_FOUND`"),
    "estimates of a session": ((0, True), "the rows are not estimated"),
    "expiry of a session": (False, "sessions have no `expire_time`"),
    "Arrow types": (
        {
            "id": "int64",
            "text": "string",
            "uri": "string",
            "ts": "timestamp[us, tz=UTC]",
            "score": "double",
            "blob": "binary",
            "tags": "list<l: string>",
            "msg": "list<l: struct<role: string, content: string>>",
            "meta": "string",
        },
        "the items of a list are called `l`",
    ),
    "JSON is marked as JSON": (None, "it is plain text"),
    "read from an offset": (NUM_ROWS, "the offset is ignored"),
    "nested columns": ("InvalidArgument", "they are refused"),
    "LZ4": (False, "nothing is compressed"),
    "ZSTD": (False, "nothing is compressed"),
    "a sample of a tenth": (False, "the share is ignored: all rows"),
    "a snapshot": (2, "the time is ignored: the newest rows"),
}


def draw_table():
    """The differences, in Markdown."""
    rows = [f"| {path} | {words} |" for path, (_, words) in KNOWN_DIFFERENCES.items()]
    return "\n".join(["| call | bqemulator 1.4.0 |", "| --- | --- |", *rows])


@pytest.mark.parametrize("path", PATHS)
def test_the_server_answers_as_bigquery_does(server_and_clients, path):
    server, clients = server_and_clients
    do, expected = PATHS[path]
    if server != "ours" and path in KNOWN_DIFFERENCES:
        # Where this fails, the emulator has learnt something: take the row out.
        expected, _ = KNOWN_DIFFERENCES[path]
    assert do(clients) == expected


def test_the_differences_are_printed_and_in_the_readme(capsys):
    assert set(KNOWN_DIFFERENCES) < set(PATHS)
    with capsys.disabled():
        num_differences, num_calls = len(KNOWN_DIFFERENCES), len(PATHS)
        sys.stdout.write(f"\nOf {num_calls} calls, bqemulator differs in {num_differences}:\n")
        sys.stdout.write(f"{draw_table()}\n")
    assert draw_table() in (Path(__file__).parent / "README.md").read_text()
