import json
import shutil

import pytest
import safetensors.torch
import torch
import transformers

from gemma_tuner.checkpoints.loading import load_model
from gemma_tuner.errors import CheckpointError, ConfigError
from gemma_tuner.testing import FAMILIES, save_tiny_model, tiny_model

UP = "model.language_model.layers.1.mlp.up_proj.weight"
TOWER = "model.vision_tower.encoder.layers.0.mlp.up_proj.linear.weight"


@pytest.fixture
def broken(checkpoints, tmp_path):
    """A copy of the E2B checkpoint to damage."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoints["gemma4-e2b"], folder)
    return folder


def edit_weights(folder, edit):
    path = folder / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    edit(weights)
    safetensors.torch.save_file(weights, path, metadata={"format": "pt"})


def assert_same_weights(model, original):
    """Every tensor of ``model`` equals the original's, persistent buffers included."""
    expected = original.state_dict()
    found = model.state_dict()
    assert found
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name
    return expected.keys() - found.keys()


@pytest.mark.parametrize("shard", ["10GB", "300KB"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_weight_is_loaded(name, shard, tmp_path, modalities):
    original, processor = save_tiny_model(name, tmp_path, seed=3, max_shard_size=shard)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 or shard == "300KB"
    model, loaded_processor = load_model(tmp_path, modalities=modalities[name], device="cpu")
    assert not assert_same_weights(model, original)
    assert type(model) is type(original)
    assert model.dtype == torch.float32
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert type(loaded_processor) is type(processor)
    assert loaded_processor.tokenizer.padding_side == "right"


@pytest.mark.parametrize("name", FAMILIES)
def test_text_alone_holds_no_tower_and_computes_the_same(name, checkpoints, make_batch, caplog):
    original, processor = tiny_model(name)
    with caplog.at_level("WARNING"):
        model, _ = load_model(checkpoints[name], device="cpu")
    assert not caplog.records
    left_out = assert_same_weights(model, original)
    parts = {key.split(".")[1] for key in model.state_dict() if key.startswith("model.")}
    kept = {"embed_vision", "embed_audio"} if name == "gemma3n" else set()
    assert parts == {"language_model"} | kept
    assert left_out
    batch = make_batch(processor)
    assert torch.equal(model(**batch).loss, original(**batch).loss)


@pytest.mark.parametrize(
    ("name", "chosen"),
    [
        ("gemma4-e2b", ("image",)),
        ("gemma4-e2b", ("text", "audio")),
        ("gemma4-12b", ("audio",)),
        ("gemma3n", ("image",)),
        ("gemma3n", ("audio",)),
    ],
)
def test_one_tower_alone_computes_the_same(name, chosen, checkpoints, make_batch):
    original, processor = tiny_model(name)
    model, _ = load_model(checkpoints[name], modalities=chosen, device="cpu")
    assert assert_same_weights(model, original)
    batch = make_batch(processor, *(kind for kind in chosen if kind != "text"))
    assert torch.equal(model(**batch).loss, original(**batch).loss)


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_on_request(name, checkpoints, make_batch, modalities):
    model, processor = load_model(
        checkpoints[name], modalities=modalities[name], device="cpu", dtype="bfloat16"
    )
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.isfinite(model(**make_batch(processor, *modalities[name][1:])).loss)


def test_the_choice_is_announced(checkpoints, capsys):
    load_model(checkpoints["gemma4-e2b"], device="cpu")
    lines = [line for line in capsys.readouterr().err.splitlines() if "gemma_tuner" in line]
    assert len(lines) == 1
    assert "text on cpu (as asked), float32 (the checkpoint is float32)" in lines[0]


@pytest.mark.parametrize("key", [UP, TOWER, "model.language_model.layers.1.layer_scalar"])
def test_a_missing_tensor_is_named(broken, key):
    edit_weights(broken, lambda weights: weights.pop(key))
    with pytest.raises(CheckpointError, match=rf"1 missing \({key}\).*again"):
        load_model(broken, modalities=("image", "audio"), device="cpu")


def test_a_missing_clip_bound_is_named(broken):
    key = TOWER.replace("linear.weight", "input_max")
    edit_weights(broken, lambda weights: weights.pop(key))
    with pytest.raises(CheckpointError, match="input_max"):
        load_model(broken, modalities=("image",), device="cpu")


def test_a_renamed_tensor_is_missing_and_unexpected(broken):
    """What a patched tower does: the peer's defect that left towers at random."""
    renamed = TOWER.replace(".linear", "")
    edit_weights(broken, lambda weights: weights.update({renamed: weights.pop(TOWER)}))
    with pytest.raises(CheckpointError) as caught:
        load_model(broken, modalities=("image",), device="cpu")
    assert f"1 missing ({TOWER})" in str(caught.value)
    assert f"1 unexpected ({renamed})" in str(caught.value)
    load_model(broken, device="cpu")  # text alone does not need that tower


def test_a_reshaped_tensor_is_named(broken):
    edit_weights(broken, lambda weights: weights.update({UP: torch.zeros(3, 5)}))
    with pytest.raises(
        CheckpointError, match=rf"of another shape \({UP} \[3, 5\] for \[128, 64\]"
    ):
        load_model(broken, device="cpu")


def test_many_faults_are_counted_and_few_named(broken):
    edit_weights(
        broken,
        lambda weights: [weights.pop(key) for key in list(weights) if "mlp.up_proj" in key],
    )
    with pytest.raises(CheckpointError, match=r"8 missing \(([^,]+, ){5}\.\.\.\)"):
        load_model(broken, device="cpu")


def damage_header(folder):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[20:60] = b"\xff" * 40
    path.write_bytes(bytes(content))


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def pickle_weights(folder):
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def drop_feature_extractor(folder):
    path = folder / "processor_config.json"
    settings = json.loads(path.read_text())
    del settings["feature_extractor"]
    path.write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_header, "damaged or incomplete.*download it again"),
        (truncate, "damaged or incomplete.*download it again"),
        (lambda d: (d / "model.safetensors").unlink(), r"no weights \(\*\.safetensors\)"),
        (pickle_weights, "pickled weights.*convert them to safetensors"),
        (lambda d: (d / "config.json").unlink(), "no config.json"),
        (lambda d: (d / "config.json").write_text("{"), "not a valid JSON"),
        (lambda d: (d / "chat_template.jinja").unlink(), "no chat template.*-it"),
        (lambda d: (d / "tokenizer.json").unlink(), "tokenizer of .* is not its model's"),
        (lambda d: (d / "processor_config.json").unlink(), "feature extractor|processor"),
        (drop_feature_extractor, "feature.extractor"),
        (lambda d: (d / "adapter_config.json").write_text("{}"), "holds an adapter.*PeftModel"),
    ],
)
def test_a_damaged_folder_is_explained(broken, damage, message):
    damage(broken)
    with pytest.raises(CheckpointError, match=f"(?s){message}") as caught:
        load_model(broken, modalities=("audio",), device="cpu")
    assert broken.name in str(caught.value)
    assert str(broken) not in str(caught.value)  # a user's paths are private


