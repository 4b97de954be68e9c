"""The local Cloud Storage server, as the official client sees it."""

import base64
import contextlib
import gzip
import io
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import google_crc32c
import pytest
import requests
from google.api_core import exceptions
from google.auth.exceptions import InvalidOperation
from google.cloud.storage import retry, transfer_manager
from hypothesis import given
from hypothesis import strategies as st

from gemma_tuner.errors import ConfigError
from gemma_tuner.testing.cloud.gcs.buckets import ApiError, compile_glob, select_fields
from gemma_tuner.testing.cloud.gcs.faults import (
    Fault,
    FaultScript,
    FlipBit,
    Overwrite,
    Refuse,
    Reset,
    Stall,
    Truncate,
)
from gemma_tuner.testing.cloud.gcs.server import GcsServer

DATA = bytes(range(256)) * 1200  # 307,200 bytes
QUICK_RETRY = retry.DEFAULT_RETRY.with_delay(initial=0.01, maximum=0.02)


@pytest.fixture
def server():
    with GcsServer() as running:
        running.create_bucket("bucket")
        yield running


@pytest.fixture
def bucket(server):
    return server.client().bucket("bucket")


def reads(server):
    """The downloads: the client also looks at each bucket once, in the background."""
    return [each for each in server.requests if each.operation == "read"]


def download(bucket, name, generation=None, **arguments):
    return bucket.blob(name, generation=generation).download_as_bytes(
        **{"retry": None, "checksum": "crc32c", **arguments}
    )


# Objects


def test_what_is_uploaded_is_downloaded_with_its_checksums(bucket):
    blob = bucket.blob("a/x.bin")
    blob.metadata = {"key": "value"}
    blob.upload_from_string(DATA, content_type="image/jpeg")
    seen = bucket.get_blob("a/x.bin")
    crc32c = base64.b64encode(google_crc32c.value(DATA).to_bytes(4)).decode()
    assert (seen.size, seen.content_type, seen.crc32c) == (len(DATA), "image/jpeg", crc32c)
    assert (seen.metadata, seen.generation) == ({"key": "value"}, blob.generation)
    assert download(bucket, "a/x.bin") == DATA
    assert download(bucket, "a/x.bin", checksum="md5") == DATA


def test_objects_put_without_http_are_the_same_to_the_client(server, bucket):
    generation = server.put("bucket", "x.wav", b"abc", content_type="audio/wav")
    seen = bucket.get_blob("x.wav")
    assert (seen.generation, seen.content_type) == (generation, "audio/wav")
    assert download(bucket, "x.wav", generation=generation) == b"abc"
    server.delete("bucket", "x.wav")
    assert bucket.get_blob("x.wav") is None


@pytest.mark.parametrize(
    "name",
    [
        "d é/ü x+.jpg",
        "50%/a#b?c&d=e.txt",
        "日本/語 🐈.png",
        "a//b/",
        "~'()[]{}*!$,;:@|\\.x",
        "o/compose",
    ],
)
def test_any_name_can_be_used(server, bucket, name):
    bucket.blob(name).upload_from_string(name.encode())
    server.put("bucket", "put " + name, b"1")
    assert download(bucket, name) == name.encode()
    assert download(bucket, "put " + name) == b"1"
    assert bucket.get_blob(name).name == name
    assert {blob.name for blob in bucket.list_blobs()} == {name, "put " + name}
    assert [blob.name for blob in bucket.list_blobs(prefix=name)] == [name]
    bucket.blob(name).delete()
    assert bucket.get_blob(name) is None


@pytest.mark.parametrize("size", [0, 1, 262_144, 1_000_000, 1_048_576])
def test_resumable_uploads_take_chunks(bucket, size):
    data = (DATA * 4)[:size]
    blob = bucket.blob("big.bin", chunk_size=262_144)
    blob.upload_from_file(io.BytesIO(data), content_type="audio/flac")
    assert bucket.get_blob("big.bin").content_type == "audio/flac"
    assert download(bucket, "big.bin") == data


