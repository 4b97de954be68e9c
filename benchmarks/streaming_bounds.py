"""Does a stream keep to its bounds of memory, disk and start-up time?

    python -m benchmarks.streaming_bounds [--only manifest] [--rows 5000000]

``memory``: a consumer 100 times slower than its source of 1 MB sounds, or of 1 MB texts; how much
more memory its process takes than before the first example, beside ``window_bytes``.
``cache``: the bytes in the cache's folder at any time, over two epochs of ten times its budget.
``manifest``: writing one of many rows, opening it again, and reading it in shuffled order.

Every figure is of a fresh process, by the counts of /proc: it needs Linux. ``anon`` is memory of
its own, ``all`` adds the pages of files that it has mapped. Prints a line of JSON for each figure.
"""

import argparse
import fcntl
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

from benchmarks.streaming import SPAWN, describe_machine, open_ours, serve_objects
from gemma_tuner.storage.config import FetchConfig
from gemma_tuner.streaming.opening import stream_local
from gemma_tuner.streaming.stream import ExampleStream

MB = 1_000_000
ROOT = Path(__file__).resolve().parents[1]
SLOWNESS = 100
FAST_EXAMPLES = 50
Kind = Literal["sounds", "texts", "Chinese texts"]
ALPHABETS: dict[Kind, str] = {"texts": "some words of ", "Chinese texts": "\u4e00\u4e8c\u4e09"}


class MemoryWatch:
    """The most memory that this process takes while it is watched, beyond what it took before."""

    def __init__(self) -> None:
        self.before = self.peak = read_memory()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "MemoryWatch":
        Path("/proc/self/clear_refs").write_text("5")  # begins the kernel's own peak anew
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()
        self._note()

    def _watch(self) -> None:
        while not self._stopped.wait(0.005):
            self._note()

    def _note(self) -> None:
        now = read_memory()
        self.peak = {name: max(self.peak[name], now[name]) for name in now}

    def describe(self) -> dict[str, float]:
        anon, everything = self.peak["RssAnon"], self.peak["VmHWM"]
        return {
            "peak_anon_mb": round(anon / MB, 1),
            "peak_all_mb": round(everything / MB, 1),
            "extra_anon_mb": round((anon - self.before["RssAnon"]) / MB, 1),
            "extra_all_mb": round((everything - self.before["VmRSS"]) / MB, 1),
        }


def read_memory() -> dict[str, int]:
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {name: 1024 * int(fields[name].split()[0]) for name in ("VmRSS", "VmHWM", "RssAnon")}


