"""Two processes train as one does that accumulates twice as much, and leave a run together."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from gemma_tuner.testing.mps.pretend_device import why_not_pretend
from tests.runs import read_trace, run
from tests.two_processes import (
    ADAPTER,
    DROPPING,
    FAULTS,
    SETTINGS,
    check,
    find_port,
    launch,
    list_checkpoints,
    place_of,
    run_rank,
)

pytestmark = pytest.mark.slow

# A smooth step: Adam's default turns rounding into whole steps.
SMOOTH = {"epsilon": 1.0, "learning_rate": 0.05}


def assert_same_runs(folder, reference):
    """Equal to rounding: the sums of two processes round otherwise than one sum."""
    ours, theirs = load_file(folder / ADAPTER), load_file(reference / ADAPTER)
    assert ours.keys() == theirs.keys()
    begin = torch.cat([tensor.flatten() for name, tensor in sorted(ours.items())])
    end = torch.cat([tensor.flatten() for name, tensor in sorted(theirs.items())])
    assert float((begin - end).norm()) <= 1e-5 * float(end.norm())
    for kind in ("step", "eval"):
        traces = read_trace(folder, kind), read_trace(reference, kind)
        assert len(traces[0]) == len(traces[1]) > 0
        for here, there in zip(*traces, strict=True):
            assert here.keys() == there.keys()
            for name, value in there.items():
                is_number = isinstance(value, float)
                assert here[name] == (pytest.approx(value, rel=1e-4) if is_number else value), name
    assert list_checkpoints(folder) == list_checkpoints(reference)


@pytest.mark.parametrize(
    "length",
    [
        {"max_steps": 5},
        {"max_steps": None, "epochs": 1, "rows": 9},  # the last step has one example
        {"max_steps": 2, "rows": 1},  # as many held-out examples
    ],
)
def test_two_processes_equal_one_with_twice_the_accumulation(tmp_path, length):
    options = SETTINGS | SMOOTH | length
    run(tmp_path / "one", **options | {"gradient_accumulation": 2})
    assert launch(tmp_path / "two", run_rank, **options) == [0, 0]
    assert_same_runs(tmp_path / "two", tmp_path / "one")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of two processes that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    assert launch(folder, run_rank, **DROPPING) == [0, 0]
    return folder


@pytest.mark.parametrize("stopped_rank", [0, 1])
def test_a_signal_to_one_process_stops_both_and_both_resume(tmp_path, whole, stopped_rank):
    stopping = {"stopped_rank": stopped_rank, "stop_after": 2}
    assert launch(tmp_path, run_rank, **stopping, **DROPPING) == [0, 0]
    assert list_checkpoints(tmp_path) == ["step-00000002"]
    assert launch(tmp_path, run_rank, resume=True, **DROPPING) == [0, 0]
    assert (tmp_path / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes()
    assert read_trace(tmp_path) == read_trace(whole)
    assert read_trace(tmp_path, "eval") == read_trace(whole, "eval")


def test_a_signal_to_one_process_where_both_stop_early(tmp_path):
    stopping = {"early_stopping_patience": 1, "learning_rate": 1e-30, "max_steps": 9}
    options = SETTINGS | stopping | {"stopped_rank": 1, "stop_after": 2}
    assert launch(tmp_path, run_rank, **options) == [0, 0]
    assert list_checkpoints(tmp_path) == ["step-00000002"]


@pytest.mark.parametrize("bad_rank", [0, 1])
@pytest.mark.parametrize("fault", FAULTS)
def test_what_ends_one_process_ends_both_with_the_steps_before_and_both_resume(
    tmp_path, whole, fault, bad_rank
):
    check(tmp_path, whole, fault, bad_rank, **DROPPING)


# The device comes before everything that could ask torch for MPS, as many imports do.
ON_METAL = """
import sys
from gemma_tuner.testing.mps.pretend_device import pretend_mps
pretend_mps(sys.argv[1])
import torch
from gemma_tuner.training.processes import Processes
processes = Processes(torch.device("mps"))
weight = torch.nn.Parameter(torch.zeros(3, device="mps"))
weight.grad = torch.full((3,), float(processes.index + 1), device="mps")
loss = torch.tensor(0.5, device="mps")
processes.sum_gradients([weight], loss)
print(processes.index, processes.count, weight.grad.device.type, weight.grad.tolist(), loss.item())
"""


def test_two_processes_on_metal_know_of_each_other_and_add_up(request):
    if reason := why_not_pretend():
        pytest.skip(f"two processes on MPS not tested: {reason}")
    cache, port = request.config.cache.mkdir("pretend_mps"), find_port()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ON_METAL, str(cache)],
            env=os.environ | place_of(rank, port) | {"CUDA_VISIBLE_DEVICES": ""},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert said == [f"{rank} 2 mps [3.0, 3.0, 3.0] 1.0\n" for rank in range(2)]
