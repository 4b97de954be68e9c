"""A resumed run cuts its micro-batches as it did before."""

from dataclasses import replace

import pytest
import torch

from gemma_tuner.planning.choice import CheckpointingLevel
from gemma_tuner.training.micro_batches import MicroBatchPlan, restore
from gemma_tuner.training.step import Stepper
from tests.runs import build_trainer


class FullOnce(Stepper):
    """Has no room to train on two examples, once."""

    is_full = True

    def loss_sum(self, batch):
        if self.is_full and torch.is_grad_enabled() and len(batch) > 1:
            self.is_full = False
            raise torch.OutOfMemoryError("no room")
        return super().loss_sum(batch)


def build(folder, **settings):
    trainer = build_trainer(folder, dropout=0.5, **settings)
    trainer.stepper.__class__ = FullOnce
    return trainer


def test_what_a_run_has_learned_of_memory_resumes_too(tmp_path):
    whole = build(tmp_path / "whole")
    whole.fit()
    assert whole.counts["out_of_memory"] == 1
    stopped = build(tmp_path / "stopped")
    stopped.stop_after = 2
    stopped.fit()
    resumed = build_trainer(tmp_path / "stopped", dropout=0.5)  # with room for two
    resumed.plan()  # made before the state is read
    resumed.fit(resume=True)
    # with other cuts, dropout would draw other numbers
    for one, other in zip(resumed.trainable, whole.trainable, strict=True):
        assert torch.equal(one, other)
    assert resumed.stepper.micro_batch_plan.levels == whole.stepper.micro_batch_plan.levels


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    trainer = build_trainer(tmp_path_factory.mktemp("planned"))
    return trainer.plan(), trainer.config


def test_what_a_run_cuts_by_is_kept_as_json_and_taken_up(planned, capsys):
    plan, config = planned
    before = replace(
        MicroBatchPlan.of(plan, plan.levels, config),
        levels=(CheckpointingLevel(0, 30), CheckpointingLevel(8, 60)),
    )
    before = MicroBatchPlan.from_dict(before.to_dict())
    found = restore(plan, before, config)
    assert found.levels == before.levels
    assert "cut as before" in str(found)
    assert restore(plan, MicroBatchPlan.of(plan, plan.levels, config), config) is plan
    assert capsys.readouterr().err == ""


def test_other_settings_or_less_memory_cut_anew(planned, capsys):
    plan, config = planned
    before = replace(
        MicroBatchPlan.of(plan, plan.levels, config), levels=(CheckpointingLevel(0, 30),)
    )
    asked = replace(config, gradient_checkpointing=True)
    assert restore(plan, before, asked) is plan
    assert capsys.readouterr().err == ""
    scarce = replace(plan, levels=(CheckpointingLevel(8, 30),))
    # 0: there was so much room that nothing was tried
    for found, needs in ((plan, plan.usable_bytes + 1), (scarce, 0)):
        assert restore(found, replace(before, peak_bytes=needs), config) is found
        assert "less memory than when this run was saved" in capsys.readouterr().err
