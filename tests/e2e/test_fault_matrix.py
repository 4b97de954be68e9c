"""Every kind of fault at every moment, as docs/streaming.md says: nothing lost, or a clear stop.

The tables of that page are what is expected here: a row is a kind of fault, a column the moment at
which it strikes, and the cell what comes of it. Servers, protocols and clients are real.
"""

import datetime
import functools
import gzip
import io
import itertools
import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import google.auth.credentials
import google.auth.exceptions
import PIL.Image
import pyarrow
import pytest
from google.cloud import storage

from gemma_tuner.errors import GemmaTunerError
from gemma_tuner.sources.bigquery import spool
from gemma_tuner.storage.config import FetchConfig
from gemma_tuner.streaming.opening import stream_bigquery, stream_gcs
from gemma_tuner.streaming.stream import ExampleStream
from gemma_tuner.testing.cloud.bigquery.server import BigQueryFault, BigQueryServer
from gemma_tuner.testing.cloud.bigquery.tables import RefusedError
from gemma_tuner.testing.cloud.gcs import server as gcs_server
from gemma_tuner.testing.cloud.gcs.api import Answer
from gemma_tuner.testing.cloud.gcs.faults import (
    Effect,
    Fault,
    FlipBit,
    Overwrite,
    Refuse,
    Reset,
    Stall,
    Truncate,
)
from gemma_tuner.testing.cloud.gcs.server import GcsServer

NUM_ROWS = 24
STRUCK = 9  # the picture, of those that are read in the middle
TOTAL_SECONDS = 1.0
SLACK_SECONDS = 4.0  # of a busy machine
FETCH = FetchConfig(
    attempt_timeout_seconds=0.3,
    total_timeout_seconds=TOTAL_SECONDS,
    min_free_disk_bytes=0,
    window_examples=1,
    io_threads=1,
    hedged_fraction=0.0,
)
DOCS = Path(__file__).parents[2] / "docs" / "streaming.md"
REMEDY = re.compile("; |, or |: ")
MOMENTS = ("opening", "reading", "resuming")


def read_table(title: str) -> dict[str, tuple[str, ...]]:
    """Read the table below a heading: what comes of each kind, at each moment."""
    section = DOCS.read_text().partition(f"### {title}\n")[2].partition("\n#")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line[:1] == "|"]
    return {kind.strip(): tuple(cell.strip() for cell in cells) for kind, *cells in rows[2:]}


def draw_picture(number: int) -> bytes:
    file = io.BytesIO()
    PIL.Image.new("RGB", (8, 8), (number, 2 * number, 3)).save(file, "PNG")
    return file.getvalue()


PICTURES = [draw_picture(number) for number in range(NUM_ROWS)]


def name(number: int) -> str:
    return f"{number:03}.png"


def read_all(stream: Iterator) -> Iterator[int]:
    """Hand out the number of each example, by its key and by its pixels."""
    for example in stream:
        number = int(example.key)
        assert next(example.media).source.getpixel((0, 0)) == (number, 2 * number, 3)
        yield number


def tell(read: Callable[[], list[int]], done: list[int]) -> str:
    """Say what came: everything, everything but what was struck, or a stop in time."""
    began = time.monotonic()
    try:
        numbers = done + read()
    except GemmaTunerError as error:
        outcome = "stop" if REMEDY.search(str(error)) else f"a stop without remedy: {error}"
    else:
        missing = sorted(set(range(NUM_ROWS)) - set(numbers))
        assert numbers == sorted(set(numbers)), "in order, each once"
        outcome = "whole" if not missing else f"without {len(missing)}"
    assert time.monotonic() - began < 3 * TOTAL_SECONDS + SLACK_SECONDS
    return outcome


# ---- Cloud Storage --------------------------------------------------------------------------


class Token(google.auth.credentials.Credentials):
    """A token that has expired at some moment and is not renewed."""

    expired_now = False

    @property
    def valid(self) -> bool:
        return not self.expired_now

    def refresh(self, request) -> None:
        if self.expired_now:
            raise google.auth.exceptions.RefreshError("expired")
        self.token = "t"


HONEST_SEND = gcs_server._Connection._send


