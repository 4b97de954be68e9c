"""A run with an optimizer or a loss that is handed in."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from gemma_tuner.batch import IGNORED
from gemma_tuner.errors import ConfigError, ResumeError
from gemma_tuner.models.loss import target_loss_sum
from gemma_tuner.training.optim import measure_state
from gemma_tuner.training.trainer import Trainer
from tests.runs import StoppingTrainer, build_trainer, read_trace


def sgd(model, momentum=0.9):
    return torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=1.0, momentum=momentum
    )


def build(folder, *, make_optimizer=None, loss=None, stop_after=None, dropout=0.5, **settings):
    plain = build_trainer(folder, dropout=dropout, **settings)
    trainer = StoppingTrainer(
        plain.model,
        plain.stream,
        plain.collator,
        plain.config,
        eval_stream=plain.stream,
        optimizer=make_optimizer(plain.model) if make_optimizer else None,
        loss=loss,
    )
    trainer.stop_after = stop_after
    return trainer


def test_a_run_with_another_optimizer_resumes_exactly(tmp_path):
    whole = build(tmp_path / "whole", make_optimizer=sgd)
    whole.fit()
    build(tmp_path / "stopped", make_optimizer=sgd, stop_after=2).fit()
    resumed = build(tmp_path / "stopped", make_optimizer=sgd)
    resumed.fit(resume=True)
    assert read_trace(tmp_path / "stopped") == read_trace(tmp_path / "whole")
    for one, other in zip(resumed.trainable, whole.trainable, strict=True):
        assert torch.equal(one, other)
        assert list(whole.optimizer.state[other]) == ["momentum_buffer"]


def test_its_rate_is_that_of_the_settings(tmp_path):
    trainer = build(tmp_path, make_optimizer=sgd, max_steps=2, schedule="linear")
    trainer.fit()
    assert [record["learning_rate"] for record in read_trace(tmp_path)] == [1e-2, 5e-3]


def test_a_plan_counts_what_an_optimizer_keeps(tmp_path):
    moments, adapters = [], []
    for make in (None, sgd, lambda model: sgd(model, momentum=0.0)):
        plan = build(tmp_path, make_optimizer=make, batch_size=1).plan()
        moments.append(plan.footprint.resident["moments"])
        adapters.append(plan.footprint.resident["adapters"])
    assert moments == [2 * adapters[0], adapters[1], 0]


def test_what_of_a_factored_optimizer_is_kept_is_measured():
    parameter = torch.nn.Parameter(torch.ones(64, 32))
    optimizer = torch.optim.Adafactor([parameter])
    assert measure_state(optimizer) == (64 + 32) / (64 * 32)
    assert not optimizer.state[parameter]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_run_does_not_go_on_with_another_optimizer(tmp_path, momentum):
    build(tmp_path, max_steps=1).fit()
    other = build(tmp_path, make_optimizer=lambda model: sgd(model, momentum), max_steps=2)
    with pytest.raises(ResumeError, match=r"optimizer .*exp_avg"):
        other.fit(resume=True)


def test_an_optimizer_of_other_parameters_is_refused(tmp_path):
    plain = build_trainer(tmp_path)
    rest = (plain.model, plain.stream, plain.collator, plain.config)
    half = torch.optim.SGD(plain.trainable[::2], lr=0.1)
    with pytest.raises(ConfigError, match=r"\(SGD\) holds \d+ of the model's \d+ trainable"):
        Trainer(*rest, optimizer=half)
    with pytest.raises(ConfigError, match="optimizer is a float"):
        Trainer(*rest, optimizer=0.1)


def test_a_non_finite_gradient_is_skipped_by_any_optimizer(tmp_path):
    trainer = build(tmp_path, make_optimizer=sgd, max_steps=3)
    trainer.trainable[0].register_hook(
        lambda gradient: gradient * (float("nan") if trainer.step == 1 else 1.0)
    )
    trainer.fit()
    assert [record["skipped_steps"] for record in read_trace(tmp_path)] == [0, 1, 1]
    assert all(bool(p.isfinite().all()) for p in trainer.trainable)


def plain_loss(model, batch, *, chunk_tokens):
    logits = model(**batch.inputs, use_cache=False).logits[:, :-1].float()
    return cross_entropy(
        logits.flatten(0, 1),
        batch.labels[:, 1:].flatten(),
        ignore_index=IGNORED,
        reduction="sum",
    )


def test_a_plain_loss_trains_as_the_default_does(tmp_path):
    traces = []
    for name, loss in (("default", None), ("plain", plain_loss)):
        build(tmp_path / name, loss=loss, dropout=0.0, max_steps=2).fit()
        traces.append([record["loss"] for record in read_trace(tmp_path / name)])
    assert traces[1] == pytest.approx(traces[0], rel=1e-4)


def test_a_weighted_loss_is_what_is_trained_planned_and_measured(tmp_path):
    def doubled(model, batch, *, chunk_tokens):
        return 2 * target_loss_sum(model, batch, chunk_tokens=chunk_tokens)

    default = build(tmp_path / "one", batch_size=1)
    weighted = build(tmp_path / "two", loss=doubled, batch_size=1)
    assert weighted.plan().peak_bytes >= default.plan().peak_bytes
    assert weighted.evaluate().loss == pytest.approx(2 * default.evaluate().loss, rel=1e-6)
