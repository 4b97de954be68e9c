"""The local BigQuery server, asked by the official clients only."""

import datetime
import decimal
import sys
import threading
import time

import pyarrow
import pyarrow.ipc
import pytest
from google.api_core import exceptions
from google.cloud import bigquery
from google.cloud.bigquery_storage_v1 import types
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemma_tuner.errors import ConfigError
from gemma_tuner.testing.cloud.bigquery.server import BigQueryFault, BigQueryServer
from gemma_tuner.testing.cloud.bigquery.values import json_field
from tests.read_sessions import open_session

duckdb = pytest.importorskip("duckdb", reason="NOT TESTED: SQL needs the package duckdb")

BIGQUERY = "gemma_tuner.testing.cloud.bigquery"
TABLE = "my-project.support.tickets"
MEBIBYTE = 1 << 20
T0 = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
DAY = datetime.timedelta(days=1)
NUM_ROWS = 25


def make_rows(num_rows=NUM_ROWS):
    rows = range(num_rows)
    return pyarrow.table(
        [
            pyarrow.array(rows),
            pyarrow.array([f"question {i}" for i in rows]),
            pyarrow.array([i / 7 for i in rows]),
            pyarrow.array([i % 2 == 0 for i in rows]),
            pyarrow.array([bytes([i % 256]) * 3 for i in rows]),
            pyarrow.array([T0 + i * DAY for i in rows]),
            pyarrow.array([(T0 + i * DAY).date() for i in rows]),
            pyarrow.array([decimal.Decimal(i) / 4 for i in rows], pyarrow.decimal128(10, 2)),
            pyarrow.array([f'{{"k": {i}}}' for i in rows]),
            pyarrow.array([["a", "b"][: i % 3] for i in rows]),
            pyarrow.array(
                [
                    [{"role": "user", "content": f"q{i}"}, {"role": "model", "content": "a"}]
                    for i in rows
                ]
            ),
            pyarrow.array(
                [
                    {
                        "uri": f"gs://b/{i}.png",
                        "version": str(i),
                        "authorizer": None,
                        "details": '{"gcs_metadata": {"size": 1}}',
                    }
                    for i in rows
                ]
            ),
        ],
        schema=pyarrow.schema(
            [
                ("id", pyarrow.int64()),
                ("text", pyarrow.string()),
                ("score", pyarrow.float64()),
                ("good", pyarrow.bool_()),
                ("blob", pyarrow.binary()),
                ("created", pyarrow.timestamp("us", "UTC")),
                ("day", pyarrow.date32()),
                ("price", pyarrow.decimal128(10, 2)),
                json_field("meta"),
                ("tags", pyarrow.list_(pyarrow.string())),
                (
                    "msg",
                    pyarrow.list_(
                        pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())])
                    ),
                ),
                (
                    "media",
                    pyarrow.struct(
                        [
                            ("uri", pyarrow.string()),
                            ("version", pyarrow.string()),
                            ("authorizer", pyarrow.string()),
                            ("details", pyarrow.string()),
                        ]
                    ),
                ),
            ]
        ),
    )


@pytest.fixture
def server():
    with BigQueryServer(rows_per_message=4) as server:
        server.put_table(TABLE, make_rows(), at=T0)
        yield server


@pytest.fixture
def client(server):
    return server.client("my-project")


@pytest.fixture
def read_client(server):
    return server.read_client()


def read(read_client, stream, offset=0):
    """What a stream delivers, decoded from the messages: the client's own way is deprecated."""
    batches, schema = [], None
    for message in read_client.read_rows(stream.name, offset=offset):
        if schema is None:
            schema = pyarrow.ipc.read_schema(
                pyarrow.py_buffer(message.arrow_schema.serialized_schema)
            )
        packed = message.arrow_record_batch.serialized_record_batch
        batches.append(pyarrow.ipc.read_record_batch(pyarrow.py_buffer(packed), schema))
    return pyarrow.Table.from_batches(batches) if batches else pyarrow.table({"id": []})


def read_ids(read_client, stream, offset=0):
    return read(read_client, stream, offset)["id"].to_pylist()


def query(client, sql, **config):
    return client.query(sql, job_config=bigquery.QueryJobConfig(**config))


def ids(client, sql, **config):
    return [row[0] for row in query(client, sql, **config).result()]


# --- REST: tables and rows ---------------------------------------------------------------------


