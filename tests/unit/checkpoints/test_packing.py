"""A packed checkpoint is loaded strictly, trained on, and merged into what was trained on."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import gemma_tuner as gt
from gemma_tuner.checkpoints.weights import list_tensors
from gemma_tuner.errors import CheckpointError, ConfigError
from gemma_tuner.models.few_bits.grids import Grid
from gemma_tuner.models.few_bits.layers import (
    PackedExperts,
    PackedLayer,
    PackedLinear,
    list_packable,
    replace_packed,
)
from gemma_tuner.models.few_bits.tables import (
    PackedEmbedding,
    PackedHead,
    name_table,
    replace_table,
)
from gemma_tuner.testing import FAMILIES, tiny_model

TABLE = Grid(8, 64, is_affine=True)


@pytest.fixture(scope="module", params=FAMILIES)
def base(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "base"
    model, processor = tiny_model(request.param)
    model.to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def read_logits(model):
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


@pytest.mark.parametrize(
    "options", [{"head_bits": 8}, {"grid": "affine", "group": 32}, {"bits": 8, "group": 32}]
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_is_loaded_is_the_model_packed_in_memory(base, tmp_path, options, dtype):
    folder = gt.pack(base, tmp_path / "packed", **options)
    loaded, _ = gt.load_model(folder, device="cpu", dtype=dtype)
    has_table = "head_bits" in options
    grid = Grid(options.get("bits", 4), 32, is_affine=not has_table)
    packed, _ = gt.load_model(base, device="cpu", dtype="bfloat16")
    expected, _ = gt.load_model(base, device="cpu", dtype=dtype)
    names = list_packable(packed, grid)
    assert len(names) > 10
    if has_table:
        names[name_table(packed.config.model_type)] = TABLE
    replace_packed(packed, replace_table(packed, names))
    for name in names:
        expected.set_submodule(name, packed.get_submodule(name).to(getattr(torch, dtype)))
    if has_table:
        expected.set_output_embeddings(PackedHead(expected.get_input_embeddings()))
    found = {name for name, module in loaded.named_modules() if isinstance(module, PackedLayer)}
    assert found == names.keys()
    assert loaded.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert torch.equal(read_logits(loaded), read_logits(expected))


def change(folder, edit):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_what_is_missing_or_of_another_shape_is_named(base, tmp_path):
    folder = gt.pack(base, tmp_path / "packed")
    name = next(
        name for name in load_file(folder / "model.safetensors") if name.endswith("q_proj.scales")
    )
    change(folder, lambda tensors: tensors.update({name: tensors[name][:-1].clone()}))
    with pytest.raises(CheckpointError, match=r"another shape .*q_proj\.scales"):
        gt.load_model(folder, device="cpu")
    change(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=r"1 missing .*q_proj\.scales"):
        gt.load_model(folder, device="cpu")
    table = gt.pack(base, tmp_path / "table", head_bits=8)
    change(table, lambda tensors: tensors.pop("model.language_model.embed_tokens.biases"))
    with pytest.raises(CheckpointError, match=r"1 missing .*embed_tokens\.biases"):
        gt.load_model(table, device="cpu")
    config = json.loads((folder / "config.json").read_text())
    for wrong in ({"model.nowhere": "symmetric-4-32"}, {"lm_head": "ternary-2-32"}, ["lm_head"]):
        (folder / "config.json").write_text(json.dumps(config | {"packed": wrong}))
        with pytest.raises(CheckpointError, match="packed"):
            gt.load_model(folder, device="cpu")


def test_what_is_packed_is_not_packed_again_and_wrong_settings_are_refused(base, tmp_path):
    folder = gt.pack(base, tmp_path / "packed", bits=8)
    with pytest.raises(CheckpointError, match="packed already"):
        gt.pack(folder, tmp_path / "again")
    with pytest.raises(ConfigError, match="bits is 3"):
        gt.pack(base, tmp_path / "new", bits=3)
    with pytest.raises(ConfigError, match="head_bits is 4"):
        gt.pack(base, tmp_path / "new", head_bits=4)
    with pytest.raises(ConfigError, match="grid"):
        gt.pack(base, tmp_path / "new", grid="nf4")


def test_exports_read_the_weights_that_were_trained_on(base, tmp_path):
    folder = gt.pack(base, tmp_path / "packed", head_bits=8)
    model, _ = gt.load_model(folder, device="cpu", dtype="bfloat16")
    weights = list_tensors(folder)
    assert weights.keys() == list_tensors(base).keys()
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear | PackedEmbedding):
            stored, weight = weights[f"{name}.weight"], module.weight[:]
            assert torch.equal(stored.read(), weight)
            assert b"".join(stored.copy()) == weight.view(torch.uint8).numpy().tobytes()
        elif isinstance(module, PackedExperts):
            stored = weights[f"{name}.down_proj"].read()
            assert torch.equal(stored[3], module.read_expert("down_proj_", 3))


def test_a_head_apart_from_its_embedding_is_not_packed(base, tmp_path):
    folder = Path(shutil.copytree(base, tmp_path / "untied"))
    change(folder, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(2, 64)}))
    with pytest.raises(CheckpointError, match="leave head_bits out"):
        gt.pack(folder, tmp_path / "packed", head_bits=8)


def test_a_merged_run_computes_what_its_adapter_does(base, tmp_path):
    folder = gt.pack(base, tmp_path / "packed", head_bits=8)
    model, _ = gt.load_model(folder, device="cpu", dtype="float32")
    model = gt.add_lora(model, gt.LoraConfig(rank=4))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    model.save_pretrained(tmp_path / "adapter")
    gt.export_merged(tmp_path / "adapter", tmp_path / "merged", base=folder)
    assert "packed" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    merged, _ = gt.load_model(tmp_path / "merged", device="cpu", dtype="float32")
    assert not any(isinstance(module, PackedLayer | PackedHead) for module in merged.modules())
    expected, found = read_logits(model), read_logits(merged)
    before, _ = gt.load_model(folder, device="cpu", dtype="float32")
    moved = (expected - read_logits(before)).norm()
    assert (found - expected).norm() < 0.2 * moved  # merged weights are rounded to bfloat16


def test_the_plan_counts_packed_weights_as_they_stay(base, tmp_path):
    folder = gt.pack(base, tmp_path / "packed", head_bits=8)
    model, _ = gt.load_model(folder, device="cpu", dtype="bfloat16")
    table = model.get_input_embeddings()
    model = gt.add_lora(model, gt.LoraConfig(rank=4))
    plan = gt.plan(folder, lora=gt.LoraConfig(rank=4), memory_gib=8, max_tokens=64, device="mps")
    dense = gt.plan(base, lora=gt.LoraConfig(rank=4), memory_gib=8, max_tokens=64, device="mps")
    decoder = model.get_base_model().get_decoder().layers
    tensors = [*decoder.parameters(), *decoder.buffers()]
    held = sum(x.nbytes for x in tensors if not x.requires_grad)
    assert (
        held <= plan.footprint.resident["decoder"] <= 2 * held
    )  # the allocator rounds small tensors
    assert plan.footprint.resident["decoder"] < 0.8 * dense.footprint.resident["decoder"]
    held = sum(x.nbytes for x in table.buffers())
    assert held <= plan.footprint.resident["embeddings"] < held + 3 * 512


@pytest.mark.parametrize("wish", [{"variant": "full"}, {"targets": ("experts",)}])
def test_packed_weights_are_not_trained_themselves(wish):
    model, _ = tiny_model("gemma4-26b-a4b")
    replace_packed(model, list_packable(model, Grid(4, 32)))
    with pytest.raises(ConfigError, match="not packed"):
        gt.add_lora(model, gt.LoraConfig(rank=2, **wish))
