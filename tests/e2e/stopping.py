"""Streams of every kind, made of nothing but arguments: all that a new process has to go on with.

Every picture is of another colour, and what is compared is keys together with pixels: a stream
that delivers the right key with another example's media is wrong as well.
"""

import io
import json
import os
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import PIL.Image
from google.auth.credentials import AnonymousCredentials
from google.cloud import storage

from gemma_tuner.records import Example
from gemma_tuner.storage.config import FetchConfig
from gemma_tuner.streaming.mixing import mix
from gemma_tuner.streaming.opening import stream_gcs, stream_local
from gemma_tuner.streaming.stream import ExampleStream
from gemma_tuner.testing.cloud.gcs.server import GcsServer

NUM_ROWS = 110
BROKEN = {17, 18, 80}
"""Pictures that are damaged as they are stored."""
OVERWRITTEN, DELETED, NEVER_THERE, NO_ANSWER = 40, 41, 60, 90
BUCKET = "media"


@dataclass(frozen=True)
class Case:
    """How a stream is opened."""

    kind: str
    fetch: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        settings = {**self.fetch, **self.options}
        return "-".join([self.kind, *(f"{name}={value}" for name, value in settings.items())])


def draw_picture(number: int) -> bytes:
    file = io.BytesIO()
    PIL.Image.new("RGB", (3, 2), (number % 256, number // 256, 99)).save(file, "PNG")
    return file.getvalue()


def make_row(name: str, number: int, **columns: Any) -> dict[str, Any]:
    answer = "" if number == NO_ANSWER else f"A{number}"
    return {"id": f"{name}{number}", "prompt": "Q", "response": answer, **columns}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_data(folder: Path) -> None:
    """Local data: a file of text, four files of text, and pictures with bad ones among them."""
    rows = [make_row("t", number) for number in range(NUM_ROWS) if number != NO_ANSWER]
    write_rows(folder / "text.jsonl", rows)
    for number in range(4):
        write_rows(folder / f"files/{number}.jsonl", rows[number * 30 : number * 30 + 30])
    pictures = folder / "pictures"
    write_rows(
        pictures / "rows.jsonl",
        [make_row("p", number, image=f"{number}.png") for number in range(NUM_ROWS)],
    )
    for number in range(NUM_ROWS):
        content = draw_picture(number)
        content = content[:40] if number in BROKEN else content
        (pictures / f"{number}.png").write_bytes(content)


def fill_bucket(server: GcsServer) -> None:
    """The same pictures in a bucket, with one that is missing from the beginning."""
    for number in range(NUM_ROWS):
        if number != NEVER_THERE:
            content = draw_picture(1000 + number)
            server.put(BUCKET, f"{number}.png", content[:40] if number in BROKEN else content)
    rows = [make_row("g", number, file_name=f"{number}.png") for number in range(NUM_ROWS)]
    server.put(BUCKET, "manifest.jsonl", "".join(json.dumps(r) + "\n" for r in rows).encode())


def change_bucket(server: GcsServer) -> None:
    """What happens to a bucket after its manifest was written."""
    server.put(BUCKET, f"{OVERWRITTEN}.png", draw_picture(7))
    server.delete(BUCKET, f"{DELETED}.png")


def open_client(endpoint: str) -> storage.Client:
    return storage.Client(
        project="local",
        credentials=AnonymousCredentials(),
        client_options={"api_endpoint": endpoint},
    )


def open_stream(case: Case, folder: Path, client: storage.Client | None = None) -> ExampleStream:
    """Open a stream as a program does that is started again."""
    fetch = FetchConfig(**{"min_free_disk_bytes": 0, "window_examples": 8, **case.fetch})
    options = {"cache_dir": folder / "cache", "fetch": fetch, **case.options}
    bad = {"max_bad_fraction": 0.1}
    match case.kind:
        case "text":
            return stream_local(folder / "text.jsonl", **options)
        case "files":
            return stream_local(sorted((folder / "files").iterdir()), **options)
        case "pictures":
            return stream_local(folder / "pictures" / "rows.jsonl", **bad, **options)
        case "gcs":
            return stream_gcs(f"gs://{BUCKET}/", gcs_client=client, **bad, **options)
        case "mix":
            parts = [
                open_stream(Case(kind, case.fetch, case.options), folder, client)
                for kind in ("text", "pictures", "gcs")
            ]
            return mix(dict(zip(parts, (2, 0.5, 1), strict=True)))
    raise ValueError(case.kind)


def describe(example: Example) -> str:
    """Name an example and what it holds."""
    pixels = [zlib.crc32(part.source.tobytes()) for part in example.media]
    return f"{example.key} {example.turns[-1].text} {pixels}"


def record(stream: ExampleStream, num_epochs: int) -> tuple[list[str], list[str]]:
    """Read without a stop; return the examples, and the state before each and after the last."""
    examples, states = [], [json.dumps(stream.state_dict())]
    for _ in range(num_epochs):
        for example in stream:
            examples.append(describe(example))
            states.append(json.dumps(stream.state_dict()))
    return examples, states


def read_on(stream: ExampleStream, state: str, count: int) -> tuple[list[str], str]:
    """Restore a stream, and read so many examples; return them and the state after them."""
    stream.load_state_dict(json.loads(state))
    examples: list[str] = []
    num_fruitless = 0
    while len(examples) < count and num_fruitless < 2:
        before = len(examples)
        for example in stream:
            examples.append(describe(example))
            if len(examples) == count:
                break
        num_fruitless = num_fruitless + 1 if len(examples) == before else 0
    return examples, json.dumps(stream.state_dict())


def read_on_in_new_process(
    case: Case, folder: Path, endpoint: str, stops: list[tuple[int, str, int]]
) -> list[tuple[int, int, list[str], str]]:
    """For some stops: open the stream from its arguments, restore it and read on.

    Returns:
        The process, and for each stop the examples and the state after them.
    """
    client = open_client(endpoint)
    return [
        (os.getpid(), stop, *read_on(open_stream(case, folder, client), state, count))
        for stop, state, count in stops
    ]
