"""A merged checkpoint has every tensor of its base and computes what the adapter does."""

import json
import shutil

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import gemma_tuner as gt
from gemma_tuner.checkpoints.folders import new_file, new_folder
from gemma_tuner.checkpoints.writing import complete_config
from gemma_tuner.errors import CheckpointError
from gemma_tuner.export.adapter import export_adapter
from gemma_tuner.export.merged import export_merged
from gemma_tuner.models.adapter_files import save_adapter
from gemma_tuner.testing import FAMILIES, tiny_model
from tests.export_parts import (
    TARGETS,
    add_trained_lora,
    logits,
    save_base,
    text_inputs,
)
from tests.limits import files_limited_to
from tests.stock import Float64Everywhere


@pytest.fixture(scope="module")
def e2b(tmp_path_factory):
    """A base, an adapter on all of its parts, and the logits with it."""
    folder = tmp_path_factory.mktemp("e2b")
    model, _ = save_base("gemma4-e2b", folder / "base")
    model = add_trained_lora(model, targets=TARGETS["gemma4-e2b"])
    export_adapter(model, folder / "adapter")
    return folder, logits(model, text_inputs())


def assert_same_logits(got, expected):
    """Within 1e-5 of the largest logit, which is rounding: in float64 they are equal (below)."""
    largest = expected.abs().max().item()
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * largest)


def load_float64(folder):
    return transformers.AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float64, experts_implementation="eager"
    )


def change_dtype(folder, dtype):
    """Change the dtype of a checkpoint's weights; return them."""
    weights = folder / "model.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    return tensors


def read_all(folder):
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def test_merged_checkpoint_computes_what_the_adapter_does(e2b, tmp_path):
    folder, expected = e2b
    report = export_merged(
        folder / "adapter", tmp_path / "merged", base=folder / "base", shard_bytes=500_000
    )
    before, after = read_all(folder / "base"), read_all(tmp_path / "merged")
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == report.num_merged == 84
    assert {name.split(".")[1] for name in changed} == {
        *("language_model", "vision_tower", "audio_tower", "embed_vision", "embed_audio")
    }
    assert report.num_copied == len(before) - 84
    shards = sorted(tmp_path.glob("merged/*.safetensors"))
    assert len(shards) > 4
    # A shard is larger than asked for only if it is one tensor.
    assert all(s.stat().st_size < 600_000 or len(load_file(s)) == 1 for s in shards)

    model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    assert_same_logits(logits(model, text_inputs()), expected)
    for name in ("tokenizer.json", "processor_config.json", "chat_template.jinja"):
        copied = (tmp_path / "merged" / name).read_bytes()
        assert copied == (folder / "base" / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", ["lora", "dora", "rslora", "full"])
def test_every_family_and_variant(family, variant, tmp_path):
    save_base(family, tmp_path / "base")
    offered = ("text", "image") if family in FAMILIES[2:4] else ("text", "image", "audio")
    model, _ = gt.load_model(tmp_path / "base", modalities=offered, device="cpu")
    targets = [t for t in TARGETS[family] if t != "experts" or variant in ("lora", "rslora")]
    model = add_trained_lora(model, targets=targets, variant=variant)
    save_adapter(model, tmp_path / "adapter")
    export_merged(tmp_path / "adapter", tmp_path / "merged", base=tmp_path / "base")

    assert read_all(tmp_path / "merged").keys() == read_all(tmp_path / "base").keys()
    merged, _ = gt.load_model(tmp_path / "merged", modalities=offered, device="cpu")
    assert_same_logits(logits(merged, text_inputs()), logits(model, text_inputs()))

    # In float64 nothing but rounding goes away: what is left is no error of the merge.
    change_dtype(tmp_path / "base", torch.float64)
    export_merged(tmp_path / "adapter", tmp_path / "merged64", base=tmp_path / "base")
    base, merged64 = load_float64(tmp_path / "base"), load_float64(tmp_path / "merged64")
    unmerged = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").double()
    with Float64Everywhere():
        expected, got = (logits(each, text_inputs()) for each in (unmerged, merged64))
    largest = expected.abs().max().item()
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-13 * largest)
    # Every weight, of towers too, is what PEFT merges in float64, rounded once.
    theirs = unmerged.merge_and_unload().state_dict()
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, theirs[name].float(), rtol=2**-23, atol=0)


def test_an_adapter_trained_without_towers_keeps_them(e2b, tmp_path):
    folder, _ = e2b
    model, _ = gt.load_model(folder / "base", device="cpu")
    save_adapter(add_trained_lora(model, layers=2), tmp_path / "adapter")
    report = export_merged(tmp_path / "adapter", tmp_path / "merged", base=folder / "base")
    before, after = read_all(folder / "base"), read_all(tmp_path / "merged")
    assert after.keys() == before.keys()
    assert report.num_merged < 14
    assert all(torch.equal(before[n], after[n]) for n in before if "tower" in n)


