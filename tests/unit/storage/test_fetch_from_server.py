"""Reads through the official client from a local server that fails in every way it knows."""

import gzip
import io
import random
from concurrent.futures import ThreadPoolExecutor

import PIL.Image
import pytest

from gemma_tuner.storage.config import FetchConfig
from gemma_tuner.storage.fetch import Fetcher
from gemma_tuner.storage.gcs import GcsStore
from gemma_tuner.storage.objects import (
    AccessDeniedError,
    CorruptReadError,
    ObjectChangedError,
    StoreOptions,
    TransientReadError,
)
from gemma_tuner.storage.stores import Stores
from gemma_tuner.streaming.opening import stream_gcs
from gemma_tuner.testing.cloud.gcs.faults import (
    Fault,
    FlipBit,
    Overwrite,
    Refuse,
    Reset,
    Stall,
    Truncate,
)
from gemma_tuner.testing.cloud.gcs.server import GcsServer

NUM_OBJECTS = 200
CONTENTS = {
    f"a/{number:03}.jpg": random.Random(number).randbytes(20_000) for number in range(NUM_OBJECTS)
}


@pytest.fixture
def server():
    with GcsServer(seed=1) as server:
        for name, content in CONTENTS.items():
            server.put("media", name, content)
        yield server


def make_fetcher(server, folder, cache_bytes=1 << 26, **config):
    kept = {"cache_bytes": cache_bytes, "min_free_disk_bytes": 0}
    settings = {"attempt_timeout_seconds": 2.0, "total_timeout_seconds": 30.0, **kept} | config
    stores = Stores(StoreOptions(gcs_client=server.client()))
    return Fetcher(stores, folder / "media", FetchConfig(**settings))


def pin(server, name="a/"):
    return list(GcsStore(StoreOptions(server.client())).list_objects(f"gs://media/{name}"))


@pytest.mark.parametrize(
    "faults",
    [
        [Fault(Refuse(503), probability=0.05), Fault(Refuse(429, 0), probability=0.02)],
        [
            Fault(Stall(1.0), probability=0.03),
            Fault(Stall(1.0, after_bytes=500), probability=0.02),
        ],
        [Fault(Truncate(), probability=0.02), Fault(Reset(after_bytes=99), probability=0.02)],
        [Fault(FlipBit(), probability=0.01), Fault(Reset(), probability=0.03)],
    ],
    ids=["refused", "stalled", "cut", "flipped"],
)
def test_every_object_arrives_whole_whatever_fails(server, tmp_path, faults):
    objects = pin(server)
    assert len(objects) == NUM_OBJECTS
    for fault in faults:
        server.add_fault(fault)
    fetcher = make_fetcher(server, tmp_path)
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(fetcher.fetch, objects))
        again = list(pool.map(fetcher.fetch, objects))
    fetcher.close()
    assert found == again == list(CONTENTS.values())
    counts = fetcher.counts
    assert counts.hits == NUM_OBJECTS
    struck = [one for one in server.requests if one.operation == "read" and one.effect is not None]
    assert len(struck) >= 4
    assert counts.retries + counts.hedges > 0
    # A hedge whose first attempt answered before it began asks nothing.
    assert NUM_OBJECTS + counts.retries <= counts.requests
    assert counts.requests <= NUM_OBJECTS + counts.retries + counts.hedges


def test_what_cannot_be_mended_is_raised_as_what_it_is(server, tmp_path):
    names = ("overwritten", "deleted", "flipped", "forbidden")
    for name in names:
        server.put("media", f"b/{name}", b"as it was found")
    deleted, flipped, forbidden, overwritten = pin(server, "b/")
    server.put("media", "b/overwritten", b"new")
    server.delete("media", "b/deleted")
    server.add_fault(Fault(FlipBit(), name="b/flipped"))
    server.add_fault(Fault(Refuse(403), name="b/forbidden"))
    fetcher = make_fetcher(server, tmp_path)
    for stored, error, num_requests in (
        (overwritten, ObjectChangedError, 1),
        (deleted, ObjectChangedError, 1),
        (flipped, CorruptReadError, 2),
        (forbidden, AccessDeniedError, 1),
    ):
        before = fetcher.counts.requests
        with pytest.raises(error):
            fetcher.fetch(stored)
        assert fetcher.counts.requests - before == num_requests
    fetcher.close()


def test_an_object_overwritten_while_it_is_read_is_never_its_successor(server, tmp_path):
    stored = pin(server, "a/000.jpg")[0]
    server.add_fault(Fault(Overwrite(b"another picture"), name="a/000.jpg"))
    fetcher = make_fetcher(server, tmp_path)
    with pytest.raises(ObjectChangedError):
        fetcher.fetch(stored)
    fetcher.close()


def test_an_object_that_cannot_be_read_ends_at_the_deadline(server, tmp_path):
    stored = pin(server, "a/000.jpg")[0]
    server.add_fault(Fault(Refuse(503)))
    fetcher = make_fetcher(server, tmp_path, total_timeout_seconds=1.0)
    with pytest.raises(TransientReadError, match=r"'000\.jpg'.*failed.*its store answers"):
        fetcher.fetch(stored)
    fetcher.close()


def test_what_is_stored_zipped_arrives_unzipped(server, tmp_path):
    picture = bytes(50_000)
    server.put("media", "zip/x.png", gzip.compress(picture), content_encoding="gzip")
    fetcher = make_fetcher(server, tmp_path)
    for _ in range(2):
        assert fetcher.fetch(pin(server, "zip/")[0]) == picture
    assert fetcher.counts.bytes_downloaded < 1000
    fetcher.close()


def test_files_over_ranges_survive_faults(server, tmp_path):
    lines = b"".join(b"%d\n" % number for number in range(1_500_000))
    server.put("media", "rows.txt", lines)
    stored = pin(server, "rows.txt")[0]
    server.add_fault(Fault(Refuse(503), name="rows.txt", nth=1))
    server.add_fault(Fault(Truncate(), name="rows.txt", nth=3))
    fetcher = make_fetcher(server, tmp_path)
    with fetcher.open(stored) as file:
        assert b"".join(file) == lines
    assert fetcher.counts.requests == 3 + 2
    fetcher.close()


def test_what_the_cache_has_no_room_for_is_reported(server, tmp_path):
    server.put("media", "s/0.jpg", draw_picture())
    server.put("media", "s/0.txt", b"Red.")
    fetch = FetchConfig(min_free_disk_bytes=1 << 60)
    stream = stream_gcs(
        "gs://media/s/", cache_dir=tmp_path, fetch=fetch, gcs_client=server.client()
    )
    assert "not kept" not in str(stream.report())
    for _ in range(2):
        assert len(list(stream)) == 1
    assert stream.report().fetched.not_kept == 2
    assert "2 not kept" in str(stream.report())


def draw_picture():
    file = io.BytesIO()
    PIL.Image.new("RGB", (4, 4), "red").save(file, "JPEG")
    return file.getvalue()
