"""BigQuerySource against the local server, over the official clients."""

import datetime
import io
import json
import logging
import os
import signal
import stat
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow
import pytest

from gemma_tuner.errors import ConfigError, DataError, SourceError
from gemma_tuner.records import Example, StoredObject, Text
from gemma_tuner.sources.bigquery.parts import DamagedBatchError, Part
from gemma_tuner.sources.bigquery.rows import read_rows
from gemma_tuner.sources.bigquery.source import BigQuerySource
from gemma_tuner.sources.columns import Columns
from gemma_tuner.storage.objects import AccessDeniedError
from gemma_tuner.testing.cloud.bigquery.server import BigQueryFault, BigQueryServer

TABLE = "p.d.t"
NUM_ROWS = 120
ROWS_PER_MESSAGE = 10
JSON = {b"ARROW:extension:name": b"google:sqlType:json"}
SELECT = "SELECT id, prompt, response FROM `p.d.t`"
SECRET = "the ring lies under the oak"

NAIVE = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC).replace(tzinfo=None)

Make = Callable[..., BigQuerySource]


def make_table(num_rows: int = NUM_ROWS, answer: str = "answer") -> pyarrow.Table:
    return pyarrow.table(
        {
            "id": list(range(num_rows)),
            "prompt": [f"question {number}" for number in range(num_rows)],
            "response": [f"{answer} {number}" for number in range(num_rows)],
            "wide": ["w" * 500] * num_rows,
            "seen": [datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)] * num_rows,
        }
    )


@pytest.fixture(name="server")
def _server() -> Iterator[BigQueryServer]:
    with BigQueryServer(rows_per_message=ROWS_PER_MESSAGE) as server:
        server.put_table(TABLE, make_table())
        yield server


@pytest.fixture(name="make")
def _make(server: BigQueryServer, tmp_path: Path) -> Make:
    client, read_client = server.client("p"), server.read_client()

    def make(table: str | None = TABLE, query: str | None = None, **options) -> BigQuerySource:
        options.setdefault("folder", tmp_path / "rows")
        return BigQuerySource(
            None if query else table, query, client=client, read_client=read_client, **options
        )

    return make


def list_calls(server: BigQueryServer, method: str) -> list:
    return [call for call in server.calls if call.method == method]


def list_runs(server: BigQueryServer) -> list:
    return [call for call in list_calls(server, "jobs.insert") if not call.dry_run]


def answers(outcomes) -> list[str]:
    return sorted(example.turns[-1].text for _, example in outcomes)


def expected(num_rows: int = NUM_ROWS, answer: str = "answer") -> list[str]:
    return sorted(f"{answer} {number}" for number in range(num_rows))


# --- a table ---------------------------------------------------------------------------------


def test_a_table_is_read_by_its_mapped_columns_alone(server, make):
    source = make()
    rows = list(source)
    assert answers(rows) == expected()
    assert [origin for origin, _ in rows] == [f"{TABLE}:{n}" for n in range(1, NUM_ROWS + 1)]
    assert {example.key for _, example in rows} == {str(number) for number in range(NUM_ROWS)}
    (session,) = list_calls(server, "CreateReadSession")
    assert session.selected_fields == ("id", "prompt", "response")
    assert session.compression == "ZSTD"
    assert session.snapshot_time is not None
    assert len(list_calls(server, "ReadRows")) == 4
    assert not list_calls(server, "tabledata.list")

    summary = source.read_summary()
    assert summary["format"] == "bigquery"
    assert summary["layout"] == "prompt and response"
    assert summary["columns"] == {"prompt": "prompt", "response": "response", "id": "id"}
    assert summary["unused"] == ["seen", "wide"]
    assert summary["num_files"] == 1
    assert json.loads(json.dumps(summary)) == summary


def test_the_cost_is_told_before_the_reading_and_in_the_summary(server, make, caplog):
    server.add_fault(BigQueryFault("ReadRows", "PERMISSION_DENIED", nth=None))
    caplog.set_level(logging.INFO, "gemma_tuner")
    source = make()
    with pytest.raises(AccessDeniedError):
        list(source)
    assert f"about {NUM_ROWS} rows of {TABLE}" in caplog.text
    assert "BigQuery scans 4.238 KiB in 3 columns" in caplog.text


