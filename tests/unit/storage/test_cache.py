"""The media cache: what was written comes back or nothing does, and the budget holds always."""

import errno
import os
import random
import signal
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import google_crc32c
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_tuner.errors import SourceError
from gemma_tuner.records import StoredObject
from gemma_tuner.storage.cache import MediaCache
from tests.media_cache import CacheCheck, check_cache

HEADER_BYTES, TOTAL_BYTES = 20, 12
ROOT = Path(__file__).resolve().parents[3]


def make_object(number, **changes):
    return StoredObject(**{"uri": f"gs://bucket/{number}.jpg", "generation": 7} | changes)


def open_cache(folder, max_bytes=1 << 20, **settings):
    return MediaCache(folder, **{"max_bytes": max_bytes, "min_free_bytes": 0} | settings)


def list_entries(folder):
    return sorted(folder.glob("??/*.media"))


def sum_sizes(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


class Clock:
    """Time that passes when it is told to."""

    def __init__(self):
        self.seconds = 1_800_000_000.0
        self.probe = None

    def __call__(self):
        if self.probe is not None:
            self.probe()
        return self.seconds


def test_what_was_written_comes_back(tmp_path):
    cache = open_cache(tmp_path / "new" / "cache")
    for number, content in enumerate([b"", b"x", os.urandom(100_000)]):
        stored = make_object(number, num_bytes=len(content), crc32c=google_crc32c.value(content))
        assert cache.read(stored) is None
        assert cache.write(stored, content)
        assert cache.write(stored, content)  # It is there already.
        assert cache.read(stored) == content
        assert open_cache(cache._files.path).read(stored) == content
    assert (cache.counts.hits, cache.counts.misses, cache.counts.not_stored) == (3, 3, 0)
    assert check_cache(cache._files.path) == CacheCheck(entries=3, num_bytes=100_001, damaged=0)
    assert cache.num_bytes == sum_sizes(cache._files.path) == 100_001 + 3 * 20 + 12


def test_versions_and_parts_are_kept_apart(tmp_path):
    cache = open_cache(tmp_path)
    variants = [
        make_object(1),
        make_object(1, generation=8),
        make_object(2),
        make_object(1, start=0, num_bytes=5),
        make_object(1, start=5, num_bytes=5),
        make_object(1, start=5, num_bytes=6),
        make_object(1, generation=None, crc32c=1),
    ]
    for number, stored in enumerate(variants[:-1]):
        assert cache.write(stored, b"%d" % number * (stored.num_bytes or 1))
    for number, stored in enumerate(variants[:-1]):
        assert cache.read(stored) == b"%d" % number * (stored.num_bytes or 1)
    assert cache.read(variants[-1]) is None


def test_an_object_without_version_or_checksum_is_never_kept(tmp_path):
    cache = open_cache(tmp_path)
    unknown = make_object(1, generation=None, num_bytes=3)
    assert not cache.write(unknown, b"abc")
    assert cache.read(unknown) is None
    assert cache.counts.not_stored == cache.counts.misses == 1
    by_checksum = make_object(1, generation=None, crc32c=google_crc32c.value(b"abc"))
    assert cache.write(by_checksum, b"abc")
    assert cache.read(by_checksum) == b"abc"
    changed = make_object(1, generation=None, crc32c=google_crc32c.value(b"abd"))
    assert cache.read(changed) is None


def test_the_users_alone(tmp_path):
    old = os.umask(0)
    try:
        open_cache(tmp_path / "cache").write(make_object(1), b"private")
    finally:
        os.umask(old)
    for path in [tmp_path / "cache", *(tmp_path / "cache").rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_every_flipped_bit_is_found(tmp_path):
    cache = open_cache(tmp_path)
    stored, content = make_object(1), b"eleven bits"
    cache.write(stored, content)
    path = list_entries(tmp_path)[0]
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        assert check_cache(cache._files.path) == CacheCheck(0, 0, damaged=1)
        assert cache.read(stored) is None
        assert not path.exists()
        assert cache.num_bytes == sum_sizes(tmp_path)
        assert cache.write(stored, content)
    assert cache.read(stored) == content
    assert cache.counts.damaged == cache.counts.misses == 8 * len(whole)


@pytest.mark.parametrize("length", [0, 5, 19, 20, 22, 24])
def test_another_length_is_damage(tmp_path, length):
    cache = open_cache(tmp_path)
    cache.write(make_object(1), b"abc")
    path = list_entries(tmp_path)[0]
    path.write_bytes((path.read_bytes() + b"more")[:length])
    assert cache.read(make_object(1)) is None
    assert (cache.counts.damaged, list_entries(tmp_path)) == (1, [])


def test_an_entry_that_is_whole_but_not_what_is_pinned_is_damage(tmp_path):
    cache = open_cache(tmp_path)
    stored = make_object(1, crc32c=google_crc32c.value(b"right"))
    cache.write(stored, b"wrong")
    assert cache.read(stored) is None
    assert cache.counts.damaged == 1


class ModelOfCache:
    """The least recently used cache in its plainest form."""

    def __init__(self, max_bytes):
        self.max_bytes = max_bytes
        self.entries = {}  # number -> (last used, size)
        self.evicted = 0

    def total(self):
        return TOTAL_BYTES + sum(size for _, size in self.entries.values())

    def write(self, number, num_bytes, now):
        size = num_bytes + HEADER_BYTES
        if TOTAL_BYTES + size > self.max_bytes:
            return number in self.entries
        if number not in self.entries:
            if self.total() + size > self.max_bytes:
                goal = self.max_bytes - size - self.max_bytes // 16
                while self.entries and self.total() > goal:
                    del self.entries[min(self.entries, key=lambda number: self.entries[number])]
                    self.evicted += 1
            self.entries[number] = (now, size)
        return True

    def read(self, number, now):
        if number in self.entries and now - self.entries[number][0] >= 60:
            self.entries[number] = (now, self.entries[number][1])
        return number in self.entries


operations = st.tuples(
    st.sampled_from(["read", "write", "open"]), st.integers(0, 7), st.sampled_from([1, 70])
)


@settings(max_examples=60)
@given(
    sizes=st.lists(st.integers(0, 400), min_size=8, max_size=8),
    max_bytes=st.integers(50, 1200),
    steps=st.lists(operations, max_size=40),
)
def test_it_keeps_what_a_model_keeps(tmp_path_factory, sizes, max_bytes, steps):
    folder, clock = tmp_path_factory.mktemp("cache"), Clock()

    def probe():  # Called in the middle of each write, when most is on the disk.
        assert sum_sizes(folder) <= max_bytes

    clock.probe = probe
    cache, model = open_cache(folder, max_bytes, clock=clock), ModelOfCache(max_bytes)
    contents = [bytes([number]) * size for number, size in enumerate(sizes)]
    num_evicted = 0
    for operation, number, seconds in steps:
        clock.seconds += seconds
        if operation == "write":
            is_stored = cache.write(make_object(number), contents[number])
            assert is_stored == model.write(number, sizes[number], clock.seconds)
        elif operation == "read":
            expected = contents[number] if model.read(number, clock.seconds) else None
            assert cache.read(make_object(number)) == expected
        else:
            num_evicted += cache.counts.evicted
            cache = open_cache(folder, max_bytes, clock=clock)
        assert cache.num_bytes == model.total() == sum_sizes(folder) <= max_bytes
    assert num_evicted + cache.counts.evicted == model.evicted
    clock.probe = None
    assert check_cache(cache._files.path).entries == len(model.entries)


def test_a_full_budget_keeps_what_was_used_last(tmp_path):
    clock = Clock()
    cache = open_cache(tmp_path, 12 + 11 * 1020, clock=clock)
    for number in range(10):
        clock.seconds += 1
        cache.write(make_object(number), bytes(1000))
    clock.seconds += 100
    assert cache.read(make_object(0)) is not None  # The oldest becomes the latest.
    for number in range(10, 14):
        clock.seconds += 1
        cache.write(make_object(number), bytes(1000))
    assert cache.read(make_object(0)) is not None
    assert cache.read(make_object(1)) is None
    assert cache.read(make_object(13)) is not None


def test_no_budget_is_no_cache(tmp_path):
    cache = open_cache(tmp_path / "none", 0)
    assert not cache.write(make_object(1), b"abc")
    assert cache.read(make_object(1)) is None
    assert cache.num_bytes == 0
    assert check_cache(cache._files.path) == CacheCheck(0, 0, 0)
    assert not (tmp_path / "none").exists()


def test_what_is_larger_than_the_budget_is_not_stored_and_evicts_nothing(tmp_path):
    cache = open_cache(tmp_path, 1000)
    assert cache.write(make_object(1), bytes(500))
    assert not cache.write(make_object(2), bytes(1000 - 20 - 12 + 1))
    assert cache.counts.not_stored == 1
    assert cache.read(make_object(1)) is not None
    assert cache.write(make_object(3), bytes(1000 - 20 - 12))
    assert sum_sizes(tmp_path) == 1000


def test_a_smaller_budget_holds_from_the_beginning(tmp_path):
    cache = open_cache(tmp_path, 100_000)
    for number in range(20):
        cache.write(make_object(number), bytes(4000))
    assert sum_sizes(tmp_path) > 80_000
    open_cache(tmp_path, 20_000)
    assert 10_000 < sum_sizes(tmp_path) <= 20_000


def test_the_disk_keeps_its_free_space_and_that_is_told_once(tmp_path, caplog):
    cache = open_cache(tmp_path, min_free_bytes=1 << 60)
    for number in range(2):
        assert not cache.write(make_object(number), b"abc")
    assert cache.counts.not_stored == 2
    (told,) = caplog.messages
    assert "min_free_disk_bytes" in told
    assert str(tmp_path) not in told
    assert list_entries(tmp_path) == []


@pytest.mark.parametrize("step", ["ftruncate", "utime", "rename"])
def test_a_full_disk_is_counted_and_nothing_is_left(tmp_path, monkeypatch, step):
    cache = open_cache(tmp_path, 1000)

    def fail(*arguments, **named):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path if step == "rename" else os, step, fail)
        for number in range(3):
            assert not cache.write(make_object(number), bytes(600))
    assert cache.counts.not_stored == 3
    assert cache.write(make_object(1), bytes(600))  # Nothing else takes its room.
    assert cache.num_bytes == sum_sizes(tmp_path) == 632


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_disk_that_fills_while_writing(tmp_path, monkeypatch):
    cache = open_cache(tmp_path)
    begin = cache._files.begin

    def begin_on_a_full_disk(num_bytes):
        path, descriptor = begin(num_bytes)
        os.close(descriptor)
        return path, os.open("/dev/full", os.O_WRONLY)

    monkeypatch.setattr(cache._files, "begin", begin_on_a_full_disk)
    assert not cache.write(make_object(1), bytes(100_000))
    assert cache.num_bytes == sum_sizes(tmp_path) == TOTAL_BYTES


def test_a_folder_that_cannot_be_used_is_an_error_at_once(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SourceError, match=r"'cache'.*cache_dir=.*cache_bytes=0"):
        open_cache(tmp_path / "file" / "cache")


def test_a_cache_emptied_by_hand_begins_anew(tmp_path):
    cache = open_cache(tmp_path / "cache")
    cache.write(make_object(1), b"abc")
    subprocess.run(["rm", "-r", tmp_path / "cache"], check=True)
    assert cache.read(make_object(1)) is None
    assert cache.write(make_object(1), b"abc")
    assert cache.num_bytes == sum_sizes(tmp_path / "cache")


def test_other_peoples_files_are_left_alone(tmp_path):
    (tmp_path / "ab").mkdir()
    (tmp_path / "incoming").mkdir()
    others = [tmp_path / "ab" / "photo.jpg", tmp_path / "incoming" / "mail.txt", tmp_path / "lock"]
    for path in others:
        path.write_bytes(bytes(5000))
    cache = open_cache(tmp_path, 3000)
    for number in range(10):
        assert cache.write(make_object(number), bytes(1000))
    assert all(path.read_bytes() == bytes(5000) for path in others)


def test_a_torn_total_is_counted_anew(tmp_path):
    cache = open_cache(tmp_path, 3000)
    cache.write(make_object(1), bytes(1000))
    for content in (b"", b"torn", bytes(12), b"\xff" * 12):
        (tmp_path / "media.lock").write_bytes(content)
        assert cache.num_bytes == 1032
    (tmp_path / "media.lock").write_bytes(b"")
    for number in range(9):
        cache.write(make_object(number), bytes(1000))
        assert sum_sizes(tmp_path) <= 3000


def test_leftovers_count_while_their_writer_lives_and_go_after_it(tmp_path):
    cache = open_cache(tmp_path, 10_000)
    cache.write(make_object(0), b"small")
    with cache._files.locked():
        leftover, descriptor = cache._files.begin(6000)
    assert not open_cache(tmp_path, 10_000).write(make_object(1), bytes(5000))
    assert cache.read(make_object(0)) == b"small"  # Evicting it would not have helped.
    assert leftover.exists()
    os.close(descriptor)  # As the system does for a killed process.
    assert open_cache(tmp_path, 10_000).write(make_object(1), bytes(5000))
    assert not leftover.exists()
    assert cache.num_bytes == sum_sizes(tmp_path) == 5032 + 25


HAMMER = """
import os, random, sys, threading
from pathlib import Path
from gemma_tuner.records import StoredObject
from gemma_tuner.storage.cache import MediaCache

folder, max_bytes, seed, num_threads, num_steps = sys.argv[1], *map(int, sys.argv[2:])
cache = MediaCache(Path(folder), max_bytes=max_bytes, min_free_bytes=0)
wrong = []

def hammer(rng):
    for _ in range(num_steps):
        number = rng.randrange(60)
        stored = StoredObject(f"gs://b/{number}", generation=1)
        content = bytes([number]) * (1000 + 300 * number)
        found = cache.read(stored)
        if found is None:
            cache.write(stored, content)
        elif found != content:
            wrong.append(number)

threads = [threading.Thread(target=hammer, args=(random.Random(f"{seed}/{number}"),))
           for number in range(num_threads)]
print("begun", flush=True)
for thread in threads: thread.start()
for thread in threads: thread.join()
counts = cache.counts
print(len(wrong), counts.damaged, counts.evicted, counts.hits)
"""


def start_hammer(folder, max_bytes, seed, num_threads, num_steps):
    arguments = [str(folder), *map(str, (max_bytes, seed, num_threads, num_steps))]
    process = subprocess.Popen(
        [sys.executable, "-c", HAMMER, *arguments], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout.readline() == "begun\n"
    return process


def test_processes_and_threads_share_a_folder_within_its_budget(tmp_path):
    max_bytes = 150_000
    cache = open_cache(tmp_path, max_bytes)
    sums, is_over = [], threading.Event()

    def watch():
        while not is_over.is_set():
            with cache._files.locked():  # So that all sizes are of one moment.
                sums.append(sum_sizes(tmp_path))
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        processes = [start_hammer(tmp_path, max_bytes, seed, 3, 100) for seed in range(2)]
        outputs = [process.communicate(timeout=100)[0] for process in processes]
    finally:
        is_over.set()
        watcher.join()
    for output in outputs:
        num_wrong, num_damaged, num_evicted, num_hits = map(int, output.split())
        assert (num_wrong, num_damaged) == (0, 0)
        assert num_evicted > 10
        assert num_hits > 10
    assert len(sums) > 20
    assert max_bytes // 2 < max(sums) <= max_bytes
    assert check_cache(cache._files.path).damaged == 0
    assert cache.num_bytes == sum_sizes(tmp_path)


def test_a_killed_writer_leaves_a_whole_cache(tmp_path):
    rng, max_bytes, num_leftovers, check = random.Random(0), 150_000, 0, CacheCheck(0, 0, 0)
    for seed in range(8):
        process = start_hammer(tmp_path, max_bytes, seed, 3, 100_000)
        time.sleep(rng.uniform(0.0, 0.15))
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=30)
        assert sum_sizes(tmp_path) <= max_bytes
        num_leftovers += len(list(tmp_path.glob("incoming/*")))
        cache = open_cache(tmp_path, max_bytes)
        assert list(tmp_path.glob("incoming/*")) == []
        check = check_cache(cache._files.path)
        assert check.damaged == 0
        assert cache.num_bytes == sum_sizes(tmp_path) <= max_bytes
    assert num_leftovers > 0
    assert check.entries > 0


def test_writers_of_one_object_leave_one_entry(tmp_path):
    cache = open_cache(tmp_path, 4 << 20)
    start = threading.Barrier(8)

    def write(_):
        start.wait()
        return cache.write(make_object(1), bytes(300_000))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(write, range(8)))
    assert len(list_entries(tmp_path)) == 1
    assert list(tmp_path.glob("incoming/*")) == []
    assert cache.num_bytes == sum_sizes(tmp_path) == 300_032
