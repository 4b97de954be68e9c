"""The best held-out adapter, early stopping, and what is said of losses that rise."""

import json
import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from gemma_tuner.errors import CheckpointError, ConfigError
from gemma_tuner.models.adapter_files import WEIGHTS, save_adapter
from gemma_tuner.testing import tiny_model
from gemma_tuner.training.adapters import find_adapter
from gemma_tuner.training.best import Standing
from gemma_tuner.training.config import TrainConfig
from gemma_tuner.training.reporting.metrics import EvalRecord
from gemma_tuner.training.trainer import Trainer
from tests.runs import StoppingTrainer, build_trainer, read_trace


class Scripted(StoppingTrainer):
    """A trainer whose held-out losses are given, by the steps at which they are measured."""

    losses = {}

    def evaluate(self):
        record = super().evaluate()
        return replace(record, loss=self.losses.get(self.step, record.loss))


def build(folder, losses, **settings):
    """A run of eight steps, measured every second."""
    options = {"max_steps": 8, "eval_every_steps": 2, "save_every_steps": 3, **settings}
    trainer = build_trainer(folder, dropout=0.1, **options)
    trainer.__class__, trainer.losses = Scripted, losses
    return trainer


def weights(folder):
    return load_file(folder / WEIGHTS)


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def names(folder):
    return sorted(path.name for path in (folder / "run/best").iterdir())


