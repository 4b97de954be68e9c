"""A run over BigQuery and Cloud Storage that nothing goes well for, killed three times.

Every good example arrives once, counted from saved states; the bad ones, and no others, are in
the quarantine with what is wrong with them; and what lies on disk is whole.
"""

import io
import json
import queue
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow
import pytest

from gemma_tuner.testing.cloud.bigquery.server import BigQueryFault, BigQueryServer
from gemma_tuner.testing.cloud.gcs.faults import Fault, FlipBit, Refuse, Stall, Truncate
from gemma_tuner.testing.cloud.gcs.server import GcsServer
from tests.e2e.killed_run import TABLE, open_stream
from tests.media_cache import check_cache

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 60.0
ROWS_PER_MESSAGE = 10
FAULTS = (
    Fault(Refuse(503), probability=0.04),
    Fault(Refuse(503, retry_after_seconds=1), probability=0.01),
    Fault(Stall(3.0), probability=0.01),
    Fault(Stall(3.0, after_bytes=300), probability=0.01),
    Fault(Truncate(), probability=0.01),
    Fault(FlipBit(), probability=0.01),
)
BROKEN = {3: "decode", 31: "decode", 32: "decode", 77: "decode", 90: "decode"}
OVERWRITTEN, DELETED = (50, 51), (60,)
NEVER_THERE, NO_ANSWER = 70, 71
WRONG = {
    **dict.fromkeys(BROKEN, ("decode", "damaged|known format")),
    **dict.fromkeys(OVERWRITTEN, ("fetch", "was overwritten after it was found")),
    **dict.fromkeys(DELETED, ("fetch", "was deleted after it was found")),
    NEVER_THERE: ("row", "does not exist"),
    NO_ANSWER: ("row", "empty answer"),
}


def draw_pixels(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 255, (24, 24, 3), dtype=np.uint8)


def draw_picture(number: int) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(draw_pixels(number)).save(file, "PNG")
    return file.getvalue()


def name(number: int) -> str:
    return f"pictures/{number:04}.png"


class Cloud:
    """Both servers with their data, and the faults of a bad day."""

    def __init__(self, gcs: GcsServer, tables: BigQueryServer, num_rows: int) -> None:
        self.gcs = gcs
        self.tables = tables
        self.endpoints = {
            "gcs": gcs.endpoint,
            "bigquery": tables.endpoint,
            "read": tables.read_endpoint,
        }
        for number in range(num_rows):
            content = draw_picture(number)
            if number != NEVER_THERE:
                gcs.put("media", name(number), content[:400] if number in BROKEN else content)
        numbers = range(num_rows)
        tables.put_table(
            TABLE,
            pyarrow.table(
                {
                    "id": [f"row{number}" for number in numbers],
                    "prompt": ["What is it?"] * num_rows,
                    "response": ["" if n == NO_ANSWER else f"number {n}" for n in numbers],
                    "image": [f"gs://media/{name(number)}" for number in numbers],
                    "unused": ["x" * 100] * num_rows,
                }
            ),
        )
        self.be_bad()

    def be_bad(self) -> None:
        self.gcs.clear_faults()
        for fault in FAULTS:
            self.gcs.add_fault(fault)

    def change(self) -> None:
        """What happens to the bucket after its objects were found."""
        for number in OVERWRITTEN:
            self.gcs.put("media", name(number), draw_picture(10_000 + number))
        for number in DELETED:
            self.gcs.delete("media", name(number))

    def list_reads(self) -> list:
        return [call for call in self.tables.calls if call.method == "ReadRows"]


class Life:
    """One life of the run, from its start to its end or its death."""

    def __init__(self, folder: Path, cloud: Cloud) -> None:
        arguments = json.dumps([str(folder), cloud.endpoints])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.killed_run", arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        self.examples: list[str] = []
        self._lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout or ():
            if line.startswith("row"):
                self.examples.append(line.strip())
            else:
                self._lines.put(line.strip())

    def wait_for(self, word: str) -> None:
        assert self._lines.get(timeout=SECONDS) == word

    def go_on(self) -> None:
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.end()

    def end(self) -> None:
        self.process.wait(SECONDS)
        self._reader.join()
        self.process.stdin.close()
        self.process.stdout.close()


