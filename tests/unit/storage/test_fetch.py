"""Reads that survive a bad network: repeated, hedged, checked, counted; and files over them."""

import gzip
import io
import random
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import google_crc32c
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_tuner.errors import SourceError
from gemma_tuner.records import StoredObject
from gemma_tuner.storage import fetch as fetch_module
from gemma_tuner.storage.config import FetchConfig
from gemma_tuner.storage.fetch import Fetcher
from gemma_tuner.storage.objects import (
    AccessDeniedError,
    CorruptReadError,
    ObjectChangedError,
    TransientReadError,
)


class ScriptedStore:
    """Objects in memory; each read of one takes the next step of its script, then succeeds.

    A step is an exception to raise, bytes to return instead, seconds to take, or a list of them.
    """

    def __init__(self, contents, scripts=None):
        self.contents = contents
        self.scripts = {uri: list(steps) for uri, steps in (scripts or {}).items()}
        self.reads = []
        self.num_found = 0
        self.is_up = False
        self._lock = threading.Lock()

    def find(self, uri):
        """Stand for the stores of all schemes."""
        self.num_found += 1
        return self

    def list_objects(self, uri):
        raise NotImplementedError

    def pin_objects(self, uris):
        """Answers if it is up: what is asked are the objects' names, of which none is there."""
        if not self.is_up:
            raise TransientReadError("503")
        return [ObjectChangedError("gone") for _ in uris]

    def read_object(self, stored, start, num_bytes, *, timeout_seconds):
        with self._lock:
            self.reads.append((stored.uri, start, num_bytes, timeout_seconds))
            script = self.scripts.get(stored.uri)
            step = script.pop(0) if script else None
        for action in step if isinstance(step, list) else [step]:
            if isinstance(action, Exception):
                raise action
            if isinstance(action, bytes):
                return action
            if action is not None:
                time.sleep(action)
        content = self.contents[stored.uri]
        return content[start:] if num_bytes is None else content[start : start + num_bytes]


class SkippingClock:
    """Real time, beside sleeps that take none."""

    def __init__(self):
        self.sleeps = []

    def read(self):
        return time.monotonic() + sum(self.sleeps)

    def sleep(self, seconds):
        self.sleeps.append(seconds)


def pin(uri, content, **changes):
    known = {"generation": 1, "num_bytes": len(content), "crc32c": google_crc32c.value(content)}
    return StoredObject(uri, **(known | changes))


def make_fetcher(store, cache_folder=None, clock=None, rng=None, **config):
    kept = {"cache_bytes": 1 << 24 if cache_folder else 0, "min_free_disk_bytes": 0}
    times = {} if clock is None else {"clock": clock.read, "sleep": clock.sleep}
    config = FetchConfig(**kept, **config)
    return Fetcher(store, cache_folder or Path("none"), config, rng=rng, **times)


def make_contents(num_objects, num_bytes=1000):
    rng = random.Random(0)
    return {f"gs://b/{number}.jpg": rng.randbytes(num_bytes) for number in range(num_objects)}


def fetch_one(steps, content=b"picture", **settings):
    """Fetch an object whose reads take these steps; returns it, the fetcher, store and clock."""
    store, clock = (
        ScriptedStore({"gs://b/x.jpg": content}, {"gs://b/x.jpg": steps}),
        SkippingClock(),
    )
    fetcher = make_fetcher(store, clock=clock, **settings)
    try:
        return fetcher.fetch(pin("gs://b/x.jpg", content)), fetcher, store, clock
    except SourceError as error:
        return error, fetcher, store, clock
    finally:
        fetcher.close()


def wait_until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.005)


# What arrives


def test_objects_and_parts_arrive_once_and_then_from_the_cache(tmp_path):
    contents = make_contents(10)
    store = ScriptedStore(contents)
    fetcher = make_fetcher(store, tmp_path)
    part = StoredObject("gs://b/3.jpg", generation=1, start=100, num_bytes=50)
    for _ in range(2):
        for uri, content in contents.items():
            assert fetcher.fetch(pin(uri, content)) == content
        assert fetcher.fetch(part) == contents[part.uri][100:150]
    assert store.num_found == len(store.reads) == 11
    assert {read[1:3] for read in store.reads} == {(0, None), (100, 50)}
    counts = fetcher.counts
    assert (counts.requests, counts.hits, counts.bytes_downloaded) == (11, 11, 10_050)
    assert (counts.retries, counts.hedges, counts.failures) == (0, 0, {})
    fetcher.close()


