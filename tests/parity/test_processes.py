"""Two processes train as one does that accumulates twice as much."""

import multiprocessing
import os
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gemma_tuner.errors import DataError
from tests.runs import build_trainer, read_trace, run

pytestmark = pytest.mark.slow

ADAPTER = "adapter/adapter_model.safetensors"
SETTINGS = {"batch_size": 2, "gradient_accumulation": 1, "eval_every_steps": 2}
# A smooth step: Adam's default turns rounding into whole steps.
SMOOTH = {"epsilon": 1.0, "learning_rate": 0.1}


def run_as(rank, port, function, folder, options):
    """Do what ``accelerate launch --cpu`` does for each process, then run."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    function(folder, rank, **options)


def run_rank(folder, rank, *, stopped_rank=None, stop_after=None, **options):
    run(folder, stop_after=stop_after if rank == stopped_rank else None, **options)


def run_with_bad_example(folder, rank, *, bad_rank, **options):
    trainer = build_trainer(folder, **options)
    trainer.eval_stream = None
    encode, seen = trainer.collator.encode, []

    def refuse(example):
        seen.append(example.key)
        if rank == bad_rank and len(seen) == 5:  # in the third step
            raise DataError("damaged", key=example.key)
        return encode(example)

    trainer.collator.encode = refuse
    trainer.fit()


def launch(folder, function=run_rank, **options):
    """Run two processes to their end; return how they ended."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
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


@pytest.mark.parametrize("stopped_rank", [0, 1])
def test_a_signal_to_one_process_stops_both_and_both_resume(tmp_path, stopped_rank):
    options = SETTINGS | {"dropout": 0.1}
    assert launch(tmp_path / "whole", **options) == [0, 0]
    folder = tmp_path / "stopped"
    assert launch(folder, stopped_rank=stopped_rank, stop_after=2, **options) == [0, 0]
    assert list_checkpoints(folder) == ["step-00000002"]
    assert launch(folder, resume=True, **options) == [0, 0]
    assert (folder / ADAPTER).read_bytes() == (tmp_path / "whole" / ADAPTER).read_bytes()
    assert read_trace(folder) == read_trace(tmp_path / "whole")
    assert read_trace(folder, "eval") == read_trace(tmp_path / "whole", "eval")


@pytest.mark.parametrize("bad_rank", [0, 1])
def test_an_error_in_one_process_ends_both_and_keeps_the_steps_before(tmp_path, bad_rank):
    endings = launch(tmp_path, run_with_bad_example, bad_rank=bad_rank, **SETTINGS)
    assert all(ending != 0 for ending in endings)
    assert list_checkpoints(tmp_path) == ["step-00000002"]
