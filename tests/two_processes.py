"""Two processes that train together, and what may end one of them: functions for new processes.

``PYTHONPATH=. python -m tests.two_processes cuda`` tries all of it over NCCL, with two GPUs;
``cpu`` over gloo.
"""

import json
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

import torch

from gemma_tuner.errors import DataError, GemmaTunerError
from tests.runs import build_trainer, run

ADAPTER = "adapter/adapter_model.safetensors"
# Unchecked: an example that is refused in the third step would be found before the first.
SETTINGS = {
    "batch_size": 2,
    "gradient_accumulation": 1,
    "eval_every_steps": 2,
    "check_seconds": 0,
}
DROPPING = SETTINGS | {"dropout": 0.1}


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
    if options.get("device") == "cuda":
        options["device"] = f"cuda:{rank}"
    function(folder, rank, **options)


def launch(folder, function, **options):
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


def list_checkpoints(folder):
    return sorted(path.name for path in (Path(folder) / "run/checkpoints").iterdir())


def run_rank(folder, rank, *, stopped_rank=None, stop_after=None, **options):
    run(folder, stop_after=stop_after if rank == stopped_rank else None, **options)


# ---- what may end one of them in the third step, or in the evaluation before it --------------


def refuse_an_example(trainer):
    encode, seen = trainer.collator.encode, {}

    def refuse(example):
        # Planning encodes examples once more; the fifth that is new is in the third step.
        if seen.setdefault(example.key, len(seen)) == 4:
            raise DataError("damaged", key=example.key)
        return encode(example)

    trainer.collator.encode = refuse


def _before_a_loss(trainer, act, *, is_training=True):
    loss = trainer.stepper._loss

    def break_or_go_on(*arguments, **keywords):
        if trainer.step == 2 and torch.is_grad_enabled() == is_training:
            act()
        return loss(*arguments, **keywords)

    trainer.stepper._loss = break_or_go_on


def run_out_of_memory(trainer):
    _before_a_loss(trainer, _exhaust)


def run_out_of_memory_on_held_out_data(trainer):
    _before_a_loss(trainer, _exhaust, is_training=False)


def _exhaust():
    raise torch.OutOfMemoryError("CUDA out of memory")


def break_the_device(trainer):
    def fail():
        raise RuntimeError("the device does not answer")

    _before_a_loss(trainer, fail)


def fail_in_the_optimizer(trainer):
    step = trainer.optimizer.step

    def fail():
        if trainer.step == 2:
            raise ValueError("broken")
        return step()

    trainer.optimizer.step = fail


def be_killed(trainer):
    _before_a_loss(trainer, lambda: _die(trainer))


def be_killed_before_the_sum(trainer):
    """Be gone when the others have begun to add up gradients."""
    add_up = trainer.processes._sum_tensor

    def die_or_go_on(tensor):
        if trainer.step == 2:
            _die(trainer)
        return add_up(tensor)

    trainer.processes._sum_tensor = die_or_go_on


def _die(trainer):
    Path(trainer.config.output_dir, "killed").write_text(str(time.monotonic()))
    os.kill(os.getpid(), signal.SIGKILL)


# The error where it breaks, and the steps that are kept where that is the main process, and
# another.
FAULTS = {
    refuse_an_example: ("DataError", 2, 2),
    run_out_of_memory: ("MemoryPlanError", 2, 2),
    break_the_device: ("RuntimeError", 2, 2),
    run_out_of_memory_on_held_out_data: ("MemoryPlanError", 2, 2),
    fail_in_the_optimizer: ("ValueError", 2, 3),  # whose share was in the sum already
    be_killed: (None, 2, 2),
    be_killed_before_the_sum: (None, 2, 2),
}


def run_into(folder, rank, *, fault, bad_rank, **options):
    """Meet an error in one process, note how both end, and go on in the same processes."""
    trainer = build_trainer(folder, **options)
    if fault is refuse_an_example:
        trainer.eval_stream = None  # which holds the same examples
    if rank == bad_rank:
        fault(trainer)
    error, *_ = FAULTS[fault]
    try:
        trainer.fit()
    except (GemmaTunerError, RuntimeError, ValueError) as caught:
        ending = {"error": type(caught).__name__, "says": str(caught), "at": time.monotonic()}
        is_writer = rank == 0 or error is None
        ending["steps"] = list_checkpoints(folder) if is_writer else None
        Path(folder, f"{rank}.json").write_text(json.dumps(ending))
    if error is not None:
        run(folder, resume=True, **options)


def check(folder, whole, fault, bad_rank, **options):
    """Both end soon with the steps before saved; resumed, they equal a run that nothing ended."""
    error, *steps = FAULTS[fault]
    endings = launch(folder, run_into, fault=fault, bad_rank=bad_rank, **options)
    told = {path.stem: json.loads(path.read_text()) for path in Path(folder).glob("*.json")}
    saved = [f"step-{steps[bad_rank]:08d}"]
    assert [ending["steps"] for ending in told.values() if ending["steps"]] == [saved]
    other = told[str(1 - bad_rank)]
    assert other["error"] == "ProcessError"
    if error is None:
        assert endings[bad_rank] == -signal.SIGKILL
        assert endings[1 - bad_rank] == 0
        assert "another of the 2 processes is gone" in other["says"]
        assert other["at"] - float(Path(folder, "run/killed").read_text()) < 30
        assert launch(folder, run_rank, resume=True, **options) == [0, 0]
    else:
        assert endings == [0, 0]
        assert told[str(bad_rank)]["error"] == error
        assert f"process {bad_rank} of 2 met an error" in other["says"]
        assert abs(other["at"] - told[str(bad_rank)]["at"]) < 30
    assert (folder / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes()


def main():
    """Try all of it, and say what held."""
    options = DROPPING | {"device": sys.argv[1]}
    num_failed = 0
    with tempfile.TemporaryDirectory() as name:
        whole = Path(name, "whole")
        whole.mkdir()
        assert launch(whole, run_rank, **options) == [0, 0]
        for fault in FAULTS:
            for bad_rank in range(2):
                folder = Path(name, f"{fault.__name__}-{bad_rank}")
                folder.mkdir()
                started = time.monotonic()
                try:
                    check(folder, whole, fault, bad_rank, **options)
                    result = "held"
                except (AssertionError, OSError, LookupError) as error:
                    num_failed += 1
                    result = f"FAILED: {type(error).__name__} {error}"
                seconds = time.monotonic() - started
                sys.stdout.write(
                    f"{fault.__name__} in process {bad_rank}: {result}, {seconds:.0f} s\n"
                )
                sys.stdout.flush()
    sys.exit(num_failed)


if __name__ == "__main__":
    main()