def run_fresh(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    with ProcessPoolExecutor(1, mp_context=SPAWN) as pool:
        return pool.submit(function, *arguments).result()


# --- memory -----------------------------------------------------------------------------------


def measure_memory(
    kind: Kind, window_bytes: int, *, num_items: int, num_bytes: int = MB, num_slow: int = 10
) -> dict[str, Any]:
    """Consume some examples as fast as they come, and then some 100 times slower."""
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        rows, folder = Path(name, "rows.jsonl"), Path(name, "cache")
        if kind == "sounds":
            where = stack.enter_context(serve_objects(num_items, num_bytes))
        else:
            where = str(rows)
            write_texts(rows, num_items, num_bytes, ALPHABETS[kind])
        run_fresh(_write_manifest, kind, where, folder)
        return run_fresh(_consume_slowly, kind, where, folder, window_bytes, num_slow)


def write_texts(path: Path, num_rows: int, num_characters: int, alphabet: str) -> None:
    text = alphabet * (num_characters // len(alphabet))
    with path.open("w") as file:
        for row in range(num_rows):
            file.write(f"{json.dumps({'id': row, 'text': text}, ensure_ascii=False)}\n")


def _open(kind: Kind, where: str, folder: Path, **settings: Any) -> ExampleStream:
    if kind == "sounds":
        return open_ours(where, folder, cache_bytes=0, **settings)
    return stream_local(where, cache_dir=folder, fetch=FetchConfig(**settings))


def _write_manifest(kind: Kind, where: str, folder: Path) -> dict[str, Any]:
    """Do so in a process of its own: what it needed and freed would hide what reading needs."""
    return {"rows": len(_open(kind, where, folder))}


def _consume_slowly(
    kind: Kind, where: str, folder: Path, window_bytes: int, num_slow: int
) -> dict[str, Any]:
    stream = _open(kind, where, folder, window_bytes=window_bytes)
    examples = iter(stream)
    with MemoryWatch() as watch:
        next(examples)  # after the window is full, if its examples are only texts
        started = time.perf_counter()
        for _ in range(FAST_EXAMPLES):
            next(examples)
        source_seconds = (time.perf_counter() - started) / FAST_EXAMPLES
        for _ in range(num_slow):
            time.sleep(SLOWNESS * source_seconds)
            next(examples)
    window: Any = stream._window  # pyright: ignore[reportPrivateUsage]
    stream.close()
    return {
        "kind": kind,
        "window_mb": round(window_bytes / MB, 1),
        **watch.describe(),
        "window_says_mb": round(window.peak_bytes / MB, 1),
        "source_ms": round(1000 * source_seconds, 2),
        "slow_examples": num_slow,
    }


# --- the cache --------------------------------------------------------------------------------


def measure_cache(num_objects: int, num_bytes: int, *, num_epochs: int = 2) -> dict[str, Any]:
    """Run over ten times as many bytes as the cache may have, and look at it all the time."""
    budget = num_objects * num_bytes // 10
    with serve_objects(num_objects, num_bytes) as endpoint, tempfile.TemporaryDirectory() as name:
        stream = open_ours(endpoint, name, cache_bytes=budget)
        with watch_folder(Path(name, "media")) as sums:
            num_read = sum(1 for _ in range(num_epochs) for _ in stream)
        (view,) = stream.views
        hits = view.fetcher.counts.hits
        stream.close()
    return {
        "objects": num_objects,
        "read": num_read,
        "data_mb": round(num_objects * num_bytes / MB, 2),
        "budget_bytes": budget,
        "peak_bytes": max(sums),
        "at_end_bytes": sums[-1],
        "looks": len(sums),
        "hits": hits,
    }


@contextmanager
def watch_folder(folder: Path) -> Iterator[list[int]]:
    """Sum the sizes of all files again and again, holding the cache's lock while looking."""
    sums: list[int] = []
    stopped = threading.Event()

    def look() -> None:
        lock = folder / "media.lock"
        if lock.exists():
            with lock.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH)
                sums.append(sum(one.stat().st_size for one in folder.rglob("*") if one.is_file()))

    def watch() -> None:
        while not stopped.wait(0.002):
            look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield sums
    finally:
        stopped.set()
        thread.join()
        look()


# --- the manifest -----------------------------------------------------------------------------

START = """
import sys, time
started = time.perf_counter()
from gemma_tuner.streaming.opening import stream_local
imported = time.perf_counter()
stream = stream_local(sys.argv[1], cache_dir=sys.argv[2])
opened = time.perf_counter()
memory = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(imported - started, opened - imported, len(stream), int("torch" in sys.modules),
      int(memory["RssAnon"].split()[0]) / 1e3, int(memory["VmHWM"].split()[0]) / 1e3)
"""


def measure_start(rows: Path, folder: Path) -> dict[str, Any]:
    """Open the rows in a fresh process; the first time, that writes their manifest."""
    arguments = [sys.executable, "-c", START, rows, folder]
    started = time.perf_counter()
    done = subprocess.run(arguments, check=True, capture_output=True, text=True, cwd=ROOT)
    process_seconds = time.perf_counter() - started
    numbers = list(map(float, done.stdout.split()))
    return {
        "process_seconds": round(process_seconds, 2),
        "import_seconds": round(numbers[0], 2),
        "open_seconds": round(numbers[1], 3),
        "rows": int(numbers[2]),
        "imports_torch": bool(numbers[3]),
        "anon_mb": round(numbers[4], 1),
        "peak_all_mb": round(numbers[5], 1),
    }


def write_rows(path: Path, num_rows: int) -> None:
    """Write questions and answers of some 200 bytes a row."""
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(2000)]
    texts = [" ".join(rng.choices(words, k=12)) for _ in range(5003)]
    with path.open("w") as file:
        for row in range(num_rows):
            prompt, response = texts[7 * row % len(texts)], texts[13 * row % len(texts)]
            file.write(f'{{"id": "{row}", "prompt": "{prompt}", "response": "{response}"}}\n')


def _iterate(rows: Path, folder: Path, limit_seconds: float) -> dict[str, Any]:
    stream = stream_local(rows, cache_dir=folder)
    num_read = 0
    with MemoryWatch() as watch:
        started = time.perf_counter()
        for _ in stream:
            num_read += 1
            if num_read % 1000 == 0 and time.perf_counter() - started > limit_seconds:
                break
        seconds = time.perf_counter() - started
    stream.close()
    return {
        "read": num_read,
        "seconds": round(seconds, 1),
        "rows_per_second": round(num_read / seconds),
        "all_rows_would_take_seconds": round(seconds * len(stream) / num_read),
        **watch.describe(),
    }


def measure_manifest(num_rows: int, limit_seconds: float) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as name:
        rows, folder = Path(name, "rows.jsonl"), Path(name, "cache")
        write_rows(rows, num_rows)
        first = measure_start(rows, folder)
        (manifest,) = (folder / "manifests").glob("*.arrow")
        yield {
            "start": "first",
            **first,
            "rows_per_second": round(num_rows / first["open_seconds"]),
            "rows_mb": round(rows.stat().st_size / MB, 1),
            "manifest_mb": round(manifest.stat().st_size / MB, 1),
        }
        for _ in range(3):
            yield {"start": "second", **measure_start(rows, folder)}
        yield {"iterating": "shuffled", **run_fresh(_iterate, rows, folder, limit_seconds)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", choices=("memory", "cache", "manifest"))
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--limit-seconds", type=float, default=180.0, help="of reading all rows")
    args = parser.parse_args()
    print(json.dumps(describe_machine()))

    def measure() -> Iterator[dict[str, Any]]:
        if args.only in (None, "memory"):
            for window_bytes in (64 << 20, 256 << 20):
                yield measure_memory("sounds", window_bytes, num_items=1000)
                yield measure_memory("texts", window_bytes, num_items=600)
                yield measure_memory("Chinese texts", window_bytes, num_items=300)
        if args.only in (None, "cache"):
            yield measure_cache(1000, 100_000)
        if args.only in (None, "manifest"):
            yield from measure_manifest(args.rows, args.limit_seconds)

    for result in measure():
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
