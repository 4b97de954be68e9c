"""Two processes train as one does that accumulates twice as much."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gemma_tuner.errors import DataError, GemmaTunerError
from gemma_tuner.testing.mps.pretend_device import why_not_pretend
from tests.runs import build_trainer, read_trace, run

pytestmark = pytest.mark.slow

ADAPTER = "adapter/adapter_model.safetensors"
SETTINGS = {"batch_size": 2, "gradient_accumulation": 1, "eval_every_steps": 2}
DROPPING = SETTINGS | {"dropout": 0.1}
# A smooth step: Adam's default turns rounding into whole steps.
SMOOTH = {"epsilon": 1.0, "learning_rate": 0.1}


def place_of(rank, port):
    """What ``torchrun`` tells each process."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def find_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_as(rank, port, function, folder, options):
    os.environ |= place_of(rank, port)
    torch.set_num_threads(1)
    function(folder, rank, **options)


def run_rank(folder, rank, *, stopped_rank=None, stop_after=None, **options):
    run(folder, stop_after=stop_after if rank == stopped_rank else None, **options)


def refuse_an_example(trainer):
    encode, seen = trainer.collator.encode, {}

    def refuse(example):
        # Planning encodes examples once more; the fifth that is new is in the third step.
        if seen.setdefault(example.key, len(seen)) == 4:
            raise DataError("damaged", key=example.key)
        return encode(example)

    trainer.collator.encode = refuse


def before_a_loss(trainer, act, *, is_training=True):
    loss = trainer.stepper._loss

    def break_or_go_on(*arguments, **keywords):
        if trainer.step == 2 and torch.is_grad_enabled() == is_training:
            act()
        return loss(*arguments, **keywords)

    trainer.stepper._loss = break_or_go_on


def run_out_of_memory(trainer):
    before_a_loss(trainer, exhaust)


def run_out_of_memory_on_held_out_data(trainer):
    before_a_loss(trainer, exhaust, is_training=False)


def exhaust():
    raise torch.OutOfMemoryError("CUDA out of memory")


def break_the_device(trainer):
    def fail():
        raise RuntimeError("the device does not answer")

    before_a_loss(trainer, fail)


def be_killed(trainer):
    before_a_loss(trainer, lambda: os.kill(os.getpid(), signal.SIGKILL))


def fail_in_the_optimizer(trainer):
    step = trainer.optimizer.step

    def fail():
        if trainer.step == 2:
            raise ValueError("broken")
        return step()

    trainer.optimizer.step = fail


# What breaks in the third step or the evaluation before it -> the error where it does, and the
# steps that are kept where it breaks in the main process and in another.
FAULTS = {
    refuse_an_example: ("DataError", 2, 2),
    run_out_of_memory: ("MemoryPlanError", 2, 2),
    break_the_device: ("RuntimeError", 2, 2),
    run_out_of_memory_on_held_out_data: ("MemoryPlanError", 2, 2),
    fail_in_the_optimizer: ("ValueError", 2, 3),  # whose share was in the sum already
    be_killed: (None, 2, 2),
}


def run_into(folder, rank, *, fault, bad_rank, **options):
    """Meet an error in one process, note how both end, and go on in the same processes."""
    trainer = build_trainer(folder, **options)
    if fault is refuse_an_example:
        trainer.eval_stream = None  # which holds the same examples
    if rank == bad_rank:
        fault(trainer)
    try:
        trainer.fit()
    except (GemmaTunerError, RuntimeError, ValueError) as error:
        ending = {"error": type(error).__name__, "says": str(error), "at": time.monotonic()}
        ending["steps"] = list_checkpoints(folder) if rank == 0 or fault is be_killed else None
        Path(folder, f"{rank}.json").write_text(json.dumps(ending))
    if fault is not be_killed:
        run(folder, resume=True, **options)


def launch(folder, function=run_rank, **options):
    """Run two processes to their end; return how they ended."""
    port = find_port()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.runs"])
    processes = [
        context.Process(target=run_as, args=(rank, port, function, folder, options))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    hung = [process for process in processes if process.is_alive()]
    for process in hung:
        process.kill()
        process.join()
    assert not hung, "deadlock"
    return [process.exitcode for process in processes]


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


def list_checkpoints(folder):
    return sorted(path.name for path in (Path(folder) / "run/checkpoints").iterdir())


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
    assert launch(tmp_path / "two", **options) == [0, 0]
    assert_same_runs(tmp_path / "two", tmp_path / "one")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of two processes that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    assert launch(folder, **DROPPING) == [0, 0]
    return folder


@pytest.mark.parametrize("stopped_rank", [0, 1])
def test_a_signal_to_one_process_stops_both_and_both_resume(tmp_path, whole, stopped_rank):
    assert launch(tmp_path, stopped_rank=stopped_rank, stop_after=2, **DROPPING) == [0, 0]
    assert list_checkpoints(tmp_path) == ["step-00000002"]
    assert launch(tmp_path, resume=True, **DROPPING) == [0, 0]
    assert (tmp_path / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes()
    assert read_trace(tmp_path) == read_trace(whole)
    assert read_trace(tmp_path, "eval") == read_trace(whole, "eval")


@pytest.mark.parametrize("bad_rank", [0, 1])
@pytest.mark.parametrize("fault", FAULTS)
def test_what_ends_one_process_ends_all_with_the_steps_before_and_both_resume(
    tmp_path, whole, fault, bad_rank
):
    error, *steps = FAULTS[fault]
    endings = launch(tmp_path, run_into, fault=fault, bad_rank=bad_rank, **DROPPING)
    told = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    saved = [f"step-{steps[bad_rank]:08d}"]
    assert [ending["steps"] for ending in told.values() if ending["steps"]] == [saved]
    other = told[str(1 - bad_rank)]
    assert other["error"] == "ProcessError"
    if error is None:
        assert endings[bad_rank] == -signal.SIGKILL
        assert endings[1 - bad_rank] == 0
        assert "another of the 2 processes is gone" in other["says"]
        assert launch(tmp_path, resume=True, **DROPPING) == [0, 0]
    else:
        assert endings == [0, 0]
        assert told[str(bad_rank)]["error"] == error
        assert f"process {bad_rank} of 2 met an error" in other["says"]
        assert abs(other["at"] - told[str(bad_rank)]["at"]) < 30
    assert (tmp_path / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes()


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
