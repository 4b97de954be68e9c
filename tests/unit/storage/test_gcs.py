"""Objects of Google Cloud Storage, through the official client and a local server."""

import gzip
import http.server
import sys
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from types import SimpleNamespace

import google.api_core.exceptions as api
import google.auth
import google.cloud
import google_crc32c
import pytest
from google.auth.credentials import AnonymousCredentials
from google.auth.exceptions import DefaultCredentialsError, RefreshError
from google.cloud import storage

from gemma_tuner.errors import ConfigError, SourceError
from gemma_tuner.records import StoredObject
from gemma_tuner.storage.config import FetchConfig
from gemma_tuner.storage.gcs import GcsStore
from gemma_tuner.storage.gcs_errors import explain
from gemma_tuner.storage.objects import (
    AccessDeniedError,
    CorruptReadError,
    ObjectChangedError,
    StoreOptions,
    TransientReadError,
)
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

ODD_NAME = "d é/ü x+#%?.jpg"


@pytest.fixture
def server():
    with GcsServer() as server:
        yield server


@pytest.fixture
def store(server):
    return GcsStore(StoreOptions(server.client()))


def asked(server):
    """The requests that the store made: the client looks up each bucket once by itself."""
    return [request for request in server.requests if request.operation != "bucket"]


def names_of(objects):
    return [stored.uri.removeprefix("gs://b/") for stored in objects]


def read(store, stored, start=0, num_bytes=None, timeout_seconds=2.0):
    return store.read_object(stored, start, num_bytes, timeout_seconds=timeout_seconds)


# --- finding ----------------------------------------------------------------------------------


def test_objects_prefixes_and_globs_are_found_with_all_that_pins_them(server, store):
    content = {name: name.encode() * 9 for name in ("a/1.jpg", "a/2.jpg", "a/s/3.jpg", ODD_NAME)}
    generations = {name: server.put("b", name, data) for name, data in content.items()}
    server.put("b", "a/", b"")  # what marks a folder
    assert names_of(store.list_objects("gs://b/a/")) == ["a/1.jpg", "a/2.jpg", "a/s/3.jpg"]
    assert names_of(store.list_objects("gs://b")) == sorted(content)
    assert names_of(store.list_objects("gs://b/a/*.jpg")) == ["a/1.jpg", "a/2.jpg"]
    assert names_of(store.list_objects("gs://b/**/[23].jpg")) == ["a/2.jpg", "a/s/3.jpg"]
    for name in ("a/2.jpg", "a/s/3.jpg"):
        (stored,) = store.list_objects(f"gs://b/{name}")
        assert stored == StoredObject(
            f"gs://b/{name}",
            generation=generations[name],
            num_bytes=len(content[name]),
            crc32c=google_crc32c.value(content[name]),
        )
    (stored,) = store.pin_objects([f"gs://b/{ODD_NAME}"])
    assert read(store, stored) == content[ODD_NAME]


def test_a_listing_goes_on_over_its_pages(server, store):
    for number in range(2001):
        server.put("b", f"x/{number:04}", b"x")
    found = names_of(store.list_objects("gs://b/x/"))
    assert found == [f"x/{number:04}" for number in range(2001)]
    assert len(asked(server)) == 3


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("gs://b/none.jpg", r"'none\.jpg' in the bucket 'b' does not exist"),
        ("gs://b/none/", "lies under that prefix"),
        ("gs://b/*.none", "matches that glob"),
        ("gs://nowhere/a/", "no bucket 'nowhere'"),
        ("gs://nowhere/a", "no bucket 'nowhere'"),
        ("gs:/b/a", "form gs://bucket/name"),
        ("gs://B*/a", "form gs://bucket/name"),
        ("gs://b/\ud800", "form gs://bucket/name"),
    ],
)
def test_what_is_not_there_is_told(server, store, uri, words):
    server.put("b", "a", b"x")
    with pytest.raises(SourceError, match=words):
        list(store.list_objects(uri))


