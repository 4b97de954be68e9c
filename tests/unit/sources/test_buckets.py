"""Data files in a bucket, through the official client and a local server."""

import gzip
import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gemma_tuner.errors import ConfigError, DataError, SourceError
from gemma_tuner.records import Audio, Image
from gemma_tuner.sources.buckets import BucketSource
from gemma_tuner.storage.config import FetchConfig
from gemma_tuner.storage.fetch import Fetcher
from gemma_tuner.storage.objects import (
    ObjectChangedError,
    StoreOptions,
)
from gemma_tuner.storage.stores import Stores
from gemma_tuner.testing.cloud.gcs.faults import (
    Fault,
    Overwrite,
    Refuse,
    Truncate,
)
from gemma_tuner.testing.cloud.gcs.server import GcsServer


@pytest.fixture
def server():
    with GcsServer() as server:
        yield server


@pytest.fixture
def fetcher(server, tmp_path):
    config = FetchConfig(attempt_timeout_seconds=2.0, total_timeout_seconds=10.0, cache_bytes=0)
    stores = Stores(StoreOptions(gcs_client=server.client()))
    fetcher = Fetcher(stores, tmp_path / "cache", config)
    yield fetcher
    fetcher.close()


@pytest.fixture
def make_source(fetcher):
    def make(uris, **how):
        return BucketSource(uris, fetcher, **how)

    return make


def lines(*rows):
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def pair(response="A", **more):
    return {"prompt": "Q", "response": response, **more}


def parquet(table, **how):
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **how)
    return buffer.getvalue()


def keys_of(source):
    return [example.key for _, example in source]


def test_the_identity_asks_nothing_and_follows_the_choices(server, make_source):
    one = make_source("gs://b/d/").read_identity()
    assert json.loads(json.dumps(one)) == one
    assert make_source(["gs://b/d/"]).read_identity() == one
    for other in (
        make_source("gs://b/e/"),
        make_source("gs://b/d/", split="train"),
        make_source("gs://b/d/", keywords={"id": False}),
        make_source("gs://b/d/", file_format="csv"),
    ):
        assert other.read_identity() != one
    assert server.requests == []


def test_json_lines_plain_and_zipped_by_object_glob_and_folder(server, make_source):
    server.put("b", "d/1.jsonl", lines(pair(), pair()))
    server.put("b", "d/2.jsonl.gz", gzip.compress(lines(pair())))
    server.put("b", "d/3.jsonl", gzip.compress(lines(pair())), content_encoding="gzip")
    server.put("b", "d/_hidden.jsonl", lines(pair()))
    first, others = ["1.jsonl:1", "1.jsonl:2"], ["2.jsonl.gz:1", "3.jsonl:1"]
    assert keys_of(make_source("gs://b/d/1.jsonl")) == first
    assert keys_of(make_source("gs://b/d/[12].jsonl")) == first
    for folder in ("gs://b/d/", "gs://b/d"):
        assert keys_of(make_source(folder)) == first + others
    assert keys_of(make_source("gs://b")) == [f"d/{key}" for key in first + others]
    server.put("c", "x/4.jsonl", lines(pair()))
    source = make_source(["gs://c/x/", "gs://b/d/1.jsonl", "gs://c/x/4.jsonl"])
    assert keys_of(source) == ["c/x/4.jsonl:1", *(f"b/d/{key}" for key in first)]
    summary = source.read_summary()
    assert (summary["format"], summary["num_files"]) == ("jsonl", 2)


def test_csv_and_rows_that_are_wrong_in_their_place(server, make_source):
    server.put("b", "a.csv", b"question,answer\nQ,A\nQ,\nQ,A,B\nQ,C\n")
    outcomes = list(make_source("gs://b/a.csv"))
    assert [origin for origin, _ in outcomes] == [f"a.csv:{n}" for n in range(1, 5)]
    assert [isinstance(outcome, DataError) for _, outcome in outcomes] == [0, 1, 1, 0]


def test_parquet_is_read_by_row_groups_of_the_columns_needed(server, make_source, fetcher):
    rows, megabyte = 64, 1 << 20
    table = pa.table(
        {
            "question": [f"Q{n}" for n in range(rows)],
            "huge": [bytes([n]) * megabyte for n in range(rows)],
            "answer": [f"A{n}" for n in range(rows)],
        }
    )
    data = parquet(table, row_group_size=16, compression="none", use_dictionary=False)
    server.put("b", "d/a.parquet", data)
    examples = [example for _, example in make_source("gs://b/d/")]
    assert [example.turns[1].text for example in examples] == [f"A{n}" for n in range(rows)]
    assert examples[-1].key == "a.parquet:64"
    assert fetcher.counts.bytes_downloaded < len(data) * 0.7


def test_media_beside_a_manifest_become_uris(server, make_source):
    rows = [
        pair(image="p/1.jpg", audio="gs://c/2.wav"),
        pair(image="./../3.jpg", audio="../../4.wav"),
        pair(image="../../../5.jpg", audio="6.wav"),
        pair(image="/7.jpg", audio="6.wav"),
        pair(image="https://secret.example/8.jpg", audio="6.wav"),
    ]
    server.put("b", "x/d/metadata.jsonl", lines(*rows))
    server.put("b", "x/d/other.jsonl", lines(pair()))
    for number in range(1500):
        server.put("b", f"x/d/p/{number}.jpg", b"x")
    source = make_source("gs://b/x/d/")
    first, second, *bad = [outcome for _, outcome in source]
    assert list(first.media) == [Image("gs://b/x/d/p/1.jpg"), Audio("gs://c/2.wav")]
    assert list(second.media) == [Image("gs://b/x/3.jpg"), Audio("gs://b/4.wav")]
    for error, words in zip(bad, ("outside the bucket 'b'",) * 2 + ("https: URI",), strict=True):
        assert isinstance(error, DataError)
        assert words in str(error)
        assert "secret" not in str(error)
    assert "list" not in {request.operation for request in server.requests}