def test_resumable_uploads_go_on_after_a_lost_chunk(server, bucket):
    server.add_fault(Fault(Refuse(503), nth=3, operation="upload"))
    bucket.blob("big.bin", chunk_size=262_144).upload_from_file(
        io.BytesIO(DATA * 3), retry=QUICK_RETRY
    )
    assert download(bucket, "big.bin") == DATA * 3
    uploads = [each for each in server.requests if each.operation == "upload"]
    assert [each.status for each in uploads] == [200, 308, 503, 308, 308, 200]


def test_damaged_uploads_are_refused(bucket):
    with pytest.raises(exceptions.BadRequest, match="crc32c does not match"):
        # Without a size, the client begins a resumable upload; only there it passes the sum on.
        bucket.blob("x").upload_from_file(
            io.BytesIO(b"abc"), crc32c_checksum_value="AAAAAA==", checksum=None, retry=None
        )
    assert bucket.get_blob("x") is None


def test_composing_and_copying(server, bucket):
    for name in ("1", "2"):
        server.put("bucket", name, name.encode(), content_type="text/plain")
    server.create_bucket("other")
    bucket.blob("both").compose([bucket.blob("1"), bucket.blob("2")])
    assert download(bucket, "both") == b"12"
    assert bucket.get_blob("both").md5_hash is None
    copied = bucket.copy_blob(bucket.blob("1"), server.client().bucket("other"), "a/1")
    assert (copied.download_as_bytes(), copied.content_type) == (b"1", "text/plain")
    assert bucket.blob("3").rewrite(bucket.blob("2")) == (None, 1, 1)
    assert download(bucket, "3") == b"2"


def test_buckets(server):
    client = server.client()
    assert client.lookup_bucket("new") is None
    assert not client.create_bucket("new").versioning_enabled
    with pytest.raises(exceptions.Conflict):
        client.create_bucket("new")
    assert [each.name for each in client.list_buckets()] == ["bucket", "new"]
    with pytest.raises(exceptions.NotFound):
        list(client.list_blobs("none"))


# Ranges


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (100, 199, slice(100, 200)),
        (0, 0, slice(0, 1)),
        (307_190, None, slice(307_190, None)),
        (307_190, 999_999, slice(307_190, None)),
        (-10, None, slice(-10, None)),
        (-999_999, None, slice(0, None)),
    ],
)
def test_ranges(server, bucket, start, end, expected):
    server.put("bucket", "x", DATA)
    assert download(bucket, "x", start=start, end=end, checksum=None) == DATA[expected]
    read = reads(server)[-1]
    assert (read.status, read.num_bytes) == (206, len(DATA[expected]))
    assert read.byte_range is not None


@pytest.mark.parametrize(("data", "start"), [(DATA, len(DATA)), (b"", 0)])
def test_a_range_beyond_the_end_is_416(server, bucket, data, start):
    server.put("bucket", "x", data)
    with pytest.raises(exceptions.RequestRangeNotSatisfiable):
        download(bucket, "x", start=start, end=start + 10)


def test_a_reader_seeks(server, bucket):
    server.put("bucket", "x", DATA)
    with bucket.blob("x").open("rb", chunk_size=65_536) as file:
        file.seek(123_456)
        assert file.read(1000) == DATA[123_456:124_456]
        file.seek(-5, io.SEEK_END)
        assert file.read() == DATA[-5:]


def test_the_path_without_download_serves_media_too(server):
    server.put("bucket", "a/x", DATA)
    url = f"{server.endpoint}/storage/v1/b/bucket/o/a%2Fx?alt=media"
    answer = requests.get(url, headers={"Range": "bytes=5-9"}, timeout=5)
    assert (answer.status_code, answer.content) == (206, DATA[5:10])
    assert answer.headers["Content-Range"] == f"bytes 5-9/{len(DATA)}"


# Generations


def test_an_overwritten_generation_is_gone(server, bucket):
    old = server.put("bucket", "x", b"old")
    new = server.put("bucket", "x", b"new")
    assert new > old
    assert download(bucket, "x", generation=new) == b"new"
    with pytest.raises(exceptions.NotFound, match="No such object: bucket/x"):
        download(bucket, "x", generation=old)
    assert reads(server)[-1].generation == old


