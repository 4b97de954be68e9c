"""Norms that keep only their input: transformers' numbers, fewer bytes."""

import pickle

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nRMSNorm
from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm
from transformers.models.gemma4_unified.modeling_gemma4_unified import Gemma4UnifiedRMSNorm

from gemma_tuner.models.norms import LeanNorm, use_lean_norms
from gemma_tuner.testing import FAMILIES, tiny_model
from tests.stock import use_stock_norms

STOCK = (Gemma4RMSNorm, Gemma4UnifiedRMSNorm, Gemma3nRMSNorm)


def make_norm(cls, *, with_scale, dtype):
    norm = cls(24, with_scale=with_scale).to(dtype).requires_grad_(False)
    if with_scale:
        norm.weight.normal_(generator=torch.Generator().manual_seed(1))
    return norm


def run(norm, dtype):
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(2, 5, 24, generator=generator).mul(3).to(dtype).requires_grad_()
    output = norm(values)
    weights = torch.randn(output.shape, generator=generator)
    (output.float() * weights).sum().backward()
    return output.detach(), values.grad


@pytest.mark.parametrize("cls", STOCK)
@pytest.mark.parametrize("with_scale", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_numbers_and_gradients_are_those_of_transformers(cls, with_scale, dtype):
    norm = make_norm(cls, with_scale=with_scale, dtype=dtype)
    expected = run(norm, dtype)
    use_lean_norms(norm)
    assert type(norm) is not cls
    found = run(norm, dtype)
    assert torch.equal(found[0], expected[0])
    tolerance = 2**-7 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found[1], expected[1], rtol=tolerance, atol=tolerance)
    use_stock_norms(norm)
    assert type(norm) is cls


def test_backward_needs_the_input_alone():
    norm = make_norm(STOCK[0], with_scale=True, dtype=torch.bfloat16)

    def count_saved():
        saved = {}
        with saved_tensors_hooks(lambda x: saved.update({x.data_ptr(): x}) or x, lambda x: x):
            norm(torch.randn(64, 24, dtype=torch.bfloat16, requires_grad=True))
        return sum(x.nbytes for x in saved.values())

    stock = count_saved()
    use_lean_norms(norm)
    a_row = 24 * 2 + 4  # the input and one float32 factor
    assert count_saved() == 64 * a_row + 24 * 2 <= stock / 2


def test_a_norm_that_trains_is_left_to_transformers():
    norm = make_norm(STOCK[0], with_scale=True, dtype=torch.float32).requires_grad_()
    use_lean_norms(norm)
    run(norm, torch.float32)
    assert norm.weight.grad.abs().sum() > 0


def test_another_norm_under_the_same_name_is_not_replaced(monkeypatch, capsys):
    cls = STOCK[0]
    monkeypatch.setattr(
        cls, "forward", lambda self, x: torch.nn.functional.rms_norm(x, (8,), 1 + self.weight)
    )
    norm = cls(8).requires_grad_(False)
    use_lean_norms(norm)
    assert type(norm) is cls
    assert "another norm than 5.23's" in capsys.readouterr().err


@pytest.mark.parametrize("family", FAMILIES)
def test_every_norm_of_a_family_is_lean(family):
    model, _ = tiny_model(family)
    assert not [name for name, module in model.named_modules() if type(module) in STOCK]


def test_a_model_with_lean_norms_can_be_pickled():
    model, _ = tiny_model("gemma4-e2b")
    norms = {name: m for name, m in model.named_modules() if isinstance(m, LeanNorm)}
    assert norms
    copies = pickle.loads(pickle.dumps(norms))
    for name, module in norms.items():
        assert type(copies[name]) is type(module)
        values = torch.linspace(-1, 1, getattr(module, "weight", torch.ones(64)).shape[0])
        torch.testing.assert_close(copies[name](values), module(values))
