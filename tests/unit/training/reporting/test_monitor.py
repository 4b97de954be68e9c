"""The monitor says what a run does to the machine, once, and gives pools back seldom."""

import gc
import json
import math
import mmap

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gemma_tuner.batch import IGNORED, Batch
from gemma_tuner.errors import MemoryPlanError
from gemma_tuner.training.reporting.metrics import StepRecord
from gemma_tuner.training.reporting.monitor import (
    MANY_SHAPES,
    GrowthWatch,
    PoolPolicy,
    RunMonitor,
    SpeedWatch,
    SwapWatch,
)
from gemma_tuner.training.reporting.reports import Reports
from tests.runs import build_trainer

CPU = torch.device("cpu")
GIB = 2**30


def batch_of(length, targets=8, rows=1):
    ids = torch.zeros(rows, length, dtype=torch.int64)
    return Batch(
        keys=("example",) * rows,
        inputs={"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        labels=torch.full_like(ids, IGNORED),
        target_rows=torch.zeros(rows, targets, dtype=torch.int64),
        target_slots=torch.zeros(targets, dtype=torch.int64),
        target_ids=torch.zeros(targets, dtype=torch.int64),
        num_target_tokens=targets,
        num_tokens=rows * length,
    )


# --- pools --------------------------------------------------------------------------------------


def run_pools(occasions, *, used=2 * GIB, driver=8 * GIB, budget=10 * GIB):
    """Ask at each step; the steps at which pools were given back."""
    policy = PoolPolicy(budget)
    return [
        step
        for step, occasion in enumerate(occasions)
        if policy.is_due(occasion, step, used, driver)
    ]


def test_pools_are_given_back_when_the_length_changes_and_seldom():
    assert run_pools(["length"] * 100) == [0, 20, 40, 60, 80]


def test_pools_that_hold_little_are_kept():
    assert run_pools(["length", "evaluation"] * 50, driver=4 * GIB) == []
    assert run_pools(["limit"] * 100, driver=9 * GIB) == []
    assert run_pools(["limit"] * 100, used=int(9.4 * GIB), driver=int(9.6 * GIB)) == []


def test_near_the_limit_pools_are_given_back_at_once_but_not_every_step():
    steps = run_pools(["limit"] * 200, driver=int(9.5 * GIB))
    assert steps[:8] == [0, 1, 3, 7, 15, 31, 51, 71]
    assert steps[-1] - steps[-2] == PoolPolicy.STEPS_BETWEEN


def test_a_limit_that_is_reached_rarely_is_answered_at_once_each_time():
    policy = PoolPolicy(10 * GIB)
    for step in (0, 100, 200, 300):
        assert policy.is_due("limit", step, 2 * GIB, int(9.5 * GIB))


class PoolingAllocator:
    """Keeps what a step has used until it is told to give it back, as Metal's allocator does.

    Blocks of one length serve no other: the worst there can be.
    """

    def __init__(self):
        self.pools = {}

    def step(self, length):
        self.pools[length] = 2**20 * length

    @property
    def driver_bytes(self):
        return 2 * GIB + sum(self.pools.values())


@given(st.lists(st.sampled_from([256, 384, 512, 768, 1024, 1536, 2048]), max_size=200))
def test_pools_stay_bounded_over_many_lengths_at_few_waits(lengths):
    """Without the monitor they would grow to 8.3 GiB; the budget is 6 GiB."""
    allocator, policy, times = PoolingAllocator(), PoolPolicy(6 * GIB), 0
    for step, length in enumerate(lengths):
        if step > 0 and length != lengths[step - 1]:
            times += policy.is_due("length", step, 2 * GIB, allocator.driver_bytes)
        allocator.step(length)
        assert allocator.driver_bytes <= 0.9 * 6 * GIB + 2 * GIB
        if policy.is_due("limit", step, 2 * GIB, allocator.driver_bytes):
            allocator.pools.clear()
            times += 1
    assert times <= 1 + len(lengths) / 2


# --- swap, speed, growth ------------------------------------------------------------------------


def test_swap_is_told_at_two_and_then_each_gibibyte():
    watch = SwapWatch(3 * GIB)
    told = [gib for gib in range(3, 12) if watch.observe(gib * GIB)]
    assert told == [5, 6, 7, 8, 9, 10, 11]
    watch = SwapWatch(0)
    assert [watch.observe(int(x * GIB)) is not None for x in (1.9, 2.0, 2.9, 2.5, 3.1)] == [
        False,
        True,
        False,
        False,
        True,
    ]


def test_swap_says_what_helps():
    message = SwapWatch(GIB).observe(4 * GIB) or ""
    assert message.startswith("the machine's swap has grown by 3.0 GiB")
    assert "batch_size" in message
    assert "close other programs" in message


@given(st.lists(st.integers(0, 2 * GIB - 1)))
def test_swap_below_two_gibibytes_is_nobodys_business(readings):
    watch = SwapWatch(5 * GIB)
    assert not any(watch.observe(5 * GIB + reading) for reading in readings)


def run_speeds(speeds, seconds=30.0, waits=0.0):
    """The intervals after which something was said, and what."""
    watch = SpeedWatch()
    said = {}
    for index, speed in enumerate(speeds):
        if message := watch.observe(seconds * index, speed, waits):
            said[index] = message
    return said


def test_a_fall_is_told_once_and_so_is_its_end():
    said = run_speeds([1000] * 10 + [600] * 20 + [950] * 10)
    assert list(said) == [12, 32]  # three of five intervals say so
    assert said[12].startswith("slower for the last 150 s: 600 tokens/s against 1000 at best")
    assert "throttled" in said[12]
    assert said[32] == "back to 950 tokens/s (best so far 1000)"


def test_waiting_for_data_is_named_as_the_cause():
    (message,) = run_speeds([1000] * 10 + [400] * 10, waits=18.0).values()
    assert "60% of the time it waits for data" in message


def test_short_intervals_are_gathered_to_a_minute():
    assert run_speeds([1000] * 50 + [100] * 50, seconds=0.1) == {}
    said = run_speeds([1000] * 100 + [100] * 100, seconds=1.0)
    assert len(said) == 1
    assert 125 < min(said) < 135


def test_a_slow_first_interval_and_single_ones_are_nothing():
    assert run_speeds([10, *[1000, 950, 300, 1010, 980, 1020] * 10]) == {}


def test_a_speed_at_the_edge_is_not_told_again_and_again():
    assert len(run_speeds([1000] * 10 + [705, 690] * 50)) <= 1


@given(st.lists(st.floats(701, 1000), max_size=60))
def test_speeds_within_a_third_are_not_told(speeds):
    assert run_speeds(speeds) == {}


def run_growth(readings):
    watch = GrowthWatch()
    return {i: message for i, x in enumerate(readings) if (message := watch.observe(int(x)))}


def test_growth_is_told_and_told_again_when_it_goes_on():
    said = run_growth([4 * GIB + 0.02 * GIB * i for i in range(100)])
    assert 2 <= len(said) <= 5
    assert min(said) > GrowthWatch.WARM_UP + 2 * GrowthWatch.WINDOW
    assert all("has grown from 4." in message for message in said.values())


def test_what_grows_at_first_and_levels_off_is_told_never_or_once():
    assert run_growth([GIB, 2 * GIB, *[3 * GIB] * 100]) == {}
    assert len(run_growth([*[3 * GIB] * 20, *[5 * GIB] * 100])) == 1


@given(st.lists(st.floats(1.0, 1.09), max_size=100))
def test_memory_that_stays_within_a_tenth_is_not_told(readings):
    assert run_growth([10 * GIB * x for x in readings]) == {}


# --- the whole ----------------------------------------------------------------------------------


@pytest.fixture
def reports(tmp_path):
    with Reports(tmp_path, total_steps=9, step=0, show=False, is_main_process=True) as reports:
        yield reports


def read_events(folder):
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "event"]