def test_a_bucket_with_versioning_keeps_generations(server):
    server.create_bucket("kept", keeps_versions=True)
    generations = [server.put("kept", "x", data) for data in (b"1", b"2", b"3")]
    bucket = server.client().bucket("kept")
    bucket.blob("x").delete()
    assert bucket.get_blob("x") is None
    assert [download(bucket, "x", generation=each) for each in generations] == [b"1", b"2", b"3"]
    assert [blob.generation for blob in bucket.list_blobs(versions=True)] == generations
    assert list(bucket.list_blobs()) == []
    bucket.blob("x", generation=generations[1]).delete()
    assert bucket.get_blob("x", generation=generations[1]) is None
    assert bucket.get_blob("x", generation=generations[2]) is not None


def test_versioning_is_switched_on_by_the_client(server, bucket):
    bucket.versioning_enabled = True
    bucket.patch()
    old = server.put("bucket", "x", b"old")
    server.put("bucket", "x", b"new")
    assert download(bucket, "x", generation=old) == b"old"


def test_preconditions(server, bucket):
    generation = server.put("bucket", "x", b"abc")
    assert download(bucket, "x", if_generation_match=generation) == b"abc"
    with pytest.raises(exceptions.PreconditionFailed):
        download(bucket, "x", if_generation_match=1)
    with pytest.raises(exceptions.PreconditionFailed):
        bucket.blob("x").reload(if_generation_match=1, retry=None)
    with pytest.raises(exceptions.NotModified):
        download(bucket, "x", if_generation_not_match=generation)
    with pytest.raises(exceptions.PreconditionFailed):
        bucket.blob("x").upload_from_string(b"q", if_generation_match=0)
    with pytest.raises(exceptions.PreconditionFailed):
        bucket.blob("x").delete(if_generation_match=1)
    bucket.blob("new").upload_from_string(b"q", if_generation_match=0)
    bucket.blob("x").delete(if_generation_match=generation)


def test_what_is_not_done_is_refused(server, bucket):
    server.put("bucket", "x", b"abc")
    with pytest.raises(exceptions.MethodNotImplemented, match="ifMetagenerationMatch"):
        bucket.blob("x").reload(if_metageneration_match=1)
    with pytest.raises(exceptions.MethodNotImplemented, match="does not do"):
        bucket.get_iam_policy()


# Listing


def test_pages_have_tokens_that_go_on_where_they_ended(server, bucket):
    names = [*(f"d/{index:03d}" for index in range(25)), "e"]
    for name in reversed(names):
        server.put("bucket", name, b"")
    pages = bucket.list_blobs(prefix="d/", page_size=10)
    sizes_and_tokens = [(page.num_items, pages.next_page_token) for page in pages.pages]
    assert [size for size, _ in sizes_and_tokens] == [10, 10, 5]
    token = sizes_and_tokens[0][1]
    # What happens before the token is nobody's business; what happens behind it shows.
    server.put("bucket", "d/0095", b"")
    server.delete("bucket", "d/009")
    server.put("bucket", "d/005", b"again")
    rest = [blob.name for blob in bucket.list_blobs(prefix="d/", page_token=token)]
    assert rest == ["d/0095", *names[10:25]]
    assert [blob.name for blob in bucket.list_blobs(max_results=3)] == names[:3]
    with pytest.raises(exceptions.BadRequest, match="page token"):
        list(bucket.list_blobs(page_token="nonsense"))


def test_names_are_listed_in_utf8_order(server, bucket):
    names = ["a", "a ", "a/", "a/b", "aa", "B", "é", "z", "\uffee", "🐈"]
    for name in names:
        server.put("bucket", name, b"")
    listed = [blob.name for blob in bucket.list_blobs(page_size=2)]
    assert listed == sorted(names, key=lambda name: name.encode())