def test_table_metadata(server, client):
    table = client.get_table(TABLE)
    assert (table.num_rows, table.table_type, table.modified) == (NUM_ROWS, "TABLE", T0)
    assert table.num_bytes == server.read_table(TABLE).nbytes
    kinds = {field.name: (field.field_type, field.mode) for field in table.schema}
    assert kinds == {
        "id": ("INTEGER", "NULLABLE"),
        "text": ("STRING", "NULLABLE"),
        "score": ("FLOAT", "NULLABLE"),
        "good": ("BOOLEAN", "NULLABLE"),
        "blob": ("BYTES", "NULLABLE"),
        "created": ("TIMESTAMP", "NULLABLE"),
        "day": ("DATE", "NULLABLE"),
        "price": ("NUMERIC", "NULLABLE"),
        "meta": ("JSON", "NULLABLE"),
        "tags": ("STRING", "REPEATED"),
        "msg": ("RECORD", "REPEATED"),
        "media": ("RECORD", "NULLABLE"),
    }
    before = table.etag
    assert client.get_table(TABLE).etag == before
    server.put_table(TABLE, make_rows(3), at=T0 + DAY)
    after = client.get_table(TABLE)
    assert after.etag != before
    assert (after.num_rows, after.modified, after.created) == (3, T0 + DAY, T0)


def test_rows_over_rest_have_their_values(client):
    row = dict(next(iter(client.list_rows(TABLE, start_index=5, max_results=1))).items())
    assert row == {
        "id": 5,
        "text": "question 5",
        "score": 5 / 7,
        "good": False,
        "blob": b"\5\5\5",
        "created": T0 + 5 * DAY,
        "day": datetime.date(2026, 1, 6),
        "price": decimal.Decimal("1.25"),
        "meta": {"k": 5},
        "tags": ["a", "b"],
        "msg": [{"role": "user", "content": "q5"}, {"role": "model", "content": "a"}],
        "media": {
            "uri": "gs://b/5.png",
            "version": "5",
            "authorizer": None,
            "details": '{"gcs_metadata": {"size": 1}}',
        },
    }


def test_pages_have_tokens_and_resume(server, client):
    pages, tokens = [], []
    listing = client.list_rows(TABLE, page_size=10)
    for page in listing.pages:
        pages.append([row["id"] for row in page])
        tokens.append(listing.next_page_token)
    assert [len(page) for page in pages] == [10, 10, 5]
    assert tokens[-1] is None
    again = client.list_rows(TABLE, page_size=10, page_token=tokens[0])
    assert [row["id"] for row in again] == list(range(10, NUM_ROWS))
    assert server.calls[-1].method == "tabledata.list"


def test_selected_columns_over_rest(server, client):
    fields = client.get_table(TABLE).schema[:2]
    rows = list(client.list_rows(TABLE, selected_fields=fields, start_index=20, max_results=2))
    assert [tuple(row.values()) for row in rows] == [(20, "question 20"), (21, "question 21")]
    assert server.calls[-1].selected_fields == ("id", "text")
    assert server.calls[-1].offset == 20
    assert server.calls[-1].table == TABLE


def test_datasets_and_tables_are_made(server, client):
    assert client.create_dataset("fresh").dataset_id == "fresh"
    assert client.get_dataset("fresh").project == "my-project"
    with pytest.raises(exceptions.Conflict):
        client.create_dataset("fresh")
    schema = [
        bigquery.SchemaField("id", "INT64", "REQUIRED"),
        bigquery.SchemaField("at", "TIMESTAMP"),
        bigquery.SchemaField("meta", "JSON"),
        bigquery.SchemaField("blob", "BYTES"),
        bigquery.SchemaField("tags", "STRING", "REPEATED"),
        bigquery.SchemaField(
            "msg", "RECORD", "REPEATED", fields=[bigquery.SchemaField("role", "STRING")]
        ),
    ]
    table = client.create_table(bigquery.Table("my-project.fresh.t", schema=schema))
    assert (table.schema[0].name, table.schema[0].mode) == ("id", "REQUIRED")
    row = {
        "id": 1,
        "at": "2026-02-03T04:05:06Z",
        "meta": '{"a": 1}',
        "blob": "AAE=",
        "tags": ["x"],
        "msg": [{"role": "user"}],
    }
    assert client.insert_rows_json("my-project.fresh.t", [row]) == []
    assert [dict(row.items()) for row in client.list_rows("my-project.fresh.t")] == [
        {
            "id": 1,
            "at": datetime.datetime(2026, 2, 3, 4, 5, 6, tzinfo=datetime.UTC),
            "meta": {"a": 1},
            "blob": b"\0\1",
            "tags": ["x"],
            "msg": [{"role": "user"}],
        }
    ]
    errors = client.insert_rows_json(
        "my-project.fresh.t", [{"id": 2, "nope": 1}, {"id": "x"}, {"id": 3}]
    )
    assert [error["index"] for error in errors] == [0, 1]
    assert server.read_table("my-project.fresh.t").num_rows == 1  # all or none
    client.delete_table("my-project.fresh.t")
    with pytest.raises(exceptions.NotFound, match=r"Not found: Table my-project:fresh\.t"):
        client.get_table("my-project.fresh.t")


def test_table_expiration_is_kept(client):
    table = client.get_table(TABLE)
    table.expires = T0 + 400 * DAY
    client.update_table(table, ["expires"])
    assert client.get_table(TABLE).expires == T0 + 400 * DAY


