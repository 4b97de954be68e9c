"""Every stop resumes exactly: what is read before and after it is what an unstopped run reads.

For every number of examples ``k`` in two epochs the state after ``k`` restores a stream that is
made anew of its arguments. It must read on with the right examples, and come to the very state
that the unstopped run had there; as the state decides what follows, the rest is right as well.
From some of the stops the whole rest is read all the same.
"""

import itertools
import json
import multiprocessing
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from gemma_tuner.streaming.stream import ExampleStream
from gemma_tuner.testing.cloud.gcs.faults import Fault, FlipBit, Refuse, Reset, Stall, Truncate
from gemma_tuner.testing.cloud.gcs.server import GcsServer
from tests.e2e.stopping import (
    BROKEN,
    DELETED,
    NEVER_THERE,
    NO_ANSWER,
    NUM_ROWS,
    OVERWRITTEN,
    Case,
    change_bucket,
    describe,
    fill_bucket,
    open_stream,
    read_on,
    read_on_in_new_process,
    record,
    write_data,
)
from tests.media_cache import check_cache

ROOT = Path(__file__).resolve().parents[2]
NUM_EPOCHS = 2
FAULTS = [
    Fault(Refuse(503), probability=0.04),
    Fault(Refuse(503, retry_after_seconds=0), probability=0.01),
    Fault(Stall(1.0), probability=0.01),
    Fault(Stall(1.0, after_bytes=20), probability=0.01),
    Fault(Truncate(), probability=0.02),
    Fault(Reset(), probability=0.01),
    # Never two in a row: what is damaged twice in a row is taken for damaged.
    Fault(FlipBit(), nth=tuple(range(5, 3000, 7)), probability=0.2),
]
IMPATIENT = {"attempt_timeout_seconds": 0.4, "total_timeout_seconds": 60.0}
EVICTING = {"cache_bytes": 1500}  # about 15 of the pictures


class World:
    """A folder and a bucket with data, of which some go bad once their manifest is written."""

    def __init__(self, folder: Path, server: GcsServer) -> None:
        self.folder = folder
        self.server = server
        self.client = server.client()
        write_data(folder)
        fill_bucket(server)

    def open(self, case: Case) -> ExampleStream:
        return open_stream(case, self.folder, self.client)

    def begin(self, case: Case) -> tuple[list[str], list[str]]:
        """Write the manifest, let time do its work, and read without a stop."""
        self.open(case)
        change_bucket(self.server)
        if "attempt_timeout_seconds" in case.fetch:
            for fault in FAULTS:
                self.server.add_fault(fault)
        examples, states = record(self.open(case), NUM_EPOCHS)
        assert len(examples) >= 200
        return examples, states


@pytest.fixture(name="world")
def _world(tmp_path: Path) -> Iterator[World]:
    with GcsServer(seed=3) as server:
        yield World(tmp_path, server)


def check_every_stop(world: World, case: Case, *, ahead: int, whole_every: int) -> None:
    examples, states = world.begin(case)
    for k, state in enumerate(states):
        rest = len(examples) - k
        count = rest if k % whole_every == 0 else min(rest, ahead)
        continued, reached = read_on(world.open(case), state, count)
        assert examples[:k] + continued == examples[: k + count], f"stopped at {k}"
        if count:
            assert reached == states[k + count], f"stopped at {k}"
    if "cache_bytes" in case.fetch:
        check = check_cache(world.folder / "cache" / "media")
        assert check.entries < 20
        assert check.damaged == 0
    if "attempt_timeout_seconds" in case.fetch:
        struck = Counter(type(request.effect).__name__ for request in world.server.requests)
        assert min(struck[name] for name in ("Refuse", "Stall", "Truncate", "FlipBit")) > 3


ALL = 1  # the whole rest, from every stop


@pytest.mark.parametrize(
    ("case", "ahead", "whole_every"),
    [
        (Case("text", {"window_examples": 1, "io_threads": 1}), 0, ALL),
        (Case("text", {"window_examples": 256}, {"seed": 12345}), 0, ALL),
        (Case("files", {}, {"locality": "shard", "seed": 1}), 0, ALL),
        (Case("pictures", {}, {"seed": 1}), 6, 16),
        (Case("gcs"), 6, 64),
        (Case("gcs", {"window_examples": 1, "io_threads": 1}, {"seed": 1}), 3, 64),
    ],
    ids=str,
)
def test_every_stop_resumes_exactly(world, case, ahead, whole_every):
    check_every_stop(world, case, ahead=ahead, whole_every=whole_every)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "ahead", "whole_every"),
    [
        (Case("gcs", {"window_examples": 256}, {"seed": 12345}), 6, 8),
        (Case("gcs", {"window_examples": 256, "io_threads": 1}), 6, 16),
        (Case("gcs", {"window_examples": 8, "io_threads": 1}, {"seed": 12345}), 6, 16),
        (Case("gcs", {"window_examples": 1}, {"shuffle": False}), 6, 16),
        (Case("gcs", {"window_bytes": 200, "decode_threads": 3}), 6, 16),
        (Case("gcs", EVICTING), 2, 103),
        (Case("mix", {"window_examples": 4}), 2, 320),
        (Case("mix", {"window_examples": 256}, {"seed": 12345}), 6, 64),
        (Case("mix", EVICTING, {"seed": 1}), 2, 320),
        (Case("gcs", {"window_examples": 4, "cache_bytes": 0, **IMPATIENT}), 2, 103),
        (Case("gcs", {"window_examples": 16, **EVICTING, **IMPATIENT}, {"seed": 1}), 2, 103),
    ],
    ids=str,
)
def test_every_stop_resumes_exactly_however_it_is_read(world, case, ahead, whole_every):
    check_every_stop(world, case, ahead=ahead, whole_every=whole_every)


