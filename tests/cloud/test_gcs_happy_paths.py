"""Plain calls of the official client, against our local server and one that we did not write.

Our server would pass its own idea of Cloud Storage; the independent emulator checks that idea
where it can. Where the two differ, ``KNOWN_DIFFERENCES`` says how, tests hold both to it, and
``README.md`` beside this file shows it as a table.
"""

import base64
import contextlib
import gzip
import io
import logging
import socket
import sys
from pathlib import Path

import google_crc32c
import pytest
from google.api_core import exceptions
from google.auth.credentials import AnonymousCredentials
from google.cloud import storage
from google.cloud.storage import transfer_manager

from gemma_tuner.testing.cloud.gcs.server import GcsServer

DATA = bytes(range(256)) * 400
PACKED = gzip.compress(b"hello", mtime=0)
NUM_NUMBERED = 12
NUMBERED = [f"d/{index:02d}.jpg" for index in range(NUM_NUMBERED)]
MISSING = "NOT TESTED AGAINST AN INDEPENDENT SERVER: gcp-storage-emulator is not installed"


@contextlib.contextmanager
def run_ours():
    with GcsServer() as server:
        yield server.client()


@contextlib.contextmanager
def run_emulator():
    emulator = pytest.importorskip("gcp_storage_emulator.server", reason=MISSING)
    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with emulator.create_server("127.0.0.1", port, in_memory=True):
        yield storage.Client(
            project="local",
            credentials=AnonymousCredentials(),
            client_options={"api_endpoint": f"http://127.0.0.1:{port}"},
        )


SERVERS = {"ours": run_ours, "gcp-storage-emulator": run_emulator}


@pytest.fixture(scope="module", params=SERVERS)
def server_and_bucket(request):
    with SERVERS[request.param]() as client:
        bucket = client.create_bucket("happy")
        for index in range(NUM_NUMBERED):
            blob = bucket.blob(f"d/{index:02d}.jpg")
            blob.upload_from_string(b"x%d" % index, content_type="image/jpeg")
        bucket.blob("d/sub/z.txt").upload_from_string("z")
        bucket.blob("x.bin").upload_from_string(DATA)
        packed = bucket.blob("packed.txt")
        packed.content_encoding = "gzip"
        packed.upload_from_string(PACKED)
        yield request.param, bucket


def encode_crc32c(data):
    return base64.b64encode(google_crc32c.value(data).to_bytes(4)).decode()


def answer(function, *arguments, **keywords):
    """What a call returns, or the name of its error."""
    try:
        return function(*arguments, **keywords)
    except exceptions.GoogleAPIError as error:
        return type(error).__name__


def names(blobs):
    return [blob.name for blob in blobs]


def read(bucket, name, **arguments):
    generation = arguments.pop("generation", None)
    blob = bucket.blob(name, generation=generation)
    return answer(blob.download_as_bytes, retry=None, **arguments)


def new(bucket, name, *versions):
    """Upload versions of an object, and return their generations."""
    blob = bucket.blob(name)
    generations = []
    for data in versions:
        blob.upload_from_string(data)
        generations.append(blob.generation)
    return generations


def page_sizes(bucket):
    return [page.num_items for page in bucket.list_blobs(prefix="d/", page_size=5).pages]


def go_on_from_a_token(bucket):
    first = bucket.list_blobs(prefix="d/", page_size=5)
    next(first.pages)
    return names(bucket.list_blobs(prefix="d/", page_token=first.next_page_token))[:1]


def list_folder(bucket):
    found = bucket.list_blobs(prefix="d/", delimiter="/")
    return len(list(found)), sorted(found.prefixes)


def list_with_fields(bucket):
    found = bucket.list_blobs(prefix="d/01", fields="items(name,size,crc32c),nextPageToken")
    return [(blob.name, blob.size, blob.crc32c, blob.content_type) for blob in found]


def read_by_file(bucket):
    with bucket.blob("x.bin").open("rb", chunk_size=65_536) as file:
        file.seek(70_000)
        return file.read(10)