def test_a_full_cache_asks_for_no_store(tmp_path):
    content = b"kept"
    fetcher = make_fetcher(ScriptedStore({"gs://b/x": content}), tmp_path)
    fetcher.fetch(pin("gs://b/x", content))
    fetcher.close()

    class Refusing:
        def find(self, uri):
            raise AccessDeniedError("no credentials")

    offline = Fetcher(Refusing(), tmp_path, FetchConfig(min_free_disk_bytes=0))
    assert offline.fetch(pin("gs://b/x", content)) == content
    for _ in range(2):
        with pytest.raises(AccessDeniedError, match="no credentials"):
            offline.fetch(pin("gs://b/y", content))
    offline.close()


def test_many_threads_read_at_once():
    contents = make_contents(64)
    store = ScriptedStore(contents, {uri: [0.02] for uri in contents})
    fetcher = make_fetcher(store, io_threads=16)
    began = time.monotonic()
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda uri: fetcher.fetch(pin(uri, contents[uri])), contents))
    assert found == list(contents.values())
    assert time.monotonic() - began < 64 * 0.02
    assert fetcher.counts.requests == 64
    fetcher.close()


def test_an_object_of_unknown_size_and_checksum_arrives():
    fetcher = make_fetcher(ScriptedStore({"gs://b/x": b"abc"}))
    assert fetcher.fetch(StoredObject("gs://b/x")) == b"abc"
    fetcher.close()


@pytest.mark.parametrize("damaged", [b"pictur", b"pictures", b"pictuRe", b""])
def test_damage_is_fetched_once_more(damaged, tmp_path):
    found, fetcher, store, clock = fetch_one([damaged], cache_folder=tmp_path)
    assert found == b"picture"
    assert fetcher.counts.failures == {"corrupt": 1}
    assert (fetcher.counts.retries, clock.sleeps) == (1, [])
    error, fetcher, store, _ = fetch_one([damaged] * 5, cache_folder=tmp_path / "other")
    assert isinstance(error, CorruptReadError)
    assert "'x.jpg'" in str(error)
    assert len(store.reads) == 2
    assert fetcher.counts.failures == {"corrupt": 2}
    assert list(tmp_path.glob("other/??/*")) == []


def test_damage_that_the_store_finds_is_fetched_once_more():
    found, *_ = fetch_one([CorruptReadError("short")])
    assert found == b"picture"
    error, _, store, _ = fetch_one([CorruptReadError("short")] * 5)
    assert isinstance(error, CorruptReadError)
    assert len(store.reads) == 2


@pytest.mark.parametrize("error", [ObjectChangedError("changed"), AccessDeniedError("denied")])
def test_what_no_attempt_would_mend_is_raised_at_once(error):
    found, fetcher, store, _ = fetch_one([error])
    assert found is error
    assert len(store.reads) == 1
    assert fetcher.counts.failures == {str(error): 1}


def test_what_is_no_error_of_a_store_passes_as_it_is():
    store = ScriptedStore({"gs://b/x": b""}, {"gs://b/x": [ZeroDivisionError()]})
    fetcher = make_fetcher(store)
    with pytest.raises(ZeroDivisionError):
        fetcher.fetch(StoredObject("gs://b/x"))
    fetcher.close()


# Repeating


class HighestRandom(random.Random):
    """Draws the highest number each time, and remembers from what."""

    def __init__(self):
        super().__init__()
        self.bounds = []

    def uniform(self, a, b):
        self.bounds.append((a, b))
        return b


def test_waits_double_up_to_a_bound_and_are_drawn_between_zero_and_it():
    rng = HighestRandom()
    found, fetcher, _, clock = fetch_one([TransientReadError("503")] * 9, rng=rng)
    assert found == b"picture"
    assert clock.sleeps == [0.5, 1, 2, 4, 8, 16, 32, 32, 32]
    assert rng.bounds == [(0.0, seconds) for seconds in clock.sleeps]
    counts = fetcher.counts
    assert (counts.requests, counts.retries, counts.failures) == (10, 9, {"transient": 9})
    assert counts.seconds_waited == sum(clock.sleeps)
    _, _, _, clock = fetch_one([TransientReadError("503")] * 9, rng=random.Random(1))
    assert len(set(clock.sleeps)) == 9


