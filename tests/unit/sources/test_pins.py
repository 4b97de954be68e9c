"""Media in buckets, named by rows of any source, are pinned to what is there."""

import json
from collections.abc import Sequence

import pytest

from gemma_tuner.errors import DataError
from gemma_tuner.records import Audio, Example, Image, StoredObject, Text, Turn
from gemma_tuner.sources.local import LocalSource
from gemma_tuner.sources.pins import pin_media
from gemma_tuner.storage.gcs import GcsStore
from gemma_tuner.storage.objects import AccessDeniedError, ObjectChangedError, StoreOptions
from gemma_tuner.testing.cloud.gcs.server import GcsServer


@pytest.fixture
def server():
    with GcsServer() as server:
        yield server


def make(key, *media):
    answer = Turn("assistant", (Text("A"),))
    return f"t:{key}", Example(str(key), (Turn("user", (*media, Text("Q"))), answer))


def sources_of(example):
    return [part.source for part in example.media]


class OneStore:
    """The stores of all schemes, of which there is one."""

    def __init__(self, store):
        self.store = store
        self.num_found = 0

    def find(self, uri):
        self.num_found += 1
        return self.store


class CountingStore:
    """A bucket in which everything is, and which remembers what it was asked."""

    def __init__(self):
        self.asked: list[Sequence[str]] = []

    def pin_objects(self, uris):
        self.asked.append(uris)
        return [StoredObject(uri, generation=1, num_bytes=1, crc32c=1) for uri in uris]


def test_examples_without_media_in_buckets_pass_untouched_and_open_nothing():
    whole = StoredObject("gs://b/w", generation=1, num_bytes=2, crc32c=3)
    part = StoredObject("gs://b/a.tar", generation=1, num_bytes=2, start=512)
    local = StoredObject("a.tar", num_bytes=2, start=512)
    outcomes = [
        make(0),
        make(1, Image("a/b.jpg"), Audio(b"RIFF")),
        make(2, Image(whole), Image(part), Audio(local)),
        ("t:3", DataError("no", key="3")),
        ("t:4", Example("4", document="D")),
    ]
    passed = list(pin_media(outcomes, stores := OneStore(None)))
    assert stores.num_found == 0
    assert all(
        new[0] == old[0] and new[1] is old[1] for new, old in zip(passed, outcomes, strict=True)
    )


def test_uris_and_references_get_version_size_and_checksum(server):
    server.put("b", "a.jpg", b"picture")
    generation = server.put("b", "s/a.wav", b"sound!")
    bare = StoredObject("gs://b/a.jpg")
    reference = StoredObject("gs://b/s/a.wav", generation=generation, num_bytes=6)
    store = GcsStore(StoreOptions(server.client()))
    outcomes = [
        make(0, Image("gs://b/a.jpg"), Audio("gs://b/s/a.wav"), Image("local.jpg")),
        make(1, Image(bare), Audio(reference)),
    ]
    first, second = [outcome for _, outcome in pin_media(outcomes, OneStore(store))]
    pinned = store.pin_objects(["gs://b/a.jpg", "gs://b/s/a.wav"])
    assert sources_of(first) == [*pinned, "local.jpg"]
    assert sources_of(second) == pinned
    assert [type(part) for part in first.media] == [Image, Audio, Image]
    assert pinned[1].generation == generation
    assert None not in (pinned[0].crc32c, pinned[0].num_bytes, pinned[0].generation)


def test_what_cannot_be_pinned_is_wrong_with_its_example_alone(server):
    generation = server.put("b", "x/old.jpg", b"old")
    server.put("b", "x/old.jpg", b"new")
    server.put("b", "x/empty.jpg", b"")
    server.put("b", "x/good.jpg", b"good")
    overwritten = StoredObject("gs://b/x/old.jpg", generation=generation)
    outcomes = [
        make(0, Image("gs://b/x/good.jpg")),
        make(1, Image("gs://b/x/none.jpg"), Image("gs://b/x/good.jpg")),
        make(2, Audio("gs://b/x/empty.jpg")),
        make(3, Image(overwritten)),
        make(4, Image("gs://b/")),
        make(5, Image("gs://nowhere/x.jpg")),
        make(6),
    ]
    pinned = list(pin_media(outcomes, OneStore(GcsStore(StoreOptions(server.client())))))
    assert [origin for origin, _ in pinned] == [f"t:{n}" for n in range(7)]
    good, *bad, last = [outcome for _, outcome in pinned]
    assert isinstance(good, Example)
    assert last is outcomes[-1][1]
    words = (
        "its image: 'none.jpg' in the bucket 'b' does not exist",
        "its audio 'empty.jpg' is empty (0 bytes)",
        f"its image 'old.jpg' was overwritten: the row names generation {generation}",
        "not of the form gs://bucket/name",
        "there is no bucket 'nowhere'",
    )
    for number, (error, expected) in enumerate(zip(bad, words, strict=True), 1):
        assert isinstance(error, DataError)
        assert error.key == str(number)
        assert expected in str(error)
    assert isinstance(bad[0].__cause__, ObjectChangedError)


def test_a_missing_permission_ends_the_reading(server):
    server.put("b", "a.jpg", b"x")
    server.forbid("b")
    with pytest.raises(AccessDeniedError, match=r"storage\.objects\.get"):
        list(
            pin_media(
                [make(0, Image("gs://b/a.jpg"))], OneStore(GcsStore(StoreOptions(server.client())))
            )
        )


def test_batches_keep_the_order_and_hold_a_bounded_number():
    store = CountingStore()
    num_taken = 0

    def take():
        nonlocal num_taken
        for number in range(5000):
            num_taken += 1
            yield make(number, *([Image(f"gs://b/{number // 2}")] if number % 3 else []))

    num_held = 0
    keys = []
    for origin, outcome in pin_media(take(), OneStore(store)):
        num_held = max(num_held, num_taken - len(keys))
        keys.append(outcome.key)
        assert origin == f"t:{outcome.key}"
        assert all(isinstance(source, StoredObject) for source in sources_of(outcome))
    assert keys == [str(number) for number in range(5000)]
    assert num_held <= 1000
    assert len(store.asked) == 5
    assert all(len(set(uris)) == len(uris) <= 1000 for uris in store.asked)


def test_rows_of_local_files_may_name_objects(server, tmp_path):
    for number in range(30):
        server.put("b", f"m/{number}.jpg", b"%d" % number)
    rows = [{"image": f"gs://b/m/{number}.jpg", "caption": "C"} for number in range(31)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    store = GcsStore(StoreOptions(server.client()))
    *good, bad = pin_media(LocalSource(tmp_path / "a.jsonl"), OneStore(store))
    assert [sources_of(example)[0].num_bytes for _, example in good] == [1] * 10 + [2] * 20
    assert bad[0] == "a.jsonl:31"
    assert isinstance(bad[1], DataError)
    # Google's client looks at each bucket once by itself, for its traces.
    asked = [each.operation for each in server.requests if each.operation != "bucket"]
    assert asked == ["list"]
