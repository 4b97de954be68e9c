"""QA-LoRA: adapters on pooled inputs, whose merge changes the biases of a packed base alone."""

import copy
import json

import gguf
import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import gemma_tuner as gt
from gemma_tuner.checkpoints.mlx import from_mlx, to_mlx
from gemma_tuner.checkpoints.weights import list_tensors
from gemma_tuner.errors import CheckpointError, ConfigError
from gemma_tuner.export.adapter import export_adapter
from gemma_tuner.export.gguf import export_gguf
from gemma_tuner.export.merged import export_merged
from gemma_tuner.models.adapter_files import save_adapter
from gemma_tuner.models.few_bits.grids import Grid
from gemma_tuner.models.few_bits.layers import replace_packed
from gemma_tuner.models.lora import LoraConfig, add_lora
from gemma_tuner.models.lora_linear import PooledLinear
from gemma_tuner.testing import tiny_model
from gemma_tuner.training.adapters import load_adapter
from tests import runs
from tests.examples import EVERY_FAMILY
from tests.export_parts import add_trained_lora, logits, save_base, text_inputs
from tests.parity.test_exactness import (
    assert_equal_gradients,
    randomize_adapters,
)
from tests.parity.test_packed import (
    list_packed,
    make_batch,
    make_packed,
    take_gradients,
    unpack_in_place,
)

AFFINE = Grid(4, 32, is_affine=True)
OF_TO_MLX = [family for family in EVERY_FAMILY if "gemma3n" not in str(family)]


class Pooled(nn.Module):
    """A layer and its adapter as the paper writes them, in plain torch."""

    def __init__(self, layer, adapter):
        super().__init__()
        self.layer = layer
        part = adapter.lora_A["default"]
        self.a = nn.Parameter(part.weight.detach().clone())
        self.b = nn.Parameter(adapter.lora_B["default"].weight.detach().clone())
        self.group, self.scale = part.group, adapter.scaling["default"]

    def forward(self, x):
        pooled = x.unflatten(-1, (-1, self.group)).sum(-1) / self.group**0.5
        return self.layer(x) + self.scale * (pooled @ self.a.T @ self.b.T)


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_gradients_are_those_of_a_dense_model_with_pooled_adapters(family):
    packed, batch = make_packed(family, AFFINE), make_batch(family)
    dense = copy.deepcopy(packed)
    unpack_in_place(dense, family)
    packed = add_lora(packed, LoraConfig(rank=4, variant="qalora"))
    randomize_adapters(packed)
    names = {}
    for name, module in list(packed.get_base_model().named_modules()):
        if hasattr(module, "lora_A"):
            dense.set_submodule(name, Pooled(dense.get_submodule(name), module))
            names |= {f"{name}.a": f"{name}.lora_A", f"{name}.b": f"{name}.lora_B"}
    assert len(names) > 20
    expected_loss, expected = take_gradients(dense, batch, None)
    expected = {f"base_model.model.{names[n]}.default.weight": g for n, g in expected.items()}
    assert all(gradient.abs().max() > 0 for gradient in expected.values())
    for layers in (None, 0):
        loss, found = take_gradients(packed, batch, layers)
        torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
        assert_equal_gradients(found, expected, of_whole=1e-4, of_each_tensor=1e-3)


def save_packed(family, folder, dtype=torch.float32, bits=4):
    base, _ = save_base(family, folder / "base")
    base.to(dtype).save_pretrained(folder / "base")
    return gt.pack(folder / "base", folder / "packed", bits=bits, grid="affine", group=32)


def load(folder):
    return gt.load_model(folder, device="cpu", dtype="float32", modalities=("text",))[0]


