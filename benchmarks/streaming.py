"""How fast and how well shuffled is a stream over many small objects, beside what else there is?

    python -m benchmarks.streaming [--only throughput] [--objects 400] [--rounds 3]

``throughput``: sounds of 100 KB in a local stand-in for Cloud Storage, in a process of its own,
that takes 40 ms to the first byte. Every way of reading takes its turn in each round; the best
round of each counts, because other work on the machine only ever makes one slower.
``hedging``: the time of single reads when 5 % of requests stall for 2 s, with hedges and without.
``shuffle``: the order of one epoch over 100 files of 1,000 rows.

Prints a line of JSON for each figure. It shows ratios: no network, no Google.
"""

import argparse
import io
import json
import multiprocessing
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from google.auth.credentials import AnonymousCredentials
from google.cloud import storage
from requests.adapters import HTTPAdapter

from gemma_tuner.records import StoredObject
from gemma_tuner.storage.config import FetchConfig
from gemma_tuner.streaming.manifest import list_stored
from gemma_tuner.streaming.opening import stream_gcs, stream_local
from gemma_tuner.streaming.stream import ExampleStream
from gemma_tuner.testing.cloud.gcs.faults import Fault, Stall
from gemma_tuner.testing.cloud.gcs.server import GcsServer

BUCKET, ROWS_NAME = "benchmark", "rows.jsonl"
SPAWN = multiprocessing.get_context("spawn")
THREADS = 16
STALLED = Fault(Stall(2.0), name="media/*", probability=0.05)