def test_a_missing_shard_is_named(tmp_path):
    save_tiny_model("gemma4-31b", tmp_path, max_shard_size="300KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=shards[1].name):
        load_model(tmp_path, device="cpu")


def test_an_adapter_folder_is_not_a_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds an adapter"):
        load_model(tmp_path, device="cpu")


def test_other_models_are_refused(tmp_path):
    transformers.LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"'llama'.*gemma4_unified"):
        load_model(tmp_path, device="cpu")


def test_code_in_a_checkpoint_never_runs(broken):
    settings = json.loads((broken / "config.json").read_text())
    settings["auto_map"] = {"AutoConfig": "planted.Planted"}
    (broken / "config.json").write_text(json.dumps(settings))
    (broken / "planted.py").write_text(f"open({str(broken / 'ran')!r}, 'w')")
    load_model(broken, device="cpu")
    assert not (broken / "ran").exists()


def test_modalities_are_checked(checkpoints):
    with pytest.raises(ConfigError, match=r"'video'.*text, image, audio"):
        load_model(checkpoints["gemma4-e2b"], modalities=["video"], device="cpu")
    with pytest.raises(ConfigError, match="no audio part; it offers text, image"):
        load_model(checkpoints["gemma4-31b"], modalities=("audio",), device="cpu")


def test_a_string_of_modalities_is_refused(checkpoints):
    with pytest.raises(ConfigError, match=r"\('image',\)"):
        load_model(checkpoints["gemma4-e2b"], modalities="image", device="cpu")


@pytest.mark.parametrize("path", ["/no/such/folder", "./nothing/here"])
def test_a_folder_that_is_not_there(path):
    with pytest.raises(CheckpointError, match="no such folder"):
        load_model(path, device="cpu")


def test_offline_and_not_cached():
    with pytest.raises(CheckpointError) as caught:
        load_model("google/gemma-4-E2B-it", device="cpu")
    for hint in ("https://huggingface.co/google/gemma-4-E2B-it", "hf auth login", "licence"):
        assert hint in str(caught.value)