def test_views_run_and_cannot_be_listed_or_streamed(server, client, read_client):
    server.put_view("my-project.support.good", f"SELECT id FROM `{TABLE}` WHERE good")
    assert client.get_table("my-project.support.good").table_type == "VIEW"
    assert ids(client, "SELECT id FROM support.good WHERE id < 5 ORDER BY id") == [0, 2, 4]
    with pytest.raises(exceptions.BadRequest, match="type VIEW"):
        list(client.list_rows("my-project.support.good", selected_fields=[]))
    with pytest.raises(exceptions.InvalidArgument, match="non-table"):
        open_session(read_client, "my-project.support.good")


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(
        st.fixed_dictionaries(
            {
                "number": st.integers(-(2**63), 2**63 - 1) | st.none(),
                "real": st.floats() | st.none(),
                "text": st.text() | st.none(),
                "raw": st.binary() | st.none(),
                "at": st.datetimes(timezones=st.just(datetime.UTC)).map(
                    lambda t: t.replace(fold=0)
                ),
                "list": st.lists(st.text()),
            }
        ),
        min_size=1,
        max_size=5,
    )
)
def test_any_value_arrives_unchanged(server, client, rows):
    schema = pyarrow.schema(
        [
            ("number", pyarrow.int64()),
            ("real", pyarrow.float64()),
            ("text", pyarrow.string()),
            ("raw", pyarrow.binary()),
            ("at", pyarrow.timestamp("us", "UTC")),
            ("list", pyarrow.list_(pyarrow.string())),
        ]
    )
    server.put_table("p.d.t", pyarrow.Table.from_pylist(rows, schema=schema))
    got = [dict(row.items()) for row in client.list_rows("p.d.t")]
    wanted = [{name: row[name] for name in schema.names} for row in rows]
    assert repr(got) == repr(wanted)  # as text, so that NaN equals NaN


# --- queries -----------------------------------------------------------------------------------


def test_query_with_parameters(server, client):
    parameters = [
        bigquery.ScalarQueryParameter("limit", "INT64", 9),
        bigquery.ScalarQueryParameter("score", "FLOAT64", 0.1),
        bigquery.ScalarQueryParameter("good", "BOOL", True),
        bigquery.ScalarQueryParameter("blob", "BYTES", b"\0\0\0"),
        bigquery.ScalarQueryParameter("since", "TIMESTAMP", T0 + 2 * DAY),
        bigquery.ScalarQueryParameter("last", "DATE", datetime.date(2026, 1, 7)),
        bigquery.ArrayQueryParameter("words", "STRING", ["question 4", "question 6", "it's"]),
    ]
    sql = f"""
        SELECT id FROM `{TABLE}`  -- a comment with a ' in it
        WHERE id < @limit AND score > @score AND good = @good AND blob != @blob
          AND created >= @since AND day <= @last AND text IN UNNEST(@words) ORDER BY id"""
    assert ids(client, sql, query_parameters=parameters) == [4, 6]
    positional = [bigquery.ScalarQueryParameter(None, "INT64", n) for n in (3, 5)]
    sql = "SELECT id FROM support.tickets WHERE id > ? AND id < ?"
    assert ids(client, sql, query_parameters=positional) == [4]
    assert [call.query for call in server.calls if call.method == "jobs.insert"][-1] == sql
    in_order = "SELECT ? + id FROM support.tickets WHERE id > ? ORDER BY id LIMIT ?"
    three = [bigquery.ScalarQueryParameter(None, "INT64", n) for n in (100, 5, 1)]
    assert ids(client, in_order, query_parameters=three) == [106]
    price = [bigquery.ScalarQueryParameter("price", "NUMERIC", decimal.Decimal("0.123456789"))]
    assert ids(client, "SELECT @Price", query_parameters=price) == [price[0].value]


