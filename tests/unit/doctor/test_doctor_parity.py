"""Steps against the CPU: the comparison finds what is wrong, and a real step passes."""

from dataclasses import replace

import pytest
import torch

from gemma_tuner.doctor import parity
from gemma_tuner.doctor.parity import (
    MODALITIES,
    find_distance,
    judge_step,
    make_batch,
    make_model,
    take_step,
)
from gemma_tuner.testing import FAMILIES


@pytest.fixture(scope="module")
def model():
    return make_model("gemma4-e2b", torch.float32)


@pytest.fixture(scope="module")
def batch():
    return make_batch("gemma4-e2b", "text")


@pytest.fixture(scope="module")
def step(model, batch):
    return take_step(model, batch, checkpointing=False)


NONE = find_distance((1.0, {"a": torch.ones(2)}), (1.0, {"a": torch.ones(2)}))
# What the CPU's bfloat16 may do to a tiny random model.
ROUNDING = replace(
    NONE, loss_difference=3e-3, smallest_cosine=0.8, whole_cosine=0.98, norm_ratio=0.97
)


def test_every_family_is_there():
    assert set(MODALITIES) == set(FAMILIES)
    assert sum(map(len, MODALITIES.values())) == 13


def test_a_step_reaches_adapters_and_equals_itself(model, batch, step):
    loss, gradients = step
    assert 1 < loss < 20
    assert len(gradients) == 96  # two of each of 48 adapters of the decoder, none of a tower
    assert all(gradient.norm() > 0 for gradient in gradients.values())
    with_checkpointing = take_step(model, batch, checkpointing=True)
    distance = find_distance(with_checkpointing, step)
    assert distance.loss_difference == 0.0
    assert judge_step(distance, NONE)[0] == "ok"


@pytest.mark.parametrize(
    "plant",
    [
        lambda gradient: gradient * 1.01,
        lambda gradient: -gradient,
        lambda gradient: gradient.flip(0),
        lambda gradient: torch.zeros_like(gradient),
        lambda gradient: torch.full_like(gradient, torch.nan),
        lambda gradient: gradient + 0.05 * gradient.norm() / gradient.numel() ** 0.5,
    ],
)
def test_one_wrong_gradient_is_found_in_float32(step, plant):
    loss, gradients = step
    name = max(gradients, key=lambda name: float(gradients[name].norm()))
    distance = find_distance((loss, {**gradients, name: plant(gradients[name])}), step)
    result, reason, figures = judge_step(distance, NONE)
    assert result == "wrong"
    assert reason
    assert figures["whole_cosine"] == pytest.approx(distance.whole_cosine, nan_ok=True)


def test_a_gradient_that_is_missing_or_too_many_is_found(step):
    loss, gradients = step
    name = next(iter(gradients))
    fewer = {other: x for other, x in gradients.items() if other != name}
    for distance in (
        find_distance((loss, fewer), step),
        find_distance(step, (loss, fewer)),
    ):
        result, reason, _ = judge_step(distance, NONE)
        assert result == "wrong"
        assert name in reason


def test_another_loss_is_found(step):
    loss, gradients = step
    for wrong in (loss * 1.001, float("nan")):
        assert judge_step(find_distance((wrong, gradients), step), NONE)[0] == "wrong"


def test_bfloat16_may_round_as_the_cpu_does_and_not_much_more():
    assert judge_step(ROUNDING, ROUNDING)[0] == "ok"
    assert judge_step(replace(ROUNDING, whole_cosine=0.95), ROUNDING)[0] == "ok"
    for wrong in (
        {"whole_cosine": 0.9},
        {"norm_ratio": 1.2},
        {"loss_difference": 0.05},
        {"whole_cosine": float("nan")},
    ):
        assert judge_step(replace(ROUNDING, **wrong), ROUNDING)[0] == "wrong", wrong


def test_a_device_that_refuses_the_model_is_a_result(monkeypatch):
    def refuse(device):
        raise RuntimeError("no such dtype here")

    def make_refused(family, dtype):
        model = make_model(family, dtype)
        monkeypatch.setattr(model, "to", refuse)
        return model

    monkeypatch.setattr(parity, "MODALITIES", {"gemma4-31b": ("text",)})
    monkeypatch.setattr(parity, "make_model", make_refused)
    checks = parity.check_family("gemma4-31b", torch.device("cpu"))
    assert [check.result for check in checks] == ["wrong"] * 4
    assert checks[0].reason == "the device refuses it: RuntimeError: no such dtype here"