@pytest.mark.slow
def test_every_stop_resumes_exactly_in_a_new_process(world):
    """Each process begins with an interpreter of its own, and makes streams of arguments alone."""
    case = Case("gcs")
    examples, states = world.begin(case)
    stops = [(k, state, len(examples) - k) for k, state in enumerate(states)]
    tasks = [stops[start::14] for start in range(14)]
    how = (case, world.folder, world.server.endpoint)
    with multiprocessing.get_context("spawn").Pool(2, maxtasksperchild=2) as pool:
        results = [pool.apply_async(read_on_in_new_process, (*how, task)) for task in tasks]
        outcomes = [outcome for result in results for outcome in result.get(timeout=120)]
    assert sorted(stop for _, stop, _, _ in outcomes) == list(range(len(examples) + 1))
    assert len({process for process, _, _, _ in outcomes}) >= 7
    for _, k, continued, reached in outcomes:
        assert examples[:k] + continued == examples, f"stopped at {k}"
        if k < len(examples):
            assert reached == states[-1]


def test_bad_rows_cost_one_row_each_and_no_other_is_lost(world):
    """What the other tests compare with is itself right."""
    examples, _ = world.begin(Case("gcs"))
    gone = {*BROKEN, OVERWRITTEN, DELETED, NEVER_THERE, NO_ANSWER}
    good = sorted(f"g{number}" for number in range(NUM_ROWS) if number not in gone)
    keys = [example.split()[0] for example in examples]
    assert sorted(keys[: len(good)]) == sorted(keys[len(good) :]) == good
    assert keys[: len(good)] != keys[len(good) :]
    assert len(set(examples)) == len(good)  # no two have the same pixels, or answers
    stages = {one.key: one.stage for one in world.open(Case("gcs")).inspect_quarantine()}
    assert stages == {
        **{f"g{number}": "decode" for number in BROKEN},
        **{f"g{number}": "fetch" for number in (OVERWRITTEN, DELETED)},
        **{f"g{number}": "row" for number in (NEVER_THERE, NO_ANSWER)},
    }


# --- ranks and workers -----------------------------------------------------------------------


def read_all_slots(stream: ExampleStream) -> Iterator[str | None]:
    while True:
        for example in stream.read_slots():
            yield None if example is None else describe(example)


def take_slots(stream: ExampleStream, index: int, count: int, num_slots: int) -> dict[int, object]:
    """What one of several ranks reads of the next slots; by their places after this one."""
    first = stream.state_dict()
    place = first["epoch"] * len(stream) + first["position"]
    mine = [slot for slot in range(place, place + num_slots) if slot % count == index]
    slots = read_all_slots(stream.shard(index, count))
    return dict(zip(mine, itertools.islice(slots, len(mine)), strict=True))


@pytest.mark.parametrize("kind", ["pictures", "gcs", "mix"])
def test_other_numbers_of_ranks_read_the_same_slots_in_the_same_order(world, kind):
    case = Case(kind, {"window_examples": 16})
    world.begin(case)
    expected = list(itertools.islice(read_all_slots(world.open(case)), 230))
    assert None in expected
    # Slots, by 1, 2, 4 and again 1 ranks; 7 and 30 are shared unevenly, 110 passes an epoch's end.
    for sizes in ((7, 26, 52, 60), (1, 30, 110, 5), (55, 54, 4, 100), (109, 2, 4, 3)):
        state, done = json.dumps(world.open(case).state_dict()), 0
        for num_ranks, num_slots in zip((1, 2, 4, 1), sizes, strict=True):
            read: dict[int, object] = {}
            for rank in range(num_ranks):
                stream = world.open(case)  # of a process of its own
                stream.load_state_dict(json.loads(state))
                read |= take_slots(stream, rank, num_ranks, num_slots)
            assert sorted(read) == list(range(done, done + num_slots))
            assert [read[slot] for slot in sorted(read)] == expected[done : done + num_slots]
            whole = world.open(case)
            whole.load_state_dict(json.loads(state))
            whole.follow(whole.shard(0, num_ranks), num_slots)
            state, done = json.dumps(whole.state_dict()), done + num_slots
        stream = world.open(case)
        stream.load_state_dict(json.loads(state))
        rest = list(itertools.islice(read_all_slots(stream), len(expected) - done))
        assert rest == expected[done:]
        assert Counter(rest) == Counter(expected[done:])


# --- beside it -------------------------------------------------------------------------------

NO_TORCH = """
import sys
import gemma_tuner.streaming.opening, gemma_tuner.streaming.mixing
assert "torch" not in sys.modules, "imported"
stream = gemma_tuner.streaming.opening.stream_local(sys.argv[1], cache_dir=sys.argv[2])
assert len(list(stream)) == len(stream) > 0
stream.load_state_dict(stream.state_dict())
assert not {"torch", "transformers", "google.cloud.storage"} & sys.modules.keys(), "used"
"""


def test_streaming_does_without_torch(tmp_path):
    write_data(tmp_path)
    subprocess.run(
        [sys.executable, "-c", NO_TORCH, tmp_path / "text.jsonl", tmp_path / "cache"],
        check=True,
        cwd=ROOT,
        timeout=60,
    )