def test_pictures_with_texts_beside_them(server, make_source):
    for name in ("1.jpg", "2.jpg", "s/3.wav"):
        server.put("b", f"d/{name}", b"x")
    for name in ("1.txt", "s/3.txt", "README.txt"):
        server.put("b", f"d/{name}", b"Words.")
    source = make_source("gs://b/d/")
    first, bad, last = [outcome for _, outcome in source]
    assert list(first.media) == [Image("gs://b/d/1.jpg")]
    assert list(last.media) == [Audio("gs://b/d/s/3.wav")]
    assert (first.turns[1].text, last.key) == ("Words.", "s/3.wav")
    assert "no '2.txt' beside it" in str(bad)
    assert source.read_summary()["notes"][0] == ".txt files without media: 1"


def test_tars_are_found_by_parts_of_the_pinned_object(server, make_source, fetcher):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for n in range(3):
            for ending, content in (("jpg", b"%d" % n * 9), ("json", b'{"caption": "A frog."}')):
                info = tarfile.TarInfo(f"{n:04}.{ending}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    generation = server.put("b", "d/train-0.tar", buffer.getvalue())
    examples = [example for _, example in make_source("gs://b/d/", split="train")]
    assert [example.key for example in examples] == ["0000", "0001", "0002"]
    for n, example in enumerate(examples):
        (picture,) = example.media
        assert (picture.source.uri, picture.source.generation, picture.source.crc32c) == (
            "gs://b/d/train-0.tar",
            generation,
            None,
        )
        assert fetcher.fetch(picture.source) == b"%d" % n * 9


def test_splits_are_chosen_by_names_and_by_columns(server, make_source):
    for name in ("train-0.jsonl", "train-1.jsonl", "test-0.jsonl"):
        server.put("b", f"d/{name}", lines(pair()))
    assert keys_of(make_source("gs://b/d/", split="test")) == ["test-0.jsonl:1"]
    source = make_source("gs://b/d/")
    assert keys_of(source) == ["train-0.jsonl:1", "train-1.jsonl:1"]
    assert source.read_summary()["notes"] == ["files of other splits not read (test): 1"]
    server.put("b", "e/a.jsonl", lines(pair(split="train"), pair(split="val")))
    assert keys_of(make_source("gs://b/e/", split="validation")) == ["a.jsonl:2"]
    with pytest.raises(SourceError, match="no split 'x'"):
        keys_of(make_source("gs://b/d/", split="x"))


def test_a_data_file_that_changes_while_it_is_read_is_told(server, make_source):
    large = lines(*(pair("A" * 1000) for _ in range(12_000)))
    for name, content, fault in (
        ("a.jsonl", large, Fault(Overwrite(), nth=4)),
        ("b.parquet", parquet(pa.table({"text": ["x" * 99] * 999})), Fault(Overwrite(), nth=2)),
        ("c.tar", bytes(10240), Fault(Overwrite(), nth=1)),
    ):
        server.put("b", name, content)
        server.add_fault(fault)
        with pytest.raises(ObjectChangedError, match=f"'{name}' .* was overwritten after it was"):
            list(make_source(f"gs://b/{name}"))
        server.clear_faults()


def test_a_bad_network_changes_no_row(server, make_source):
    server.put("b", "a.jsonl", lines(*(pair("A" * 1000, id=n) for n in range(12_000))))
    server.add_fault(Fault(Refuse(503), nth=(1, 3)))
    server.add_fault(Fault(Truncate(), nth=2))
    assert keys_of(make_source("gs://b/a.jsonl")) == [str(n) for n in range(12_000)]


@pytest.mark.parametrize(
    ("uris", "how", "error", "words"),
    [
        ([], {}, SourceError, "no URIs"),
        ("data/train.jsonl", {}, SourceError, "form gs://"),
        ("gs://b/", {"file_format": "xml"}, ConfigError, "format='xml'"),
        ("gs://b/none/", {}, SourceError, "under that prefix"),
        ("gs://b/*.none", {}, SourceError, "matches that glob"),
        ("gs://b/m/", {}, SourceError, r"folder 'm' holds 1 \.log"),
        ("gs://b/m/x.log", {}, SourceError, "no known format"),
        (["gs://b/a.csv", "gs://b/a.jsonl"], {}, SourceError, "different formats"),
        ("gs://b/z.tar.gz", {}, SourceError, "compressed tar"),
        ("gs://b/a.jsonl", {"keywords": {"prompt": "x"}}, SourceError, "names the column 'x'"),
    ],
)
def test_what_cannot_be_read_is_told(server, make_source, uris, how, error, words):
    for name in ("a.csv", "m/x.log", "z.tar.gz"):
        server.put("b", name, b"x,y\n1,2\n")
    server.put("b", "a.jsonl", lines(pair()))
    with pytest.raises(error, match=words):
        list(make_source(uris, **how))