def send(connection, answer: Answer, delivery) -> None:
    """Send bare bytes where there is no status, and one by one after the header ``Trickle``."""
    if not answer.status:
        connection.wfile.write(answer.body)
        connection.close_connection = True
    elif "Trickle" in answer.headers:
        slow = tuple((bytes([byte]), 0.05) for byte in answer.body)
        HONEST_SEND(connection, answer, replace(delivery, pieces=slow))
    else:
        if "Content-Length" in answer.headers:  # a lie, sent as the only one
            connection.close_connection = True
            answer = replace(answer, body=answer.body[: int(answer.headers["Content-Length"])])
            delivery = replace(delivery, pieces=((answer.body, 0.0),))
            headers = {k: v for k, v in answer.headers.items() if k != "Content-Length"}
            answer = replace(answer, headers=headers)
        HONEST_SEND(connection, answer, delivery)


@dataclass(frozen=True)
class Alter:
    """An answer is what a function makes of it."""

    change: Callable[[Answer], Answer]


class Bucket:
    """A server with rows and pictures, its clients, and a way to let something go wrong."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.patch = patch
        self.server = GcsServer().start()
        patch.setattr(gcs_server._Connection, "_send", send)
        for number, picture in enumerate(PICTURES):
            self.server.put("b", name(number), picture)
        rows = [
            {"id": str(n), "file_name": name(n), "prompt": "Q", "response": "A"}
            for n in range(NUM_ROWS)
        ]
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        self.server.put("b", "metadata.jsonl", content)
        self.folder = folder
        self.token = Token()
        self.token.token = "t"
        self.client = storage.Client(
            "p", self.token, client_options={"api_endpoint": self.server.endpoint}
        )

    def open(self) -> ExampleStream:
        how = {"fetch": FETCH, "shuffle": False, "max_bad_fraction": 0.05}
        return stream_gcs("gs://b/*.jsonl", cache_dir=self.folder, gcs_client=self.client, **how)

    def strike(self, effect: Effect | Alter, moment: str, nth: int | None = None) -> None:
        """Let requests go wrong: all of them, or the nth about each object."""
        if isinstance(effect, Alter):
            honest = self.server.api.answer

            def answer(call):
                given = honest(call)
                is_struck = call.name == name(STRUCK) or moment == "opening"
                return effect.change(given) if is_struck and given.status < 300 else given

            self.server.api.answer = answer
        elif moment == "opening":
            for operation in ("list", "stat"):
                self.server.add_fault(Fault(effect, nth=nth, operation=operation))
            self.server.add_fault(Fault(effect, name="*.jsonl", nth=nth))
        else:
            self.server.add_fault(Fault(effect, name=name(STRUCK), nth=nth))

    def close(self) -> None:
        self.server.stop()


def alter(body=lambda body: body, /, **how) -> Alter:
    def change(answer: Answer) -> Answer:
        headers = {**answer.headers, **how.get("headers", {})}
        rest = {key: value for key, value in how.items() if key != "headers"}
        return replace(answer, **{"body": body(answer.body), **rest, "headers": headers})

    return Alter(change)


def loop_pages(answer: Answer) -> Answer:
    listing = json.loads(answer.body)
    return replace(answer, body=json.dumps({**listing, "nextPageToken": "again"}).encode())


def empty_pages(answer: Answer) -> Answer:
    return replace(answer, body=b'{"nextPageToken": "more"}')


def zipped(answer: Answer) -> Answer:
    headers = {**answer.headers, "Content-Encoding": "gzip"}
    return replace(answer, body=gzip.compress(answer.body), headers=headers)


def change_object(bucket: Bucket, moment: str) -> None:
    bucket.strike(Overwrite(PICTURES[0]), moment)


def delete_object(bucket: Bucket, moment: str) -> None:
    bucket.server.delete("b", "metadata.jsonl" if moment == "opening" else name(STRUCK))


def jump(seconds: float) -> Callable[[Bucket, str], None]:
    def strike(bucket: Bucket, _: str) -> None:
        honest = time.time
        bucket.patch.setattr(time, "time", lambda: honest() + seconds)
        bucket.strike(Refuse(503), "reading", 1)

    return strike


def expire(bucket: Bucket, _: str) -> None:
    bucket.token.expired_now = True


def use_endpoint(endpoint: str) -> Callable[[Bucket, str], None]:
    def strike(bucket: Bucket, _: str) -> None:
        bucket.client._connection.API_BASE_URL = endpoint

    return strike


def once(effect: Effect) -> Callable[[Bucket, str], None]:
    return lambda bucket, moment: bucket.strike(effect, moment, 1)


def always(effect: Effect) -> Callable[[Bucket, str], None]:
    return lambda bucket, moment: bucket.strike(effect, moment)


WRONG_HASH = {"x-goog-hash": "crc32c=AAAAAA=="}
BUCKET_FAULTS: dict[str, Callable[[Bucket, str], None]] = {
    "401 once": once(Refuse(401)),
    "a token that expires": expire,
    "403": always(Refuse(403)),
    "deleted after it was listed": delete_object,
    "408 once": once(Refuse(408)),
    "overwritten (412)": change_object,
    "429 once, with `Retry-After: 0`": once(Refuse(429, retry_after_seconds=0)),
    "429 for ever": always(Refuse(429)),
    "500, 502 or 503 once": once(Refuse(502)),
    "503 for ever": always(Refuse(503)),
    "a reset once": once(Reset(10)),
    "a body that ends early, once": once(Truncate()),
    "a body that stalls, once": once(Stall(30.0, after_bytes=10)),
    "a trickle": always(alter(headers={"Trickle": "1"})),
    "another part than was asked for": always(
        alter(lambda body: body[: len(body) // 2], headers={"Content-Range": "bytes 0-1/9"})
    ),
    "another checksum": always(alter(headers=WRONG_HASH)),
    "a flipped bit, once": once(FlipBit()),
    "a longer body than was said": always(alter(lambda body: body + b"x" * 9)),
    "a wrong `Content-Length`": always(alter(headers={"Content-Length": "5"})),
    "zipped on the way": always(Alter(zipped)),
    "no JSON": always(alter(lambda _: b"<html>")),
    "JSON of another form": always(alter(lambda _: b'{"items": [7], "size": "x"}')),
    "pages that come again": always(Alter(loop_pages)),
    "empty pages for ever": always(Alter(empty_pages)),
    "a refused connection": use_endpoint("http://127.0.0.1:9"),
    "no HTTP": always(alter(lambda _: b"\x15\x03\x03\x00\x02\x02\x28" * 9, status=0)),
    "a clock that jumps": jump(-86_400.0),
}
ONLY_LISTINGS = ("pages that come again", "empty pages for ever")


@pytest.fixture(name="bucket")
def _bucket(tmp_path, monkeypatch) -> Iterator[Bucket]:
    with ExitStack() as stack:
        bucket = Bucket(tmp_path, monkeypatch)
        stack.callback(bucket.close)
        yield bucket


BUCKET_TABLE = read_table("Cloud Storage, fault by fault")


def test_the_table_of_buckets_holds_what_is_tested():
    assert BUCKET_TABLE.keys() == BUCKET_FAULTS.keys()


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("kind", BUCKET_FAULTS)
def test_faults_of_buckets(bucket, kind, moment):
    strike = BUCKET_FAULTS[kind]
    done: list[int] = []
    if moment == "opening":
        strike(bucket, moment)
        outcome = tell(lambda: list(read_all(iter(bucket.open()))), done)
    elif kind in ONLY_LISTINGS:
        outcome = "–"
    else:
        stream = bucket.open()
        numbers = read_all(iter(stream))
        done += itertools.islice(numbers, 4)
        state = json.loads(json.dumps(stream.state_dict()))
        if moment == "resuming":
            numbers.close()
        strike(bucket, moment)

        def go_on() -> list[int]:
            if moment == "reading":
                return list(numbers)
            again = bucket.open()
            again.load_state_dict(state)
            return list(read_all(iter(again)))

        outcome = tell(go_on, done)
    assert outcome == BUCKET_TABLE.get(kind, ("?",) * 3)[MOMENTS.index(moment)]


# ---- BigQuery -------------------------------------------------------------------------------

TABLE = "p.d.t"
ROWS = pyarrow.table(
    {
        "id": [f"{n}" for n in range(NUM_ROWS)],
        "prompt": ["Q"] * NUM_ROWS,
        "response": [f"answer {n}" for n in range(NUM_ROWS)],
    }
)
OTHER = pyarrow.table({"id": ["x"] * 3, "prompt": [1, 2, 3], "response": [b"a"] * 3})


class Tables:
    """A server with a table, and ways to change what it says over REST and in its streams."""

    def __init__(self, folder: Path) -> None:
        self.server = BigQueryServer(rows_per_message=3)
        self.server.put_table(TABLE, ROWS)
        self.folder = folder
        self.project = "p"
        self.by_query = False

    def open(self) -> ExampleStream:
        asked = {"query": f"SELECT * FROM `{TABLE}`", "max_bytes_billed": False}
        return stream_bigquery(
            **(asked if self.by_query else {"table": TABLE}),
            cache_dir=self.folder,
            fetch=FETCH,
            shuffle=False,
            bigquery_client=self.server.client(self.project),
            bigquery_read_client=self.server.read_client(),
        )

    def read(self) -> list[int]:
        numbers = []
        for example in self.open():
            number = int(example.key)
            assert example.turns[-1].parts[0].text == f"answer {number}"
            numbers.append(number)
        return numbers

    def let(self, change: Callable) -> None:
        """Put ``change(request, responses)`` between the streams and their reader."""
        service = self.server._read
        honest = service._read
        service._read = lambda request: change(request, honest(request))

    def let_rest(self, change: Callable) -> None:
        """Put ``change(path, answer)`` behind the REST interface; ``answer()`` is honest."""
        rest = self.server._rest
        honest = rest.answer
        rest.answer = lambda *asked: change(asked[1], functools.partial(honest, *asked))


def fail(code: str | None, nth: int | None = 1, **how) -> Callable[[Tables, str], None]:
    def strike(tables: Tables, moment: str) -> None:
        methods = ("tables.get", "CreateReadSession") if moment == "opening" else ("ReadRows",)
        for method in methods:
            tables.server.add_fault(BigQueryFault(method, code, nth=nth, **how))

    return strike


def stop_early(num_calls: int) -> Callable[[Tables, str], None]:
    """Let the first calls end after a message, or before any where all calls do."""
    calls = itertools.count()

    def strike(tables: Tables, _: str) -> None:
        tables.let(lambda _, all_: itertools.islice(all_, 1 if next(calls) < num_calls else None))

    return strike


def damage(response):
    batch = bytearray(response.arrow_record_batch.serialized_record_batch)
    batch[: len(batch) // 2] = bytes(len(batch) // 2)
    response.arrow_record_batch.serialized_record_batch = bytes(batch)
    return response


def lie_about_rows(response):
    response.row_count += 1
    return response


def put_other_schema(response):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, OTHER.schema) as writer:
        writer.write_table(OTHER)
    messages = pyarrow.ipc.MessageReader.open_stream(sink.getvalue())
    messages.read_next_message()
    batch = messages.read_next_message().serialize().to_pybytes()
    response.arrow_record_batch.serialized_record_batch = batch
    return response


def change_messages(change: Callable, num_messages: int | None) -> Callable[[Tables, str], None]:
    numbers = itertools.count()

    def strike(tables: Tables, _: str) -> None:
        tables.let(
            lambda _, all_: (
                change(one) if num_messages is None or next(numbers) < num_messages else one
                for one in all_
            )
        )

    return strike


def empty(response):
    response.row_count = 0
    return response


def send_empty_for_ever(tables: Tables, _: str) -> None:
    def send(_, all_):
        first = empty(next(all_))
        while not tables.server._catalogue.stopping.wait(0.02):
            yield first

    tables.let(send)


def send_twice(tables: Tables, _: str) -> None:
    tables.let(lambda _, all_: itertools.chain.from_iterable((one, one) for one in all_))


def swap(tables: Tables, _: str) -> None:
    tables.let(lambda _, all_: iter([*all_][::-1]))


def expire_sessions(tables: Tables, _: str) -> None:
    calls = itertools.count()

    def expire(_, all_):
        if not next(calls):
            tables.server.expire_sessions()
        return all_

    tables.let(expire)


def replace_table(tables: Tables, _: str) -> None:
    def put(_, all_):
        tables.server.put_table(TABLE, ROWS.slice(3))
        return all_

    tables.let(put)


def delete_table(tables: Tables, moment: str) -> None:
    tables.server.client("p").delete_table(TABLE)


def lie_in_metadata(**fields) -> Callable[[Tables, str], None]:
    return lambda tables, _: tables.let_rest(
        lambda path, answer: {**answer(), **(fields if "/tables/" in path else {})}
    )


def leave_running(tables: Tables, _: str) -> None:
    tables.by_query = True

    def answer_later(path: str, answer: Callable):
        found = answer()
        if "status" in found and not found.get("configuration", {}).get("dryRun"):
            found = {**found, "status": {"state": "RUNNING"}}
        return {**found, "jobComplete": False} if "/queries/" in path else found

    tables.let_rest(answer_later)


def stall_rest(tables: Tables, _: str) -> None:
    tables.by_query = True

    def wait(path: str, answer: Callable):
        if "/queries/" in path:
            tables.server._catalogue.stopping.wait(30)
        return answer()

    tables.let_rest(wait)


def send_no_json(tables: Tables, _: str) -> None:
    tables.let_rest(lambda path, answer: [1] if answer() else [])


def refuse_once(reason: str) -> Callable[[Tables, str], None]:
    calls = itertools.count()

    def strike(tables: Tables, _: str) -> None:
        def refuse(request, all_):
            if not next(calls):
                raise RefusedError(reason, "injected fault")
            return all_

        tables.let(refuse)

    return strike


class LaterDate(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return super().now(tz) + datetime.timedelta(days=2)


def jump_ahead(tables: Tables, _: str) -> None:
    tables.patch.setattr(spool.datetime, "datetime", LaterDate)


def stop_server(tables: Tables, _: str) -> None:
    tables.server._read_server.stop(grace=None).wait()
    tables.server._rest.shutdown()
    tables.server._rest.server_close()


TABLE_FAULTS: dict[str, Callable[[], Callable[[Tables, str], None]]] = {
    "`UNAVAILABLE` once": lambda: fail("UNAVAILABLE", after_rows=3),
    "`UNAVAILABLE` for ever": lambda: fail("UNAVAILABLE", None),
    "`INTERNAL` once": lambda: fail("INTERNAL", after_rows=3),
    "`RESOURCE_EXHAUSTED` once": lambda: fail(
        "RESOURCE_EXHAUSTED", after_rows=3, retry_after_seconds=0.05
    ),
    "`RESOURCE_EXHAUSTED` for ever": lambda: fail(
        "RESOURCE_EXHAUSTED", None, retry_after_seconds=0.05
    ),
    "`PERMISSION_DENIED`": lambda: fail("PERMISSION_DENIED", None),
    "a stall once": lambda: fail(None, after_rows=3, stall_seconds=0.5),
    "a stall for ever": lambda: fail(None, None, stall_seconds=30.0),
    "streams that end early, once": lambda: stop_early(4),
    "streams that always end early": lambda: change_messages(empty, None),
    "empty messages for ever": lambda: send_empty_for_ever,
    "a damaged batch, once": lambda: change_messages(damage, 1),
    "damaged batches for ever": lambda: change_messages(damage, None),
    "batches of another schema": lambda: change_messages(put_other_schema, None),
    "a wrong number of rows in a batch": lambda: change_messages(lie_about_rows, None),
    "batches that come twice": lambda: send_twice,
    "batches in another order": lambda: swap,
    "a session that expires": lambda: expire_sessions,
    "a stream that is not found, once": lambda: refuse_once("notFound"),
    "a table replaced meanwhile": lambda: replace_table,
    "a table deleted": lambda: delete_table,
    "a table said to be longer": lambda: lie_in_metadata(numRows="99"),
    "a table said to be shorter": lambda: lie_in_metadata(numRows="5"),
    "a query that never ends": lambda: leave_running,
    "a result that stalls": lambda: stall_rest,
    "JSON of another form": lambda: send_no_json,
    "a refused connection": lambda: stop_server,
    "a clock that jumps": lambda: jump_ahead,
}
ONLY_REST = {
    "a table said to be longer",
    "a table said to be shorter",
    "a query that never ends",
    "a result that stalls",
    "JSON of another form",
}
"""BigQuery's REST interface is asked at the opening, and not again."""
ONLY_STREAMS = {kind for kind in TABLE_FAULTS if "batch" in kind or "stream" in kind} | {
    "empty messages for ever",
    "a session that expires",
}
TABLE_TABLE = read_table("BigQuery, fault by fault")