def test_offsets_prefixes_and_delimiters(server, bucket):
    for name in ("a/1", "a/2", "a/b/3", "a/b/4", "a/c/5", "a/d", "e"):
        server.put("bucket", name, b"")

    def listed(**arguments):
        found = bucket.list_blobs(**arguments)
        return [blob.name for blob in found], sorted(found.prefixes)

    assert listed(start_offset="a/2", end_offset="a/c/5")[0] == ["a/2", "a/b/3", "a/b/4"]
    for page_size in (1, 2, 100):
        found = listed(prefix="a/", delimiter="/", page_size=page_size)
        assert found == (["a/1", "a/2", "a/d"], ["a/b/", "a/c/"])
    assert listed(delimiter="/") == (["e"], ["a/"])


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("d/0?.jpg", ["d/00.jpg", "d/01.jpg"]),
        ("*.jpg", []),
        ("**.jpg", ["d/00.jpg", "d/01.jpg", "d/e/02.jpg"]),
        ("**/*.jpg", ["d/00.jpg", "d/01.jpg", "d/e/02.jpg"]),
        ("d/*.{png,txt}", ["d/a.png", "d/b.txt"]),
        ("d/[!0]*", ["d/a.png", "d/b.txt"]),
        ("d/[0-1]1.jpg", ["d/01.jpg"]),
    ],
)
def test_globs(server, bucket, pattern, expected):
    for name in ("d/00.jpg", "d/01.jpg", "d/a.png", "d/b.txt", "d/e/02.jpg"):
        server.put("bucket", name, b"")
    assert [blob.name for blob in bucket.list_blobs(match_glob=pattern)] == expected


@given(st.text("ab/.*?[]{},!\\^-", max_size=8), st.text("ab/.", max_size=6))
def test_any_glob_is_compiled_or_refused(pattern, name):
    with contextlib.suppress(ApiError):
        compile_glob(pattern).fullmatch(name)


@given(st.text(st.characters(exclude_characters="*?[]{}\\", codec="utf-8"), max_size=10))
def test_a_glob_without_wildcards_means_itself(name):
    assert compile_glob(name).fullmatch(name)
    assert not compile_glob(name).fullmatch(name + "x")


def test_only_the_fields_asked_for_come_back(server, bucket):
    server.put("bucket", "x", b"abc", content_type="image/png")
    server.put("bucket", "y", b"")
    fields = "items(name, size,generation,crc32c),nextPageToken"
    found = bucket.list_blobs(fields=fields, page_size=1)
    blobs = list(found)
    assert [(blob.name, blob.size, blob.content_type) for blob in blobs] == [
        ("x", 3, None),
        ("y", 0, None),
    ]
    assert select_fields({"a": {"b": 1, "c": 2}, "d": 3}, "a/c") == {"a": {"c": 2}}
    assert select_fields({"a": {"b": 1, "c": 2}, "d": 3}, "*") == {"a": {"b": 1, "c": 2}, "d": 3}


# gzip


def test_gzip_is_decompressed_for_those_who_do_not_take_it(server, bucket):
    packed = gzip.compress(DATA)
    server.put("bucket", "x", packed, content_encoding="gzip")
    assert download(bucket, "x") == DATA
    assert download(bucket, "x", raw_download=True) == packed
    url = f"{server.endpoint}/download/storage/v1/b/bucket/o/x?alt=media"
    headers = {"Accept-Encoding": "identity", "Range": "bytes=0-9"}
    answer = requests.get(url, headers=headers, timeout=5)
    assert (answer.status_code, answer.content) == (200, DATA)
    assert "Content-Length" not in answer.headers
    assert "Content-Encoding" not in answer.headers
    assert answer.headers["x-goog-stored-content-encoding"] == "gzip"
    crc32c = base64.b64encode(google_crc32c.value(packed).to_bytes(4)).decode()
    assert f"crc32c={crc32c}" in answer.headers["x-goog-hash"]


# Errors and permissions