# --- pinning ----------------------------------------------------------------------------------


def test_many_objects_of_a_folder_are_pinned_by_few_pages(server, store):
    for number in range(2500):
        server.put("b", f"m/{number:04}.jpg", b"%d" % number)
        server.put("b", f"m/{number:04}/inner.jpg", b"x")
    for number in range(3):
        server.put("b", f"m/a{number}", b"x")
    wanted = [f"gs://b/m/{number:04}.jpg" for number in range(400, 1000)]
    pinned = store.pin_objects([*wanted[::-1], "gs://b/m/0500.png", wanted[0]])
    assert [stored.uri for stored in pinned[:600]] == wanted[::-1]
    assert [stored.num_bytes for stored in pinned[:600]] == [3] * 600
    assert pinned[601] == pinned[599]
    assert isinstance(pinned[600], ObjectChangedError)
    assert "'0500.png' in the bucket 'b' does not exist" in str(pinned[600])
    assert len(asked(server)) == 2  # a page holds the folders as well
    assert {request.operation for request in asked(server)} == {"list"}


def test_scattered_objects_are_pinned_one_by_one(server, store):
    for number in range(0, 30_000, 10):
        server.put("b", f"m/{number:05}.jpg", b"x")
    wanted = [f"gs://b/m/{number:05}.jpg" for number in range(0, 30_000, 1000)]
    missing = ["gs://b/m/5", "gs://b/other", "gs://nowhere/x", "gs://b/", "nonsense"]
    pinned = store.pin_objects([*wanted, *missing])
    assert [stored.uri for stored in pinned[:30]] == wanted
    assert [type(error) for error in pinned[30:]] == [ObjectChangedError] * 3 + [SourceError] * 2
    operations = [request.operation for request in server.requests]
    assert (operations.count("list"), operations.count("stat")) == (1, 20 + 3)


def test_pinning_does_without_the_permission_to_list(server, store):
    for number in range(40):
        server.put("b", f"{number:02}", b"x")
    server.add_fault(Fault(Refuse(403), operation="list"))
    for _ in range(2):
        pinned = store.pin_objects([f"gs://b/{number:02}" for number in range(40)])
        assert all(isinstance(stored, StoredObject) for stored in pinned)
    assert [request.operation for request in server.requests].count("list") == 1


def test_a_missing_permission_ends_pinning(server, store):
    server.put("b", "a", b"x")
    server.forbid("b")
    with pytest.raises(AccessDeniedError, match=r"storage\.objects\.get .*bucket 'b'"):
        store.pin_objects(["gs://b/a"])
    with pytest.raises(AccessDeniedError, match=r"storage\.objects\.list .*bucket 'b'"):
        list(store.list_objects("gs://b/"))


def test_metadata_are_asked_for_again(server, store):
    server.put("b", "a", b"x")
    server.add_fault(Fault(Refuse(503), operation="stat", nth=1))
    server.add_fault(Fault(Reset(), operation="list", nth=1))
    (stored,) = store.pin_objects(["gs://b/a"])
    assert stored.num_bytes == 1
    assert len(list(store.list_objects("gs://b/"))) == 1
    assert len(asked(server)) == 4


# --- reading ----------------------------------------------------------------------------------


def test_whole_objects_and_ranges_of_the_pinned_version(server, store):
    server.create_bucket("b", keeps_versions=True)
    content = bytes(range(256)) * 40
    server.put("b", "a", content)
    (stored,) = store.pin_objects(["gs://b/a"])
    server.put("b", "a", b"newer")
    assert read(store, stored) == content
    assert read(store, stored, 100, 50) == content[100:150]
    assert read(store, stored, 10_000) == content[10_000:]
    assert read(store, stored, 5, 0) == b""
    reads = [request for request in server.requests if request.operation == "read"]
    assert {request.generation for request in reads} == {stored.generation}
    assert [request.byte_range for request in reads] == [None, "bytes=100-149", "bytes=10000-"]


