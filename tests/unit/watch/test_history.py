"""A log as columns: figures as logged, times as they follow, nothing that breaks the page."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_tuner.training.reporting.metrics import DeviceRecord, EvalRecord, JsonlLog, StepRecord
from gemma_tuner.watch.history import COLUMNS, History, read_steps
from gemma_tuner.watch.tail import JsonlTail


def step_record(step, **changes):
    values = {
        "step": step,
        "loss": 2.0,
        "learning_rate": 1e-4,
        "grad_norm": 0.5,
        "tokens": 100 * step,
        "target_tokens": 20 * step,
        "tokens_per_second": 50.0,
        "target_tokens_per_second": 10.0,
        "data_wait_seconds": 0.5,
        "memory_bytes": 10**9,
        "skipped_steps": 0,
        "epoch": step / 10,
        "device": DeviceRecord(driver_bytes=2 * 10**9, peak_bytes=3 * 10**9, num_shapes=1),
    }
    return StepRecord(**(values | changes))


def read(path):
    history = History()
    for record in (record for gain in JsonlTail(path).read() for record in gain.records):
        history.add(record)
    return history


def test_columns_are_what_was_logged(tmp_path):
    with JsonlLog(tmp_path / "log.jsonl") as log:
        log.event(0, "run", max_steps=40, config={"learning_rate": 1e-4})
        log.evaluation(EvalRecord(0, 3.0, 20.1, 99, 7))
        log.event(
            1, "plan", parts={"weights": 5}, peak_bytes=7, budget_bytes=9, summary="in words"
        )
        log.step(step_record(10, loss=2.5))
        log.step(step_record(20, loss=1.5))
        log.event(20, "swap", message="it swaps")
    history = read(tmp_path / "log.jsonl")
    assert (history.max_steps, history.config) == (40, {"learning_rate": 1e-4})
    assert history.steps.tolist() == [10, 20]
    assert history.column("loss").tolist() == [2.5, 1.5]
    assert history.column("peak_bytes").tolist() == [3e9, 3e9]
    assert history.held_out == [(0, 3.0)]
    assert (history.plan.parts, history.plan.peak_bytes) == ({"weights": 5}, 7)
    assert [(event.name, event.is_warning) for event in history.events] == [("swap", True)]
    assert history.step == 20


def test_times_follow_from_tokens_and_speeds(tmp_path):
    with JsonlLog(tmp_path / "log.jsonl") as log:
        log.step(step_record(1))
        log.step(step_record(11, tokens_per_second=100.0, data_wait_seconds=4.0))
        log.step(step_record(21, data_wait_seconds=99.0))
    history = read(tmp_path / "log.jsonl")
    assert history.interval_seconds().tolist() == [2.0, 10.0, 20.0]
    assert history.interval_seconds()[-2:].tolist() == [10.0, 20.0]
    assert history.interval_steps()[-1:].tolist() == [10]
    assert history.interval_steps().tolist() == [1, 10, 10]
    assert history.wait_shares().tolist() == [0.25, 0.4, 1.0]


def test_what_is_not_finite_is_a_gap_and_a_warning(tmp_path):
    with JsonlLog(tmp_path / "log.jsonl") as log:
        log.step(step_record(1, loss=math.nan, grad_norm=math.inf))
    history = read(tmp_path / "log.jsonl")
    assert np.isnan(history.column("loss")).all()
    (event,) = history.events
    assert event.is_warning
    assert event.message == "loss is nan, grad norm is inf"


@pytest.mark.parametrize(
    ("names", "phase"),
    [
        (["run", "evaluating", "training"], "training"),
        (["training", "sampling"], "sampling"),
        (["training", "stopped", "saved"], "stopped"),
        (["training", "saved", "finished"], "finished"),
        (["stopped", "saved", "run", "training"], "training"),
    ],
)
def test_the_newest_phase_counts_and_saving_is_none(names, phase):
    history = History()
    for name in names:
        history.add({"kind": "event", "step": 3, "name": name})
    assert history.phase == phase


def test_a_step_after_an_evaluation_is_training():
    history = History()
    history.add({"kind": "event", "step": 3, "name": "evaluating"})
    history.add({"kind": "step", "step": 4})
    assert history.phase == "training"


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.just(10**400)
    | st.floats()
    | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)
FIELDS = (*COLUMNS, "step", "device", "counts", "nonfinite", "config", "max_steps", "parts")


@given(
    st.lists(
        st.builds(
            lambda kind, name, fields: {"kind": kind, "name": name} | fields,
            st.sampled_from(["step", "eval", "event", "new"]),
            st.sampled_from(["run", "plan", "training", "other"]),
            st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=4),
        ),
        max_size=6,
    )
)
def test_no_line_breaks_it(records):
    history = History()
    for record in records:
        history.add(record)
    num_steps = sum(record["kind"] == "step" for record in records)
    assert len(history) == num_steps == len(history.wait_shares())
    assert all(len(history.column(name)) == num_steps for name in COLUMNS)


def read_slowly(lines):
    history = History()
    for line in lines:
        history.add(json.loads(line))
    return history


def make_log(changes=()):
    """Steps as they are logged, with an event and held-out losses among them."""
    lines = []
    for step in range(1, 301):
        record = {"kind": "step", "step": step, "loss": 3.0 / step, "tokens": 10 * step}
        record |= {"tokens_per_second": None if step % 7 == 0 else 5.0, "counts": {"cut": step}}
        record |= {"device": {"peak_bytes": step * 2**20} if step % 2 else None}
        record |= dict(changes).get(step, {})
        lines.append(json.dumps(record).encode())
        if step % 50 == 0:
            lines.append(b'{"kind": "event", "step": %d, "name": "saved"}' % step)
            lines.append(b'{"kind": "eval", "step": %d, "loss": 2.5}' % step)
    return lines


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {9: {"nonfinite": {"loss": "NaN"}, "loss": None}},
        {9: {"loss": "three"}},
        {9: {"step": -1}},
        {9: {"step": 2.5}},
        {9: {"memory_bytes": 10**400}},
        {9: {"device": ["a"]}},
        {9: {"kind": "steps"}},
        {300: {"loss": 1.0}},
    ],
    ids=str,
)
def test_many_steps_are_read_at_once_as_one_by_one(changes):
    lines = make_log(changes)
    table, others = read_steps(lines)
    quick = History()
    if table is not None:
        assert len(others) < 20
        quick.add_steps(table)
    for line in others:
        quick.add(json.loads(line))
    slow = read_slowly(lines)
    assert (table is None) == (9 in changes and not {"kind", "memory_bytes"} & changes[9].keys())
    np.testing.assert_array_equal(quick.steps, slow.steps)
    for name in COLUMNS:
        np.testing.assert_array_equal(quick.column(name), slow.column(name), name)
    for name in ("held_out", "events", "phase", "last", "step"):
        assert getattr(quick, name) == getattr(slow, name), name