@pytest.mark.parametrize(
    ("sql", "expected"),
    [
        ("SELECT COUNT(*) FROM tickets", [(NUM_ROWS,)]),
        ("SELECT SUM(id) AS s FROM my-project.support.tickets AS t WHERE t.id < 3", [(3,)]),
        ('SELECT text FROM tickets WHERE text = "question 1"', [("question 1",)]),
        ("SELECT m.role FROM tickets t, UNNEST(t.msg) AS m WHERE id = 0", [("user",), ("model",)]),
        ("SELECT msg[OFFSET(0)].content FROM tickets WHERE id = 2", [("q2",)]),
        ("SELECT media.uri FROM tickets WHERE media.version = '3'", [("gs://b/3.png",)]),
        ("SELECT JSON_VALUE(meta, '$.k') FROM tickets WHERE id = 4", [("4",)]),
        ("SELECT SAFE_CAST('x' AS INT64) IS NULL, CAST('2' AS FLOAT64)", [(True, 2.0)]),
        ("SELECT id FROM tickets WHERE REGEXP_CONTAINS(text, r'\\b7$')", [(7,)]),
        ("SELECT EXTRACT(YEAR FROM created) FROM tickets WHERE id = 0", [(2026,)]),
        ("SELECT id FROM tickets WHERE created = TIMESTAMP('2026-01-03 00:00:00+00')", [(2,)]),
        ("SELECT 1.5, 'it\\'s', [1, 2]", [(1.5, "it's", [1, 2])]),
        ("SELECT t.table FROM (SELECT 1 AS table) AS t", [(1,)]),
        (
            "WITH few AS (SELECT * EXCEPT (msg) FROM tickets WHERE id < 2) "
            "SELECT a.id, b.text FROM few a JOIN few b USING (id) ORDER BY 1",
            [(0, "question 0"), (1, "question 1")],
        ),
        (
            "SELECT [STRUCT('user' AS role, text AS content)] AS messages FROM tickets LIMIT 1",
            [([{"role": "user", "content": "question 0"}],)],
        ),
        (
            "SELECT ARRAY(SELECT AS STRUCT 'user' AS role, text AS content) FROM tickets LIMIT 1",
            [([{"role": "user", "content": "question 0"}],)],
        ),
        # Types that DuckDB would narrow, and a time that would lose its zone.
        (
            "SELECT CAST('3000000000' AS INT), CAST('3000000001' AS INTEGER)",
            [(3 * 10**9, 3 * 10**9 + 1)],
        ),
        ("SELECT CAST('1.123456789' AS NUMERIC)", [(decimal.Decimal("1.123456789"),)]),
        ("SELECT TIMESTAMP_MILLIS(1767225600000)", [(T0,)]),
    ],
)
def test_dialect(client, sql, expected):
    job = query(client, sql, default_dataset="my-project.support")
    assert [tuple(row.values()) for row in job.result()] == expected


def test_query_and_wait_uses_jobs_query(server, client):
    assert [row.id for row in client.query_and_wait("SELECT id FROM support.tickets LIMIT 2")] == [
        0,
        1,
    ]
    assert server.calls[-1].method == "jobs.query"


def test_long_results_come_in_pages(client):
    rows = query(client, "SELECT id FROM support.tickets ORDER BY id").result(page_size=10)
    assert [row.id for row in rows] == list(range(NUM_ROWS))


def test_time_travel(server, client):
    server.put_table(TABLE, make_rows(10), at=T0 + DAY)
    count = f"SELECT COUNT(*) FROM `{TABLE}`"
    then = [bigquery.ScalarQueryParameter("then", "TIMESTAMP", T0 + DAY / 2)]
    assert ids(client, count) == [10]
    assert ids(
        client, count + " AS t FOR SYSTEM_TIME AS OF @then WHERE t.id >= 0", query_parameters=then
    ) == [NUM_ROWS]
    snapshot = " FOR SYSTEM_TIME AS OF TIMESTAMP '2026-01-01 12:00:00+00'"
    assert ids(client, count + snapshot) == [NUM_ROWS]
    with pytest.raises(exceptions.BadRequest, match="Cannot read before 1767225600000"):
        ids(client, count + " FOR SYSTEM_TIME AS OF TIMESTAMP '2025-01-01 00:00:00+00'")


def test_dry_run_estimates_the_columns_read_and_runs_nothing(server, client):
    table = server.read_table(TABLE)

    def estimate(sql):
        job = query(client, sql, dry_run=True)
        assert job.state == "DONE"
        return job.total_bytes_processed

    assert estimate("SELECT id FROM support.tickets") == table["id"].nbytes
    assert estimate("SELECT id FROM support.tickets WHERE text = 'x' LIMIT 1") == (
        table["id"].nbytes + table["text"].nbytes
    )
    assert estimate("SELECT * FROM support.tickets") == table.nbytes
    assert estimate("SELECT COUNT(*) FROM support.tickets") == 0
    assert 0 < estimate("SELECT media.uri FROM support.tickets") < table["media"].nbytes
    both = estimate("SELECT a.id FROM support.tickets a JOIN support.tickets b ON a.id = b.id")
    assert both == table["id"].nbytes  # one table, one column
    assert server.bytes_billed == 0
    assert all(call.dry_run for call in server.calls)
    job = query(client, "SELECT id, meta FROM support.tickets", dry_run=True)
    assert [(field.name, field.field_type) for field in job.schema] == [
        ("id", "INTEGER"),
        ("meta", "JSON"),
    ]


def test_costs_are_counted_and_budgets_hold(server, client):
    sql = "SELECT text FROM support.tickets"
    started = time.monotonic()
    # The client knows no exception for this reason, and so makes it an internal error.
    with pytest.raises(exceptions.InternalServerError, match="10485760 or higher required") as e:
        query(client, sql, maximum_bytes_billed=10 * MEBIBYTE - 1).result()
    assert e.value.errors[0]["reason"] == "bytesBilledLimitExceeded"
    assert time.monotonic() - started < 5  # and does not try again
    assert server.bytes_billed == 0
    job = query(client, sql, maximum_bytes_billed=10 * MEBIBYTE)
    job.result()
    assert job.total_bytes_processed == server.read_table(TABLE)["text"].nbytes
    assert job.total_bytes_billed == server.bytes_billed == 10 * MEBIBYTE