def test_a_second_iteration_asks_nothing_and_discard_forgets(server, make, tmp_path):
    source = make()
    rows = list(source)
    num_calls = len(server.calls)
    assert list(source) == rows
    assert list(make()) == rows, "another process after a kill"
    assert len(server.calls) == num_calls
    assert source.read_summary()["notes"][0].startswith(f"by BigQuery's estimate {NUM_ROWS} rows")
    source.discard()
    assert not (tmp_path / "rows").exists()
    source.discard()
    server.put_table(TABLE, make_table(3, "new"))
    assert answers(source) == expected(3, "new")


def test_what_lies_on_disk_is_private_and_holds_no_row_in_the_record(make, server, tmp_path):
    server.put_table(TABLE, pyarrow.table({"prompt": [SECRET], "response": [SECRET]}))
    list(make())
    folder = tmp_path / "rows"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    record = (folder / "record.json").read_text()
    assert SECRET not in record
    assert "part-0.arrow" in {path.name for path in folder.iterdir()}


def test_the_identity_is_the_arguments_and_asks_nothing(server, make, tmp_path):
    identity = make(split="train", keywords={"response": "response"}).read_identity()
    assert json.loads(json.dumps(identity)) == identity
    assert identity["table"] == TABLE
    assert identity["snapshot_time"] is None
    offline = BigQuerySource("p.d.t", folder=tmp_path)  # without a client there is none to make
    assert offline.read_identity()["keywords"] == {}
    assert server.calls == []


def test_the_identity_tells_apart_what_clients_of_two_projects_name_alike(server, tmp_path):
    read_client = server.read_client()

    def identify(project: str, **named) -> dict:
        client = server.client(project)
        source = BigQuerySource(folder=tmp_path, client=client, read_client=read_client, **named)
        return source.read_identity()

    for named in ({"table": "d.t"}, {"query": SELECT}):
        assert identify("dev", **named) != identify("prod", **named)
        assert identify("dev", **named) == identify("dev", **named)
    assert identify("dev", table=TABLE) == identify("prod", table=TABLE)
    alone = BigQuerySource(TABLE, folder=tmp_path).read_identity()
    assert identify("dev", table=TABLE) == alone
    assert server.calls == []


def test_other_arguments_do_not_take_the_rows_of_these(make):
    assert len(list(make())) == NUM_ROWS
    assert len(list(make(row_restriction="id < 5"))) == 5
    assert len(list(make(keywords={"prompt": "wide"}))) == NUM_ROWS


def test_a_restriction_is_for_bigquery_to_apply(server, make):
    assert answers(make(row_restriction="id < 7 AND seen IS NOT NULL")) == expected(7)
    (session,) = list_calls(server, "CreateReadSession")
    assert session.row_restriction == "id < 7 AND seen IS NOT NULL"
    assert "seen" not in session.selected_fields


def test_a_bad_restriction_is_told_in_bigquerys_words(make):
    with pytest.raises(SourceError, match=r"opening a read session of p\.d\.t .*nonsense"):
        list(make(row_restriction="nonsense = 1"))


def test_an_empty_table_has_no_rows(server, make):
    server.put_table(TABLE, make_table(0))
    source = make()
    assert list(source) == []
    assert source.read_summary()["format"] == "bigquery"


def test_a_split_column_is_heeded(server, make):
    table = make_table(6).append_column("split", [["train", "test"] * 3])
    server.put_table(TABLE, table)
    assert len(list(make(split="test"))) == 3
    with pytest.raises(SourceError, match="no split 'dev'"):
        list(make(split="dev"))


def test_a_table_above_the_limit_is_not_read(server, make):
    with pytest.raises(ConfigError, match=r"max_bytes_billed=100 allows 100 bytes"):
        list(make(max_bytes_billed=100))
    assert list_calls(server, "ReadRows") == []


def test_a_view_is_refused_with_the_query_that_would_do(server, make):
    server.put_view("p.d.v", SELECT)
    with pytest.raises(SourceError, match=r"VIEW.*no snapshots.*query=\"SELECT"):
        list(make("p.d.v"))
    assert list_calls(server, "CreateReadSession") == []


def test_a_missing_table_and_a_name_that_is_none(make):
    with pytest.raises(SourceError, match=r"p\.d\.absent does not exist"):
        list(make("p.d.absent"))
    with pytest.raises(ConfigError, match=r"'absent' names no table; write project"):
        list(make("absent"))


def test_a_table_is_found_by_dataset_and_name(make):
    assert next(iter(make("d.t")))[0] == "p.d.t:1"