def test_zipped_objects_come_as_they_are_stored(server, store):
    zipped = gzip.compress(b"text " * 1000)
    server.put("b", "a.txt", zipped, content_encoding="gzip")
    (stored,) = store.pin_objects(["gs://b/a.txt"])
    assert stored.num_bytes == len(zipped)
    assert read(store, stored) == zipped
    assert read(store, stored, 2, 5) == zipped[2:7]


@pytest.mark.parametrize(
    ("effect", "expected", "words"),
    [
        (Refuse(503, 7), TransientReadError, "status 503"),
        (Refuse(429), TransientReadError, "status 429"),
        (Refuse(408), TransientReadError, "status 408"),
        (Refuse(403), AccessDeniedError, r"storage\.objects\.get is missing on the bucket 'b'"),
        (Refuse(401), AccessDeniedError, "gcloud auth application-default login"),
        (Refuse(400), SourceError, "status 400"),
        (Stall(5.0), TransientReadError, "Timeout"),
        (Stall(5.0, after_bytes=3), TransientReadError, "Timeout"),
        (Reset(), TransientReadError, "ConnectionError"),
        (Reset(after_bytes=3), TransientReadError, "ProtocolError"),
        (Truncate(), TransientReadError, "ProtocolError"),
        (FlipBit(), CorruptReadError, "another checksum"),
        (Overwrite(), ObjectChangedError, r"was overwritten after .*generation \d+ then, \d+ now"),
    ],
    ids=lambda value: type(value).__name__ if hasattr(value, "__slots__") else None,
)
def test_each_failure_is_of_its_kind_and_one_attempt(server, store, effect, expected, words):
    server.put("b", "deep/a.jpg", b"0123456789")
    (stored,) = store.pin_objects(["gs://b/deep/a.jpg"])
    server.add_fault(Fault(effect))
    with pytest.raises(SourceError, match=words) as caught:
        read(store, stored, timeout_seconds=0.3)
    assert type(caught.value) is expected
    assert "'a.jpg' in the bucket 'b'" in str(caught.value)
    assert caught.value.__suppress_context__
    assert not any(secret in str(caught.value) for secret in ("http", "deep", "alt=media"))
    retry_after = getattr(caught.value, "retry_after_seconds", None)
    assert retry_after == (7.0 if effect == Refuse(503, 7) else None)
    assert [request.operation for request in server.requests].count("read") == 1


class Trickle(http.server.BaseHTTPRequestHandler):
    """Answers one byte at a time, each sooner than any wait for bytes ends."""

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "100000")
        self.end_headers()
        with suppress(ConnectionError):
            while not self.server.stopping.wait(0.05):
                self.wfile.write(b" ")
                self.wfile.flush()

    def log_message(self, *_, **__):
        pass


@pytest.mark.parametrize("uri", ["gs://b/a.jpg", "gs://b/deep/", "gs://b/*.jpg"])
def test_metadata_that_trickle_are_given_up(uri):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Trickle) as server:
        server.stopping = threading.Event()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        client = storage.Client(
            "p",
            AnonymousCredentials(),
            client_options={"api_endpoint": f"http://127.0.0.1:{server.server_port}"},
        )
        how = StoreOptions(
            client, fetch=FetchConfig(attempt_timeout_seconds=0.3, total_timeout_seconds=0.3)
        )
        store = GcsStore(how)
        began = time.monotonic()
        with pytest.raises(TransientReadError, match="nor looked up within"):
            list(store.list_objects(uri))
        with pytest.raises(TransientReadError, match="nor looked up within"):
            store.pin_objects([f"gs://b/{number}" for number in range(20)])
        assert time.monotonic() - began < 5
        server.stopping.set()
        server.shutdown()


