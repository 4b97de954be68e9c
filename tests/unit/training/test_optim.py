"""The optimizer, its rate, and steps that are skipped without leaving a trace."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from gemma_tuner.errors import ConfigError
from gemma_tuner.training.config import TrainConfig
from gemma_tuner.training.optim import (
    build_optimizer,
    find_fused,
    learning_rate_at,
    set_learning_rate,
)
from gemma_tuner.training.step import NonfiniteGuard, guarded_step

CPU = torch.device("cpu")
CONFIG = TrainConfig(max_steps=10, learning_rate=1e-2, weight_decay=0.1)


def make_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3))
    model.get_parameter("0.bias").requires_grad = False
    return model


def fill_gradients(model, seed, value=None):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            if value is not None:
                parameter.grad.view(-1)[1] = value


def snapshot(model, optimizer):
    tensors = {name: p.detach().clone() for name, p in model.named_parameters()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"{index}.{key}": value.clone() for key, value in state.items()}
    return tensors


def assert_same_bits(left, right):
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def take_step(model, optimizer, seed, value=None):
    fill_gradients(model, seed, value)
    return guarded_step(optimizer, clip_grad_norm_(list(model.parameters()), 1.0))


# --- building ---------------------------------------------------------------------------------


def test_only_what_trains_is_optimized_and_fused_is_used():
    model = make_model()
    optimizer = build_optimizer(model.named_parameters(), CONFIG, CPU)
    (group,) = optimizer.param_groups
    assert group["param_names"] == ["0.weight", "1.weight", "1.bias"]
    assert (group["lr"], group["weight_decay"], group["fused"]) == (1e-2, 0.1, True)
    assert find_fused(CPU) == (
        True,
        "cpu has a fused AdamW that skips bad steps without a host sync",
    )


def test_a_device_without_fused_adamw_is_found_out():
    fused, reason = find_fused(torch.device("meta"))
    assert not fused
    assert "meta" in reason


def test_a_frozen_model_is_refused():
    model = make_model().requires_grad_(requires_grad=False)
    with pytest.raises(ConfigError, match="add_lora"):
        build_optimizer(model.named_parameters(), CONFIG, CPU)


def test_half_precision_parameters_are_refused_by_name():
    model = make_model()
    model[1].to(torch.bfloat16)
    with pytest.raises(ConfigError, match=r"1\.weight is torch\.bfloat16.*torch\.float32"):
        build_optimizer(model.named_parameters(), CONFIG, CPU)


def test_non_contiguous_parameters_are_refused_by_name():
    model = make_model()
    model[1].weight = nn.Parameter(torch.ones(5, 3).t())
    with pytest.raises(ConfigError, match=r"1\.weight with shape \(3, 5\).*not contiguous"):
        build_optimizer(model.named_parameters(), CONFIG, CPU)


def test_parameters_elsewhere_are_refused_by_name():
    with pytest.raises(ConfigError, match=r"0\.weight is on cpu, the run on meta"):
        build_optimizer(make_model().named_parameters(), CONFIG, torch.device("meta"))


def test_steps_equal_plain_adamw():
    model = make_model()
    plain = copy.deepcopy(model)
    optimizer = build_optimizer(model.named_parameters(), CONFIG, CPU)
    reference = torch.optim.AdamW(
        [p for p in plain.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1
    )
    for seed in range(5):
        take_step(model, optimizer, seed)
        fill_gradients(plain, seed)
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        reference.step()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


# --- learning rate ----------------------------------------------------------------------------

TRANSFORMERS = {
    "constant": lambda opt, warmup, total: get_constant_schedule_with_warmup(opt, warmup),
    "linear": get_linear_schedule_with_warmup,
    "cosine": get_cosine_schedule_with_warmup,
}


@pytest.mark.parametrize("schedule", TRANSFORMERS)
@pytest.mark.parametrize(("warmup", "total"), [(0, 7), (3, 20), (1, 2), (19, 20)])
def test_rates_equal_transformers(schedule, warmup, total):
    config = TrainConfig(
        max_steps=total, schedule=schedule, warmup_steps=warmup, learning_rate=3e-4
    )
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(1))], lr=3e-4)
    scheduler = TRANSFORMERS[schedule](optimizer, warmup, total)
    theirs = []
    for _ in range(total + 1):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    ours = [learning_rate_at(step, config, total) for step in range(total)]
    # Ours rises from the first step on; theirs spends it at 0.
    expected = [theirs[step + 1 if step < warmup else step] for step in range(total)]
    assert ours == pytest.approx(expected, rel=1e-12)
    assert max(ours) == pytest.approx(3e-4)
    assert min(ours) > 0


def test_rates_by_hand():
    config = TrainConfig(max_steps=6, schedule="linear", warmup_steps=2, learning_rate=1.0)
    rates = [learning_rate_at(step, config, 6) for step in range(7)]
    assert rates == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    assert learning_rate_at(99, config, 6) == 0.0


def test_set_learning_rate_reaches_the_step():
    model = make_model()
    optimizer = build_optimizer(model.named_parameters(), CONFIG, CPU)
    before = snapshot(model, optimizer)["0.weight"]
    set_learning_rate(optimizer, 0.0)
    take_step(model, optimizer, 0)
    assert torch.equal(snapshot(model, optimizer)["0.weight"], before)
    set_learning_rate(optimizer, 1e-3)
    take_step(model, optimizer, 1)
    assert not torch.equal(snapshot(model, optimizer)["0.weight"], before)


# --- skipping --------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_bad_gradient_leaves_no_trace(fused, value):
    model = make_model()
    optimizer = build_optimizer(model.named_parameters(), CONFIG, CPU)
    optimizer.param_groups[0]["fused"] = fused
    for seed in range(3):
        assert take_step(model, optimizer, seed).item() == 0.0
    before = snapshot(model, optimizer)
    assert before["0.step"].item() == 3.0
    for seed in range(3, 6):
        assert take_step(model, optimizer, seed, value).item() == 1.0
        assert_same_bits(snapshot(model, optimizer), before)

    # and the run goes on as if the bad steps had never been
    clean = make_model()
    clean_optimizer = build_optimizer(clean.named_parameters(), CONFIG, CPU)
    clean_optimizer.param_groups[0]["fused"] = fused
    for seed in (0, 1, 2, 9):
        take_step(clean, clean_optimizer, seed)
    take_step(model, optimizer, 9)
    assert_same_bits(snapshot(model, optimizer), snapshot(clean, clean_optimizer))


def test_a_bad_first_step_leaves_no_trace():
    model = make_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model.named_parameters(), CONFIG, CPU)
    take_step(model, optimizer, 0, math.nan)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
    for state in optimizer.state.values():
        assert not any(value.any() for value in state.values())


@pytest.mark.parametrize(("fused", "is_retried"), [(True, True), (False, False)])
def test_only_a_step_that_changes_nothing_before_it_has_its_memory_is_tried_again(
    fused, is_retried
):
    class RunsOut(torch.optim.AdamW):
        calls = 0

        def step(self, closure=None):
            self.calls += 1
            if self.calls == 1:  # one that is not fused has changed some parameters by now
                raise torch.OutOfMemoryError("no room")
            return super().step(closure)

    model = make_model()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = RunsOut(parameters, lr=1e-2, fused=fused, foreach=False)
    if is_retried:
        take_step(model, optimizer, 0)
    else:
        with pytest.raises(torch.OutOfMemoryError):
            take_step(model, optimizer, 0)
    assert optimizer.calls == 1 + is_retried
    assert {state["step"].item() for state in optimizer.state.values()} == (
        {1} if is_retried else set()
    )


def test_a_fused_step_never_waits_for_the_device():
    """On fake tensors any read-back of a value raises."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

    with FakeTensorMode(), torch.device("cpu"):
        model = make_model()
        optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], fused=True
        )
        guard = NonfiniteGuard(CPU)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        grad_norm = clip_grad_norm_(list(model.parameters()), 1.0)
        guard.count(guarded_step(optimizer, grad_norm))
        with pytest.raises(DataDependentOutputException):
            guard.total.item()


def test_the_guard_counts():
    guard = NonfiniteGuard(CPU)
    seen = []
    for skipped in (0.0, 1.0, 1.0, 0.0, 1.0):
        guard.count(torch.tensor(skipped))
        seen.append((guard.total.item(), guard.consecutive.item()))
    assert seen == [(0, 0), (1, 1), (2, 2), (2, 0), (3, 1)]
    resumed = NonfiniteGuard(CPU, total=3, consecutive=1)
    resumed.count(torch.tensor(1.0))
    assert (resumed.total.item(), resumed.consecutive.item()) == (4, 2)
