"""The window hands out in order whatever the threads do, and holds no more than it may."""

import random
import threading
import time

import numpy as np
import pytest

from gemma_tuner.errors import DataError, SourceError
from gemma_tuner.records import Audio, Example, Image, StoredObject, Text, Turn
from gemma_tuner.storage.config import FetchConfig
from gemma_tuner.streaming.window import Failure, Window, _measure_bytes


def example(key, *parts):
    return Example(key, (Turn("user", parts), Turn("assistant", (Text("A"),))))


class Load:
    """An example whose parts take as long and become as large as the test says."""

    def __init__(self, number, num_bytes=100, decoded=400, seconds=0.0, fail=None, kind="stored"):
        self.number, self.num_bytes, self.decoded = number, num_bytes, decoded
        self.seconds, self.fail, self.kind = seconds, fail, kind
        self.fails_in = "fetch"
        self.fetched = self.was_decoded = False
        self.row, self.view, self.manifest = number, self, self

    def read_example(self, row):
        if self.kind == "text":
            return example(str(self.number), Text("x" * self.num_bytes))
        source = StoredObject("gs://b/x", 1, self.num_bytes) if self.kind == "stored" else b"e"
        return example(str(self.number), Audio(source))

    def fetch(self, read):
        time.sleep(self.seconds)
        self.fetched = True
        if self.fail and self.fails_in == "fetch":
            raise self.fail
        return example(read.key, Audio(b"e" * self.num_bytes))

    def decode(self, fetched):
        assert all(isinstance(part.source, bytes) for part in fetched.media)
        self.was_decoded = True
        if self.fail:
            raise self.fail
        return example(fetched.key, Audio(np.zeros(self.decoded // 4, np.float32)))


def keys(window):
    return [outcome.key for _, outcome in window]


def test_each_slot_comes_with_its_own_outcome():
    loads = [Load(n, kind=("stored", "bytes", "text")[n % 3]) for n in range(20)]
    for slot, outcome in Window(iter(loads), FetchConfig()):
        assert outcome.key == str(slot.row)


def test_order_is_kept_whatever_is_slow():
    rng = random.Random(0)
    loads = [
        Load(n, seconds=rng.choice([0, 0, 0.01]), kind=rng.choice(["stored", "bytes", "text"]))
        for n in range(200)
    ]
    assert keys(Window(iter(loads), FetchConfig(window_examples=32))) == [
        str(n) for n in range(200)
    ]


def test_reads_run_side_by_side():
    loads = [Load(n, seconds=0.05) for n in range(64)]
    started = time.perf_counter()
    assert len(keys(Window(iter(loads), FetchConfig(io_threads=16)))) == 64
    assert time.perf_counter() - started < 64 * 0.05 / 4


@pytest.mark.parametrize("window_bytes", [1, 900, 2000, 10**6])
def test_a_slow_consumer_meets_no_more_than_the_window(window_bytes):
    loads = [Load(n) for n in range(60)]
    config = FetchConfig(window_bytes=window_bytes, window_examples=20)
    window = Window(iter(loads), config)
    for number in range(60):
        assert next(window)[1].key == str(number)
        time.sleep(0.001)
        ahead = sum(load.fetched for load in loads) - number
        assert ahead <= 21
    # The one at the head may be larger than the window; decoders may find out how large.
    slack = 500 + config.decode_threads * 400
    assert window.peak_bytes <= window_bytes + slack


def test_decoding_ahead_keeps_to_half_of_the_bytes():
    loads = [Load(n, num_bytes=10, decoded=4000) for n in range(40)]
    window = Window(iter(loads), FetchConfig(window_bytes=20_000, decode_threads=2))
    next(window)
    time.sleep(0.05)
    decoded = sum(load.was_decoded for load in loads)
    assert 2 <= decoded <= 1 + 10_000 // 4000 + 2
    assert len(keys(window)) == 39


def test_what_fails_comes_in_its_place_and_others_go_on():
    loads = [Load(n) for n in range(10)]
    loads[3].fail = DataError("gone", key="3")
    loads[6].fail, loads[6].fails_in = DataError("damaged", key="6"), "decode"
    outcomes = [outcome for _, outcome in Window(iter(loads), FetchConfig())]
    assert [type(outcome) for outcome in outcomes].count(Failure) == 2
    assert (outcomes[3].stage, outcomes[3].error.key) == ("fetch", "3")
    assert (outcomes[6].stage, outcomes[6].error.key) == ("decode", "6")
    assert [o.key for o in outcomes if isinstance(o, Example)] == list("01245789")


def test_what_is_not_about_one_example_is_raised_in_its_place():
    loads = [Load(n) for n in range(10)]
    loads[3].fail = SourceError("no permission")
    window = Window(iter(loads), FetchConfig())
    assert [next(window)[1].key for _ in range(3)] == ["0", "1", "2"]
    with pytest.raises(SourceError, match="no permission"):
        next(window)


def test_closing_waits_for_nothing():
    loads = [Load(n, seconds=5) for n in range(30)]
    window = Window(iter(loads), FetchConfig())
    thread = threading.Timer(0.05, window.close)
    thread.start()
    started = time.perf_counter()
    thread.join()
    window.close()
    assert time.perf_counter() - started < 2


def test_sizes_are_those_of_what_is_held():
    assert _measure_bytes(example("k", Text("four"), Image(b"12"))) == 4 + 2 + 1
    assert _measure_bytes(example("k", Audio(StoredObject("gs://b/x", 1, 70)))) == 71
    assert _measure_bytes(example("k", Audio(np.zeros(5, np.float32)))) == 21
    assert _measure_bytes(Example("k", document="abc")) == 3