def upload_resumably(bucket):
    data = DATA * 8
    bucket.blob("big.bin", chunk_size=262_144).upload_from_file(io.BytesIO(data))
    return read(bucket, "big.bin") == data


def keep_metadata(bucket):
    blob = bucket.blob("w/m.txt")
    blob.metadata = {"k": "v"}
    blob.upload_from_string("hi", content_type="text/plain")
    seen = bucket.get_blob("w/m.txt")
    return seen.metadata, seen.content_type, seen.size


def sum_up(bucket):
    return bucket.get_blob("x.bin").crc32c


def use_any_name(bucket):
    name = "d é/ü x+%#.jpg"
    bucket.blob(name).upload_from_string(b"1")
    return read(bucket, name), names(bucket.list_blobs(prefix="d é/")) == [name]


def delete(bucket):
    new(bucket, "gone", b"1")
    bucket.blob("gone").delete()
    return bucket.get_blob("gone"), answer(bucket.blob("gone").delete)


def compose(bucket):
    bucket.blob("both").compose([bucket.blob("d/00.jpg"), bucket.blob("d/01.jpg")])
    return read(bucket, "both")


def copy(bucket):
    return bucket.copy_blob(bucket.blob("x.bin"), bucket, "copied").size


def download_many(bucket):
    targets = [(bucket.blob(f"d/{index:02d}.jpg"), io.BytesIO()) for index in range(4)]
    transfer_manager.download_many(targets, worker_type="thread", max_workers=2)
    return b"".join(target.getvalue() for _, target in targets)


def read_overwritten(bucket):
    old, _ = new(bucket, "twice", b"old", b"new")
    return read(bucket, "twice", generation=old)


def match_generation(bucket):
    (generation,) = new(bucket, "once", b"1")
    right = read(bucket, "once", if_generation_match=generation)
    return right, read(bucket, "once", if_generation_match=1)


def create_twice(bucket):
    blob = bucket.blob("only-once")
    first = answer(blob.upload_from_string, b"1", if_generation_match=0)
    return first, answer(blob.upload_from_string, b"2", if_generation_match=0)


def read_as_it_is_stored(bucket):
    return read(bucket, "packed.txt", raw_download=True)[:2]


def read_decompressed_on_the_way(bucket):
    url = f"{bucket.client.api_endpoint}/download/storage/v1/b/happy/o/packed.txt?alt=media"
    # The client always takes gzip; other programs do not.
    return bucket.client._http.get(url, headers={"Accept-Encoding": "identity"}).content[:5]


# What to do, and what Cloud Storage answers by its documentation.
PATHS = {
    "list under a prefix": (
        lambda bucket: names(bucket.list_blobs(prefix="d/0", max_results=2)),
        ["d/00.jpg", "d/01.jpg"],
    ),
    "sizes of pages of 5": (page_sizes, [5, 5, 3]),
    "go on from a page token": (go_on_from_a_token, ["d/05.jpg"]),
    "list one folder": (list_folder, (NUM_NUMBERED, ["d/sub/"])),
    "list by glob": (
        lambda bucket: names(bucket.list_blobs(match_glob="d/{00,1?}.jpg")),
        ["d/00.jpg", "d/10.jpg", "d/11.jpg"],
    ),
    "glob within a folder": (
        lambda bucket: names(bucket.list_blobs(match_glob="*.txt")),
        ["packed.txt"],
    ),
    "glob through folders": (
        lambda bucket: names(bucket.list_blobs(match_glob="**/z.txt")),
        ["d/sub/z.txt"],
    ),
    "list between offsets": (
        lambda bucket: names(
            bucket.list_blobs(prefix="d/", start_offset="d/10", end_offset="d/11.jpg")
        ),
        ["d/10.jpg"],
    ),
    "list some fields": (list_with_fields, [("d/01.jpg", 2, encode_crc32c(b"x1"), None)]),
    "read it all": (lambda bucket: read(bucket, "x.bin", checksum="crc32c") == DATA, True),
    "read with MD5": (lambda bucket: read(bucket, "x.bin", checksum="md5") == DATA, True),
    "read a range": (lambda bucket: read(bucket, "x.bin", start=5, end=9), DATA[5:10]),
    "read to the end": (lambda bucket: read(bucket, "x.bin", start=len(DATA) - 3), DATA[-3:]),
    "read the last bytes": (lambda bucket: read(bucket, "x.bin", start=-3), DATA[-3:]),
    "read beyond the end": (
        lambda bucket: read(bucket, "x.bin", start=len(DATA)),
        "RequestRangeNotSatisfiable",
    ),
    "read as a file": (read_by_file, DATA[70_000:70_010]),
    "read what is not there": (lambda bucket: read(bucket, "none"), "NotFound"),
    "checksum in the metadata": (sum_up, encode_crc32c(DATA)),
    "upload in chunks": (upload_resumably, True),
    "content type and metadata": (keep_metadata, ({"k": "v"}, "text/plain", 2)),
    "a name of many kinds": (use_any_name, (b"1", True)),
    "delete": (delete, (None, "NotFound")),
    "compose": (compose, b"x0x1"),
    "copy": (copy, len(DATA)),
    "transfer manager": (download_many, b"x0x1x2x3"),
    "read an overwritten generation": (read_overwritten, "NotFound"),
    "ifGenerationMatch on a read": (match_generation, (b"1", "PreconditionFailed")),
    "ifGenerationMatch=0 on a write": (create_twice, (None, "PreconditionFailed")),
    "gzip, as the client reads it": (lambda bucket: read(bucket, "packed.txt"), b"hello"),
    "gzip, raw": (read_as_it_is_stored, PACKED[:2]),
    "gzip, to a reader without gzip": (read_decompressed_on_the_way, b"hello"),
}