# Lowest after step 4, then worse; NaN is never the lowest.
LOSSES = {0: 5.0, 2: 3.0, 4: 1.0, 6: math.nan, 8: 2.0}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run to its end, with the adapter that each step left."""
    folder = tmp_path_factory.mktemp("whole")
    trainer = build(folder, LOSSES)
    take = trainer.train_step

    def train_step(step_input):
        result = take(step_input)
        save_adapter(trainer.model, folder / f"step-{trainer.step}")
        return result

    trainer.train_step = train_step
    return folder, trainer, trainer.fit()


def test_the_best_adapter_is_kept_and_is_what_save_writes(whole, tmp_path, caplog):
    folder, trainer, result = whole
    assert result.best_step == 4
    assert names(folder) == ["step-00000004"]
    assert equal(weights(trainer.save(tmp_path / "best")), weights(folder / "step-4"))
    assert "step 4" in caplog.text
    assert json.loads((tmp_path / "best/gemma_tuner.json").read_text())["step"] == 4
    assert equal(weights(trainer.save(tmp_path / "last", best=False)), weights(folder / "step-8"))
    PeftModel.from_pretrained(tiny_model("gemma4-e2b")[0], tmp_path / "best")


def test_a_run_means_its_best_adapter_once_that_is_saved(tmp_path, capsys):
    trainer = build(tmp_path, LOSSES)
    trainer.fit()
    trainer.save(tmp_path / "run/adapter")
    capsys.readouterr()
    assert find_adapter(tmp_path / "run") == tmp_path / "run/adapter"
    assert capsys.readouterr().err == ""
    longer = build(tmp_path, {**LOSSES, 9: 0.5}, max_steps=9)
    longer.fit(resume=True)
    assert find_adapter(tmp_path / "run").name == "step-00000009"


def test_it_is_named_in_the_log_and_in_the_result(whole):
    folder, _, result = whole
    events = read_trace(folder, "event")
    assert [event["step"] for event in events if event["name"] == "best"] == [0, 2, 4]
    (last,) = [event["message"] for event in events if event["name"] == "held_out"]
    for said in (last, repr(result), result._repr_html_()):
        assert "best held-out loss 1.0000 (step 4)" in said
        assert "best/step-00000004" in said


def test_a_run_that_keeps_it_trains_as_one_that_does_not(whole, tmp_path):
    folder, _, _ = whole
    trainer = build(tmp_path, LOSSES, keep_best=False)
    trainer.fit()
    assert not (tmp_path / "run/best").exists()
    assert equal(weights(trainer.save(tmp_path / "last")), weights(folder / "step-8"))
    assert read_trace(tmp_path) == read_trace(folder)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "stop_after", [pytest.param(2, marks=SLOW), 5, pytest.param(7, marks=SLOW)]
)
def test_a_resumed_run_has_the_same_best(whole, tmp_path, stop_after):
    folder, _, _ = whole
    stopped = build(tmp_path, LOSSES)
    stopped.stop_after = stop_after
    assert stopped.fit().stopped_by == "SIGTERM"
    resumed = build(tmp_path, LOSSES)
    result = resumed.fit(resume=True)
    assert result.best_step == 4
    assert names(tmp_path) == ["step-00000004"]
    assert equal(weights(resumed.save(tmp_path / "best")), weights(folder / "step-4"))
    for kind in ("step", "eval"):
        assert str(read_trace(tmp_path, kind)) == str(read_trace(folder, kind))  # NaN is not NaN


def test_what_a_checkpoint_has_as_its_best_stays(tmp_path):
    """A run that ends between an evaluation and its checkpoint goes on from an older best."""
    trainer = build(tmp_path, LOSSES)

    def fail(step_input):
        if trainer.step == 5:  # the newest checkpoint, of step 3, has step 2 as its best
            raise KeyboardInterrupt
        return Scripted.train_step(trainer, step_input)

    trainer.train_step = fail
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert names(tmp_path) == ["step-00000002", "step-00000004"]
    resumed = build(tmp_path, {**LOSSES, 4: 4.0})
    assert resumed.fit(resume=True).best_step == 8
    resumed = build(tmp_path, LOSSES)
    assert resumed.fit(resume=True).best_step == 8  # nothing is left to do, and it is still known


def test_what_a_killed_run_was_about_to_delete_goes_when_it_is_resumed(tmp_path):
    settings = {"max_steps": 4, "keep_checkpoints": 1}
    build(tmp_path, LOSSES, **settings).fit()
    for name in ("checkpoints", "best"):
        folder = tmp_path / "run" / name
        for left in ("step-00000002", ".step-00000002.old", ".step-00000001.tmp"):
            shutil.copytree(folder / "step-00000004", folder / left)
    build(tmp_path, LOSSES, **settings).fit(resume=True)
    assert names(tmp_path) == ["step-00000004"]
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000004"]


def test_a_best_adapter_that_the_main_process_died_in_writing_is_written_by_another(tmp_path):
    trainer = build(tmp_path, LOSSES, max_steps=4)
    trainer.fit()
    best = tmp_path / "run/best/step-00000004"
    (best / "adapter_config.json").unlink()
    shutil.rmtree(tmp_path / "run/checkpoints")
    trainer.processes.is_bereft, trainer.run_state._saved = True, None
    reports = SimpleNamespace(event=lambda *_: None, restart_clock=lambda *_: None)
    trainer.run_state.save(reports, None)
    assert equal(weights(best), weights(tmp_path / "run/checkpoints/step-00000004"))
    assert (best / "adapter_config.json").is_file()


def test_a_best_adapter_that_is_gone_is_an_error(tmp_path):
    trainer = build(tmp_path, {0: 1.0, 1: 2.0}, max_steps=1)
    trainer.fit()
    (tmp_path / "run/best").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"best=False"):
        trainer.save(tmp_path / "adapter")
    trainer.save(tmp_path / "adapter", best=False)


# --- early stopping --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patience", "stop_after"),
    [(2, 5), *(pytest.param(*case, marks=SLOW) for case in ((1, None), (1, 5), (2, None)))],
)
def test_a_run_stops_early_and_a_resumed_one_at_the_same_step(tmp_path, patience, stop_after):
    settings = {"early_stopping_patience": patience, "max_steps": 12}
    losses = {**LOSSES, 10: 2.0}
    trainer = build(tmp_path, losses, **settings)
    if stop_after:
        trainer.stop_after = stop_after
        trainer.fit()
        trainer = build(tmp_path, losses, **settings)
    result = trainer.fit(resume=bool(stop_after))
    assert (result.step, result.best_step) == (4 + 2 * patience, 4)
    assert result.stopped_by == "early_stopping"
    events = [event["name"] for event in read_trace(tmp_path, "event")]
    assert "stopped_early" in events
    assert events[-1] == "finished"
    again = build(tmp_path, losses, **settings).fit(resume=True)
    assert (again.step, again.stopped_by) == (result.step, "early_stopping")


@pytest.mark.parametrize("held_out", [True, False])
def test_patience_without_evaluations_is_refused(tmp_path, held_out):
    settings = {"max_steps": 2, "early_stopping_patience": 2, "output_dir": tmp_path}
    if held_out:
        with pytest.raises(ConfigError, match="eval_every_steps"):
            TrainConfig(**settings)
        return
    trainer = build_trainer(tmp_path)
    with pytest.raises(ConfigError, match="eval_stream"):
        Trainer(
            trainer.model,
            trainer.stream,
            trainer.collator,
            TrainConfig(**settings, eval_every_steps=1),
        )


# --- losses that rise ------------------------------------------------------------------------


def stand(*measured):
    """Where a run stands after ``(training losses, held-out loss)`` from before step 1 on."""
    standing = Standing()
    for step, (train, held_out) in enumerate(measured):
        for loss in train:
            standing.note_train_loss(loss)
        record = EvalRecord(step, held_out, math.exp(held_out), 1, 1)
        standing.note_held_out(record, is_last=step == len(measured) - 1)
    return standing


NAN = math.nan


@pytest.mark.parametrize(
    ("measured", "best", "rises"),
    [
        ([([], 3.0), ([2.0, 1.0], 2.0), ([0.5], 2.5), ([0.1], 3.0)], 1, True),
        ([([], 3.0), ([2.0, 1.0], 3.5)], 0, True),  # the two of a run without eval_every_steps
        ([([], 3.0), ([2.0, 2.5], 3.5)], 0, False),  # the training loss rises, too
        ([([], 3.0), ([2.0], 2.0), ([1.0], 1.0)], 2, False),
        ([([], 3.0), ([2.0], 2.0), ([1.0], 2.5), ([0.5], 1.5)], 3, False),  # it came down again
        ([([], 3.0), ([], 3.5)], 0, False),  # nothing was logged
        ([([], NAN), ([2.0], NAN), ([1.0], NAN)], None, False),
        ([([], NAN), ([2.0], 2.0), ([NAN, 1.0], NAN), ([0.5], 2.5)], 1, True),
    ],
)
def test_it_is_said_where_held_out_losses_rise_and_training_losses_fall(measured, best, rises):
    standing = stand(*measured)
    assert standing.step == best
    assert ("has risen" in standing.rise) == rises
    assert Standing(**json.loads(json.dumps(vars(standing), allow_nan=False))) == standing
    json.dumps(vars(stand(*measured[:-1])), allow_nan=False)


def test_a_run_that_learns_by_heart_says_so(tmp_path):
    trainer = build(tmp_path, {0: 1.0, 2: 1.5, 4: 2.0}, max_steps=4)
    result = trainer.fit()
    (event,) = [e for e in read_trace(tmp_path, "event") if e["name"] == "overfitting"]
    assert "has risen from 1.0000 (step 0) to 2.0000 (step 4)" in event["message"]
    assert event["message"] in repr(result)
