"""What a run tells beside its losses: plan and phases in the log, samples, trackers."""

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gemma_tuner.errors import ConfigError
from gemma_tuner.training.config import TrainConfig
from gemma_tuner.training.reporting.trackers import Trackers
from tests.runs import build_trainer

SAMPLES = {"every_steps": 2, "max_new_tokens": 4}


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_scalars(run):
    (folder,) = {path.parent for path in (run / "gemma_tuner").glob("events*")}
    accumulator = EventAccumulator(str(folder)).Reload()
    return {
        tag: [(event.step, event.value) for event in accumulator.Scalars(tag)]
        for tag in accumulator.Tags()["scalars"]
    }


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run of five steps, stopped after the third and continued."""
    folder = tmp_path_factory.mktemp("told")
    settings = {"trackers": ("tensorboard",), "eval_every_steps": 2, "samples": SAMPLES}
    trainer = build_trainer(folder, **settings)
    trainer.stop_after = 3
    trainer.fit()
    first = read(folder / "run/log.jsonl")
    trainer = build_trainer(folder, **settings)
    trainer.fit(resume=True)
    return folder / "run", first


def test_plan_and_phases_are_in_the_log(stopped):
    run, first = stopped
    phases = [line["name"] for line in first if line["kind"] == "event"]
    assert phases == [
        *("run", "evaluating", "best", "sampling", "training", "plan", "evaluating", "best"),
        *("sampling", "stopped", "saved", "held_out"),
    ]
    begun = first[0]
    assert begun["max_steps"] == 5
    assert begun["config"]["learning_rate"] == 1e-2
    assert "output_dir" not in begun["config"]
    (plan,) = [line for line in first if line.get("name") == "plan"]
    assert plan["budget_bytes"] > 0
    assert plan["summary"].startswith("plan for ")
    times = [line["time"] for line in first]
    assert times == sorted(times)
    last = read(run / "log.jsonl")
    assert [line["name"] for line in last if line["kind"] == "event"][-1] == "finished"


def test_samples_are_taken_while_it_trains(stopped):
    run, _ = stopped
    assert [line["step"] for line in read(run / "samples.jsonl")] == [0, 2, 4, 5]


def test_tensorboard_draws_each_step_once(stopped):
    run, _ = stopped
    scalars = read_scalars(run)
    steps = [line for line in read(run / "log.jsonl") if line["kind"] == "step"]
    losses = [(line["step"], pytest.approx(line["loss"], rel=1e-6)) for line in steps]
    assert scalars["train/loss"] == losses
    assert [step for step, _ in scalars["held_out/loss"]] == [0, 2, 4, 5]
    assert {"train/learning_rate", "train/grad_norm", "train/tokens_per_second"} <= set(scalars)


def test_samples_change_nothing(stopped, tmp_path):
    run, _ = stopped
    trainer = build_trainer(tmp_path, eval_every_steps=2)
    trainer.fit()
    plain = [line for line in read(tmp_path / "run/log.jsonl") if line["kind"] == "step"]
    with_samples = [line for line in read(run / "log.jsonl") if line["kind"] == "step"]
    assert [line["loss"] for line in plain] == [line["loss"] for line in with_samples]


def test_trackers_that_are_not_there(tmp_path):
    with pytest.raises(ConfigError, match="trackers must be a tuple of aim"):
        TrainConfig(max_steps=1, trackers=("tensorbord",))
    with pytest.raises(ConfigError, match="trackers must be a tuple of aim"):
        TrainConfig(max_steps=1, trackers="tensorboard")
    trainer = build_trainer(tmp_path, trackers=("wandb",))
    with pytest.raises(ConfigError, match="'wandb' is not installed here; `pip install wandb`"):
        Trackers(trainer.config, trainer.device, 0)
    assert not Path(tmp_path / "run" / "gemma_tuner").exists()