def test_results_are_tables_that_storage_reads(server, client, read_client):
    job = query(client, "SELECT id, meta FROM support.tickets WHERE MOD(id, 2) = 0")
    job.result()
    hidden = f"{job.destination.project}.{job.destination.dataset_id}.{job.destination.table_id}"
    session = open_session(read_client, hidden)
    assert read_ids(read_client, session.streams[0]) == list(range(0, NUM_ROWS, 2))
    assert job.result().to_arrow(bqstorage_client=read_client).num_rows == 13


def test_destination_and_write_disposition(server, client):
    target = "my-project.support.chosen"

    def keep(where, disposition=None):
        sql = f"SELECT id FROM support.tickets WHERE {where}"
        config = {"write_disposition": disposition} if disposition else {}
        query(client, sql, destination=target, **config).result()
        return server.read_table(target)["id"].to_pylist()

    assert keep("id < 2") == [0, 1]
    with pytest.raises(exceptions.Conflict, match="Already Exists"):
        keep("id < 2")
    assert keep("id = 7", "WRITE_APPEND") == [0, 1, 7]
    assert keep("id = 9", "WRITE_TRUNCATE") == [9]
    with pytest.raises(exceptions.NotFound, match="Dataset my-project:nowhere"):
        query(client, "SELECT 1 AS x", destination="my-project.nowhere.t").result()


@pytest.mark.parametrize(
    ("sql", "kind", "message"),
    [
        ("SELECT nope FROM support.tickets", exceptions.BadRequest, "nope"),
        ("SELECT id FROM support.none", exceptions.NotFound, "my-project:support.none was not"),
        ("SELECT id FROM none.t", exceptions.NotFound, "Dataset my-project:none was not"),
        ("SELECT id FROM tickets", exceptions.BadRequest, "must be qualified with a dataset"),
        ("SELECT (1", exceptions.BadRequest, "Syntax error"),
        ("SELECT 'x", exceptions.BadRequest, "Unclosed string"),
        ("SELECT @missing", exceptions.BadRequest, "missing"),
        ("DROP TABLE support.tickets", exceptions.MethodNotImplemented, "SELECT"),
        ("SELECT 1; SELECT 2", exceptions.MethodNotImplemented, "one SELECT"),
        (
            "SELECT place FROM support.tickets, UNNEST(tags) WITH OFFSET AS place",
            exceptions.MethodNotImplemented,
            "WITH OFFSET",
        ),
        ("SELECT * FROM read_csv('/etc/hostname')", exceptions.BadRequest, "qualified"),
    ],
)
def test_query_errors(client, sql, kind, message):
    with pytest.raises(kind, match=message):
        query(client, sql).result()
    with pytest.raises(kind, match=message):  # a dry run fails at once
        query(client, sql, dry_run=True)


# --- Storage -----------------------------------------------------------------------------------


def test_session_describes_what_it_reads(server, read_client):
    session = open_session(read_client, TABLE, streams=3)
    table = server.read_table(TABLE)
    assert session.estimated_row_count == NUM_ROWS
    assert session.estimated_total_bytes_scanned == table.nbytes
    left = session.expire_time - datetime.datetime.now(datetime.UTC)
    assert datetime.timedelta(hours=5.9) < left <= datetime.timedelta(hours=6)
    schema = pyarrow.ipc.read_schema(pyarrow.py_buffer(session.arrow_schema.serialized_schema))
    assert schema == table.schema
    assert schema.field("meta").metadata[b"ARROW:extension:name"] == b"google:sqlType:json"
    assert str(schema.field("created").type) == "timestamp[us, tz=UTC]"
    assert schema.field("price").type == pyarrow.decimal128(38, 9)


def test_streams_share_the_rows(server, read_client):
    session = open_session(read_client, TABLE, streams=3)
    parts = [read_ids(read_client, stream) for stream in session.streams]
    assert len(parts) == 3
    assert all(parts)
    assert sorted(row for part in parts for row in part) == list(range(NUM_ROWS))
    assert read(read_client, session.streams[0]) == server.read_table(TABLE).slice(
        parts[0][0], len(parts[0])
    )


def test_messages_are_small_and_only_the_first_has_the_schema(read_client):
    session = open_session(read_client, TABLE)
    messages = list(read_client.read_rows(session.streams[0].name))
    assert [message.row_count for message in messages] == [4] * 6 + [1]
    assert [bool(message.arrow_schema.serialized_schema) for message in messages] == [
        True,
        *[False] * 6,
    ]


@pytest.mark.parametrize("offset", [0, 3, 4, 24, 25])
def test_offset(server, read_client, offset):
    (stream,) = open_session(read_client, TABLE).streams
    assert read_ids(read_client, stream, offset) == list(range(offset, NUM_ROWS))
    assert server.calls[-1].offset == offset
    assert server.calls[-1].stream == stream.name