def note(monitor, batch):
    monitor.note_shape(batch.labels.shape[1], batch.shape)


def record_of(step, speed=1000.0):
    return StepRecord(step, 2.0, 1e-4, 0.5, 100, 10, speed, 10.0, 0.0, GIB, 0, 0.1)


def test_shapes_are_counted_as_the_device_sees_them():
    monitor = RunMonitor(CPU, 8 * GIB)
    for length in (32, 48, 32, 64, 48):
        note(monitor, batch_of(length))
    assert len(monitor.shapes) == 3
    note(monitor, batch_of(32, targets=16))
    note(monitor, batch_of(32, rows=2))
    assert len(monitor.shapes) == monitor.read_memory().num_shapes == 5


def test_media_count_towards_the_shape():
    batch = batch_of(32)
    with_media = {**batch.inputs, "pixel_values": torch.zeros(1, 10, 12)}
    other = Batch(
        **{name: getattr(batch, name) for name in Batch.__slots__} | {"inputs": with_media}
    )
    assert batch.shape != other.shape


def test_shapes_warn_only_where_they_cost_something(tmp_path, reports):
    monitor = RunMonitor(CPU, 8 * GIB)
    for length in range(4 * MANY_SHAPES):
        note(monitor, batch_of(8 + length))
        monitor.after_step(length + 1, reports)
    assert read_events(tmp_path) == []