def test_a_missing_object_is_404_and_a_forbidden_bucket_403(server, bucket):
    with pytest.raises(exceptions.NotFound, match="No such object: bucket/none"):
        download(bucket, "none")
    server.put("bucket", "x", b"abc")
    server.forbid("bucket")
    message = r"does not have storage\.objects\.get access to the Google Cloud Storage object"
    with pytest.raises(exceptions.Forbidden, match=message):
        download(bucket, "x")
    with pytest.raises(exceptions.Forbidden, match=r"storage\.objects\.list access"):
        list(bucket.list_blobs())
    with pytest.raises(exceptions.Forbidden):
        bucket.blob("y").upload_from_string(b"")
    server.allow("bucket")
    assert download(bucket, "x") == b"abc"


# Faults


@pytest.mark.parametrize(
    ("status", "error", "reason"),
    [
        (403, exceptions.Forbidden, "forbidden"),
        (429, exceptions.TooManyRequests, "rateLimitExceeded"),
        (500, exceptions.InternalServerError, "backendError"),
        (503, exceptions.ServiceUnavailable, "backendError"),
    ],
)
def test_refusals_give_status_reason_and_time_to_wait(server, bucket, status, error, reason):
    server.put("bucket", "x", b"abc")
    server.add_fault(Fault(Refuse(status, retry_after_seconds=7), nth=1))
    with pytest.raises(error) as caught:
        download(bucket, "x")
    assert caught.value.response.headers["Retry-After"] == "7"
    told = json.loads(caught.value.response.content)["error"]
    assert (told["code"], told["errors"][0]["reason"]) == (status, reason)
    assert download(bucket, "x") == b"abc"
    assert [(each.status, each.effect) for each in reads(server)] == [
        (status, Refuse(status, retry_after_seconds=7)),
        (200, None),
    ]


def test_401_makes_the_client_look_for_new_credentials(server, bucket):
    server.put("bucket", "x", b"abc")
    server.add_fault(Fault(Refuse(401)))
    with pytest.raises(InvalidOperation, match="cannot be refreshed"):
        download(bucket, "x")
    url = f"{server.endpoint}/storage/v1/b/bucket/o/x?alt=media"
    told = requests.get(url, timeout=5).json()["error"]
    assert (told["code"], told["errors"][0]["reason"]) == (401, "required")


def test_the_client_itself_recovers_from_refusals(server, bucket):
    server.put("bucket", "x", DATA)
    server.add_fault(Fault(Refuse(503), nth=(1, 2)))
    assert download(bucket, "x", retry=QUICK_RETRY) == DATA
    assert [each.status for each in reads(server)] == [503, 503, 200]


@pytest.mark.parametrize("after_bytes", [None, 1000])
def test_a_stall_outlasts_the_clients_patience(server, bucket, after_bytes):
    server.put("bucket", "x", DATA)
    server.add_fault(Fault(Stall(30.0, after_bytes=after_bytes), nth=1))
    begin = time.perf_counter()
    with pytest.raises(requests.exceptions.RequestException, match="timed out"):
        download(bucket, "x", timeout=0.2)
    assert download(bucket, "x", timeout=5) == DATA
    assert time.perf_counter() - begin < 5


def test_a_short_stall_passes(server, bucket):
    server.put("bucket", "x", DATA)
    server.add_fault(Fault(Stall(0.2, after_bytes=1000)))
    begin = time.perf_counter()
    assert download(bucket, "x") == DATA
    assert time.perf_counter() - begin >= 0.2


@pytest.mark.parametrize(
    "effect", [Truncate(), Truncate(0), Truncate(10**9), Reset(), Reset(5000)]
)
def test_lost_connections_are_errors_and_the_next_request_works(server, bucket, effect):
    server.put("bucket", "x", DATA)
    server.add_fault(Fault(effect, nth=1))
    with pytest.raises(
        (requests.exceptions.ConnectionError, requests.exceptions.ChunkedEncodingError)
    ):
        download(bucket, "x")
    assert reads(server)[-1].num_bytes < len(DATA)
    assert download(bucket, "x") == DATA


def test_a_reset_is_a_reset(server, bucket):
    server.put("bucket", "x", DATA)
    server.add_fault(Fault(Reset()))
    with pytest.raises(requests.exceptions.ConnectionError, match="reset by peer"):
        download(bucket, "x")
    assert reads(server)[-1].status == 0


