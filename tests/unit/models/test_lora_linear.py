"""Adapters with fewer passes: PEFT's numbers and gradients."""

import peft
import pytest
import torch
from peft.tuners import lora
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from gemma_tuner.collators.text import TextCollator
from gemma_tuner.models import lora_linear
from gemma_tuner.models.lora import LoraConfig, add_lora
from gemma_tuner.models.lora_linear import LoraLinear, use_lean_adapters
from gemma_tuner.models.loss import target_loss_sum
from gemma_tuner.models.modes import begin_training
from gemma_tuner.testing import tiny_model
from tests.examples import example


class OneLayer(nn.Module):
    def __init__(self, *, bias=False):
        super().__init__()
        self.layer = nn.Linear(12, 20, bias=bias)

    def forward(self, x):
        return self.layer(x)


def make_layer(dtype=torch.float64, *, bias=False, **options):
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=3, lora_alpha=7, target_modules=["layer"], **options)
    model = peft.get_peft_model(OneLayer(bias=bias), settings, autocast_adapter_dtype=False)
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter).to(dtype)
    return model


def run(model, dtype=torch.float64):
    x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1)).to(dtype)
    x.requires_grad_()
    output = model(x)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    (output * weights).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return {"output": output.detach(), "x": x.grad, **found}


def assert_same(model):
    expected = run(model)
    use_lean_adapters(model)
    assert type(model.base_model.model.layer) is LoraLinear
    found = run(model)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-11, atol=1e-11)


def test_numbers_and_gradients_are_those_of_peft():
    assert_same(make_layer())


@pytest.mark.parametrize(
    "options",
    [{"bias": True}, {"lora_bias": True}, {"lora_dropout": 0.5}, {"use_rslora": True}],
    ids=str,
)
def test_what_is_not_plain_is_as_peft_has_it(options):
    bias = options.pop("bias", False)
    assert_same(make_layer(bias=bias, **options).eval())


def test_what_comes_out_may_be_changed_in_place():
    model = make_layer()
    use_lean_adapters(model)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    expected = torch.autograd.grad((model(x) + 1).square().sum(), list(model.parameters())[1:])
    output = model(x)
    output += 1  # as the towers' layers do with their residuals
    found = torch.autograd.grad(output.square().sum(), list(model.parameters())[1:])
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_under_autocast_it_is_as_peft_has_it():
    model = make_layer(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        expected = run(model, torch.float32)
        use_lean_adapters(model)
        found = run(model, torch.float32)
    assert expected["output"].dtype == torch.bfloat16
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_dropout_drops_while_it_trains():
    model = make_layer(lora_dropout=0.5).train()
    use_lean_adapters(model)
    torch.manual_seed(1)
    one, other = run(model), run(model)
    assert not torch.equal(one["output"], other["output"])


def test_adapters_that_are_off_merged_or_two_are_as_peft_has_them():
    model = make_layer()
    layer = model.base_model.model.layer
    base = run(layer.base_layer)["output"]
    use_lean_adapters(model)
    adapted = run(model)["output"]
    with model.disable_adapter():
        assert torch.equal(run(model)["output"], base)
    model.merge_adapter()
    torch.testing.assert_close(run(model)["output"], adapted, rtol=1e-11, atol=1e-11)
    model.unmerge_adapter()
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["layer"]))
    layer.to(torch.float64)
    nn.init.normal_(layer.lora_B["second"].weight)
    model.base_model.set_adapter(["default", "second"])
    both = run(model)["output"]
    model.base_model.set_adapter(["second"])
    second = run(model)["output"]
    torch.testing.assert_close(both, adapted + second - base, rtol=1e-9, atol=1e-9)


def test_an_input_without_gradient_costs_none():
    model = make_layer(torch.float32)
    use_lean_adapters(model)

    def count(*, requires_grad):
        x = torch.randn(10, 12, requires_grad=requires_grad)
        with FlopCounterMode(display=False) as counter:
            model(x).sum().backward()
        return counter.get_total_flops()

    of_x = 2 * 10 * (12 * 20 + 3 * 12)
    assert count(requires_grad=True) - count(requires_grad=False) == of_x
    # forward: W, A, B; backward: of the inner rows, of A, of B
    assert count(requires_grad=False) == 2 * 10 * (12 * 20 + 2 * 3 * 12 + 3 * 3 * 20)


def test_dora_is_left_to_peft():
    model = make_layer(use_dora=True)
    use_lean_adapters(model)
    assert type(model.base_model.model.layer) is lora.Linear


def test_a_dora_adapter_that_is_added_later_is_as_peft_has_it():
    model = make_layer()
    use_lean_adapters(model)
    torch.manual_seed(3)
    settings = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["layer"], use_dora=True)
    model.add_adapter("dora", settings)
    model.to(torch.float64).set_adapter("dora")
    layer = model.base_model.model.layer
    nn.init.normal_(layer.lora_B["dora"].weight)
    layer.lora_magnitude_vector["dora"].weight.data.mul_(1.5)
    found = run(model)
    assert type(layer) is LoraLinear
    layer.__class__ = lora.Linear
    expected = run(model)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


class Packed(nn.Module):
    """A frozen layer that keeps no weight, only what makes it: bytes and a scale per row."""

    def __init__(self, layer):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bias = None
        scale = layer.weight.abs().amax(1, keepdim=True) / 127
        self.numbers = nn.Buffer((layer.weight / scale).round().to(torch.int8))
        self.scale = nn.Buffer(scale.detach())

    @property
    def weight(self):
        return self.numbers * self.scale

    def forward(self, x):
        return nn.functional.linear(x, self.weight)


def list_saved(layer):
    """The shapes that are kept for backward."""
    saved = []
    with saved_tensors_hooks(lambda x: saved.append(x.shape) or x, lambda x: x):
        layer(torch.randn(5, layer.in_features))
    return saved


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_a_layer_that_unpacks_its_weight_is_adapted_as_a_dense_one(monkeypatch, variant):
    monkeypatch.setattr(lora_linear, "LINEAR", (nn.Linear, Packed))
    found = []
    for is_packed in (False, True):
        gemma, processor = tiny_model("gemma4-e2b")
        for layer in gemma.get_decoder().layers:
            packed = Packed(layer.mlp.up_proj)
            layer.mlp.up_proj.weight.data = packed.weight
            if is_packed:
                layer.mlp.up_proj = packed
        model = add_lora(gemma, LoraConfig(rank=3, variant=variant))
        batch = TextCollator(processor)([example("How much?", answer="As much as you like.")])
        begin_training(model)
        adapted = gemma.get_decoder().layers[0].mlp.up_proj
        loss = target_loss_sum(model, batch, chunk_tokens=16)
        loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        found.append((loss.detach(), gradients))
        if is_packed and variant == "lora":
            assert type(adapted) is LoraLinear
            assert adapted.base_layer.numbers.shape not in list_saved(adapted)
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1].keys() == found[1][1].keys()
    for name, gradient in found[0][1].items():
        assert torch.equal(gradient, found[1][1][name]), name