# What gcp-storage-emulator 2026.7.19 answers instead, and in words.
KNOWN_DIFFERENCES = {
    "list under a prefix": (NUMBERED[:10], "`maxResults` is ignored"),
    "sizes of pages of 5": ([NUM_NUMBERED + 1], "everything is one page"),
    "go on from a page token": (["d/00.jpg"], "the list begins anew"),
    "list between offsets": ([*NUMBERED, "d/sub/z.txt"], "offsets are ignored"),
    "list some fields": (
        [("d/01.jpg", 2, encode_crc32c(b"x1"), "image/jpeg")],
        "all fields of each object come back",
    ),
    "read the last bytes": (DATA, "a range from the end is ignored: everything comes back"),
    "read beyond the end": (b"", "no bytes instead of 416"),
    "read an overwritten generation": (
        b"new",
        "the generation is ignored: the new bytes come back",
    ),
    "ifGenerationMatch on a read": ((b"1", b"1"), "the condition is ignored"),
    "ifGenerationMatch=0 on a write": ((None, None), "the condition is ignored: overwritten"),
    "gzip, as the client reads it": (PACKED, "`Content-Encoding` is not sent: compressed bytes"),
    "gzip, to a reader without gzip": (PACKED[:5], "it is not decompressed"),
}


def draw_table():
    """The differences, in Markdown."""
    rows = [f"| {path} | {words} |" for path, (_, words) in KNOWN_DIFFERENCES.items()]
    return "\n".join(["| call | gcp-storage-emulator 2026.7.19 |", "| --- | --- |", *rows])


@pytest.mark.parametrize("path", PATHS)
def test_the_server_answers_as_cloud_storage_does(server_and_bucket, path):
    server, bucket = server_and_bucket
    do, expected = PATHS[path]
    if server != "ours" and path in KNOWN_DIFFERENCES:
        # Where this fails, the emulator has learnt something: take the row out.
        expected, _ = KNOWN_DIFFERENCES[path]
    assert do(bucket) == expected


def test_the_differences_are_printed_and_in_the_readme(capsys):
    assert set(KNOWN_DIFFERENCES) < set(PATHS)
    with capsys.disabled():
        num_differences, num_calls = len(KNOWN_DIFFERENCES), len(PATHS)
        sys.stdout.write(f"\nOf {num_calls} calls, the emulator differs in {num_differences}:\n")
        sys.stdout.write(f"{draw_table()}\n")
    assert draw_table() in (Path(__file__).parent / "README.md").read_text()