def test_the_store_is_given_the_time_that_it_asks_for():
    busy = TransientReadError("429", retry_after_seconds=40)
    found, _, _, clock = fetch_one([busy, busy], rng=HighestRandom())
    assert (found, clock.sleeps) == (b"picture", [40, 40])
    polite = TransientReadError("429", retry_after_seconds=0.1)
    _, _, _, clock = fetch_one([polite], rng=HighestRandom())
    assert clock.sleeps == [0.5]


def test_nobody_waits_beyond_the_total_deadline():
    late = TransientReadError("429 rate limit", retry_after_seconds=90)
    error, fetcher, store, clock = fetch_one([late] * 5, total_timeout_seconds=100.0)
    assert type(error) is SourceError  # Nothing else was read: it is not this object's fault.
    assert clock.sleeps == [90]  # A second would end at 180.
    assert len(store.reads) == 2
    assert fetcher.counts.seconds_waited == 90
    for words in ("'x.jpg'", "2 attempts", "90 s", "429 rate limit", "total_timeout_seconds"):
        assert words in str(error)


def test_an_object_that_cannot_be_read_is_told_from_a_store_that_cannot():
    store = ScriptedStore({"gs://b/x": b"x"}, {"gs://b/x": [TransientReadError("503")] * 99})
    store.is_up = True
    fetcher = make_fetcher(store, clock=SkippingClock(), total_timeout_seconds=50.0)
    with pytest.raises(TransientReadError, match="its store answers: look at this object"):
        fetcher.fetch(pin("gs://b/x", b"x"))
    store.is_up = False
    store.scripts["gs://b/x"] = [TransientReadError("503")] * 99
    with pytest.raises(SourceError, match="nothing could be read for"):
        fetcher.fetch(pin("gs://b/x", b"x"))


def test_attempts_end_at_the_total_deadline():
    steps = [TransientReadError("503")] * 1000
    error, _, store, clock = fetch_one(
        steps, rng=HighestRandom(), attempt_timeout_seconds=30.0, total_timeout_seconds=40.0
    )
    assert type(error) is SourceError
    assert clock.sleeps == [0.5, 1, 2, 4, 8, 16]  # 31.5 s; 32 more would be too many.
    given = [read[3] for read in store.reads]
    assert given == pytest.approx([30, 30, 30, 30, 30, 40 - 15.5, 40 - 31.5], abs=0.5)


def test_an_attempt_that_trickles_is_given_up_however_long_it_takes():
    store = ScriptedStore({"gs://b/x": b"abc"}, {"gs://b/x": [1.0]})
    fetcher = make_fetcher(store, clock=SkippingClock(), attempt_timeout_seconds=0.1)
    began = time.monotonic()
    assert fetcher.fetch(pin("gs://b/x", b"abc")) == b"abc"
    assert 0.1 <= time.monotonic() - began < 0.9
    assert fetcher.counts.failures == {"timeout": 1}
    assert fetcher.counts.bytes_downloaded == 3
    wait_until(lambda: fetcher.counts.bytes_downloaded == 6)  # The abandoned one's count too.
    assert fetcher.counts.failures == {"timeout": 1}
    fetcher.close()


def test_stalled_attempts_leave_threads_for_others():
    contents = make_contents(14)
    store = ScriptedStore(contents, {uri: [3.0] for uri in contents})
    fetcher = make_fetcher(
        store, clock=SkippingClock(), io_threads=2, attempt_timeout_seconds=0.05
    )
    began = time.monotonic()
    for uri, content in contents.items():
        assert fetcher.fetch(pin(uri, content)) == content
    assert time.monotonic() - began < 2.5
    # A busy machine may take so long for one that does not stall, too.
    assert fetcher.counts.failures.keys() == {"timeout"}
    assert fetcher.counts.failures["timeout"] >= 14
    fetcher.close()


# Hedging


def warm_up(fetcher, num_reads=30):
    """Let a fetcher learn that reads are quick, and earn hedges."""
    for _ in range(num_reads):
        fetcher.fetch(StoredObject("gs://b/quick"))


def make_hedging(steps, num_warm=30, **config):
    store = ScriptedStore({"gs://b/quick": b"q", "gs://b/x": b"abc"}, {"gs://b/x": steps})
    fetcher = make_fetcher(store, clock=SkippingClock(), **config)
    warm_up(fetcher, num_warm)
    return fetcher, store