def test_a_truncated_gzip_that_is_decompressed_on_the_way_is_noticed(server):
    server.put("bucket", "x", gzip.compress(DATA), content_encoding="gzip")
    server.add_fault(Fault(Truncate()))
    url = f"{server.endpoint}/download/storage/v1/b/bucket/o/x?alt=media"
    with pytest.raises(requests.exceptions.ChunkedEncodingError):
        requests.get(url, headers={"Accept-Encoding": "identity"}, timeout=5)


def test_a_flipped_bit_shows_in_the_checksum_alone(server, bucket):
    server.put("bucket", "x", DATA)
    server.add_fault(Fault(FlipBit(at_byte=1), nth=(1, 2)))
    damaged = download(bucket, "x", checksum=None)
    assert len(damaged) == len(DATA)
    assert [index for index in range(len(DATA)) if damaged[index] != DATA[index]] == [1]
    with pytest.raises(Exception, match="Checksum mismatch"):
        download(bucket, "x")
    assert download(bucket, "x") == DATA


def test_an_object_overwritten_just_before_it_is_served(server, bucket):
    old = server.put("bucket", "x", b"old")
    server.add_fault(Fault(Overwrite(b"new"), nth=1))
    with pytest.raises(exceptions.NotFound):
        download(bucket, "x", generation=old)
    assert download(bucket, "x") == b"new"
    old = bucket.get_blob("x").generation
    server.clear_faults()
    server.add_fault(Fault(Overwrite(b"newer"), nth=1))
    with pytest.raises(exceptions.PreconditionFailed):
        download(bucket, "x", if_generation_match=old)


def test_faults_strike_the_names_and_operations_they_say(server, bucket):
    for name in ("a/1", "b/1"):
        server.put("bucket", name, b"abc")
    server.add_fault(Fault(Refuse(503), name="a/*"))
    server.add_fault(Fault(Refuse(500), operation="list", nth=2))
    server.add_fault(Fault(Refuse(403), operation="stat", name="b/1"))
    assert download(bucket, "b/1") == b"abc"
    with pytest.raises(exceptions.ServiceUnavailable):
        download(bucket, "a/1")
    found = bucket.list_blobs(page_size=1, retry=None)
    with pytest.raises(exceptions.InternalServerError):
        list(found)
    bucket.blob("a/1").reload()
    with pytest.raises(exceptions.Forbidden):
        bucket.blob("b/1").reload()
    server.clear_faults()
    assert download(bucket, "a/1") == b"abc"


@pytest.mark.parametrize("arguments", [{"probability": 1.5}, {"nth": 0}, {"nth": ()}])
def test_impossible_faults_are_errors(arguments):
    with pytest.raises(ConfigError):
        Fault(Reset(), **arguments)


RATES = [
    Fault(Refuse(503), probability=0.05),
    Fault(Stall(0.0), probability=0.02),
    Fault(Truncate(), probability=0.01),
    Fault(FlipBit(), probability=0.01),
]


def test_random_faults_do_not_depend_on_the_order_of_threads():
    def strike(num_threads, order):
        with GcsServer(seed=7) as server:
            for index in range(100):
                server.put("bucket", f"{index:03d}", DATA[:100])
            for fault in RATES:
                server.add_fault(fault)
            bucket = server.client().bucket("bucket")

            def read(name):
                for turn in range(3):
                    with contextlib.suppress(
                        exceptions.GoogleAPIError, requests.exceptions.RequestException
                    ):
                        download(bucket, name, start=turn % 2, end=50)

            with ThreadPoolExecutor(num_threads) as pool:
                list(pool.map(read, order))
            return sorted(
                (each.name, each.byte_range, type(each.effect).__name__) for each in reads(server)
            )

    names = [f"{index:03d}" for index in range(100)]
    alone = strike(1, names)
    assert len({effect for *_, effect in alone}) > 2
    assert strike(16, reversed(names)) == alone


