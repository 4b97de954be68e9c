"""Training on packed weights is training on the dense model of the values that they stand for."""

import re

import pytest
import torch
from safetensors.torch import load
from torch import nn

from gemma_tuner.collators.multimodal import MultimodalCollator
from gemma_tuner.models.grids import Grid
from gemma_tuner.models.lora import LoraConfig, add_lora
from gemma_tuner.models.loss import target_loss_sum
from gemma_tuner.models.modes import begin_training
from gemma_tuner.models.packed import PackedExperts, PackedLinear, replace_packed
from gemma_tuner.testing import FAMILIES, tiny_model
from tests import runs
from tests.parity.test_exactness import gradients, make_examples, randomize_adapters

DECODER = re.compile(
    r"model\.language_model\.layers\.\d+\."
    r"((self_attn|mlp)\.\w+_proj|per_layer_(input_gate|projection)|experts)"
)
GRIDS = {
    "symmetric-32": Grid(4, 32),
    "affine-32": Grid(4, 32, is_affine=True),
    "8 bits": Grid(8, 32, is_affine=True),
}


def list_packed(model, grid):
    return {
        name: grid
        for name, module in model.named_modules()
        if DECODER.fullmatch(name)
        and grid.fits(getattr(module, "in_features", 0) or module.down_proj.shape[-1])
    }


def unpack_in_place(dense, packed):
    """Give a dense model the values of a packed one."""
    for name, module in packed.named_modules():
        original = dense.get_submodule(name)
        if isinstance(module, PackedLinear):
            original.weight = nn.Parameter(module.weight, requires_grad=False)
        elif isinstance(module, PackedExperts):
            for pile in ("gate_up_proj", "down_proj"):
                matrices = [module.read_expert(f"{pile}_", i) for i in range(module.num_experts)]
                setattr(original, pile, nn.Parameter(torch.stack(matrices), requires_grad=False))


def make_pair(family, grid, dtype):
    packed, processor = tiny_model(family)
    dense, _ = tiny_model(family)
    packed, dense = packed.to(dtype), dense.to(dtype)
    names = list_packed(packed, grid)
    assert len(names) > 10
    replace_packed(packed, names)
    unpack_in_place(dense, packed)
    return packed, dense, processor


def take_gradients(model, batch, layers):
    begin_training(model, checkpointed_layers=layers)
    loss = target_loss_sum(model, batch, chunk_tokens=64)
    (loss / batch.num_target_tokens).backward()
    return loss.detach(), gradients(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_the_dense_model(family, grid, variant, dtype):
    packed, dense, processor = make_pair(family, grid, dtype)
    dense.set_experts_implementation("eager")
    batch = MultimodalCollator(processor)(make_examples(family))
    config = LoraConfig(rank=4, variant=variant)
    packed, dense = add_lora(packed, config), add_lora(dense, config)
    randomize_adapters(packed)
    randomize_adapters(dense)
    expected_loss, expected = take_gradients(dense, batch, None)
    assert expected
    for layers in (None, 0):
        loss, found = take_gradients(packed, batch, layers)
        assert torch.equal(loss, expected_loss)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def run_packed(folder, monkeypatch, **settings):
    def make(family):
        model, processor = tiny_model(family)
        replace_packed(model, list_packed(model, Grid(4, 32)))
        return model, processor

    monkeypatch.setattr(runs, "tiny_model", make)
    return runs.run(folder, **settings)


def read_adapter(folder):
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(tmp_path, monkeypatch):
    run_packed(tmp_path / "whole", monkeypatch)
    run_packed(tmp_path / "stopped", monkeypatch, stop_after=2)
    run_packed(tmp_path / "stopped", monkeypatch, resume=True)
    assert read_adapter(tmp_path / "stopped") == read_adapter(tmp_path / "whole")


def test_how_a_step_is_cut_changes_nothing(tmp_path, monkeypatch):
    smooth = {"epsilon": 0.1}  # else AdamW makes a step of rounding where a gradient is nothing
    run_packed(tmp_path / "two", monkeypatch, **smooth)
    run_packed(tmp_path / "one", monkeypatch, batch_size=1, gradient_accumulation=4, **smooth)
    two, one = (load(read_adapter(tmp_path / name)) for name in ("two", "one"))
    assert all(torch.allclose(two[name], one[name], atol=1e-5) for name in two)