def test_a_second_attempt_overtakes_a_slow_first():
    fetcher, store = make_hedging([1.0])
    began = time.monotonic()
    assert fetcher.fetch(pin("gs://b/x", b"abc")) == b"abc"
    assert 0.05 <= time.monotonic() - began < 0.9
    counts = fetcher.counts
    assert (counts.hedges, counts.hedges_won, counts.retries) == (1, 1, 0)
    assert counts.requests == 32
    wait_until(lambda: fetcher.counts.bytes_downloaded == 30 + 3 + 3)
    assert len(store.reads) == 32
    fetcher.close()


def test_a_slow_first_attempt_that_still_wins():
    fetcher, _ = make_hedging([0.3, 1.0])
    assert fetcher.fetch(pin("gs://b/x", b"abc")) == b"abc"
    assert (fetcher.counts.hedges, fetcher.counts.hedges_won) == (1, 0)
    fetcher.close()


def test_errors_of_the_abandoned_attempt_are_counted_and_harm_nothing():
    fetcher, _ = make_hedging([[0.3, TransientReadError("503")]])
    assert fetcher.fetch(pin("gs://b/x", b"abc")) == b"abc"
    assert fetcher.counts.failures == {}
    wait_until(lambda: fetcher.counts.failures == {"transient": 1})
    assert fetcher.counts.retries == 0
    fetcher.close()


def test_a_first_attempt_that_fails_leaves_the_second_running():
    fetcher, _ = make_hedging([[0.2, TransientReadError("503")], 0.4])
    assert fetcher.fetch(pin("gs://b/x", b"abc")) == b"abc"
    counts = fetcher.counts
    assert (counts.hedges_won, counts.retries, counts.failures) == (1, 0, {"transient": 1})
    fetcher.close()


def test_two_that_fail_are_one_failure_to_wait_after():
    slow_failure = [0.2, TransientReadError("503")]
    fetcher, _ = make_hedging([slow_failure, slow_failure])
    assert fetcher.fetch(pin("gs://b/x", b"abc")) == b"abc"
    counts = fetcher.counts
    assert (counts.hedges, counts.retries, counts.failures) == (1, 1, {"transient": 2})
    fetcher.close()


def test_what_the_first_to_end_finds_out_is_final():
    fetcher, _ = make_hedging([1.0, ObjectChangedError("changed")])
    began = time.monotonic()
    with pytest.raises(ObjectChangedError):
        fetcher.fetch(pin("gs://b/x", b"abc"))
    assert time.monotonic() - began < 0.9
    fetcher.close()


@pytest.mark.parametrize(
    ("num_warm", "config"), [(19, {}), (30, {"hedged_fraction": 0}), (9, {"hedged_fraction": 1})]
)
def test_no_hedge_without_experience_or_permission(num_warm, config):
    fetcher, _ = make_hedging([0.3], num_warm, **config)
    assert fetcher.fetch(pin("gs://b/x", b"abc")) == b"abc"
    assert fetcher.counts.hedges == 0
    fetcher.close()


def test_a_store_that_turns_slow_is_hedged_within_the_fraction():
    fetcher, store = make_hedging([], num_warm=30, io_threads=2)  # Two tokens are saved at most.
    store.scripts["gs://b/x"] = [0.08] * 100
    for _ in range(10):
        fetcher.fetch(pin("gs://b/x", b"abc"))
    counts = fetcher.counts
    assert 2 <= counts.hedges <= 2 + 0.1 * 10
    fetcher.close()


def measure_p99_seconds(hedged_fraction, stall_seconds, num_reads=400):
    stalls = random.Random(3)
    steps = [stall_seconds if stalls.random() < 0.05 else 0.01 for _ in range(2 * num_reads)]
    store = ScriptedStore({"gs://b/x": b"abc"}, {"gs://b/x": steps})
    fetcher = make_fetcher(store, hedged_fraction=hedged_fraction)

    def read(_):
        began = time.monotonic()
        fetcher.fetch(pin("gs://b/x", b"abc"))
        return time.monotonic() - began

    with ThreadPoolExecutor(16) as pool:
        seconds = sorted(pool.map(read, range(num_reads)))
    counts = fetcher.counts
    fetcher.close()
    return seconds[int(0.99 * num_reads)], counts


@pytest.mark.slow  # its hundredths of a second are those of a machine that does nothing else
def test_hedging_mends_the_tail():
    slow, _ = measure_p99_seconds(0, 0.5)
    quick, counts = measure_p99_seconds(0.1, 0.5)
    assert slow >= 0.5
    assert quick < 0.4
    assert 5 <= counts.hedges <= 0.1 * 400


# Ranges and files