def test_offset_beyond_the_end(read_client):
    (stream,) = open_session(read_client, TABLE).streams
    with pytest.raises(exceptions.OutOfRange):
        read_ids(read_client, stream, NUM_ROWS + 1)


def test_selected_fields_nested_too(server, read_client):
    fields = ["media.uri", "media.version", "msg.role", "id"]
    session = open_session(read_client, TABLE, selected_fields=fields)
    rows = read(read_client, session.streams[0])
    assert rows.schema.names == ["id", "msg", "media"]  # the table's order, as documented
    assert rows.slice(2, 1).to_pylist() == [
        {
            "id": 2,
            "msg": [{"role": "user"}, {"role": "model"}],
            "media": {"uri": "gs://b/2.png", "version": "2"},
        }
    ]
    assert server.calls[0].selected_fields == tuple(fields)
    with pytest.raises(exceptions.InvalidArgument, match="nope"):
        open_session(read_client, TABLE, selected_fields=["nope"])
    with pytest.raises(exceptions.InvalidArgument, match=r"nope"):
        open_session(read_client, TABLE, selected_fields=["media.nope"])


def test_row_restriction(server, read_client):
    restriction = 'text LIKE "question 1%" AND created < TIMESTAMP "2026-01-12 00:00:00+00"'
    session = open_session(read_client, TABLE, selected_fields=["id"], row_restriction=restriction)
    assert read_ids(read_client, session.streams[0]) == [1, 10]
    assert server.calls[0].row_restriction == restriction
    assert not open_session(read_client, TABLE, row_restriction="id < 0").streams
    with pytest.raises(exceptions.InvalidArgument):
        open_session(read_client, TABLE, row_restriction="nope = 1")


def test_sample(server, read_client):
    server.put_table("p.d.big", pyarrow.table({"id": range(5000)}))
    session = open_session(read_client, "p.d.big", sample_percentage=10)
    assert 400 < session.estimated_row_count < 600
    assert len(set(read_ids(read_client, session.streams[0]))) == session.estimated_row_count


def test_snapshot(server, read_client):
    server.put_table(TABLE, make_rows(10), at=T0 + DAY)
    assert open_session(read_client, TABLE).estimated_row_count == 10
    assert open_session(read_client, TABLE, snapshot=T0 + DAY / 2).estimated_row_count == NUM_ROWS
    assert server.calls[-1].snapshot_time == T0 + DAY / 2
    with pytest.raises(exceptions.InvalidArgument, match="Cannot read before"):
        open_session(read_client, TABLE, snapshot=T0 - DAY)


def test_an_open_session_keeps_its_version(server, read_client):
    session = open_session(read_client, TABLE)
    server.put_table(TABLE, make_rows(1))
    assert len(read_ids(read_client, session.streams[0])) == NUM_ROWS


@pytest.mark.parametrize("codec", ["LZ4_FRAME", "ZSTD"])
def test_compression(server, read_client, codec):
    server.put_table("p.d.text", pyarrow.table({"id": range(4), "text": ["abc" * 5000] * 4}))

    def measure(session):
        messages = list(read_client.read_rows(session.streams[0].name))
        return sum(len(m.arrow_record_batch.serialized_record_batch) for m in messages)

    plain = open_session(read_client, "p.d.text")
    compression = types.ArrowSerializationOptions.CompressionCodec
    packed = open_session(read_client, "p.d.text", codec=compression[codec])
    assert measure(packed) < measure(plain) / 10
    assert read(read_client, packed.streams[0]) == read(read_client, plain.streams[0])
    sessions = [call for call in server.calls if call.method == "CreateReadSession"]
    assert [session.compression for session in sessions] == ["", codec]


def test_long_messages(server):
    with BigQueryServer(rows_per_message=100) as server:
        server.put_table("p.d.t", pyarrow.table({"id": range(6), "text": ["x" * MEBIBYTE] * 6}))
        read_client = server.read_client()
        assert read_ids(read_client, open_session(read_client, "p.d.t").streams[0]) == [*range(6)]


def test_split(read_client):
    (stream,) = open_session(read_client, TABLE).streams
    split = read_client.split_read_stream(
        types.SplitReadStreamRequest(name=stream.name, fraction=0.3)
    )
    first = read_ids(read_client, split.primary_stream)
    assert first + read_ids(read_client, split.remainder_stream) == list(range(NUM_ROWS))
    assert len(first) == 7
    assert read_ids(read_client, stream) == list(range(NUM_ROWS))  # documented


# --- what goes wrong ---------------------------------------------------------------------------


@settings(max_examples=15)
@given(
    breaks=st.lists(st.integers(0, NUM_ROWS), max_size=4, unique=True),
    rows_per_message=st.integers(1, 30),
)
def test_the_client_resumes_and_delivers_each_row_once(breaks, rows_per_message):
    with BigQueryServer(rows_per_message=rows_per_message) as server:
        server.put_table(TABLE, make_rows().select(["id"]))
        # The nth call of ReadRows breaks after so many rows of its own.
        for nth, after_rows in enumerate(breaks, 1):
            server.add_fault(BigQueryFault("ReadRows", nth=nth, after_rows=after_rows))
        read_client = server.read_client()
        (stream,) = open_session(read_client, TABLE).streams
        assert read_ids(read_client, stream) == list(range(NUM_ROWS))
        offsets, row = [0], 0
        for after_rows in breaks:
            row += after_rows
            if row > NUM_ROWS:
                break
            offsets.append(row)
        assert [call.offset for call in server.calls if call.method == "ReadRows"] == offsets


