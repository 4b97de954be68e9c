"""Against Google's own services, for users who have an account. Never runs by itself.

    GEMMA_TUNER_LIVE_GCP=1 GEMMA_TUNER_LIVE_BUCKET=my-bucket GEMMA_TUNER_LIVE_TABLE=p.d.t \\
        pytest -m network tests/cloud/test_live.py

Needs application-default credentials. It writes four objects of a few bytes below
``gemma-tuner-live-test/`` in the bucket and deletes them, and reads at most 100 MB of the table.
"""

import os
import uuid

import pytest

import gemma_tuner as gt

MAX_BYTES = 100_000_000

pytestmark = [
    pytest.mark.network,
    pytest.mark.skipif(
        os.environ.get("GEMMA_TUNER_LIVE_GCP") != "1",
        reason="NOT TESTED AGAINST GOOGLE CLOUD: set GEMMA_TUNER_LIVE_GCP=1, and see this file",
    ),
]


@pytest.fixture
def bucket():
    name = os.environ.get("GEMMA_TUNER_LIVE_BUCKET")
    if not name:
        pytest.skip("GEMMA_TUNER_LIVE_BUCKET names no bucket")
    from google.cloud import storage

    return storage.Client().bucket(name)


def test_rows_and_media_of_a_bucket_arrive_and_changes_are_seen(bucket, tmp_path):
    prefix = f"gemma-tuner-live-test/{uuid.uuid4().hex}"
    samples = gt.testing.sample_data("audio")
    blobs = [bucket.blob(f"{prefix}/{name}") for name in ("rows.jsonl", "000.flac", "001.flac")]
    rows = "".join(
        f'{{"id": "{n}", "audio": "00{n}.flac", "prompt": "Q", "response": "A"}}\n'
        for n in range(2)
    )
    try:
        blobs[0].upload_from_string(rows)
        for blob in blobs[1:]:
            blob.upload_from_filename(str(samples / blob.name.rpartition("/")[2]))
        uri = f"gs://{bucket.name}/{prefix}/rows.jsonl"
        stream = gt.stream_gcs(uri, cache_dir=tmp_path / "a", max_bad_fraction=0.5)
        assert sorted(example.key for example in stream) == ["0", "1"]
        assert stream.report().fetched.requests == 2
        again = gt.stream_gcs(uri, cache_dir=tmp_path / "b", max_bad_fraction=0.5)
        blobs[1].upload_from_filename(str(samples / "002.flac"))
        assert [example.key for example in again] == ["1"]
        assert again.inspect_quarantine()[0].error == "ObjectChangedError"
    finally:
        for blob in blobs:
            blob.delete()


def test_a_table_is_read_within_its_limit(tmp_path):
    table = os.environ.get("GEMMA_TUNER_LIVE_TABLE")
    if not table:
        pytest.skip("GEMMA_TUNER_LIVE_TABLE names no table")
    stream = gt.stream_bigquery(table, max_bytes_billed=MAX_BYTES, cache_dir=tmp_path)
    keys = [stream[index].key for index in range(min(10, len(stream)))]
    assert len(set(keys)) == len(keys)
    with pytest.raises(gt.ConfigError, match="max_bytes_billed"):
        gt.stream_bigquery(query=f"SELECT * FROM `{table}`", cache_dir=tmp_path)