def test_ranges_are_exact_and_not_kept(tmp_path):
    content = bytes(range(256))
    store = ScriptedStore({"gs://b/x": content})
    fetcher = make_fetcher(store, tmp_path)
    whole = pin("gs://b/x", content)
    part = StoredObject("gs://b/x", generation=1, start=100, num_bytes=50)
    for _ in range(2):
        assert fetcher.read_range(whole, 10, 20) == content[10:30]
        assert fetcher.read_range(part, 10, 40) == content[110:150]
    assert fetcher.read_range(whole, 256, 0) == b""
    assert fetcher.counts.requests == 4
    assert fetcher.counts.hits == 0
    for stored, start, num_bytes in ((whole, 250, 7), (part, 10, 41), (whole, -1, 2)):
        with pytest.raises(ValueError, match="bytes"):
            fetcher.read_range(stored, start, num_bytes)
    fetcher.close()


def test_a_range_that_comes_short_is_fetched_once_more():
    store = ScriptedStore({"gs://b/x": b"0123456789"}, {"gs://b/x": [b"01"]})
    fetcher = make_fetcher(store)
    assert fetcher.read_range(StoredObject("gs://b/x"), 0, 5) == b"01234"
    store.scripts["gs://b/x"] = [b"01", b"012345"]
    with pytest.raises(CorruptReadError, match="6 bytes instead of 5"):
        fetcher.read_range(StoredObject("gs://b/x"), 0, 5)
    fetcher.close()


FILE_CONTENT = random.Random(1).randbytes(5000)


file_steps = st.one_of(
    st.tuples(st.just("read"), st.integers(-1, 6000)),
    st.tuples(st.just("seek"), st.integers(0, 6000), st.just(io.SEEK_SET)),
    st.tuples(st.just("seek"), st.integers(0, 6000), st.just(io.SEEK_CUR)),
    st.tuples(st.just("seek"), st.integers(-5000, 100), st.just(io.SEEK_END)),
    st.tuples(st.just("readline")),
)


@settings(max_examples=100)
@given(st.lists(file_steps, max_size=12), st.sampled_from([16, 700, 1 << 20]))
def test_an_open_object_is_a_file_like_any_other(steps, read_ahead_bytes):
    fetcher = make_fetcher(ScriptedStore({"gs://b/x": b"before" + FILE_CONTENT + b"after"}))
    part = StoredObject("gs://b/x", generation=1, start=6, num_bytes=len(FILE_CONTENT))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fetch_module, "_READ_AHEAD_BYTES", read_ahead_bytes)
        with fetcher.open(part) as file, io.BytesIO(FILE_CONTENT) as expected:
            for method, *arguments in steps:
                found = getattr(file, method)(*arguments)
                assert found == getattr(expected, method)(*arguments)
                assert file.tell() == expected.tell()
    fetcher.close()


def open_content(content, **config):
    store = ScriptedStore({"gs://b/data": content})
    fetcher = make_fetcher(store, **config)
    return fetcher.open(pin("gs://b/data", content)), fetcher, store


def test_parquet_reads_only_the_columns_asked_for():
    rows = 300_000
    table = pyarrow.table(
        {"a": range(rows), "b": random.Random(0).choices(range(1 << 60), k=rows)}
    )
    sink = io.BytesIO()
    pyarrow.parquet.write_table(table, sink, compression="none", use_dictionary=False)
    file, fetcher, _ = open_content(sink.getvalue())
    assert pyarrow.parquet.read_table(file).equals(table)
    fetcher.close()
    huge = io.BytesIO()
    wide = pyarrow.table(dict.fromkeys("abcdefgh", table["b"]))
    pyarrow.parquet.write_table(wide, huge, compression="none", use_dictionary=False)
    file, fetcher, _ = open_content(huge.getvalue())
    read = pyarrow.parquet.ParquetFile(file).read(columns=["b"], use_threads=False)
    assert read["b"].equals(table["b"])
    assert fetcher.counts.bytes_downloaded < len(huge.getvalue()) / 2
    fetcher.close()


def test_gzip_tar_and_lines():
    lines = [b"%d\n" % number for number in range(100_000)]
    file, fetcher, store = open_content(b"".join(lines))
    assert list(file) == lines
    assert len(store.reads) == 1
    fetcher.close()
    file, fetcher, _ = open_content(gzip.compress(b"".join(lines)))
    assert list(gzip.open(file)) == lines  # noqa: SIM115
    fetcher.close()
    archive, members = io.BytesIO(), make_contents(20, 3000)
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    file, fetcher, _ = open_content(archive.getvalue())
    with tarfile.open(fileobj=file) as tar:
        found = {member.name: tar.extractfile(member).read() for member in tar}
    assert list(found.values()) == list(members.values())
    fetcher.close()


