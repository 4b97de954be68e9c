"""A run that can be killed at any time and started again: ``python -m tests.e2e.killed_run JSON``.

It opens a table whose rows point to pictures in a bucket, says ``opened``, waits for a line, and
says of each example its key and a checksum of its pixels. Its state it saves as a trainer would:
to a new file that takes the place of the old one, every so many examples.
"""

import json
import sys
import zlib
from pathlib import Path

import grpc
from google.api_core.client_options import ClientOptions
from google.auth.credentials import AnonymousCredentials
from google.cloud import bigquery, bigquery_storage, storage
from google.cloud.bigquery_storage_v1.services.big_query_read.transports import (
    BigQueryReadGrpcTransport,
)

from gemma_tuner.storage.config import FetchConfig
from gemma_tuner.streaming.opening import stream_bigquery
from gemma_tuner.streaming.stream import ExampleStream

TABLE = "project.dataset.pictures"
SAVE_EVERY = 7
CACHE_BYTES = 1 << 30


def open_stream(folder: Path, endpoints: dict[str, str], **options) -> ExampleStream:
    credentials = AnonymousCredentials()
    channel = grpc.insecure_channel(
        endpoints["read"], options=[("grpc.max_receive_message_length", -1)]
    )
    return stream_bigquery(
        TABLE,
        cache_dir=folder / "cache",
        max_bad_fraction=0.1,
        fetch=FetchConfig(
            window_examples=24,
            cache_bytes=CACHE_BYTES,
            min_free_disk_bytes=0,
            attempt_timeout_seconds=1.0,
            total_timeout_seconds=60.0,
        ),
        gcs_client=storage.Client(
            project="project",
            credentials=credentials,
            client_options={"api_endpoint": endpoints["gcs"]},
        ),
        bigquery_client=bigquery.Client(
            project="project",
            credentials=credentials,
            client_options=ClientOptions(api_endpoint=endpoints["bigquery"]),
        ),
        bigquery_read_client=bigquery_storage.BigQueryReadClient(
            transport=BigQueryReadGrpcTransport(channel=channel)
        ),
        **options,
    )


def save(path: Path, num_examples: int, stream: ExampleStream) -> None:
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps({"examples": num_examples, "stream": stream.state_dict()}))
    temporary.replace(path)


def say(*words: object) -> None:
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


def main() -> None:
    folder, endpoints = json.loads(sys.argv[1])
    folder = Path(folder)
    stream = open_stream(folder, endpoints)
    path, num_examples = folder / "state.json", 0
    if path.exists():
        saved = json.loads(path.read_text())
        stream.load_state_dict(saved["stream"])
        num_examples = saved["examples"]
    say("opened")
    sys.stdin.readline()
    for example in stream:
        (picture,) = example.media
        say(example.key, zlib.crc32(picture.source.tobytes()))
        num_examples += 1
        if num_examples % SAVE_EVERY == 0:
            save(path, num_examples, stream)
    save(path, num_examples, stream)
    say("done")


if __name__ == "__main__":
    main()
