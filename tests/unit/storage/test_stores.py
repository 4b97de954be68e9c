"""A further scheme is one module and one line of the table: proven with a store in memory."""

import io
import json
import sys
from types import ModuleType

import google_crc32c
import PIL.Image
import pytest

from gemma_tuner.errors import DataError, SourceError
from gemma_tuner.records import StoredObject
from gemma_tuner.storage import stores as stores_module
from gemma_tuner.storage.config import FetchConfig
from gemma_tuner.storage.objects import GLOB, ObjectChangedError, StoreOptions
from gemma_tuner.storage.stores import Stores, is_stored
from gemma_tuner.streaming.opening import stream_gcs, stream_local


class MemoryStore:
    """Objects in memory, under ``mem://bucket/name``."""

    def __init__(self, contents):
        self.contents = contents
        self.num_reads = 0

    def list_objects(self, uri):
        if not uri.endswith("/") and not GLOB.search(uri):
            yield self._find(uri)
            return
        yield from (self._find(each) for each in sorted(self.contents) if each.startswith(uri))

    def pin_objects(self, uris):
        found = []
        for uri in uris:
            try:
                found.append(self._find(uri))
            except SourceError as error:
                found.append(error)
        return found

    def read_object(self, stored, start, num_bytes, *, timeout_seconds):
        self.num_reads += 1
        content = self.contents[stored.uri][start:]
        return content if num_bytes is None else content[:num_bytes]

    def _find(self, uri):
        if uri not in self.contents:
            raise ObjectChangedError(f"{uri.rpartition('/')[2]!r} is not in memory")
        content = self.contents[uri]
        return StoredObject(uri, 1, len(content), google_crc32c.value(content))


@pytest.fixture
def store(monkeypatch):
    """A bucket of three rows whose images lie beside them; one is missing."""
    image = io.BytesIO()
    PIL.Image.new("RGB", (8, 6)).save(image, "PNG")
    rows = [{"image": f"images/{number}.jpg", "caption": f"C{number}"} for number in range(3)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    images = {f"mem://b/d/images/{number}.jpg": image.getvalue() for number in (0, 1)}
    store = MemoryStore({"mem://b/d/rows.jsonl": lines, **images})
    module = ModuleType("memory_store")
    monkeypatch.setattr(module, "open_store", lambda options: store, raising=False)
    monkeypatch.setitem(sys.modules, "memory_store", module)
    monkeypatch.setitem(stores_module.SCHEMES, "mem", "memory_store")
    return store


def open_stream(function, where, tmp_path, **more):
    fetch = FetchConfig(min_free_disk_bytes=0)
    return function(where, cache_dir=tmp_path / "c", fetch=fetch, max_bad_fraction=0.5, **more)


@pytest.mark.parametrize("where", ["mem://b/d/rows.jsonl", "mem://b/d/"])
def test_rows_and_media_come_from_a_store_of_another_scheme(store, tmp_path, where):
    stream = open_stream(stream_gcs, where, tmp_path)
    for _ in range(2):
        examples = list(stream)
        assert {example.turns[1].text for example in examples} == {"C0", "C1"}
        assert all(part.source.width for example in examples for part in example.media)
    (bad,) = stream.inspect_quarantine()
    assert "'2.jpg' is not in memory" in bad.reason
    assert stream.report().fetched.hits == 2  # of the second epoch: the cache keeps any scheme
    stream.close()


def test_local_rows_may_name_media_of_another_scheme(store, tmp_path):
    row = {"image": "mem://b/d/images/0.jpg", "caption": "C"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    stream = open_stream(stream_local, tmp_path / "rows.jsonl", tmp_path)
    (example,) = stream
    assert next(example.media).source.width
    stream.close()


def test_a_store_is_opened_once_and_only_when_it_is_needed(monkeypatch):
    opened = []
    module = ModuleType("counting_store")
    monkeypatch.setattr(
        module, "open_store", lambda options: opened.append(options) or object(), raising=False
    )
    monkeypatch.setitem(sys.modules, "counting_store", module)
    monkeypatch.setitem(stores_module.SCHEMES, "mem", "counting_store")
    options = StoreOptions()
    stores = Stores(options)
    assert opened == []
    assert stores.find("mem://b/x") is stores.find("mem://c/y")
    assert opened == [options]


def test_unknown_schemes_are_told_with_those_that_are_known(tmp_path):
    assert is_stored("gs://b/x")
    assert not any(map(is_stored, ("s3://b/x", "a/b.jpg", "C:/x", "gs:/b")))
    with pytest.raises(SourceError, match="not of the form gs://bucket/name"):
        Stores(StoreOptions()).find("s3://b/x")
    (tmp_path / "rows.jsonl").write_text('{"image": "s3://b/x.jpg", "caption": "C"}\n')
    with pytest.raises(DataError, match=r"is a s3: URI.*bucket \(gs://\)"):
        stream_local(tmp_path / "rows.jsonl", cache_dir=tmp_path / "c")