def make_sound(num_bytes: int) -> bytes:
    """Noise: 16 kHz, mono, 16 bits."""
    samples = np.random.default_rng(0).integers(-9999, 9999, (num_bytes - 44) // 2, np.int16)
    file = io.BytesIO()
    soundfile.write(file, samples, 16_000, format="WAV")
    return file.getvalue()


def name_object(number: int) -> str:
    return f"media/{number:06}.wav"


def make_rows(num_objects: int) -> str:
    rows = (
        {"id": number, "audio": f"gs://{BUCKET}/{name_object(number)}", "text": "noise"}
        for number in range(num_objects)
    )
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def _serve(
    pipe: Connection, num_objects: int, num_bytes: int, latency_seconds: float, faults: list[Fault]
) -> None:
    content = make_sound(num_bytes)
    with GcsServer() as server:
        server.latency_seconds = latency_seconds
        for fault in faults:
            server.add_fault(fault)
        server.put(BUCKET, ROWS_NAME, make_rows(num_objects).encode())
        for number in range(num_objects):
            server.put(BUCKET, name_object(number), content)
        pipe.send(server.endpoint)
        pipe.poll(None)  # until the other end is closed


@contextmanager
def serve_objects(
    num_objects: int,
    num_bytes: int,
    *,
    latency_seconds: float = 0.0,
    faults: Sequence[Fault] = (),
) -> Iterator[str]:
    """Serve sounds, and rows that name them, from another process; gives its endpoint."""
    ours, theirs = SPAWN.Pipe()
    arguments = (theirs, num_objects, num_bytes, latency_seconds, list(faults))
    process = SPAWN.Process(target=_serve, args=arguments, daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours.recv()
    finally:
        ours.close()
        process.join()


def make_client(endpoint: str) -> storage.Client:
    client = storage.Client(
        project="local",
        credentials=AnonymousCredentials(),
        client_options={"api_endpoint": endpoint},
    )
    # Its own adapter keeps ten connections, which would slow the bare pool down.
    session: Any = client._http  # pyright: ignore[reportPrivateUsage]
    session.mount("http://", HTTPAdapter(pool_maxsize=4 * THREADS))
    return client


@cache
def share_client(endpoint: str, process_id: int) -> storage.Client:
    del process_id  # A worker process that was forked needs connections of its own.
    return make_client(endpoint)


def download(endpoint: str, number: int) -> bytes:
    blob: Any = share_client(endpoint, os.getpid()).bucket(BUCKET).blob(name_object(number))
    return blob.download_as_bytes(raw_download=True, checksum=None)


def download_sound(endpoint: str, number: int) -> np.ndarray:
    return soundfile.read(io.BytesIO(download(endpoint, number)), dtype="float32")[0]


class Sounds:
    """What one writes for a plain DataLoader."""

    def __init__(self, endpoint: str, num_objects: int) -> None:
        self.endpoint, self.num_objects = endpoint, num_objects

    def __len__(self) -> int:
        return self.num_objects

    def __getitem__(self, number: int) -> np.ndarray:
        return download_sound(self.endpoint, number)


def exhaust(items: Iterable[Any]) -> int:
    return sum(1 for _ in items)


def read_sequentially(endpoint: str, num_objects: int) -> int:
    return exhaust(download(endpoint, number) for number in range(num_objects))


def read_by_bare_pool(endpoint: str, num_objects: int) -> int:
    with ThreadPoolExecutor(THREADS) as pool:
        return exhaust(pool.map(partial(download, endpoint), range(num_objects)))


def read_by_data_loader(endpoint: str, num_objects: int) -> int:
    from torch.utils.data import DataLoader

    sounds: Any = Sounds(endpoint, num_objects)
    loader = DataLoader(sounds, batch_size=8, shuffle=True, num_workers=2, collate_fn=list)
    return sum(map(len, loader))


def read_by_datasets(endpoint: str, num_objects: int) -> int:
    from datasets import load_dataset

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / ROWS_NAME
        file.write_text(make_rows(num_objects))
        rows: Any = load_dataset("json", data_files=str(file), split="train", streaming=True)
        rows = rows.shuffle(seed=0, buffer_size=1000)
        return exhaust(rows.map(lambda row: {"samples": download_sound(endpoint, row["id"])}))


def open_ours(endpoint: str, folder: str | Path, **settings: Any) -> ExampleStream:
    fetch = FetchConfig(io_threads=THREADS, min_free_disk_bytes=0, **settings)
    uri = f"gs://{BUCKET}/{ROWS_NAME}"
    return stream_gcs(uri, gcs_client=make_client(endpoint), cache_dir=folder, fetch=fetch)


def time_call(call: Callable[[], int], num_objects: int) -> dict[str, float]:
    started, started_cpu = time.perf_counter(), time.process_time()
    num_read = call()
    seconds, cpu = time.perf_counter() - started, time.process_time() - started_cpu
    if num_read != num_objects:
        raise RuntimeError(f"{num_read} of {num_objects} objects were read")
    return {"per_second": num_read / seconds, "cpu_ms_each": 1000 * cpu / num_read}


def measure_throughput(
    num_objects: int, rounds: int, *, with_others: bool = True, latency_seconds: float = 0.04
) -> list[dict[str, Any]]:
    """Read the same objects in every way; the best of all rounds, and its ratio to sequential."""
    ways: dict[str, Callable[[str, int], int]] = {
        "sequential": read_sequentially,
        "bare pool": read_by_bare_pool,
    }
    if with_others:
        ways |= {
            "DataLoader, 2 workers": read_by_data_loader,
            "datasets, streaming": read_by_datasets,
        }
    found: dict[str, list[dict[str, float]]] = {}
    with serve_objects(num_objects, 100_000, latency_seconds=latency_seconds) as endpoint:
        for _ in range(rounds):
            for name, way in ways.items():
                result = time_call(partial(way, endpoint, num_objects), num_objects)
                found.setdefault(name, []).append(result)
            for name, result in _time_ours(endpoint, num_objects).items():
                found.setdefault(name, []).append(result)
    best = {name: max(them, key=lambda one: one["per_second"]) for name, them in found.items()}
    sequential, bare = best["sequential"]["per_second"], best["bare pool"]["per_second"]
    return [
        {
            "way": name,
            "objects_per_second": round(one["per_second"], 1),
            "times_sequential": round(one["per_second"] / sequential, 2),
            "times_bare_pool": round(one["per_second"] / bare, 2),
            "cpu_ms_each": round(one["cpu_ms_each"], 2),
            "rounds": [round(other["per_second"], 1) for other in found[name]],
        }
        for name, one in best.items()
    ]


def _time_ours(endpoint: str, num_objects: int) -> dict[str, dict[str, float]]:
    """Time the opening (find and pin all objects, write the manifest), and the reading apart."""
    results = {}
    for name, cache_bytes in (("ours, no cache", 0), ("ours, cold cache", 1 << 30)):
        with tempfile.TemporaryDirectory() as folder:
            open_stream = partial(open_ours, endpoint, folder, cache_bytes=cache_bytes)
            results["ours, opening"] = time_call(lambda: len(open_stream()), num_objects)  # noqa: B023
            stream = open_stream()
            results[name] = time_call(partial(exhaust, stream), num_objects)
            if cache_bytes:
                results["ours, warm cache"] = time_call(partial(exhaust, stream), num_objects)
            stream.close()
    return results


def measure_hedging(num_reads: int, *, latency_seconds: float = 0.04) -> list[dict[str, Any]]:
    """Time single reads, the same requests stalling, without hedges and with them."""
    return [_time_reads(num_reads, latency_seconds, fraction) for fraction in (0.0, 0.1)]


def _time_reads(num_reads: int, latency_seconds: float, fraction: float) -> dict[str, Any]:
    serving = serve_objects(num_reads, 100_000, latency_seconds=latency_seconds, faults=[STALLED])
    with serving as endpoint, tempfile.TemporaryDirectory() as folder:
        stream = open_ours(endpoint, folder, cache_bytes=0, hedged_fraction=fraction)
        (view,) = stream.views
        examples = map(view.manifest.read_example, range(len(stream)))
        objects = [stored for example in examples for stored in list_stored(example)]
        before = view.fetcher.counts

        def read(stored: StoredObject) -> float:
            started = time.perf_counter()
            view.fetcher.fetch(stored)
            return time.perf_counter() - started

        with ThreadPoolExecutor(THREADS) as pool:
            seconds = list(pool.map(read, objects))
        after = view.fetcher.counts
        stream.close()
    p50, p90, p99 = (round(float(value), 3) for value in np.percentile(seconds, (50, 90, 99)))
    return {
        "hedged_fraction": fraction,
        "reads": num_reads,
        "p50_seconds": p50,
        "p90_seconds": p90,
        "p99_seconds": p99,
        "hedges": after.hedges - before.hedges,
        "extra_requests": round((after.requests - before.requests) / num_reads - 1, 3),
    }


def measure_shuffle(num_files: int = 100, rows_each: int = 1000) -> list[dict[str, Any]]:
    """How far is the order of one epoch from that of the files?"""
    from datasets import load_dataset

    num_rows = num_files * rows_each
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "rows")
        folder.mkdir()
        for file in range(num_files):
            rows = range(file * rows_each, (file + 1) * rows_each)
            lines = (json.dumps({"id": row, "text": "x"}) for row in rows)
            (folder / f"{file:03}.jsonl").write_text("\n".join(lines))
        files = sorted(map(str, folder.glob("*.jsonl")))
        keywords: dict[str, Any] = {"cache_dir": Path(name, "cache"), "id": "id"}
        shards = stream_local(files, locality="shard", **keywords)
        table: Any = load_dataset("json", data_files=files, split="train", streaming=True)
        orders = {
            "ours": [int(example.key) for example in stream_local(files, **keywords)],
            'ours, locality="shard"': [int(example.key) for example in shards],
            "datasets, buffer of 1,000": [
                row["id"] for row in table.shuffle(seed=0, buffer_size=1000)
            ],
            "full permutation": np.random.default_rng(0).permutation(num_rows),
        }
    return [
        {"order": name, **describe_order(np.asarray(order), rows_each)}
        for name, order in orders.items()
    ]


def describe_order(order: np.ndarray, rows_each: int) -> dict[str, float]:
    """Compare an order with that of the files; of a random one 0, 0.333 and 1/files are expected.

    Places and rows are both permutations: their ranks are themselves.
    """
    places = np.arange(len(order))
    if not (np.sort(order) == places).all():
        raise RuntimeError("some rows were lost or repeated")
    files = order // rows_each
    return {
        "rank_correlation": round(float(np.corrcoef(places, order)[0, 1]), 4),
        "mean_displacement": round(float(np.abs(places - order).mean()) / len(order), 4),
        "same_file_neighbours": round(float((files[1:] == files[:-1]).mean()), 4),
    }


def describe_machine() -> dict[str, str]:
    packages = ("google-cloud-storage", "datasets", "torch", "pyarrow", "numpy")
    return {
        "machine": f"{os.cpu_count()} CPU cores, {platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def main() -> None:
    measures: dict[str, Callable[[argparse.Namespace], list[dict[str, Any]]]] = {
        "throughput": lambda args: measure_throughput(args.objects, args.rounds),
        "hedging": lambda args: measure_hedging(args.reads),
        "shuffle": lambda args: measure_shuffle(),
    }
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", choices=measures)
    parser.add_argument("--objects", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--reads", type=int, default=1000)
    args = parser.parse_args()
    print(json.dumps(describe_machine()))
    for what in [args.only] if args.only else measures:
        for result in measures[what](args):
            print(json.dumps({"measure": what, **result}), flush=True)


if __name__ == "__main__":
    main()