def test_an_object_that_is_gone_is_told_from_one_that_is_cut(server, store):
    server.put("b", "a", b"0123456789")
    (stored,) = store.pin_objects(["gs://b/a"])
    with pytest.raises(CorruptReadError, match="gave 2 bytes of the 9 asked"):
        read(store, stored, 8, 9)
    with pytest.raises(CorruptReadError, match="ends before the bytes"):
        read(store, stored, 50, 9)
    server.delete("b", "a")
    with pytest.raises(ObjectChangedError, match="'a' in the bucket 'b' was deleted"):
        read(store, stored)
    with pytest.raises(ObjectChangedError, match="no bucket 'c'"):
        read(store, StoredObject("gs://c/a", generation=1))


def test_what_the_service_says_of_waiting():
    def wait(value):
        response = SimpleNamespace(headers={"Retry-After": value} if value else {})
        error = api.from_http_status(
            503, "GET https://host/?X-Goog-Signature=s", response=response
        )
        return explain(error, "b", "a").retry_after_seconds

    assert (wait("12"), wait(None), wait("soon")) == (12.0, None, None)
    later = datetime.now(UTC) + timedelta(seconds=60)
    assert wait(format_datetime(later, usegmt=True)) == pytest.approx(60, abs=3)
    assert wait(format_datetime(later - timedelta(days=1), usegmt=True)) == 0.0


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (api.Forbidden("x", errors=[{"reason": "userRateLimitExceeded"}]), TransientReadError),
        (api.Forbidden("x", errors=[{"reason": "forbidden"}]), AccessDeniedError),
        (api.PreconditionFailed("x"), ObjectChangedError),
        (api.RetryError("x", cause=api.ServiceUnavailable("x")), TransientReadError),
        (RefreshError("invalid_grant: secret"), AccessDeniedError),
        (RefreshError("secret", retryable=True), TransientReadError),
        (TimeoutError("secret"), TransientReadError),
    ],
)
def test_errors_that_no_server_makes_at_will(error, expected):
    explained = explain(error, "b", "a")
    assert type(explained) is expected
    assert "secret" not in str(explained)


# --- the client -------------------------------------------------------------------------------


def test_the_client_is_made_when_the_first_object_is_asked_for(server, monkeypatch):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.endpoint)
    server.put("b", "a", b"x")
    store = GcsStore(StoreOptions())
    assert server.requests == []
    assert len(store.pin_objects(["gs://b/a"])) == 1
    assert len(asked(server)) == 1


def test_many_threads_keep_their_connections(server):
    server.put("b", "a", b"0123456789" * 1000)
    server.latency_seconds = 0.02
    client = server.client()
    store = GcsStore(StoreOptions(client, num_connections=48))
    (stored,) = store.pin_objects(["gs://b/a"])
    together = threading.Barrier(48)
    contents = []

    def work():
        together.wait()
        contents.extend(read(store, stored, timeout_seconds=10) for _ in range(3))

    threads = [threading.Thread(target=work) for _ in range(48)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert contents == [b"0123456789" * 1000] * 144
    (pool,) = client._http.get_adapter("http://").poolmanager.pools._container.values()
    assert pool.num_connections < 60  # with ten kept, each of the threads would make new ones
    assert pool.pool.maxsize == 48


def test_without_credentials_the_remedy_is_told(monkeypatch):
    def find_none(*_, **__):
        raise DefaultCredentialsError("secret path")

    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    monkeypatch.setattr(google.auth, "default", find_none)
    with pytest.raises(
        AccessDeniedError, match=r"no Google Cloud credentials.*gcloud auth"
    ) as caught:
        GcsStore(StoreOptions()).pin_objects(["gs://b/a"])
    assert "secret" not in str(caught.value)


def test_without_the_package_the_remedy_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "google.cloud.storage", None)
    monkeypatch.delattr(google.cloud, "storage")
    with pytest.raises(SourceError, match=r"google-cloud-storage.*install"):
        GcsStore(StoreOptions()).pin_objects(["gs://b/a"])


def test_something_else_than_a_client_is_refused():
    with pytest.raises(ConfigError, match="the storage client is a str"):
        GcsStore(StoreOptions("gs://b")).pin_objects(["gs://b/a"])
