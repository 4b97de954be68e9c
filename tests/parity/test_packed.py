"""Training on packed weights is training on the dense model of the values that they stand for."""

import copy
import re
from contextlib import ExitStack
from functools import cache
from itertools import product
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load
from torch import nn

from gemma_tuner.collators.multimodal import MultimodalCollator
from gemma_tuner.models.few_bits.grids import Grid
from gemma_tuner.models.few_bits.layers import PackedExperts, PackedLayer, replace_packed
from gemma_tuner.models.few_bits.tables import (
    PackedEmbedding,
    PackedHead,
    name_table,
    replace_table,
)
from gemma_tuner.models.lora import LoraConfig, add_lora, unwrap_peft
from gemma_tuner.models.loss import target_loss_sum
from gemma_tuner.models.modes import begin_training
from gemma_tuner.testing import FAMILIES, tiny_model
from gemma_tuner.testing.models import tiny
from tests import runs
from tests.parity.test_exactness import gradients, make_examples, randomize_adapters
from tests.unit.training import test_micro_batches as small_devices

DECODER = re.compile(
    r"model\.language_model\.layers\.\d+\."
    r"((self_attn|mlp)\.\w+_proj|per_layer_(input_gate|projection)|experts)"
)
SYMMETRIC = Grid(4, 32)
TABLE = Grid(8, 64, is_affine=True)
# Of the decoder, and of embedding and head where they are packed too.
GRIDS = {
    "symmetric 32": (SYMMETRIC, None),
    "affine 32": (Grid(4, 32, is_affine=True), None),
    "affine 64": (Grid(4, 64, is_affine=True), None),
    "affine 128": (Grid(4, 128, is_affine=True), None),
    "8 bits": (Grid(8, 64, is_affine=True), None),
    "8-bit head": (SYMMETRIC, TABLE),
}
DTYPES = (torch.float32, torch.bfloat16)


@cache
def make_batch(family):
    return MultimodalCollator(make_base(family)[1])(make_examples(family))


@cache
def make_base(family):
    """A tiny model wide enough for rows of whole groups of 128."""
    wide = {"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 128}
    with ExitStack() as stack:
        for sizes in (tiny._E2B_TEXT, tiny._LARGE_TEXT, tiny._MOE_TEXT, tiny._GEMMA3N_TEXT):
            own = {name: size for name, size in wide.items() if name in sizes}
            stack.enter_context(patch.dict(sizes, own))
        model, processor = tiny_model(family)
    model.set_experts_implementation("eager")  # which sums in the order that packed experts do
    return model, processor


def list_packed(model, grid):
    return {
        name: grid
        for name, module in model.named_modules()
        if DECODER.fullmatch(name)
        and grid.fits(getattr(module, "in_features", 0) or module.down_proj.shape[-1])
    }


def make_packed(family, grid, table=None, dtype=torch.float32):
    model = copy.deepcopy(make_base(family)[0]).to(dtype)
    names = list_packed(model, grid)
    assert len(names) > 30
    if table is not None:
        names[name_table(model.config.model_type)] = table
    replace_packed(model, replace_table(model, names))
    return model


def unpack_in_place(model, family):
    """Put dense layers of the same values in the places of packed ones, adapters and all."""
    base = make_base(family)[0]
    for name, module in list(model.named_modules()):
        if not isinstance(module, PackedLayer):
            continue
        own = name.removeprefix("base_model.model.").removesuffix(".base_layer")
        dense = copy.deepcopy(base.get_submodule(own))
        if isinstance(module, PackedExperts):
            for pile in ("gate_up_proj", "down_proj"):
                matrices = [module.read_expert(f"{pile}_", i) for i in range(module.num_experts)]
                setattr(dense, pile, nn.Parameter(torch.stack(matrices), requires_grad=False))
        else:
            dense.weight = nn.Parameter(module.weight[:], requires_grad=False)
        model.set_submodule(name, dense)
        if isinstance(module, PackedEmbedding):
            head = copy.deepcopy(base.lm_head)
            head.weight = dense.weight
            unwrap_peft(model).set_output_embeddings(head)
    assert not any(isinstance(module, PackedLayer | PackedHead) for module in model.modules())


def take_gradients(model, batch, layers):
    begin_training(model, checkpointed_layers=layers)
    loss = target_loss_sum(model, batch, chunk_tokens=5)
    (loss / batch.num_target_tokens).backward()
    return loss.detach(), gradients(model)


def list_cases():
    """All of them, of which an eighth runs where slow ones do not; rsLoRA differs in a factor."""
    for index, (family, grid) in enumerate(product(FAMILIES, GRIDS)):
        for number, (dtype, variant) in enumerate(product(DTYPES, ("lora", "dora"))):
            fast = index % 2 == 0 and number == (index + index // len(GRIDS)) % 4
            marks = () if fast else pytest.mark.slow
            yield pytest.param(family, grid, variant, dtype, marks=marks)
    for family, grid in zip(FAMILIES, GRIDS, strict=False):
        yield pytest.param(family, grid, "rslora", torch.bfloat16, marks=pytest.mark.slow)


@pytest.mark.parametrize(("family", "grid", "variant", "dtype"), [*list_cases()])
def test_loss_and_gradients_are_those_of_the_dense_model(family, grid, variant, dtype):
    model = make_packed(family, *GRIDS[grid], dtype)
    model = add_lora(model, LoraConfig(rank=4, variant=variant))
    randomize_adapters(model)
    batch = make_batch(family)
    every_layer, none = (take_gradients(model, batch, layers) for layers in (None, 0))
    unpack_in_place(model, family)
    expected_loss, expected = take_gradients(model, batch, None)
    assert expected
    for loss, found in (every_layer, none):
        assert torch.equal(loss, expected_loss)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.fixture
def packed_runs(monkeypatch):
    """Runs are on packed weights, embedding and head too."""

    def make(family):
        return make_packed(family, SYMMETRIC, TABLE), make_base(family)[1]

    monkeypatch.setattr(runs, "tiny_model", make)


on_packed_weights = pytest.mark.usefixtures("packed_runs")


def read_adapter(folder):
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


@on_packed_weights
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(tmp_path):
    runs.run(tmp_path / "whole")
    runs.run(tmp_path / "stopped", stop_after=2)
    runs.run(tmp_path / "stopped", resume=True)
    assert read_adapter(tmp_path / "stopped") == read_adapter(tmp_path / "whole")


@on_packed_weights
def test_how_a_step_is_cut_changes_nothing(tmp_path):
    smooth = {"epsilon": 0.1}  # else AdamW makes a step of rounding where a gradient is nothing
    runs.run(tmp_path / "two", **smooth)
    runs.run(tmp_path / "one", batch_size=1, gradient_accumulation=4, **smooth)
    two, one = (load(read_adapter(tmp_path / name)) for name in ("two", "one"))
    assert all(torch.allclose(two[name], one[name], atol=1e-5) for name in two)


@on_packed_weights
def test_what_does_not_fit_is_halved_and_the_step_is_the_same(tmp_path):
    whole, _ = small_devices.fit(tmp_path / "whole", 4, **small_devices.IMAGES)
    cut, events = small_devices.fit(tmp_path / "cut", 1, **small_devices.IMAGES)
    assert [size for size, _ in cut.stepper.tried] == [4, 2, 1, 1, 1, 1]
    assert events == [1, 1]
    for a, b in zip(*map(small_devices.gradient_like, (whole, cut)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-7)