def test_the_memory_line_is_what_the_process_holds(reports):
    monitor = RunMonitor(CPU, 8 * GIB)
    # Fresh pages: a large process may have freed memory to give to a tensor.
    held = mmap.mmap(-1, 64 * 2**20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    held.write(b"1" * len(held))
    monitor.after_step(1, reports)
    held.close()
    line = monitor.read_memory()
    assert line.peak_bytes >= line.driver_bytes + 60 * 2**20
    assert monitor.read_memory().peak_bytes < line.peak_bytes
    assert line.num_emptied == {}


def test_a_quiet_run_says_nothing(tmp_path, reports):
    monitor = RunMonitor(CPU, 8 * GIB)
    for step in range(1, 61):
        note(monitor, batch_of(32))
        monitor.after_step(step, reports)
        monitor.after_record(record_of(step), reports)
    monitor.after_evaluation()
    assert read_events(tmp_path) == []


def test_memory_that_is_never_freed_is_reported(tmp_path, reports, monkeypatch):
    monkeypatch.setattr(GrowthWatch, "MIN_GROWTH", 0.0)
    monkeypatch.setattr(GrowthWatch, "MIN_GROWTH_BYTES", 48 * 2**20)
    monitor = RunMonitor(CPU, 8 * GIB)
    held = []
    for step in range(1, 41):
        if step > 15:
            # Fresh pages: a large process may have freed memory to give to a tensor. 4 MiB a
            # step: 12 steps to the limit, and 10 to be sure.
            held.append(mmap.mmap(-1, 4 * 2**20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
            held[-1].write(bytes(4 * 2**20))
        monitor.after_record(record_of(step), reports)
    (event,) = read_events(tmp_path)
    assert event["name"] == "memory_growth"
    assert "memory held by the process (host memory) has grown" in event["message"]
    assert "fit(resume=True)" in event["message"]


# --- evaluation ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    yield build_trainer(tmp_path_factory.mktemp("held_out"), batch_size=4)
    gc.unfreeze()


def evaluate_where(trainer, monkeypatch, holds):
    """Evaluate on a device that holds so many examples; the record, and the sizes tried."""
    sizes = []

    def small_device_loss(batch):
        sizes.append(len(batch))
        loss = loss_sum_of(batch)
        if len(batch) > holds:
            raise RuntimeError("MPS backend out of memory (MPS allocated: 9.00 GiB, ...)")
        return loss

    gc.freeze()  # what is freed after each failure is looked for among younger objects
    loss_sum_of = trainer.stepper.loss_sum
    with monkeypatch.context() as patch:
        patch.setattr(trainer.stepper, "loss_sum", small_device_loss)
        return trainer.evaluate(), sizes


def test_evaluation_goes_on_with_fewer_examples_and_the_same_result(trainer, monkeypatch):
    whole, sizes = evaluate_where(trainer, monkeypatch, 4)
    assert sizes == [4, 4, 2]
    assert "out_of_memory" not in whole.counts
    for holds, tried, halvings in (
        (3, [4, 2, 2, 2, 2, 2], 1),
        (1, [4, 2, *[1] * 10], 2),
    ):
        cut, sizes = evaluate_where(trainer, monkeypatch, holds)
        assert sizes == tried
        assert cut.counts == {"out_of_memory": halvings}
        assert math.isclose(cut.loss, whole.loss, rel_tol=1e-5)
        assert (cut.target_tokens, cut.examples) == (whole.target_tokens, whole.examples)


def test_evaluation_of_one_example_that_does_not_fit_says_what_helps(trainer, monkeypatch):
    with pytest.raises(MemoryPlanError, match=r"one example does not fit.*max_tokens"):
        evaluate_where(trainer, monkeypatch, 0)