def test_columns_that_make_no_example_cost_nothing(server, make):
    server.put_table(TABLE, pyarrow.table({"prompt": ["q"], "response": [7]}))
    with pytest.raises(SourceError, match=r"'response' is INTEGER, and the response is one of"):
        list(make())
    with pytest.raises(SourceError, match="no response was recognised"):
        list(make(keywords={"response": False}))
    assert list_calls(server, "CreateReadSession") == []
    with pytest.raises(SourceError, match="'response' is INTEGER"):
        list(make(query="SELECT prompt, response FROM `p.d.t`", max_bytes_billed=False))
    assert list_runs(server) == []


# --- snapshots -------------------------------------------------------------------------------


def test_a_snapshot_is_read_as_it_was(server, make):
    then = datetime.datetime.now(datetime.UTC)
    time.sleep(0.01)
    server.put_table(TABLE, make_table(3, "new"))
    assert answers(make(snapshot_time=then)) == expected()
    assert answers(make()) == expected(3, "new")


def test_the_snapshot_of_the_first_start_holds_for_a_run_that_goes_on(server, make):
    server.add_fault(BigQueryFault("ReadRows", "PERMISSION_DENIED", nth=2, after_rows=10))
    with pytest.raises(AccessDeniedError):
        list(make())
    server.put_table(TABLE, make_table(3, "new"))
    server.expire_sessions()
    source = make()
    assert answers(source) == expected()
    first, second = list_calls(server, "CreateReadSession")
    assert first.snapshot_time == second.snapshot_time


def test_a_snapshot_that_is_refused_is_forgotten_with_the_rows(server, make, tmp_path):
    server.add_fault(BigQueryFault("ReadRows", "PERMISSION_DENIED", after_rows=10))
    with pytest.raises(AccessDeniedError):
        list(make())
    record = json.loads((tmp_path / "rows" / "record.json").read_text())
    record["snapshot_time"] = "2020-01-01T00:00:00+00:00"
    record["session"]["expires"] = "2020-01-01T06:00:00+00:00"
    (tmp_path / "rows" / "record.json").write_text(json.dumps(record))
    with pytest.raises(SourceError, match="opening a read session"):
        list(make())
    assert answers(make()) == expected()


# --- broken off and taken up again -----------------------------------------------------------


def test_a_run_that_failed_goes_on_by_offset(server, make):
    server.add_fault(BigQueryFault("ReadRows", "PERMISSION_DENIED", nth=1, after_rows=50))
    with pytest.raises(AccessDeniedError):
        list(make(max_streams=1))
    assert answers(make(max_streams=1)) == expected()
    assert [call.offset for call in list_calls(server, "ReadRows")] == [0, 50]
    assert len(list_calls(server, "CreateReadSession")) == 1
    assert len(list_calls(server, "tables.get")) == 1


def test_a_generator_that_is_closed_leaves_the_rows(server, make):
    outcomes = iter(make())
    first = [next(outcomes) for _ in range(25)]
    outcomes.close()
    num_calls = len(server.calls)
    assert list(make())[:25] == first
    assert len(server.calls) == num_calls


CHILD = """
import sys
from pathlib import Path
import signal
# A shell that runs tests in the background lets its children ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
import grpc, resource
from google.api_core.client_options import ClientOptions
from google.auth.credentials import AnonymousCredentials
from google.cloud import bigquery, bigquery_storage
from google.cloud.bigquery_storage_v1.services.big_query_read.transports import (
    BigQueryReadGrpcTransport,
)
from gemma_tuner.sources.bigquery.source import BigQuerySource

rest, read, folder = sys.argv[1:4]
client = bigquery.Client(
    project="p",
    credentials=AnonymousCredentials(),
    client_options=ClientOptions(api_endpoint=rest),
)
channel = grpc.insecure_channel(read, options=[("grpc.max_receive_message_length", -1)])
read_client = bigquery_storage.BigQueryReadClient(
    transport=BigQueryReadGrpcTransport(channel=channel)
)
source = BigQuerySource(
    "p.d.t", folder=Path(folder), client=client, read_client=read_client, max_streams=2
)
unit = 1 if sys.platform == "darwin" else 1024
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
num_rows = sum(1 for _ in source)
print(num_rows, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - before)
"""