def wait_until(is_so: Callable[[], object], *, every_seconds: float = 0.01) -> None:
    end = time.monotonic() + SECONDS
    while not is_so():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(every_seconds)


def stop_in_mid_write(process: subprocess.Popen, cache: Path) -> None:
    """Stop a process while a file of the cache is being written."""

    def is_writing() -> bool:
        if not any((cache / "incoming").glob("*.part")):
            return False
        process.send_signal(signal.SIGSTOP)
        wait_until(lambda: Path(f"/proc/{process.pid}/stat").read_text().split()[2] == "T")
        if any((cache / "incoming").glob("*.part")):
            return True
        process.send_signal(signal.SIGCONT)
        return False

    wait_until(is_writing, every_seconds=0.0)


@pytest.fixture(name="lives")
def _lives() -> Iterator[list[Life]]:
    lives: list[Life] = []
    yield lives
    for life in lives:
        if life.process.poll() is None:
            life.kill()


@pytest.mark.skipif(sys.platform != "linux", reason="stops a process by what /proc says")
@pytest.mark.parametrize(
    "num_rows", [120, pytest.param(450, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_nothing_is_lost_or_repeated_on_a_bad_day(tmp_path, lives, num_rows):
    with (
        GcsServer(seed=SEEDS[num_rows]) as gcs,
        BigQueryServer(rows_per_message=ROWS_PER_MESSAGE) as tables,
    ):
        cloud = Cloud(gcs, tables, num_rows)
        full, saved = live_through(tmp_path, lives, cloud, num_rows)
        struck = Counter(type(one.effect).__name__ for one in gcs.requests)
        assert all(struck[kind] for kind in ("Refuse", "Stall", "Truncate", "FlipBit"))
        assert len(full) == saved
        good = sorted(set(range(num_rows)) - WRONG.keys())
        crcs = {f"row{n} {zlib.crc32(draw_pixels(n).tobytes())}" for n in good}
        assert Counter(full) == Counter(crcs)
        check_quarantine(tmp_path, cloud)
        check_disk(tmp_path, num_rows)
        check_second_epoch(tmp_path, cloud, crcs)


def live_through(
    folder: Path, lives: list[Life], cloud: Cloud, num_rows: int
) -> tuple[list[str], int]:
    """Start, kill and start again; return what was read up to each saved state, joined."""
    cache = folder / "cache" / "media"
    full: list[str] = []
    unsaved: list[str] = []

    def begin() -> Life:
        lives.append(Life(folder, cloud))
        return lives[-1]

    def bury(life: Life) -> int:
        nonlocal unsaved
        # What was handed out after the state was saved is handed out again, the same.
        common = min(len(unsaved), len(life.examples))
        assert life.examples[:common] == unsaved[:common]
        path = folder / "state.json"
        num_saved = json.loads(path.read_text())["examples"] if path.exists() else 0
        unsaved = life.examples[num_saved - len(full) :]
        full.extend(life.examples[: num_saved - len(full)])
        return num_saved

    # Killed in mid-spool: one of four streams falls silent, the others come to their ends.
    cloud.tables.add_fault(BigQueryFault("ReadRows", None, after_rows=20, stall_seconds=SECONDS))
    life = begin()
    stream_messages = -(-num_rows // 4 // ROWS_PER_MESSAGE)
    entries = (3 * stream_messages + 20 // ROWS_PER_MESSAGE) * 20
    wait_until(lambda: measure(folder / "cache" / "parts", "*.index") >= entries)
    life.kill()
    assert not life.examples
    (session,) = {call.stream.rpartition("/streams/")[0] for call in cloud.list_reads()}

    # It goes on where it was; then the session ends, in the middle of its stream.
    before = len(cloud.list_reads())
    cloud.tables.add_fault(
        BigQueryFault("ReadRows", None, nth=None, after_rows=5, stall_seconds=0.5)
    )
    life = begin()
    wait_until(lambda: 20 in [call.offset for call in cloud.list_reads()[before:]])
    assert {call.stream.rpartition("/streams/")[0] for call in cloud.list_reads()} == {session}
    assert 0 not in [call.offset for call in cloud.list_reads()[before:]]
    cloud.tables.expire_sessions()
    life.wait_for("opened")
    assert {call.stream.rpartition("/streams/")[0] for call in cloud.list_reads()} > {session}
    num_calls = len(cloud.tables.calls)
    cloud.change()
    life.go_on()

    # Killed in mid-download.
    wait_until(lambda: len(life.examples) > num_rows // 4)
    silence = Stall(SECONDS, after_bytes=300)
    cloud.gcs.add_fault(Fault(silence))
    wait_until(lambda: any(one.effect == silence for one in cloud.gcs.requests))
    life.kill()
    bury(life)
    cloud.be_bad()

    # Killed in mid-write of the cache.
    life = begin()
    life.wait_for("opened")
    life.go_on()
    wait_until(lambda: len(life.examples) > num_rows // 4)
    stop_in_mid_write(life.process, cache)
    assert any((cache / "incoming").glob("*.part"))
    life.kill()
    bury(life)
    cloud.be_bad()

    life = begin()
    life.wait_for("opened")
    life.go_on()
    life.wait_for("done")
    life.end()
    assert life.process.returncode == 0
    saved = bury(life)
    assert not unsaved
    assert len(cloud.tables.calls) == num_calls, "BigQuery is read once"
    return full, saved


def measure(folder: Path, glob: str) -> int:
    return sum(path.stat().st_size for path in folder.rglob(glob) if path.exists())


def check_quarantine(folder: Path, cloud: Cloud) -> None:
    stream = open_stream(folder, cloud.endpoints)
    records = {record.key: record for record in stream.inspect_quarantine()}
    assert {key: record.stage for key, record in records.items()} == {
        f"row{number}": stage for number, (stage, _) in WRONG.items()
    }
    for number, (_, words) in WRONG.items():
        reason = records[f"row{number}"].reason
        assert any(word in reason for word in words.split("|")), reason
    assert stream.report().bad_rows == 2
    lines = next((folder / "cache" / "quarantine").iterdir()).read_text().strip().splitlines()
    assert len([line for line in lines if line]) == len(WRONG)


def check_disk(folder: Path, num_rows: int) -> None:
    """Everything is whole, and nothing is left of what was killed."""
    check = check_cache(folder / "cache" / "media")
    assert check.damaged == 0
    assert check.entries == num_rows - len(WRONG) + len(BROKEN)
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    rest = [one for one in names if not one.endswith(".media")]
    kinds = sorted(f"{Path(one).parent}/*{Path(one).suffix}" for one in rest)
    assert kinds == [
        "./*.json",
        "cache/locks/*.lock",
        "cache/manifests/*.arrow",
        "cache/media/*.lock",
        "cache/quarantine/*.jsonl",
    ], rest


def check_second_epoch(folder: Path, cloud: Cloud, expected: set[str]) -> None:
    """The next epoch comes from the cache, but for what cannot be read."""
    cloud.gcs.clear_requests()
    cloud.gcs.clear_faults()
    stream = open_stream(folder, cloud.endpoints)
    stream.load_state_dict(json.loads((folder / "state.json").read_text())["stream"])
    read = [f"{e.key} {zlib.crc32(next(e.media).source.tobytes())}" for e in stream]
    assert Counter(read) == Counter(expected)
    asked = {one.name for one in cloud.gcs.requests if one.operation == "read"}
    assert asked == {name(number) for number in (*OVERWRITTEN, *DELETED)}


SEEDS = {120: 8, 450: 8}
"""Seeds by which no object is damaged twice in a row: then it would be taken for damaged."""


@pytest.mark.parametrize("num_rows", SEEDS)
def test_no_good_object_is_damaged_twice(num_rows):
    """Whatever the order in which retries and hedges come."""
    from gemma_tuner.testing.cloud.gcs.faults import FaultScript

    script = FaultScript(SEEDS[num_rows])
    for fault in FAULTS:
        script.add(fault)
    for number in range(num_rows):
        effects = [script.choose("read", "media", name(number), None) for _ in range(8)]
        assert sum(isinstance(effect, FlipBit) for effect in effects) < 2, number