def test_internal_errors_resume_only_for_broken_connections(server, read_client):
    (stream,) = open_session(read_client, TABLE).streams
    server.add_fault(
        BigQueryFault("ReadRows", "INTERNAL", after_rows=5, message="Received RST_STREAM")
    )
    assert read_ids(read_client, stream) == list(range(NUM_ROWS))
    server.add_fault(BigQueryFault("ReadRows", "INTERNAL", after_rows=5))
    with pytest.raises(exceptions.InternalServerError, match="injected fault"):
        read_ids(read_client, stream)


def test_exhausted_quota_resumes_only_if_told_when(server, read_client):
    (stream,) = open_session(read_client, TABLE).streams
    server.add_fault(
        BigQueryFault("ReadRows", "RESOURCE_EXHAUSTED", after_rows=8, retry_after_seconds=0.05)
    )
    assert read_ids(read_client, stream) == list(range(NUM_ROWS))
    server.add_fault(BigQueryFault("ReadRows", "RESOURCE_EXHAUSTED", after_rows=8))
    with pytest.raises(exceptions.ResourceExhausted):
        read_ids(read_client, stream)


def test_stall(server, read_client):
    (stream,) = open_session(read_client, TABLE).streams
    server.add_fault(BigQueryFault("ReadRows", None, after_rows=8, stall_seconds=0.3))
    started = time.monotonic()
    assert read_ids(read_client, stream) == list(range(NUM_ROWS))
    assert time.monotonic() - started >= 0.3
    server.add_fault(BigQueryFault("ReadRows", None, stall_seconds=60))
    with pytest.raises(exceptions.DeadlineExceeded):
        next(iter(read_client.read_rows(stream.name, timeout=0.2, retry=None)))


def test_stopping_ends_stalls():
    server = BigQueryServer()
    server.put_table(TABLE, make_rows())
    server.add_fault(BigQueryFault("tables.get", None, stall_seconds=60))
    client = server.client("my-project")
    waiting = threading.Thread(target=lambda: client.get_table(TABLE, retry=None), daemon=True)
    waiting.start()
    while not server.calls:
        time.sleep(0.01)
    started = time.monotonic()
    server.stop()
    waiting.join()
    assert time.monotonic() - started < 5


def test_expired_sessions(server, read_client):
    (stream,) = open_session(read_client, TABLE).streams
    server.expire_sessions()
    with pytest.raises(exceptions.FailedPrecondition, match="session expired at 20"):
        read_ids(read_client, stream)
    fresh = open_session(read_client, TABLE)  # a new session is not expired
    assert len(read_ids(read_client, fresh.streams[0])) == NUM_ROWS


def test_a_session_expires_in_mid_stream(server, read_client):
    (stream,) = open_session(read_client, TABLE).streams
    server.add_fault(BigQueryFault("ReadRows", None, after_rows=8, stall_seconds=0.3))
    messages = iter(read_client.read_rows(stream.name))
    assert [next(messages).row_count, next(messages).row_count] == [4, 4]
    server.expire_sessions()
    with pytest.raises(exceptions.FailedPrecondition, match="session expired"):
        next(messages)


def test_session_lifetime():
    with BigQueryServer(session_lifetime_seconds=0) as server:
        server.put_table(TABLE, make_rows())
        read_client = server.read_client()
        (stream,) = open_session(read_client, TABLE).streams
        with pytest.raises(exceptions.FailedPrecondition, match=stream.name):
            read_ids(read_client, stream)


def test_denied_table(server, client, read_client):
    server.deny(TABLE)
    client.get_table(TABLE)  # metadata is another permission
    message = "Access Denied: Table my-project:support.tickets: .*bigquery.tables.getData"
    with pytest.raises(exceptions.Forbidden, match=message) as refused:
        query(client, "SELECT id FROM support.tickets").result()
    assert refused.value.errors[0]["reason"] == "accessDenied"
    with pytest.raises(exceptions.Forbidden, match=message):
        list(client.list_rows(TABLE))
    with pytest.raises(exceptions.PermissionDenied, match=r"'bigquery\.tables\.getData'"):
        open_session(read_client, TABLE)


@pytest.mark.parametrize(
    ("permission", "ask"),
    [
        ("bigquery.jobs.create", lambda s: query(s.client("my-project"), "SELECT 1").result()),
        ("bigquery.readsessions.create", lambda s: open_session(s.read_client(), TABLE)),
        (
            "bigquery.readsessions.getData",
            lambda s: read_ids(c := s.read_client(), open_session(c, TABLE).streams[0]),
        ),
    ],
)
def test_denied_project(server, permission, ask):
    ask(server)
    server.deny("my-project", permission)
    with pytest.raises(exceptions.Forbidden, match=permission):
        ask(server)