@pytest.fixture(name="tables")
def _tables(tmp_path, monkeypatch) -> Iterator[Tables]:
    with ExitStack() as stack:
        tables = Tables(tmp_path)
        tables.patch = monkeypatch
        stack.callback(tables.server.stop)
        yield tables


def test_the_table_of_bigquery_holds_what_is_tested():
    assert TABLE_TABLE.keys() == TABLE_FAULTS.keys()


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("kind", TABLE_FAULTS)
def test_faults_of_tables(tables, kind, moment):
    if kind in (ONLY_STREAMS if moment == "opening" else ONLY_REST):
        outcome = "–"
    else:
        if moment == "resuming":  # each stream brings some rows, then all stop
            for nth in range(1, 5):
                tables.server.add_fault(
                    BigQueryFault("ReadRows", "PERMISSION_DENIED", nth=nth, after_rows=3)
                )
            with pytest.raises(GemmaTunerError):
                tables.open()
        elif moment == "reading" and kind == "a refused connection":
            tables.let(lambda _, all_: (stop_server(tables, moment), iter(()))[1])
        TABLE_FAULTS[kind]()(tables, moment)
        outcome = tell(lambda: sorted(tables.read()), [])
    assert outcome == TABLE_TABLE.get(kind, ("?",) * 3)[MOMENTS.index(moment)]
