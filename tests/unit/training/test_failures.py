"""A run that ends badly says so in its folder, and a folder has one run at a time."""

import fcntl
import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from gemma_tuner.cli.opening import fit
from gemma_tuner.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DivergedError,
    describe_error,
)
from gemma_tuner.records import Example
from gemma_tuner.training.checkpoint import list_checkpoints
from gemma_tuner.training.lock import FILE, folder_locked, refuse_running
from gemma_tuner.training.reporting import page
from gemma_tuner.training.trainer import FitResult
from gemma_tuner.watch.run import open_runs
from tests.runs import build_trainer, read_trace

SECRET = "a word of the data"


def fail_at(trainer, name, error, *, after=1):
    """Let a method of the trainer raise once some steps are done."""
    method = getattr(trainer, name)

    def call(*given, **named):
        if trainer.step >= after:
            raise error
        return method(*given, **named)

    setattr(trainer, name, call)


class Trouble:
    """A tracker that fails at one of its calls."""

    def __init__(self, *failing):
        self.failing = failing

    def __call__(self, *given):
        if "open" in self.failing:
            raise RuntimeError(SECRET)
        return self

    def step(self, record):
        if "step" in self.failing:
            raise RuntimeError(SECRET)

    def evaluation(self, record):
        pass

    def close(self):
        if "close" in self.failing:
            raise RuntimeError(SECRET)


def find(folder, name):
    return [event for event in read_trace(folder, "event") if event["name"] == name]


def read_run(folder):
    (run,) = open_runs([folder / "run"])
    run.refresh()
    return run


@pytest.mark.parametrize("broken", ["train_step", "evaluate", "open", "step", "close"])
def test_what_ends_a_run_is_in_its_log(tmp_path, monkeypatch, broken):
    trainer = build_trainer(tmp_path, max_steps=2, eval_every_steps=1, trackers=("tensorboard",))
    if broken in ("train_step", "evaluate"):
        fail_at(trainer, broken, RuntimeError(SECRET))
        monkeypatch.setattr("gemma_tuner.training.trainer.Trackers", Trouble())
    else:
        monkeypatch.setattr("gemma_tuner.training.trainer.Trackers", Trouble(broken))
    with pytest.raises(RuntimeError):
        trainer.fit()
    (event,) = find(tmp_path, "failed")
    assert event["message"].startswith("RuntimeError")
    assert SECRET not in (tmp_path / "run/log.jsonl").read_text()
    run = read_run(tmp_path)
    assert run.find_phase().name == "failed"
    assert run.history.failure == event["message"]
    if broken == "train_step":
        monkeypatch.setattr("gemma_tuner.training.trainer.Trackers", Trouble())
        build_trainer(tmp_path, max_steps=2).fit(resume=True)
        assert read_run(tmp_path).find_phase().name == "finished"


def test_errors_of_our_own_are_told_whole_and_an_interrupt_is_a_stop(tmp_path):
    trainer = build_trainer(tmp_path / "one", max_steps=2)
    fail_at(trainer, "train_step", DataError("its image is\ndamaged; mend it", key="rows:7"))
    with pytest.raises(DataError):
        trainer.fit()
    (event,) = find(tmp_path / "one", "failed")
    said = "DataError: example 'rows:7': its image is damaged; mend it. What was trained is saved"
    assert event["message"].startswith(said)
    trainer = build_trainer(tmp_path / "two", max_steps=2)
    fail_at(trainer, "train_step", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    (event,) = find(tmp_path / "two", "stopped")
    assert "interrupted" in event["message"]
    assert read_run(tmp_path / "two").find_phase().name == "stopped"


def test_a_save_that_fails_after_an_error_hides_neither(tmp_path):
    trainer = build_trainer(tmp_path, max_steps=2)
    fail_at(trainer, "train_step", ValueError(SECRET))
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoints").write_text("in the way")
    with pytest.raises(CheckpointError):
        trainer.fit()
    first, second = (event["message"] for event in find(tmp_path, "failed"))
    assert first.startswith("ValueError")
    assert second.startswith("CheckpointError: cannot save a checkpoint")


def test_an_error_is_described_without_what_it_may_repeat():
    def describe(function):
        try:
            function()
        except (OSError, TypeError) as error:
            return describe_error(error)

    assert describe(lambda: open("/nowhere/" + SECRET)) == (  # noqa: SIM115, PTH123
        "FileNotFoundError: No such file or directory"
    )
    said = describe(lambda: Example(SECRET, turns=5).replace_media(None))
    assert said is not None
    assert SECRET not in said
    assert "gemma_tuner.records, line " in said


@pytest.mark.parametrize("what", ["weights", "moments"])
def test_what_is_infinite_is_never_saved_and_what_was_saved_stays(tmp_path, what):
    trainer = build_trainer(tmp_path, max_steps=6, save_every_steps=1, eval_every_steps=1)
    train_step = trainer.train_step

    def take_a_step_too_far(step_input):
        outcome = train_step(step_input)
        if trainer.step == 3:
            weight, state = next(iter(trainer.optimizer.state.items()))
            (weight.data if what == "weights" else state["exp_avg_sq"]).view(-1)[0] = torch.inf
        return outcome

    trainer.train_step = take_a_step_too_far
    with pytest.raises(DivergedError, match=r"1 of \d+ trained tensors .*lower learning rate"):
        trainer.fit()
    assert read_run(tmp_path).find_phase().name == "failed"
    checkpoints = list_checkpoints(tmp_path / "run")
    assert checkpoints[-1].name == "step-00000002"
    assert load_file(checkpoints[-1] / "adapter_model.safetensors")
    kept = [path.name for path in (tmp_path / "run/best").iterdir()]
    assert what == "moments" or "step-00000003" not in kept
    if what == "weights":
        with pytest.raises(DivergedError):
            trainer.save(tmp_path / "adapter", best=False)
        assert not (tmp_path / "adapter" / "adapter_config.json").exists()


# --- one folder, one run -----------------------------------------------------------------------


def test_a_folder_in_which_a_process_trains_is_refused_until_it_ends(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from tests.runs import build_trainer\n"
        "trainer = build_trainer(Path(sys.argv[1]))\n"
        "def wait(step_input): print('trains', flush=True); time.sleep(60)\n"
        "trainer.train_step = wait\n"
        "trainer.fit()\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout.readline() == "trains\n"
        files = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
        for resume in (False, True):
            with pytest.raises(ConfigError, match=rf"\(process {child.pid}\)"):
                build_trainer(tmp_path).fit(resume=resume)
        assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == files
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert build_trainer(tmp_path, max_steps=1).fit().step == 1
    assert (tmp_path / "run" / FILE).read_text() == str(os.getpid())


@pytest.mark.parametrize("index", [0, 1])
def test_processes_of_one_run_do_not_refuse_each_other(tmp_path, index):
    """The main one may hold the folder before the others come there; all may ask at once."""
    (tmp_path / FILE).touch()
    with (tmp_path / FILE).open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        refuse_running(tmp_path)
    main = SimpleNamespace(is_main=True)
    trainer = SimpleNamespace(
        config=SimpleNamespace(output_dir=tmp_path),
        processes=SimpleNamespace(is_main=index == 0),
        fit=lambda resume: FitResult(1, None, ()),
    )
    with (
        folder_locked(tmp_path, main),
        pytest.raises(ConfigError) if index == 0 else nullcontext(),
    ):
        fit(trainer, {}, resume=True, go_on=[])


def test_the_page_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'gemma_tuner\[watch\]'"):
        build_trainer(tmp_path, watch=True).fit()
    assert not (tmp_path / "run").exists()
