"""Adapters that PEFT made elsewhere, under any name, are opened, trained on, saved and merged."""

import json
import warnings

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import gemma_tuner as gt
from gemma_tuner.export.merged import export_merged
from gemma_tuner.export.mlx import export_mlx, import_mlx
from gemma_tuner.models.adapter_files import CONFIG, WEIGHTS, save_adapter
from gemma_tuner.testing import save_tiny_model, tiny_model
from gemma_tuner.training.adapters import list_trainable, load_adapter
from tests.export_parts import logits, text_inputs


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("e2b") / "base"
    save_tiny_model("gemma4-e2b", folder)
    return folder


def text_only(base):
    """The class that ``AutoModelForCausalLM`` gives of a text checkpoint: model.layers.0…"""
    full = transformers.AutoModelForImageTextToText.from_pretrained(base)
    model = transformers.Gemma4ForCausalLM(full.config.text_config).eval()
    model.model.load_state_dict(full.model.language_model.state_dict())
    model.tie_weights()
    return model


def whole(base):
    return transformers.AutoModelForImageTextToText.from_pretrained(base)


def train_by_hand(model):
    """Numbers as of training in whatever of a model is trained."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


WAYS = {
    "suffixes": {"target_modules": ["q_proj", "down_proj"]},
    "a regular expression": {"target_modules": r".*layers\.[0-3]\..*(q|v)_proj"},
    "some layers": {"target_modules": ["q_proj"], "layers_to_transform": [1, 5]},
    "layers by their list's name": {
        "target_modules": ["q_proj"],
        "layers_to_transform": [2],
        "layers_pattern": "layers",
    },
    "ranks and alphas of their own": {
        "target_modules": ["q_proj", "o_proj"],
        "rank_pattern": {r"model.layers.\d.self_attn.q_proj": 4, "layers.1.self_attn.o_proj": 1},
        "alpha_pattern": {"o_proj": 3},
    },
    "exclusions": {"target_modules": ["q_proj"], "exclude_modules": r".*\.[4-7]\..*"},
    "dora": {"target_modules": ["q_proj"], "use_dora": True},
    "rslora": {"target_modules": ["q_proj"], "use_rslora": True},
    "norms too": {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("made_on", [text_only, whole])
def test_an_adapter_of_peft_computes_and_merges_as_in_peft(base, way, made_on, tmp_path):
    settings = dict(WAYS[way])
    if made_on is whole:  # where suffixes reach into the towers, PEFT stops
        targets = settings["target_modules"]
        ends = targets if isinstance(targets, str) else rf".*\.({'|'.join(targets)})"
        if "layers_to_transform" in settings:
            pytest.skip("PEFT knows layers of suffixes alone, which stop at the whole class")
        settings["target_modules"] = rf"(?=.*language_model){ends}"
    config = peft.LoraConfig(r=2, lora_alpha=5, **settings)
    model = train_by_hand(peft.get_peft_model(made_on(base), config))
    model.save_pretrained(tmp_path / "theirs")
    inputs = {"input_ids": text_inputs()["input_ids"]}
    wanted = logits(model, inputs)

    if (made_on, way) != (whole, "norms too"):  # those of the towers, too
        ours = load_adapter(gt.load_model(base, device="cpu")[0], tmp_path / "theirs")
        torch.testing.assert_close(logits(ours, inputs), wanted, rtol=0, atol=2e-4)
    every = gt.load_model(base, modalities=("text", "image", "audio"), device="cpu")[0]
    save_adapter(load_adapter(every, tmp_path / "theirs"), tmp_path / "again")
    before, after = (load_file(tmp_path / name / WEIGHTS) for name in ("theirs", "again"))
    assert sorted(tensor.sum().item() for tensor in before.values()) == sorted(
        tensor.sum().item() for tensor in after.values()
    )
    with warnings.catch_warnings():  # PEFT warns of what it misses
        warnings.simplefilter("error", UserWarning)
        reopened = peft.PeftModel.from_pretrained(whole(base), tmp_path / "again").eval()
    torch.testing.assert_close(logits(reopened, inputs), wanted, rtol=0, atol=2e-4)

    export_merged(tmp_path / "theirs", tmp_path / "merged", base=base)
    merged = whole(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(merged, inputs), wanted, rtol=0, atol=2e-4)
    if "modules_to_save" not in settings:
        export_mlx(tmp_path / "theirs", tmp_path / "mlx", base=base)
        import_mlx(tmp_path / "mlx", tmp_path / "back", base=base)
        back = load_adapter(gt.load_model(base, device="cpu")[0], tmp_path / "back")
        torch.testing.assert_close(logits(back, inputs), wanted, rtol=0, atol=2e-4)


def make_rows(folder):
    rows = [json.dumps({"prompt": f"q{n}", "response": "a"}) + "\n" for n in range(8)]
    (folder / "rows.jsonl").write_text("".join(rows))
    return gt.stream_local(folder / "rows.jsonl", cache_dir=folder / "cache")


def train(model, processor, folder, name):
    config = gt.TrainConfig(
        max_steps=2, learning_rate=5e-3, output_dir=folder / name, progress=False
    )
    trainer = gt.Trainer(model, make_rows(folder), gt.TextCollator(processor), config)
    trainer.fit()
    return load_file(trainer.save(folder / name / "adapter") / WEIGHTS)


def test_going_on_equals_peft_to_the_bit_whatever_the_adapter_is_called(tmp_path):
    model, processor = tiny_model("gemma4-e2b")
    config = peft.LoraConfig(r=2, target_modules=r"model\.language_model.*\.(q|down)_proj")
    first = peft.get_peft_model(model, config)
    train_by_hand(first).save_pretrained(tmp_path / "old")

    ours = load_adapter(tiny_model("gemma4-e2b")[0], tmp_path / "old", trainable=True)
    got = train(ours, processor, tmp_path, "ours")
    theirs = peft.PeftModel.from_pretrained(
        tiny_model("gemma4-e2b")[0], tmp_path / "old", is_trainable=True
    )
    second = peft.PeftModel.from_pretrained(tiny_model("gemma4-e2b")[0], tmp_path / "old")
    second.load_adapter(tmp_path / "old", adapter_name="new", is_trainable=True)
    second.set_adapter("new")
    old = load_file(tmp_path / "old" / WEIGHTS)
    assert got.keys() == old.keys()
    assert not any(torch.equal(got[key], old[key]) for key in got)
    for name, model in (("theirs", theirs), ("new", second)):
        trained = train(model, processor, tmp_path, name)
        assert trained.keys() == got.keys()
        assert all(torch.equal(trained[key], got[key]) for key in got), name
        checkpoint = tmp_path / name / "checkpoints" / "step-00000002"
        assert all(torch.equal(load_file(checkpoint / WEIGHTS)[key], got[key]) for key in got)
    gt.export_adapter(second, tmp_path / "exported")
    exported = load_file(tmp_path / "exported" / WEIGHTS)
    assert all(torch.equal(exported[key], got[key]) for key in got)
    resumed = peft.PeftModel.from_pretrained(
        tiny_model("gemma4-e2b")[0], tmp_path / "old", adapter_name="new", is_trainable=True
    )
    config = gt.TrainConfig(
        max_steps=2, learning_rate=5e-3, output_dir=tmp_path / "new", progress=False
    )
    trainer = gt.Trainer(resumed, make_rows(tmp_path), gt.TextCollator(processor), config)
    trainer.fit(resume=True)
    saved = load_file(trainer.save(tmp_path / "resumed") / WEIGHTS)
    assert all(torch.equal(saved[key], got[key]) for key in got)


def test_what_would_be_trained_and_not_saved_is_refused(tmp_path):
    model = gt.add_lora(tiny_model("gemma4-e2b")[0], gt.LoraConfig(rank=2))
    assert list_trainable(model) == [p for p in model.parameters() if p.requires_grad]
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=r".*language.*\.q_proj"))
    model.base_model.set_adapter(["default", "other"])
    for use in (list_trainable, lambda m: save_adapter(m, tmp_path / "a")):
        with pytest.raises(gt.ConfigError, match=r"2 adapters .* active \(default, other\)"):
            use(model)
    model.set_adapter("other")
    first = next(p for name, p in model.named_parameters() if ".default." in name)
    first.requires_grad_()
    with pytest.raises(gt.ConfigError, match=r"lora_A\.default.* not of the active .*'other'"):
        list_trainable(model)
    first.requires_grad_(requires_grad=False)
    model.get_input_embeddings().weight.requires_grad_()
    with pytest.raises(gt.ConfigError, match=r"1 trainable .*embed_tokens"):
        list_trainable(model)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda c, d: c.update(peft_type="IA3"), "type IA3; only LORA"),
        (lambda c, d: c.update(peft_type="PROMPT_TUNING"), "type PROMPT_TUNING"),
        (lambda c, d: c.update(alora_invocation_tokens=[5]), "type aLoRA"),
        (
            lambda c, d: (d / WEIGHTS).rename(d / "adapters.safetensors"),
            r"of MLX; .*import_mlx\(FOLDER, NEW_FOLDER, base=MODEL\)",
        ),
        (lambda c, d: (d / WEIGHTS).rename(d / "adapter_model.bin"), "pickled"),
        (lambda c, d: (d / WEIGHTS).unlink(), "incomplete or damaged"),
    ],
)
def test_kinds_that_cannot_be_used_are_refused_by_name(spoil, message, tmp_path):
    model = gt.add_lora(tiny_model("gemma4-e2b")[0], gt.LoraConfig(rank=2, layers=1))
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    spoil(config, tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(gt.CheckpointError, match=message):
        load_adapter(tiny_model("gemma4-e2b")[0], tmp_path)


def test_an_adapter_on_a_tower_that_was_not_loaded_says_how_to_load_it(base, tmp_path):
    model = gt.load_model(base, modalities=("text", "image"), device="cpu")[0]
    model = gt.add_lora(model, gt.LoraConfig(rank=2, targets=("language", "vision")))
    save_adapter(model, tmp_path)
    with pytest.raises(gt.CheckpointError, match=r"modalities=\('text', 'image'\)"):
        load_adapter(gt.load_model(base, device="cpu")[0], tmp_path)


def test_another_base_by_name_is_said(base, tmp_path, capsys):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    config.base_model_name_or_path = "google/gemma-4-E2B"
    peft.get_peft_model(text_only(base), config).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / CONFIG).read_text())
    settings["base_model_name_or_path"] = "google/gemma-4-E2B"
    (tmp_path / CONFIG).write_text(json.dumps(settings))
    load_adapter(gt.load_model(base, device="cpu")[0], tmp_path)
    assert "names google/gemma-4-E2B as its base, and is put on base" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        {"lora_alpha": None},
        {"r": 0},
        {"r": "x"},
        {"target_modules": 3},
        {"target_modules": "("},
        {"target_modules": "(a+)+$"},
        {"target_modules": ".*" * 30 + "!"},
        {"r": 10**9},
        {"rank_pattern": {"q_proj": 10**9}},
        {"rank_pattern": ["q_proj"]},
        {"bias": "some"},
        {"megatron_config": {"a": 1}},
        {"layers_to_transform": "x"},
        {"peft_type": "BONE"},
        {"peft_type": None},
        {"rank_pattern": {"(a+)+$": 2}},
        {"alpha_pattern": 1},
    ],
    ids=str,
)
def test_settings_that_cannot_be_used_are_told(tmp_path, change):
    save_adapter(gt.add_lora(tiny_model("gemma4-e2b")[0], gt.LoraConfig(rank=2)), tmp_path)
    settings = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(settings | change))
    with pytest.raises(gt.CheckpointError):
        load_adapter(tiny_model("gemma4-e2b")[0], tmp_path)