@pytest.mark.slow
def test_ranks_and_alphas_of_their_own(tmp_path):
    model, _ = save_base("gemma4-31b", tmp_path / "base")
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=r".*language_model\.layers\.\d+\.mlp\.(up|down)_proj",
        rank_pattern={r"layers\.1\.mlp\.up_proj": 2},
        alpha_pattern={r"down_proj": 3},
        init_lora_weights=False,
    )
    model = peft.get_peft_model(model, config)
    model.save_pretrained(tmp_path / "adapter")
    export_merged(tmp_path / "adapter", tmp_path / "merged", base=tmp_path / "base")
    theirs = model.merge_and_unload().state_dict()
    for name, tensor in read_all(tmp_path / "merged").items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-6)


def test_bfloat16_is_rounded_once_and_the_loss_is_told(e2b, tmp_path):
    folder, _ = e2b
    shutil.copytree(folder / "base", tmp_path / "base")
    base = change_dtype(tmp_path / "base", torch.bfloat16)

    report = export_merged(folder / "adapter", tmp_path / "merged", base=tmp_path / "base")
    assert report.dtypes == ("bfloat16",)
    assert 0.005 < report.lost < 0.5
    name = "model.language_model.layers.0.mlp.up_proj"
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    a, b = (adapter[f"base_model.model.{name}.lora_{kind}.weight"] for kind in "AB")
    exact = base[f"{name}.weight"].double() + 2 * (b.double() @ a.double())
    merged = read_all(tmp_path / "merged")[f"{name}.weight"]
    # Half a unit in the last place of eight bits.
    assert merged.dtype is torch.bfloat16
    assert ((merged.double() - exact).abs() <= exact.abs() * 2**-8).all()
    card = (tmp_path / "merged" / "README.md").read_text()
    assert f"{report.lost:.2%}" in card


@pytest.mark.slow
def test_config_has_what_others_need_and_is_read_as_before(tmp_path):
    for family in FAMILIES:
        model, _ = tiny_model(family)
        model.config.save_pretrained(tmp_path / family)
        path = tmp_path / family / "config.json"
        config = complete_config(json.loads(path.read_text()))
        assert config["vocab_size"] == config["text_config"]["vocab_size"]
        if family != "gemma3n":
            assert config["text_config"]["global_head_dim"] == 32
            # Without it llama.cpp's converter fails; null means that there are no experts.
            num_units = config["text_config"]["moe_intermediate_size"]
            assert num_units == (32 if family == "gemma4-26b-a4b" else None)
        path.write_text(json.dumps(config))
        again = transformers.AutoConfig.from_pretrained(tmp_path / family).to_dict()
        for part in ("text_config", "vision_config", "audio_config"):
            for name, value in (model.config.to_dict()[part] or {}).items():
                assert again[part][name] == value, (family, part, name)


def files_beside(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.slow
def test_an_adapter_for_another_shape_is_refused(e2b, tmp_path):
    folder, _ = e2b
    save_base("gemma4-31b", tmp_path / "base")
    with pytest.raises(CheckpointError, match="the adapter is for another model than base"):
        export_merged(folder / "adapter", tmp_path / "merged", base=tmp_path / "base")
    assert files_beside(tmp_path) == ["base"]


def test_another_release_of_the_same_shapes_is_refused(e2b, tmp_path):
    folder, _ = e2b
    save_base("gemma4-e2b", tmp_path / "base", seed=7)
    with pytest.raises(CheckpointError, match="the same shapes but other weights"):
        export_merged(folder / "adapter", tmp_path / "merged", base=tmp_path / "base")
    assert files_beside(tmp_path) == ["base"]


def test_another_revision_is_refused(e2b, tmp_path):
    folder, _ = e2b
    cached = tmp_path / "models--ada--tiny" / "snapshots" / ("a" * 40)
    shutil.copytree(folder / "base", cached)
    shutil.copytree(folder / "adapter", tmp_path / "adapter")
    (tmp_path / "adapter" / "gemma_tuner.json").unlink()
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text()) | {"revision": "b" * 40}
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"revision {'b' * 40} .* is at {'a' * 40}"):
        export_merged(tmp_path / "adapter", tmp_path / "merged", base=cached)