@given(st.integers(0, 2**31), st.permutations(range(40)))
def test_a_script_gives_each_request_the_same_in_any_order(seed, order):
    def choose(requests_in_order):
        script = FaultScript(seed)
        for fault in RATES:
            script.add(fault)
        return {
            each: [script.choose("read", "bucket", f"{each % 8}", f"bytes={each}-") for _ in "abc"]
            for each in requests_in_order
        }

    assert choose(order) == choose(range(40))


def test_random_faults_come_at_their_rates_and_differ_between_seeds():
    def choose(seed):
        script = FaultScript(seed)
        for fault in RATES:
            script.add(fault)
        return [script.choose("read", "bucket", f"{index}", None) for index in range(20_000)]

    chosen = choose(0)
    rates = [chosen.count(fault.effect) / 20_000 for fault in RATES]
    assert rates == pytest.approx([0.05, 0.02, 0.01, 0.01], abs=0.004)
    assert choose(1) != chosen


# Many clients


def test_64_connections_wait_at_the_same_time(server, bucket):
    for index in range(64):
        server.put("bucket", f"{index}", b"%d" % index)
    server.latency_seconds = 0.5
    barrier = threading.Barrier(64)

    def read(index):
        barrier.wait()
        return download(bucket, f"{index}")

    with ThreadPoolExecutor(64) as pool:
        begin = time.perf_counter()
        assert list(pool.map(read, range(64))) == [b"%d" % index for index in range(64)]
        elapsed_seconds = time.perf_counter() - begin
    assert 0.5 <= elapsed_seconds < 8  # one after the other: 32
    assert len(reads(server)) == 64


def test_transfer_manager_downloads(server, bucket, tmp_path):
    for index in range(25):
        server.put("bucket", f"d/{index}", DATA)
    transfer_manager.download_many_to_path(
        bucket,
        [f"d/{index}" for index in range(25)],
        destination_directory=str(tmp_path),
        worker_type="thread",
        raise_exception=True,
    )
    assert all((tmp_path / f"d/{index}").read_bytes() == DATA for index in range(25))
    target = tmp_path / "whole"
    transfer_manager.download_chunks_concurrently(
        bucket.blob("d/1"), str(target), chunk_size=100_000, worker_type="thread"
    )
    assert target.read_bytes() == DATA


def test_bytes_can_be_slow(server, bucket):
    server.put("bucket", "x", DATA)
    server.bytes_per_second = 1_000_000
    begin = time.perf_counter()
    assert download(bucket, "x") == DATA
    assert time.perf_counter() - begin >= 0.3


def test_a_client_that_leaves_is_noted_with_the_bytes_it_was_sent(server):
    server.put("bucket", "x", DATA * 20)
    server.bytes_per_second = 10_000_000
    url = f"{server.endpoint}/download/storage/v1/b/bucket/o/x?alt=media"
    with requests.get(url, stream=True, timeout=5) as answer:
        answer.raw.read(1000)
    for _ in range(100):
        if reads(server)[0].num_bytes < len(DATA) * 20:
            break
        time.sleep(0.05)
    assert 1000 <= server.requests[0].num_bytes < len(DATA) * 20


def test_connections_are_kept_alive(server, bucket):
    server.put("bucket", "x", b"abc")
    url = f"{server.endpoint}/download/storage/v1/b/bucket/o/x?alt=media"
    with requests.Session() as session:
        sources = set()
        for _ in range(5):
            with session.get(url, stream=True, timeout=5) as answer:
                sources.add(answer.raw.connection.sock.getsockname())
                assert answer.content == b"abc"
    assert len(sources) == 1


def test_stopping_ends_stalls_and_threads_and_keeps_objects():
    server = GcsServer().start()
    server.put("bucket", "x", DATA)
    server.add_fault(Fault(Stall(60.0)))
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit(download, server.client().bucket("bucket"), "x")
        while not reads(server):
            time.sleep(0.01)
        begin = time.perf_counter()
        server.stop()
        assert read.exception() is not None
        assert time.perf_counter() - begin < 5
    with pytest.raises(RuntimeError, match="not running"):
        _ = server.endpoint
    server.clear_faults()
    with server:
        assert download(server.client().bucket("bucket"), "x") == DATA
        server.clear_requests()
        assert server.requests == []