def test_denying_what_is_not_checked_is_an_error(server):
    with pytest.raises(ConfigError, match=r"bigquery\.tables\.export"):
        server.deny(TABLE, "bigquery.tables.export")


def test_rest_faults_strike_the_nth_call(server, client):
    server.add_fault(BigQueryFault("tables.get", "UNAVAILABLE", nth=2, table=TABLE))
    client.get_table(TABLE, retry=None)
    with pytest.raises(exceptions.ServiceUnavailable) as refused:
        client.get_table(TABLE, retry=None)
    assert refused.value.errors[0]["reason"] == "backendError"
    client.get_table(TABLE, retry=None)
    server.add_fault(BigQueryFault("tables.get", "RESOURCE_EXHAUSTED"))
    client.get_table(TABLE)  # the client's own retry
    assert [call.method for call in server.calls] == ["tables.get"] * 5
    server.add_fault(BigQueryFault("jobs.insert", "INTERNAL", nth=None))
    for _ in range(2):
        with pytest.raises(exceptions.InternalServerError):
            client.query("SELECT 1", retry=None, job_retry=None)


def test_session_faults(server, read_client):
    server.add_fault(BigQueryFault("CreateReadSession", "PERMISSION_DENIED", table="p.d.other"))
    open_session(read_client, TABLE)
    server.put_table("p.d.other", make_rows())
    with pytest.raises(exceptions.PermissionDenied, match="injected"):
        open_session(read_client, "p.d.other")


# --- its own interface -------------------------------------------------------------------------


def test_bad_tables_are_refused(server):
    with pytest.raises(ConfigError, match=r"project\.dataset\.table"):
        server.put_table("d.t", make_rows())
    with pytest.raises(ConfigError, match="'pairs'"):
        server.put_table(
            "p.d.t",
            pyarrow.table({"pairs": pyarrow.array([[[1]]])}),
        )
    with pytest.raises(ConfigError, match="must be later"):
        server.put_table(TABLE, make_rows(), at=T0)
    with pytest.raises(ConfigError, match="time zone"):
        server.put_table(TABLE, make_rows(), at=datetime.datetime(2027, 1, 1))  # noqa: DTZ001
    huge = pyarrow.table({"n": pyarrow.array([2**63], pyarrow.uint64())})
    with pytest.raises(ConfigError, match="'n'") as refused:
        server.put_table("p.d.t", huge)
    assert str(2**63) not in str(refused.value)  # no value of the user's


def test_versions_made_now_follow_each_other(server):
    times = [server.put_table("p.d.t", make_rows(n)) for n in range(1, 50)]
    assert times == sorted(set(times))


def test_small_types_widen(server, client):
    server.put_table(
        "p.d.t",
        pyarrow.table(
            {
                "a": pyarrow.array([1], pyarrow.int8()),
                "b": pyarrow.array([0.5], pyarrow.float32()),
                "c": pyarrow.array(["x"], pyarrow.large_string()),
                "d": pyarrow.array(["x"]).dictionary_encode(),
                "e": pyarrow.array([None], pyarrow.list_(pyarrow.int32())),
                "f": pyarrow.array([None]),
                "g": pyarrow.array([0], pyarrow.timestamp("s", "Europe/Paris")),
            }
        ),
    )
    (row,) = client.list_rows("p.d.t")
    assert tuple(row.values()) == (
        1,
        0.5,
        "x",
        "x",
        [],
        None,
        datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC),
    )


@pytest.mark.parametrize("package", ["duckdb", "sqlglot"])
def test_without_its_packages_only_sql_is_missing(client, read_client, monkeypatch, package):
    for module in ("query", "dialect"):
        monkeypatch.delitem(sys.modules, f"{BIGQUERY}.{module}", raising=False)
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    assert client.get_table(TABLE).num_rows == NUM_ROWS
    assert len(read_ids(read_client, open_session(read_client, TABLE).streams[0])) == NUM_ROWS
    remedy = rf"the package {package}, .* run `pip install 'gemma_tuner\[cloud\]'`"
    with pytest.raises(exceptions.MethodNotImplemented, match=remedy):
        query(client, "SELECT 1").result()
    with pytest.raises(exceptions.MethodNotImplemented, match=remedy):
        open_session(read_client, TABLE, row_restriction="id = 1")


def test_many_clients_at_once(server):
    client, read_client = server.client("my-project"), server.read_client()
    failures = []

    def work(number):
        try:
            assert ids(client, f"SELECT id FROM support.tickets WHERE id = {number}") == [number]
            (stream,) = open_session(read_client, TABLE).streams
            assert read_ids(read_client, stream) == list(range(NUM_ROWS))
        except Exception as error:  # noqa: BLE001 - shown by the test's own thread
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