def test_a_missing_or_cut_off_shard_is_named(e2b, tmp_path):
    folder, _ = e2b
    export_merged(folder / "adapter", tmp_path / "base", base=folder / "base", shard_bytes=10**6)
    second = sorted(tmp_path.glob("base/*.safetensors"))[1]
    content = second.read_bytes()
    second.write_bytes(content[: len(content) // 2])
    (folder / "adapter" / "gemma_tuner.json").rename(tmp_path / "fingerprint")
    try:
        with pytest.raises(CheckpointError, match=rf"{second.name} is .*incomplete"):
            export_merged(folder / "adapter", tmp_path / "merged", base=tmp_path / "base")
        second.unlink()
        with pytest.raises(CheckpointError, match=rf"lacks 1 of \d weight files \({second.name}"):
            export_merged(folder / "adapter", tmp_path / "merged", base=tmp_path / "base")
    finally:
        (tmp_path / "fingerprint").rename(folder / "adapter" / "gemma_tuner.json")
    assert files_beside(tmp_path) == ["base"]


def test_an_existing_folder_is_left_alone(e2b, tmp_path):
    folder, _ = e2b
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="'merged' exists already"):
        export_merged(folder / "adapter", tmp_path / "merged", base=folder / "base")
    assert files_beside(tmp_path / "merged") == ["mine.txt"]


def test_what_appears_while_it_is_written_is_left_alone(tmp_path):
    for new in (new_folder, new_file):
        with pytest.raises(CheckpointError, match="exists already"), new(tmp_path / "it", 0):
            (tmp_path / "it").write_text("mine")
        assert files_beside(tmp_path) == ["it"]
        (tmp_path / "it").unlink()


def test_a_disk_that_fills_up_leaves_nothing(e2b, tmp_path):
    folder, _ = e2b
    with (
        files_limited_to(10**6),
        pytest.raises(CheckpointError, match="cannot write 'merged': File too large") as info,
    ):
        export_merged(folder / "adapter", tmp_path / "merged", base=folder / "base")
    assert str(tmp_path) not in str(info.value)
    assert files_beside(tmp_path) == []


def test_a_full_disk_is_found_before(e2b, tmp_path, monkeypatch):
    folder, _ = e2b
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CheckpointError, match="MB are needed and 0 MB are free"):
        export_merged(folder / "adapter", tmp_path / "merged", base=folder / "base")
    assert files_beside(tmp_path) == []


def test_leftovers_of_a_killed_export_are_removed(e2b, tmp_path):
    folder, _ = e2b
    (tmp_path / ".merged.tmp").mkdir()
    (tmp_path / ".merged.tmp" / "model.safetensors").write_bytes(b"half")
    export_merged(folder / "adapter", tmp_path / "merged", base=folder / "base")
    assert files_beside(tmp_path) == ["merged"]


def test_a_base_that_is_nowhere_says_how_to_get_it(e2b, tmp_path):
    folder, _ = e2b
    with pytest.raises(CheckpointError, match="hf download ada/not-there"):
        export_merged(folder / "adapter", tmp_path / "merged", base="ada/not-there")
    with pytest.raises(CheckpointError, match="holds no adapter"):
        export_merged(folder / "base", tmp_path / "merged", base=folder / "base")


@pytest.mark.parametrize("value", [torch.nan, 1e20])  # the second is too large for float16
def test_an_adapter_that_diverged_is_refused(e2b, tmp_path, value):
    folder, _ = e2b
    shutil.copytree(folder / "base", tmp_path / "base")
    change_dtype(tmp_path / "base", torch.float16)
    shutil.copytree(folder / "adapter", tmp_path / "adapter")
    (tmp_path / "adapter" / "gemma_tuner.json").unlink()
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] = value
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match="infinite or undefined"):
        export_merged(tmp_path / "adapter", tmp_path / "merged", base=tmp_path / "base")
    assert files_beside(tmp_path) == ["adapter", "base"]


def test_a_base_that_is_named_by_its_path_is_named_without_it(e2b, tmp_path):
    folder, _ = e2b
    shutil.copytree(folder / "adapter", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"  # as PEFT itself writes it
    named = {"base_model_name_or_path": str(folder / "base")}
    path.write_text(json.dumps(json.loads(path.read_text()) | named))
    export_merged(tmp_path / "adapter", tmp_path / "merged")
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "| Base model | base |" in card
    assert str(folder) not in card


def test_a_norm_that_was_trained_itself_is_merged(e2b, tmp_path):
    folder, _ = e2b
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder / "base")
    lora = peft.LoraConfig(
        r=2,
        target_modules=r".*language_model\.layers\.0\.self_attn\.q_proj",
        modules_to_save=["language_model.norm"],
    )
    wrapped = peft.get_peft_model(model, lora)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(1.5)
    wrapped.save_pretrained(tmp_path / "adapter")
    export_merged(tmp_path / "adapter", tmp_path / "merged", base=folder / "base")
    name = "model.language_model.norm.weight"
    before, after = read_all(folder / "base"), read_all(tmp_path / "merged")
    assert torch.equal(after[name], 1.5 * before[name])


@pytest.mark.parametrize(
    ("setting", "value"),
    [("modules_to_save", ["lm_head"]), ("bias", "all"), ("init_lora_weights", "pissa")],
)
def test_adapters_that_no_weight_can_take_in_are_refused(e2b, tmp_path, setting, value):
    folder, _ = e2b
    shutil.copytree(folder / "adapter", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {setting: value}))
    with pytest.raises(CheckpointError, match=setting):
        export_merged(tmp_path / "adapter", tmp_path / "merged", base=folder / "base")
