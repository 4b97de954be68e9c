"""A read service that ends too early, or sends what is no Arrow: told, and never half a table."""

import itertools
import random

import pyarrow
import pytest

from gemma_tuner.errors import SourceError
from gemma_tuner.sources.bigquery.parts import DamagedBatchError, Part
from gemma_tuner.sources.bigquery.source import BigQuerySource
from gemma_tuner.testing.cloud.bigquery.read_service import ReadService
from gemma_tuner.testing.cloud.bigquery.server import BigQueryServer
from tests.unit.sources.bigquery.test_source import SECRET, answers, serialize

TABLE = "p.d.t"
NUM_ROWS = 200
TABLE_ROWS = pyarrow.table(
    {"prompt": ["q"] * NUM_ROWS, "response": [f"{SECRET} {n}" for n in range(NUM_ROWS)]}
)
EXPECTED = sorted(TABLE_ROWS["response"].to_pylist())


@pytest.fixture
def make(tmp_path):
    with BigQueryServer(rows_per_message=10) as server:
        server.put_table(TABLE, TABLE_ROWS)

        def make(**options) -> BigQuerySource:
            clients = {"client": server.client("p"), "read_client": server.read_client()}
            options = {"table": TABLE, **clients, **options}
            return BigQuerySource(folder=tmp_path / "rows", **options)

        yield make


def let(monkeypatch, read):
    """Put ``read(number of the call, responses)`` between the service and its clients."""
    honest, numbers = ReadService._read, itertools.count()
    monkeypatch.setattr(
        ReadService, "_read", lambda self, asked: read(next(numbers), honest(self, asked))
    )


@pytest.mark.parametrize("num_messages", [0, 1, 3])  # of the five of each stream, at first
def test_a_call_that_ends_early_is_taken_up_again(make, monkeypatch, num_messages):
    let(monkeypatch, lambda call, all_: itertools.islice(all_, num_messages + 5 * (call // 4)))
    assert answers(make()) == EXPECTED


@pytest.mark.parametrize(
    "options",
    [{}, {"table": None, "query": f"SELECT * FROM `{TABLE}`", "max_bytes_billed": False}],
    ids=["table", "query"],
)
def test_a_table_that_stays_short_is_an_error_with_both_counts(make, monkeypatch, options):
    let(monkeypatch, lambda call, all_: itertools.islice(all_, 1 if call < 8 else 0))
    for _ in range(2):  # at the next start as well, from what is kept
        with pytest.raises(SourceError, match=r"sent [48]0 rows of .* holds 200; start again"):
            list(make(**options))
    monkeypatch.undo()
    assert answers(make(**options)) == EXPECTED


def test_a_restriction_may_leave_fewer_rows_than_the_table_holds(make):
    assert len(list(make(row_restriction=f"response = '{SECRET} 7'"))) == 1


def test_a_batch_damaged_on_its_way_is_asked_for_again(make, monkeypatch):
    def damage(call, responses):
        for response in responses:
            if call == 1:
                flip(response)
            yield response

    let(monkeypatch, damage)
    assert answers(make()) == EXPECTED


def test_batches_that_stay_damaged_are_an_error(make, monkeypatch):
    let(monkeypatch, lambda _, responses: map(flip, responses))
    with pytest.raises(SourceError, match="after row 0 of a stream is damaged, 3 times") as caught:
        list(make())
    assert SECRET not in str(caught.value)


def flip(response):
    batch = bytearray(response.arrow_record_batch.serialized_record_batch)
    batch[len(batch) // 2] ^= 0xFF
    response.arrow_record_batch.serialized_record_batch = bytes(batch)
    return response


def test_any_damaged_byte_is_refused_or_harmless(tmp_path):
    nested = [[{"role": "user", "content": "ä"}] * (n % 3) for n in range(40)]
    table = pyarrow.table({"text": ["some text"] * 40, "messages": nested})
    batch = serialize(table.to_batches()[0])
    part = Part(tmp_path, 0, table.schema.serialize().to_pybytes())
    rng = random.Random(0)
    num_refused = 0
    for _ in range(2_000):
        damaged = bytearray(batch)
        damaged[rng.randrange(len(batch))] = rng.randrange(256)
        try:
            part.append(bytes(damaged), 40)
        except DamagedBatchError:
            num_refused += 1
    for read in part.read_batches():
        read.to_pylist()  # what follows offsets that lead anywhere ends the process
    part.close()
    assert num_refused > 100