@pytest.mark.parametrize(("dtype", "lost"), [(torch.float32, 1e-5), (torch.bfloat16, 0.2)])
@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_merged_in_four_bits_it_says_what_the_adapter_said(family, dtype, lost, tmp_path):
    packed = save_packed(family, tmp_path, dtype)
    model = add_trained_lora(load(packed), variant="qalora")
    expected, inputs = logits(model, text_inputs()), text_inputs()
    with model.disable_adapter():
        effect = (logits(model, inputs) - expected).norm()
    assert effect > 0.1 * expected.norm()
    save_adapter(model, tmp_path / "adapter")
    report = export_merged(tmp_path / "adapter", tmp_path / "merged", base=packed)
    assert report.lost < lost
    found = logits(load(tmp_path / "merged"), inputs)
    if (family, dtype) != ("gemma4-26b-a4b", torch.bfloat16):  # rounded, some go to other experts
        assert (found - expected).norm() < lost * effect + 1e-5 * expected.norm()

    before, after = (load_file(f / "model.safetensors") for f in (packed, tmp_path / "merged"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == report.num_merged > 10
    assert all(name.endswith(".biases") for name in changed)
    configs = [json.loads((f / "config.json").read_text()) for f in (packed, tmp_path / "merged")]
    assert configs[0]["packed"] == configs[1]["packed"]

    # into the original, which is dense, it is merged as any other
    dense = export_merged(tmp_path / "adapter", tmp_path / "dense", base=tmp_path / "base")
    assert dense.num_merged == report.num_merged
    assert "packed" not in json.loads((tmp_path / "dense" / "config.json").read_text())


def test_an_adapter_is_saved_loaded_and_says_that_peft_does_not_open_it(tmp_path):
    packed = save_packed("gemma4-e2b", tmp_path)
    model = add_trained_lora(load(packed), variant="qalora")
    folder = export_adapter(model, tmp_path / "adapter")
    again = load_adapter(load(packed), folder)
    assert any(isinstance(module, PooledLinear) for module in again.modules())
    assert torch.equal(logits(again, text_inputs()), logits(model, text_inputs()))
    assert "PEFT does not" in (folder / "gemma_tuner.json").read_text()
    card = (folder / "README.md").read_text()
    assert "QA-LoRA, rank 4" in card
    assert "Stock PEFT does not open this adapter" in card
    plain, _ = tiny_model("gemma4-e2b")
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.PeftModel.from_pretrained(plain, folder)
    # one that PEFT trained on GPTQ layers has the same settings, and another scale
    (folder / "gemma_tuner.json").unlink()
    with pytest.raises(CheckpointError, match="how it pools its inputs"):
        load_adapter(load(packed), folder)
    with pytest.raises(CheckpointError, match="use_qalora"):
        export_merged(folder, tmp_path / "merged", base=packed)


def test_what_has_no_biases_is_refused():
    config = LoraConfig(variant="qalora")
    model, _ = tiny_model("gemma4-e2b")
    with pytest.raises(ConfigError, match=r"_proj has none; .*grid='affine'"):
        add_lora(model, config)
    replace_packed(model, list_packed(model, Grid(4, 32)))
    with pytest.raises(ConfigError, match="changes the biases of packed weights"):
        add_lora(model, config)
    model, _ = tiny_model("gemma4-e2b")
    replace_packed(model, list_packed(model, AFFINE))
    with pytest.raises(ConfigError, match="embedding_projection has none"):
        add_lora(model, LoraConfig(variant="qalora", targets=("projectors",)))
    with pytest.raises(ConfigError, match="neither dora, qalora nor dropout"):
        LoraConfig(variant="qalora", targets=("experts",))


def run_pooled(folder, monkeypatch, **settings):
    def make(family):
        model, processor = tiny_model(family)
        replace_packed(model, list_packed(model, AFFINE))
        return model, processor

    monkeypatch.setattr(runs, "tiny_model", make)
    return runs.run(folder, variant="qalora", **settings)


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(tmp_path, monkeypatch):
    run_pooled(tmp_path / "whole", monkeypatch)
    run_pooled(tmp_path / "stopped", monkeypatch, stop_after=2)
    run_pooled(tmp_path / "stopped", monkeypatch, resume=True)
    whole, stopped = (
        (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes()
        for name in ("whole", "stopped")
    )
    assert stopped == whole


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("family", OF_TO_MLX)
def test_written_for_mlx_every_weight_is_what_it_was(family, bits, tmp_path):
    packed = save_packed(family, tmp_path, torch.bfloat16, bits=bits)
    to_mlx(packed, tmp_path / "mlx")
    config = json.loads((tmp_path / "mlx" / "config.json").read_text())
    assert config["quantization"] == {"group_size": 32, "bits": bits, "mode": "affine"}
    stored = load_file(tmp_path / "mlx" / "model.safetensors")
    assert sum(name.endswith(".scales") for name in stored) > 10
    # which from_mlx reads as real MLX does (test_export_mlx)
    from_mlx(tmp_path / "mlx", tmp_path / "back")
    found, all_tensors = list_tensors(tmp_path / "back"), list_tensors(packed)
    expected = {name: each for name, each in all_tensors.items() if ".language_model." in name}
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name].read(), found[name].read()) for name in expected)


def test_what_mlx_and_q4_1_do_not_have_is_refused(tmp_path):
    packed = save_packed("gemma4-e2b", tmp_path)
    with pytest.raises(CheckpointError, match="no packed weights"):
        to_mlx(tmp_path / "base", tmp_path / "mlx")
    symmetric = gt.pack(tmp_path / "base", tmp_path / "symmetric")
    with pytest.raises(CheckpointError, match="symmetric grids"):
        to_mlx(symmetric, tmp_path / "mlx")
    save_adapter(add_trained_lora(load(packed)), tmp_path / "lora")
    with pytest.raises(ConfigError, match="would lose in 4 bits what was learned"):
        export_gguf(tmp_path / "lora", tmp_path / "m.gguf", base=packed, file_type="q4_1")


@pytest.mark.parametrize("family", OF_TO_MLX)
def test_a_file_of_q4_1_holds_the_numbers_and_new_minima(family, tmp_path):
    packed = save_packed(family, tmp_path)
    save_adapter(add_trained_lora(load(packed), variant="qalora"), tmp_path / "adapter")
    merged = tmp_path / "merged"
    export_merged(tmp_path / "adapter", merged, base=packed)
    path = tmp_path / "m.gguf"
    export_gguf(tmp_path / "adapter", path, base=packed, file_type="q4_1")
    expected = list_tensors(merged)
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for layer in (0, 3):
        for own, name in (("ffn_up", "mlp.up_proj"), ("attn_q", "self_attn.q_proj")):
            tensor = found[f"blk.{layer}.{own}.weight"]
            assert tensor.tensor_type == gguf.GGMLQuantizationType.Q4_1
            values = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))
            wanted = expected[f"model.language_model.layers.{layer}.{name}.weight"].read()
            # steps and minima are float16 there, float32 here
            torch.testing.assert_close(values, wanted, rtol=2e-3, atol=4e-3 * float(wanted.std()))
