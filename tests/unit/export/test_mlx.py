"""Adapters to MLX and back without MLX; tests/parity/test_export_mlx.py runs them in it."""

import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from gemma_tuner.errors import CheckpointError, ConfigError
from gemma_tuner.export.mlx import export_mlx, import_mlx
from gemma_tuner.models.adapter_files import save_adapter
from tests.export_parts import add_trained_lora, save_base


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    """A base with experts, and an adapter on them and on the decoder."""
    folder = tmp_path_factory.mktemp("moe")
    model, _ = save_base("gemma4-26b-a4b", folder / "base")
    save_adapter(add_trained_lora(model, targets=("language", "experts")), folder / "adapter")
    return folder


def read(folder):
    return load_file(folder / "adapter_model.safetensors")


def test_there_and_back_again_is_bit_equal(moe, tmp_path):
    export_mlx(moe / "adapter", tmp_path / "mlx", program="mlx-lm", base=moe / "base")
    import_mlx(tmp_path / "mlx", tmp_path / "back", base=moe / "base")
    before, after = read(moe / "adapter"), read(tmp_path / "back")
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    for folder in (moe / "adapter", tmp_path / "back"):
        assert peft.PeftConfig.from_pretrained(folder).target_parameters is not None
    mlx = load_file(tmp_path / "mlx" / "adapters.safetensors")
    prefix = "language_model.model.layers.0"
    assert mlx[f"{prefix}.self_attn.q_proj.lora_a"].shape == (64, 4)
    assert mlx[f"{prefix}.experts.switch_glu.up_proj.lora_b"].shape == (4, 32, 4)


def test_an_adapter_that_mlx_trained_becomes_one_of_peft(moe, tmp_path):
    """Without PEFT's settings beside it: rank and scale are MLX's, which has no alpha."""
    export_mlx(moe / "adapter", tmp_path / "mlx", program="mlx-lm", base=moe / "base")
    path = tmp_path / "mlx" / "adapter_config.json"
    config = json.loads(path.read_text())
    del config["peft_config"]
    path.write_text(json.dumps(config))
    import_mlx(tmp_path / "mlx", tmp_path / "back", base=moe / "base")
    before, after = read(moe / "adapter"), read(tmp_path / "back")
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert peft.PeftConfig.from_pretrained(tmp_path / "back").lora_alpha == 8


def test_ranks_and_scales_of_their_own_become_one(tmp_path):
    model, _ = save_base("gemma4-31b", tmp_path / "base")
    lora = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=r".*language_model\.layers\.\d+\.mlp\.(up|down)_proj",
        rank_pattern={r"up_proj": 2},
        alpha_pattern={r"layers\.0\.mlp\.up_proj": 1},
        init_lora_weights=False,
    )
    peft.get_peft_model(model, lora).save_pretrained(tmp_path / "adapter")
    export_mlx(tmp_path / "adapter", tmp_path / "mlx", base=tmp_path / "base")
    parameters = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())[
        "lora_parameters"
    ]
    assert (parameters["rank"], parameters["scale"]) == (4, 4.0)
    before = read(tmp_path / "adapter")
    mlx = load_file(tmp_path / "mlx" / "adapters.safetensors")
    for layer, kind, scale in ((0, "up", 0.5), (1, "up", 4.0), (2, "down", 2.0)):
        name = f"layers.{layer}.mlp.{kind}_proj"
        a, b = (
            before[f"base_model.model.model.language_model.{name}.lora_{x}.weight"] for x in "AB"
        )
        got = (
            mlx[f"language_model.model.{name}.lora_a"] @ mlx[f"language_model.model.{name}.lora_b"]
        )
        torch.testing.assert_close(4.0 * got.T, scale * (b @ a))
    import_mlx(tmp_path / "mlx", tmp_path / "back", base=tmp_path / "base")
    after = read(tmp_path / "back")
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_what_a_program_cannot_run_is_refused(moe, tmp_path):
    with pytest.raises(ConfigError, match="mlx-vlm cannot add adapters"):
        export_mlx(moe / "adapter", tmp_path / "mlx", program="mlx-vlm", base=moe / "base")
    with pytest.raises(ConfigError, match="program is 'ollama'"):
        export_mlx(moe / "adapter", tmp_path / "mlx", program="ollama", base=moe / "base")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({"language_model.model.norm.weight": torch.ones(2)}), "no LoRA"),
        (lambda t: t.pop("language_model.model.layers.0.mlp.up_proj.lora_a"), "lacks one half"),
        (
            lambda t: t["language_model.model.layers.1.experts.switch_glu.up_proj.lora_a"].add_(1),
            "adapters of their own on gate and up",
        ),
    ],
)
def test_an_mlx_adapter_that_peft_does_not_have_is_refused(moe, tmp_path, change, message):
    export_mlx(moe / "adapter", tmp_path / "mlx", program="mlx-lm", base=moe / "base")
    path = tmp_path / "mlx" / "adapters.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=message):
        import_mlx(tmp_path / "mlx", tmp_path / "back", base=moe / "base")
    assert not (tmp_path / "back").exists()


def change(folder, **settings):
    """Change an adapter's settings; return what they were."""
    path = folder / "adapter_config.json"
    before = json.loads(path.read_text())
    path.write_text(json.dumps(before | settings))
    return before


def test_a_base_that_is_named_by_its_path_is_named_without_it(moe, tmp_path):
    """As PEFT itself does, and mlx-lm."""
    shutil.copytree(moe / "adapter", tmp_path / "adapter")
    change(tmp_path / "adapter", base_model_name_or_path=str(moe / "base"))
    export_mlx(tmp_path / "adapter", tmp_path / "mlx")
    exported = change(tmp_path / "mlx", model=str(moe / "base"), peft_config=None)
    assert exported["model"] == exported["peft_config"]["base_model_name_or_path"] == "base"
    import_mlx(tmp_path / "mlx", tmp_path / "trained")
    change(tmp_path / "mlx", peft_config=change(tmp_path / "adapter"))
    import_mlx(tmp_path / "mlx", tmp_path / "back")
    for folder in ("trained", "back"):
        assert change(tmp_path / folder)["base_model_name_or_path"] == "base"