def test_large_reads_come_in_pieces_that_one_attempt_can_carry():
    content = bytes(9 << 20)
    file, fetcher, store = open_content(content)
    assert file.read() == content
    assert [read[2] for read in store.reads] == [4 << 20, 4 << 20, 1 << 20]
    fetcher.close()


def test_errors_of_reads_pass_through_files():
    file, fetcher, store = open_content(b"PAR1" + bytes(100_000) + b"PAR1")
    store.scripts["gs://b/data"] = [AccessDeniedError("storage.objects.get")] * 9
    with pytest.raises(AccessDeniedError, match=r"storage\.objects\.get"):
        file.read(10)
    with pytest.raises(AccessDeniedError, match=r"storage\.objects\.get"):
        pyarrow.parquet.read_table(file)
    fetcher.close()
    with pytest.raises(SourceError, match=r"'data'.*size"):
        fetcher.open(StoredObject("gs://b/data"))


# Stored zipped


def test_what_is_stored_zipped_is_unzipped_and_kept_as_it_is_stored(tmp_path):
    picture = b"\x89PNG" + bytes(100_000)
    stored = gzip.compress(picture[:50_000]) + gzip.compress(picture[50_000:])
    found, fetcher, _, _ = fetch_one([], stored, cache_folder=tmp_path)
    assert found == picture
    assert fetcher.fetch(pin("gs://b/x.jpg", stored)) == picture  # From the cache.
    assert fetcher.counts.hits == 1
    assert fetcher.counts.bytes_downloaded == len(stored)


def test_what_is_stored_zipped_and_damaged_is_corrupt():
    stored = gzip.compress(random.Random(0).randbytes(5000))
    for damaged in (stored[:-100], stored[:100] + b"\xff\xff\xff" + stored[103:], stored[:3]):
        error, _, store, _ = fetch_one([], damaged)
        assert isinstance(error, CorruptReadError)
        assert "'x.jpg' is stored zipped" in str(error)
        assert len(store.reads) == 1  # It came as it is stored: asking again is no use.


def test_unzipping_is_bounded(monkeypatch):
    monkeypatch.setattr(fetch_module, "_MAX_UNZIPPED_BYTES", 10_000)
    assert fetch_one([], gzip.compress(bytes(10_000)))[0] == bytes(10_000)
    error, *_ = fetch_one([], gzip.compress(bytes(10_001)))
    assert isinstance(error, CorruptReadError)
    assert "10,000" in str(error)


# Privacy and ends


def test_messages_tell_no_query_no_path_and_no_content():
    uri = "gs://secret-bucket/secret-folder/x.jpg?X-Goog-Signature=secret"
    content = b"secret content"
    for steps, config in (
        ([b"secret bytes"] * 2, {}),
        ([TransientReadError("503")] * 99, {"total_timeout_seconds": 2.0}),
        ([0.2] * 9, {"attempt_timeout_seconds": 0.05, "total_timeout_seconds": 0.3}),
    ):
        fetcher = make_fetcher(
            ScriptedStore({uri: content}, {uri: steps}), clock=SkippingClock(), **config
        )
        with pytest.raises(SourceError, match=r"'x\.jpg'") as caught:
            fetcher.fetch(pin(uri, content))
        assert "secret" not in str(caught.value)
        fetcher.close()


def test_close_ends_reads_at_once():
    store = ScriptedStore(
        {"gs://b/x": b"abc"},
        {"gs://b/x": [3.0], "gs://b/y": [TransientReadError("429", retry_after_seconds=60)]},
    )
    fetcher, ended = make_fetcher(store), []

    def read(uri):
        try:
            fetcher.fetch(StoredObject(uri))
        except RuntimeError as error:
            ended.append(str(error))

    readers = [threading.Thread(target=read, args=(f"gs://b/{name}",)) for name in "xy"]
    for reader in readers:
        reader.start()
    wait_until(lambda: fetcher.counts.requests == 2)
    time.sleep(0.05)
    began = time.monotonic()
    fetcher.close()
    for reader in readers:
        reader.join(10)
    assert time.monotonic() - began < 1
    assert len(ended) == 2
    with pytest.raises(RuntimeError, match="closed"):
        fetcher.fetch(StoredObject("gs://b/x"))
    fetcher.close()