def start_child(server: BigQueryServer, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, server.endpoint, server.read_endpoint, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def test_a_killed_process_is_continued_by_offset(server, make, tmp_path):
    # Both streams go silent after 30 of their 60 rows: the process is killed as it waits.
    for nth in (1, 2):
        server.add_fault(
            BigQueryFault("ReadRows", None, nth=nth, after_rows=30, stall_seconds=60.0)
        )
    folder = tmp_path / "rows"
    child = start_child(server, folder)
    try:
        deadline = time.monotonic() + 60
        entries = [folder / f"part-{number}.index" for number in (0, 1)]
        while not all(path.exists() and path.stat().st_size >= 3 * 20 for path in entries):
            assert time.monotonic() < deadline, "the child did not get so far"
            assert child.poll() is None, "the child ended"
            time.sleep(0.01)
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate()
    assert child.returncode == -signal.SIGKILL

    assert answers(make(max_streams=2)) == expected()
    assert [call.offset for call in list_calls(server, "ReadRows")] == [0, 0, 30, 30]
    assert len(list_calls(server, "CreateReadSession")) == 1


@pytest.mark.parametrize("after_rows", [0, 30])
def test_an_interrupted_process_ends_at_once_and_is_continued(server, make, tmp_path, after_rows):
    server.add_fault(
        BigQueryFault("ReadRows", None, nth=1, after_rows=after_rows, stall_seconds=60.0)
    )
    child = start_child(server, tmp_path / "rows")
    try:
        deadline = time.monotonic() + 60
        while len(list_calls(server, "ReadRows")) < 2:
            assert time.monotonic() < deadline, "the child did not get so far"
            time.sleep(0.01)
        time.sleep(0.3)
        child.send_signal(signal.SIGINT)
        child.communicate(timeout=20)
    finally:
        child.kill()
    assert child.returncode not in {0, -signal.SIGKILL}
    assert answers(make(max_streams=2)) == expected()
    assert list_calls(server, "ReadRows")[-1].offset == after_rows
    assert len(list_calls(server, "CreateReadSession")) == 1


def test_memory_is_bounded_by_messages_and_not_by_the_table(tmp_path):
    # 96 MiB in messages of 2 MiB, read by another process: its own peak is measured.
    with BigQueryServer(rows_per_message=4) as server:
        picture = os.urandom(1 << 19)
        table = {"image": [picture] * 192, "caption": ["a"] * 192}
        server.put_table(TABLE, pyarrow.table(table))
        child = start_child(server, tmp_path / "rows")
        output, _ = child.communicate(timeout=120)
    num_rows, growth = map(int, output.split())
    assert num_rows == 192
    assert growth < 48 << 20


@pytest.mark.parametrize("damage", ["torn", "flipped", "index torn", "index flipped", "no index"])
def test_damaged_parts_are_cut_and_only_what_is_cut_is_read_again(server, make, tmp_path, damage):
    rows = list(make(max_streams=1))
    content, index = (tmp_path / "rows" / f"part-0.{name}" for name in ("arrow", "index"))
    kept = 110
    if damage == "torn":
        with content.open("r+b") as file:
            file.truncate(content.stat().st_size - 7)
    elif damage == "flipped":
        flip(content, content.stat().st_size - 20)
    elif damage == "index torn":
        with index.open("r+b") as file:
            file.truncate(index.stat().st_size - 7)
    elif damage == "index flipped":
        flip(index, 20 * 5 + 9)  # the number of rows of the sixth batch
        kept = 50
    else:
        index.unlink()
        kept = 0
    assert list(make(max_streams=1)) == rows
    assert [call.offset for call in list_calls(server, "ReadRows")] == [0, kept]


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_a_damaged_record_is_begun_anew(server, make, tmp_path):
    rows = list(make())
    (tmp_path / "rows" / "record.json").write_text('{"identity": 3')
    assert list(make()) == rows
    assert len(list_calls(server, "CreateReadSession")) == 2


def test_a_session_that_expires_is_begun_anew_and_told(server, make, caplog):
    server.add_fault(BigQueryFault("ReadRows", None, nth=2, after_rows=20, stall_seconds=0.3))
    source = make(max_streams=2)
    expire_after(server, "ReadRows", 0.1)
    assert answers(source) == expected()
    first, second = list_calls(server, "CreateReadSession")
    assert first.snapshot_time == second.snapshot_time
    assert "read sessions that expired and were begun anew: 1" in source.read_summary()["notes"]
    assert "the read session of p.d.t expired" in caplog.text
    assert [call.offset for call in list_calls(server, "ReadRows")] == [0, 0, 0, 0]


def expire_after(server: BigQueryServer, method: str, seconds: float) -> None:
    """End all sessions a while after the first call of a method."""
    import threading

    def wait() -> None:
        while not list_calls(server, method):
            time.sleep(0.005)
        time.sleep(seconds)
        server.expire_sessions()

    threading.Thread(target=wait, daemon=True).start()


def test_a_session_that_expired_while_nothing_ran_is_begun_anew(server, make):
    server.add_fault(BigQueryFault("ReadRows", "PERMISSION_DENIED", nth=1, after_rows=50))
    with pytest.raises(AccessDeniedError):
        list(make(max_streams=1))
    server.expire_sessions()
    assert answers(make(max_streams=1)) == expected()
    assert [call.offset for call in list_calls(server, "ReadRows")] == [0, 50, 0]


def test_sessions_that_always_expire_end_the_reading(tmp_path):
    with BigQueryServer(session_lifetime_seconds=0.0) as server:
        server.put_table(TABLE, make_table())
        source = BigQuerySource(
            TABLE,
            folder=tmp_path / "rows",
            client=server.client("p"),
            read_client=server.read_client(),
        )
        with pytest.raises(SourceError, match="3 times in a row; read fewer columns"):
            list(source)
        assert len(list_calls(server, "CreateReadSession")) == 3


def test_the_clients_own_resume_delivers_each_row_once(server, make):
    server.add_fault(BigQueryFault("ReadRows", "UNAVAILABLE", nth=1, after_rows=30))
    source = make(max_streams=1)
    assert answers(source) == expected()
    assert [call.offset for call in list_calls(server, "ReadRows")] == [0, 30]


@pytest.mark.parametrize(
    "fault",
    [
        BigQueryFault("ReadRows", "INTERNAL", nth=1, after_rows=30),
        BigQueryFault("ReadRows", "RESOURCE_EXHAUSTED", nth=1, after_rows=30),
        BigQueryFault(
            "ReadRows", "RESOURCE_EXHAUSTED", nth=1, after_rows=30, retry_after_seconds=0.05
        ),
        BigQueryFault("ReadRows", None, nth=1, after_rows=30, stall_seconds=3.0),
    ],
    ids=["internal", "quota", "quota with a time", "stall"],
)
def test_what_passes_is_repeated_from_the_offset_and_counted(server, make, fault):
    server.add_fault(fault)
    source = make(max_streams=1, attempt_timeout_seconds=0.5)
    assert answers(source) == expected()
    assert [call.offset for call in list_calls(server, "ReadRows")] == [0, 30]
    assert "reads that broke off and were taken up again: 1" in source.read_summary()["notes"]


def test_unavailable_from_the_first_is_repeated(server, make):
    for nth in (1, 2, 3):
        server.add_fault(BigQueryFault("ReadRows", "UNAVAILABLE", nth=nth))
    source = make(max_streams=1)
    assert answers(source) == expected()
    assert "reads that broke off and were taken up again: 3" in source.read_summary()["notes"]


def test_what_does_not_pass_ends_in_time_and_keeps_what_is_read(server, make):
    for nth in range(2, 100):
        server.add_fault(BigQueryFault("ReadRows", "UNAVAILABLE", nth=nth))
    server.add_fault(BigQueryFault("ReadRows", "UNAVAILABLE", nth=1, after_rows=40))
    began = time.monotonic()
    with pytest.raises(SourceError, match=r"reading p\.d\.t failed .*read already is kept"):
        list(make(max_streams=1, total_timeout_seconds=0.5))
    assert time.monotonic() - began < 5
    assert {call.offset for call in list_calls(server, "ReadRows")} == {0, 40}


def test_the_folder_serves_one_at_a_time(make):
    outcomes = iter(make())
    next(outcomes)
    with pytest.raises(SourceError, match="is being read already"):
        next(iter(make()))
    with pytest.raises(SourceError, match="is being read already"):
        make().discard()
    outcomes.close()
    assert len(list(make())) == NUM_ROWS


def test_a_folder_that_cannot_be_used_is_told(make, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SourceError, match="cannot be kept in the folder 'rows'"):
        list(make(folder=tmp_path / "file" / "rows"))


def test_a_channel_with_a_limit_is_told(server, make, tmp_path):
    import grpc
    from google.cloud.bigquery_storage import BigQueryReadClient
    from google.cloud.bigquery_storage_v1.services.big_query_read.transports import (
        BigQueryReadGrpcTransport,
    )

    server.put_table(TABLE, pyarrow.table({"image": [os.urandom(5 << 20)], "caption": ["a"]}))
    with grpc.insecure_channel(server.read_endpoint) as channel:
        limited = BigQueryReadClient(transport=BigQueryReadGrpcTransport(channel=channel))
        source = BigQuerySource(
            TABLE, folder=tmp_path / "rows", client=server.client("p"), read_client=limited
        )
        with pytest.raises(SourceError, match="max_receive_message_length"):
            list(source)


# --- permissions and credentials -------------------------------------------------------------


@pytest.mark.parametrize(
    ("resource", "permission", "method"),
    [
        (TABLE, "bigquery.tables.get", "tables.get"),
        (TABLE, "bigquery.tables.getData", "CreateReadSession"),
        ("p", "bigquery.readsessions.create", "CreateReadSession"),
        ("p", "bigquery.readsessions.getData", "ReadRows"),
    ],
)
def test_a_missing_permission_stops_at_once(server, make, resource, permission, method):
    server.deny(resource, permission)
    with pytest.raises(AccessDeniedError) as caught:
        list(make(max_streams=1))
    assert permission in str(caught.value)
    assert "p.d.t" in str(caught.value).replace("p:d.t", "p.d.t")
    assert "http" not in str(caught.value)
    assert len(list_calls(server, method)) == 1


@pytest.mark.parametrize(
    ("resource", "permission"),
    [("p", "bigquery.jobs.create"), (TABLE, "bigquery.tables.getData")],
)
def test_a_query_without_permission(server, make, resource, permission):
    server.deny(resource, permission)
    with pytest.raises(AccessDeniedError, match=permission.replace(".", r"\.")):
        list(make(query=SELECT, max_bytes_billed=False))
    assert list_runs(server) == []


def test_missing_credentials_projects_and_packages_have_a_remedy(tmp_path, monkeypatch):
    source = BigQuerySource(TABLE, folder=tmp_path / "rows")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "absent.json"))
    with pytest.raises(AccessDeniedError, match="gcloud auth application-default login"):
        list(source)
    credentials = tmp_path / "user.json"
    credentials.write_text(
        json.dumps(
            {
                "type": "authorized_user",
                "client_id": "a",
                "client_secret": "b",
                "refresh_token": "c",
            }
        )
    )
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(credentials))
    for name in ("GOOGLE_CLOUD_PROJECT", "GCLOUD_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    with pytest.raises(SourceError, match=r"name the one that pays by project="):
        list(source)
    monkeypatch.setitem(sys.modules, "google.cloud.bigquery_storage", None)
    with pytest.raises(SourceError, match="pip install google-cloud-bigquery"):
        list(source)


# --- queries ---------------------------------------------------------------------------------


def test_a_query_without_a_limit_tells_what_it_would_cost(server, make):
    server.put_table(TABLE, make_table(60_000))
    with pytest.raises(ConfigError, match=r"would read \d\.\d+ MiB .*max_bytes_billed=False"):
        list(make(query=SELECT))
    assert list_runs(server) == []
    assert server.bytes_billed == 0


def test_a_query_above_its_limit_is_not_run(server, make):
    with pytest.raises(ConfigError, match=r"would read .*max_bytes_billed=1000 allows 1000 bytes"):
        list(make(query=SELECT, max_bytes_billed=1000))
    assert list_runs(server) == []


def test_a_limit_below_what_is_billed_at_least_is_refused_by_bigquery(server, make):
    with pytest.raises(ConfigError, match=r"would bill more than max_bytes_billed=100000"):
        list(make(query=SELECT, max_bytes_billed=100_000))
    assert server.bytes_billed == 0
    assert len(list(make(query=SELECT, max_bytes_billed=20 << 20))) == NUM_ROWS


@pytest.mark.parametrize("limit", [20 << 20, False])
def test_a_query_is_read_from_its_result(server, make, limit):
    source = make(query=f"{SELECT} WHERE id < 30", max_bytes_billed=limit)
    rows = list(source)
    assert answers(rows) == expected(30)
    assert rows[0][0] == "query:1"
    assert "bytes billed for the query: 10,485,760" in source.read_summary()["notes"]
    assert server.bytes_billed == 10 << 20
    num_calls = len(server.calls)
    assert list(source) == rows
    assert len(server.calls) == num_calls


def test_a_query_takes_the_clients_parameters(make):
    from google.cloud.bigquery import ArrayQueryParameter, ScalarQueryParameter

    source = make(
        query=f"{SELECT} WHERE id < @below AND id IN UNNEST(@ids)",
        query_parameters=[
            ScalarQueryParameter("below", "INT64", 8),
            ArrayQueryParameter("ids", "INT64", [3, 5, 9]),
        ],
        max_bytes_billed=False,
    )
    assert answers(source) == ["answer 3", "answer 5"]
    assert json.dumps(source.read_identity())


def test_a_result_is_written_to_a_new_table_and_over_none(server, make):
    source = make(query=SELECT, max_bytes_billed=False, destination="p.d.result")
    assert answers(source) == expected()
    assert next(iter(source))[0] == "p.d.result:1"
    assert server.read_table("p.d.result").num_rows == NUM_ROWS
    server.put_table("p.d.mine", pyarrow.table({"a": [1]}))
    with pytest.raises(
        SourceError, match=r"p\.d\.mine holds rows already, and is not overwritten"
    ):
        list(make(query=SELECT, max_bytes_billed=False, destination="p.d.mine"))
    assert server.read_table("p.d.mine").to_pydict() == {"a": [1]}


def test_a_query_that_ran_is_not_run_again(server, make):
    options = {"query": SELECT, "max_bytes_billed": False, "destination": "p.d.result"}
    server.add_fault(BigQueryFault("jobs.getQueryResults", "PERMISSION_DENIED"))
    server.add_fault(BigQueryFault("ReadRows", "PERMISSION_DENIED", after_rows=10))
    for _ in range(2):
        with pytest.raises(AccessDeniedError):
            list(make(**options))
    assert answers(make(**options)) == expected()
    assert len(list_runs(server)) == 1


def test_a_query_that_fails_is_told_without_its_values_and_can_be_run_again(server, make):
    rows = {"id": ["1", SECRET], "prompt": ["q", "q"], "response": ["a", "b"]}
    server.put_table(TABLE, pyarrow.table(rows))
    options = {
        "query": "SELECT CAST(id AS INT64) AS id, prompt, response FROM `p.d.t`",
        "max_bytes_billed": False,
    }
    with pytest.raises(SourceError, match="running the query was refused") as caught:
        list(make(**options))
    assert SECRET not in str(caught.value)
    server.put_table(TABLE, make_table(3))
    assert answers(make(**options)) == expected(3)


def test_a_query_that_cannot_be_read_is_told_in_bigquerys_words(make):
    with pytest.raises(SourceError, match=r"the dry run of the query was refused .*absent_column"):
        list(make(query="SELECT absent_column FROM `p.d.t`", max_bytes_billed=False))


def test_a_statement_that_changes_something_is_refused(server, make):
    with pytest.raises((ConfigError, SourceError)):
        list(make(query="DELETE FROM `p.d.t` WHERE TRUE", max_bytes_billed=False))
    assert list_runs(server) == []
    assert server.read_table(TABLE).num_rows == NUM_ROWS


# --- what rows hold --------------------------------------------------------------------------


def json_field(name: str, kind: pyarrow.DataType | None = None) -> pyarrow.Field:
    return pyarrow.field(name, kind or pyarrow.string(), metadata=JSON)


def test_object_refs_become_stored_objects(server, make):
    details = json.dumps({"gcs_metadata": {"size": 1234, "md5_hash": "x"}})
    kind = pyarrow.struct(
        [
            pyarrow.field("uri", pyarrow.string()),
            pyarrow.field("version", pyarrow.string()),
            pyarrow.field("authorizer", pyarrow.string()),
            json_field("details"),
        ]
    )
    refs = [{"uri": "gs://b/1.jpg", "version": "77", "authorizer": "us.c", "details": details}]
    table = pyarrow.table(
        [pyarrow.array(refs, kind), pyarrow.array(["a cat"])], names=["image", "caption"]
    )
    server.put_table(TABLE, table)
    ((_, example),) = make()
    (picture,) = example.media
    assert picture.source == StoredObject("gs://b/1.jpg", generation=77, num_bytes=1234)


def test_uris_bytes_and_paths(server, make):
    table = {
        "image": ["gs://b/a.jpg", "a.jpg", "https://x.org/a.jpg"],
        "audio": [b"RIFF", b"RIFF", b"RIFF"],
        "prompt": ["q"] * 3,
        "response": ["r"] * 3,
    }
    server.put_table(TABLE, pyarrow.table(table))
    good, relative, remote = (outcome for _, outcome in make(max_streams=1))
    assert [part.source for part in good.media] == ["gs://b/a.jpg", b"RIFF"]
    assert isinstance(relative, DataError)
    assert relative.key == f"{TABLE}:2"
    assert "CONCAT('gs://bucket/', column)" in str(relative)
    assert "a.jpg" not in str(relative)
    assert "a https: URI" in str(remote)


def test_messages_of_records_and_of_json(server, make):
    kind = pyarrow.list_(
        pyarrow.struct([pyarrow.field("role", pyarrow.string()), json_field("content")])
    )
    picture = {"type": "image", "image": "gs://b/a.jpg"}
    messages = [
        {"role": "user", "content": json.dumps([picture, {"type": "text", "text": "what?"}])},
        {"role": "model", "content": json.dumps("a cat")},
    ]
    broken = [{"role": "user", "content": "{"}, {"role": "model", "content": '"a"'}]
    tools = [json.dumps([{"name": "look"}]), None]
    schema = pyarrow.schema([pyarrow.field("messages", kind), json_field("tools")])
    server.put_table(TABLE, pyarrow.table([[messages, broken], tools], schema=schema))
    good, bad = (outcome for _, outcome in make(max_streams=1))
    assert [turn.role for turn in good.turns] == ["user", "assistant"]
    assert [part.source for part in good.media] == ["gs://b/a.jpg"]
    assert good.turns[0].parts[1] == Text("what?")
    assert good.turns[1].text == "a cat"
    assert good.tools == ({"type": "function", "function": {"name": "look"}},)
    assert isinstance(bad, DataError)
    assert "its field 'content' is not valid JSON" in str(bad)

    plain = pyarrow.table([[json.dumps([{"role": "user", "content": "q"}, *messages[1:]])]], ["m"])
    server.put_table(TABLE, plain.cast(pyarrow.schema([json_field("m")])))
    ((_, example),) = make(keywords={"messages": "m"})
    assert isinstance(example, Example)


def test_json_text_and_missing_ids_are_noted(server, make):
    schema = pyarrow.schema([pyarrow.field("prompt", pyarrow.string()), json_field("response")])
    server.put_table(TABLE, pyarrow.table([["q"], ['{"a": 1}']], schema=schema))
    source = make()
    ((_, example),) = source
    assert example.turns[-1].text == '{"a": 1}'
    notes = source.read_summary()["notes"]
    assert "column 'response' is JSON; the response is its JSON text" in notes
    assert any("there is no id" in note for note in notes)


def test_large_rows_are_made_python_objects_a_few_at_a_time(tmp_path):
    # One batch of 48 MiB, as BigQuery might send it: the rows come out of it in small slices.
    table = pyarrow.table({"text": ["x" * (1 << 20)] * 48})
    (batch,) = table.to_batches()
    part = Part(tmp_path, 0, table.schema.serialize().to_pybytes())
    part.append(serialize(batch), batch.num_rows)
    columns = Columns("document", {"text": "text"})
    tracemalloc.start()
    try:
        num_rows = sum(1 for _ in read_rows([part], columns, "t"))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        part.close()
    assert num_rows == 48
    assert peak < 12 << 20


@pytest.mark.parametrize("said", [1, 3])
def test_rows_that_are_not_as_many_as_was_said_are_an_error(tmp_path, said):
    table = pyarrow.table({"text": [SECRET, SECRET]})
    part = Part(tmp_path, 0, table.schema.serialize().to_pybytes())
    for batch in (serialize(table.to_batches()[0]), b"no arrow"):
        with pytest.raises(DamagedBatchError):
            part.append(batch, said)
    assert list(part.read_batches()) == []
    part.close()


def serialize(batch: pyarrow.RecordBatch) -> bytes:
    sink = io.BytesIO()
    with pyarrow.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    messages = pyarrow.ipc.MessageReader.open_stream(pyarrow.py_buffer(sink.getvalue()))
    messages.read_next_message()
    return messages.read_next_message().serialize().to_pybytes()


# --- arguments -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either table= or query="),
        ({"table": "t", "query": "q"}, "either table= or query="),
        ({"query": "q", "row_restriction": "a"}, "in a query write WHERE"),
        ({"table": "t", "destination": "d.t"}, "are of query="),
        ({"table": "t", "snapshot_time": NAIVE}, "no time zone"),
        ({"query": "q", "max_bytes_billed": True}, "max_bytes_billed=True"),
        ({"query": "q", "max_bytes_billed": 0}, "max_bytes_billed=0"),
        (
            {"table": "t", "client": object()},
            "bigquery_client= and bigquery_read_client= together",
        ),
        ({"table": "t", "max_streams": 0}, "max_streams=0"),
    ],
)
def test_arguments_that_cannot_work(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        BigQuerySource(folder=tmp_path, **options)
