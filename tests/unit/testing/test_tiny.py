import subprocess
import sys
from typing import Any

import jinja2
import numpy as np
import PIL.Image
import pytest
import torch
from huggingface_hub.utils import are_progress_bars_disabled
from transformers import AutoProcessor

from gemma_tuner.checkpoints.loading import load_model
from gemma_tuner.errors import ConfigError
from gemma_tuner.models.families import family_of_processor
from gemma_tuner.models.lora import LoraConfig, add_lora
from gemma_tuner.testing import FAMILIES, save_tiny_model, tiny_model

GEMMA4 = [family for family in FAMILIES if family.startswith("gemma4")]
LARGE = {"gemma4-26b-a4b", "gemma4-31b"}


def build(family, seed=0, processor_from=None) -> tuple[Any, Any]:
    return tiny_model(family, seed, processor_from)


def render(processor, messages, **options):
    return processor.apply_chat_template(messages, **options)


def say(*pairs, **fields):
    return [{"role": role, "content": content, **fields} for role, content in pairs]


def encode(processor, text):
    return processor(text=[text], return_tensors="pt", add_special_tokens=False, return_dict=True)


def test_importing_the_room_needs_no_torch():
    code = (
        "import sys, gemma_tuner.testing as t; "
        "assert not {'torch', 'google.cloud', 'duckdb'} & sys.modules.keys(); print(*dir(t))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout
    assert {"FAMILIES", "GcsServer", "LocalCloud", "sample_data", "tiny_model"} <= set(
        printed.split()
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_seed_decides_every_weight_and_leaves_the_global_state(family):
    state = torch.get_rng_state()
    first, again, other = (build(family, seed)[0].state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    # Every tensor differs, clip bounds and layer scalars too: one that is not loaded shows.
    assert [name for name in first if torch.equal(first[name], other[name])] == []
    assert all(torch.isfinite(tensor).all() for tensor in first.values())
    assert {tensor.dtype for tensor in first.values()} == {torch.float32}


def test_each_family_has_its_real_structure():
    models = {family: build(family)[0] for family in FAMILIES}
    shapes = {f: {n: tuple(t.shape) for n, t in m.state_dict().items()} for f, m in models.items()}
    layer = "model.language_model.layers.{}.{}.weight".format

    e2b = shapes["gemma4-e2b"]
    assert layer(3, "self_attn.k_proj") in e2b
    assert layer(7, "self_attn.k_proj") not in e2b  # shared keys and values
    assert e2b[layer(7, "mlp.up_proj")][0] == 2 * e2b[layer(3, "mlp.up_proj")][0]
    assert e2b["model.language_model.embed_tokens_per_layer.weight"] == (512, 8 * 8)
    assert any(name.endswith("q_proj.input_max") for name in e2b)
    assert any("audio_tower" in name for name in e2b)

    for family in ("gemma4-12b", "gemma4-26b-a4b", "gemma4-31b"):
        large = shapes[family]
        assert layer(1, "self_attn.v_proj") in large
        assert layer(2, "self_attn.v_proj") not in large  # keys are values
        assert large[layer(2, "self_attn.k_proj")][0] == 32  # one global head of 32
        assert large[layer(1, "self_attn.k_proj")][0] == 2 * 16
        text = models[family].config.get_text_config()
        assert text.use_bidirectional_attention == "vision"
    assert "model.language_model.layers.0.experts.gate_up_proj" in shapes["gemma4-26b-a4b"]
    assert not any("vision_tower" in name for name in shapes["gemma4-12b"])
    assert any("altup" in name for name in shapes["gemma3n"])
    assert all(
        f"{t}_attention" in str(models[f].config) for t in ("full", "sliding") for f in FAMILIES
    )


@pytest.mark.parametrize("family", ["gemma4-12b", "gemma4-26b-a4b", "gemma4-31b", "gemma4-e2b"])
def test_token_types_matter_where_pictures_look_both_ways(family):
    model, processor = build(family)
    text = render(processor, say(("user", [{"type": "image"}, {"type": "text", "text": "?"}])))
    batch = processor(
        text=[text], images=[[PIL.Image.new("RGB", (60, 60), "red")]], return_tensors="pt"
    )
    with torch.no_grad():
        both_ways = model(**batch).logits
        causal = model(
            **{**batch, "mm_token_type_ids": torch.zeros_like(batch["input_ids"])}
        ).logits
    assert torch.equal(both_ways, causal) == (family == "gemma4-e2b")


def test_a_model_is_saved_without_bars_which_are_left_as_they_were(tmp_path, capfd):
    assert not are_progress_bars_disabled()
    saved, _ = save_tiny_model("gemma4-e2b", tmp_path / "new" / "folder", seed=3)
    assert not are_progress_bars_disabled()
    assert capfd.readouterr() == ("", "")
    loaded, processor = load_model(tmp_path / "new" / "folder", device="cpu")
    weights = saved.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in loaded.state_dict().items())
    assert processor.tokenizer.get_vocab() == build("gemma4-e2b")[1].tokenizer.get_vocab()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_processor_survives_saving(family, tmp_path):
    _, processor = build(family)
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is type(processor)
    assert loaded.chat_template == processor.chat_template
    before, after = processor.tokenizer, loaded.tokenizer
    assert after.get_vocab() == before.get_vocab()
    assert set(after.all_special_tokens) == set(before.all_special_tokens)
    turns = {getattr(family_of_processor(processor), f"turn_{side}") for side in ("open", "close")}
    for tokenizer in (before, after):
        added = tokenizer.added_tokens_decoder.values()
        assert turns <= {token.content for token in added if token.special}
        # 3n's conversion gives them no names
        assert turns.isdisjoint(tokenizer.all_special_tokens) == (family == "gemma3n")
    assert after.padding_side == "right"
    text = render(
        processor, say(("user", "Say “hé” 3×"), ("assistant", "the model says: user\n\n😀"))
    )
    ids = encode(processor, text)["input_ids"][0]
    assert encode(loaded, text)["input_ids"][0].tolist() == ids.tolist()
    assert after.decode(ids) == text  # bytes stand in for characters that it does not have
    assert before.unk_token_id not in ids


@pytest.mark.parametrize("family", FAMILIES)
def test_turn_headers_are_three_tokens(family):
    _, processor = build(family)
    opener = family_of_processor(processor).turn_open
    text = render(processor, say(("user", "hi")), add_generation_prompt=True)
    tokens = processor.tokenizer.tokenize(text, add_special_tokens=False)
    start = len(tokens) - 1 - tokens[::-1].index(opener)
    assert tokens[start : start + 3] == [opener, "model", "\n"]
    assert tokens[:4] == ["<bos>", opener, "user", "\n"]
    assert tokens.count("<bos>") == 1


@pytest.mark.parametrize("family", GEMMA4)
def test_gemma4_turns(family):
    _, processor = build(family)
    messages = say(
        ("system", " be brief "),
        ("user", [{"type": "image"}, {"type": "audio"}, {"type": "text", "text": " hi "}]),
        ("assistant", " yes "),
    )
    head = (
        "<bos><|turn>system\nbe brief<turn|>\n"
        "<|turn>user\n<|image|><|audio|>hi<turn|>\n<|turn>model\n"
    )
    assert render(processor, messages) == head + "yes<turn|>\n"
    stub = "<|channel>thought\n<channel|>" if family in LARGE else ""
    assert render(processor, messages[:2], add_generation_prompt=True) == head + stub
    thinking = render(processor, messages[:2], add_generation_prompt=True, enable_thinking=True)
    assert thinking == head.replace("system\n", "system\n<|think|>\n")


@pytest.mark.parametrize("family", GEMMA4)
def test_gemma4_reasoning_of_the_last_answer_alone(family):
    _, processor = build(family)
    turns = [*say(("user", "a")), *say(("assistant", "b"), reasoning="old")]
    turns += [*say(("user", "c")), *say(("assistant", "d"), reasoning="new")]
    text = render(processor, turns)
    assert "old" not in text
    assert text.endswith("<|turn>model\n<|channel>thought\nnew\n<channel|>d<turn|>\n")


@pytest.mark.parametrize("family", GEMMA4)
def test_gemma4_tools(family):
    _, processor = build(family)
    tool = {"function": {"name": "get", "parameters": {"type": "object"}}}
    call = {"id": "1", "function": {"name": "get", "arguments": {"city": "Rome", "days": 3}}}
    turns = say(("user", "sun?"))
    turns += say(("assistant", ""), tool_calls=[call])
    waiting = render(processor, turns, tools=[tool])
    turns += say(("tool", "yes"), tool_call_id="1")
    turns += say(("assistant", "it shines"))
    text = render(processor, turns, tools=[tool])
    called = (
        '<bos><|turn>system\n<|tool>declaration:get{type:<|"|>object<|"|>}<tool|><turn|>\n'
        "<|turn>user\nsun?<turn|>\n<|turn>model\n"
        '<|tool_call>call:get{city:<|"|>Rome<|"|>,days:3}<tool_call|><|tool_response>'
    )
    assert waiting == called
    assert text == called + ('response:get{value:<|"|>yes<|"|>}<tool_response|>it shines<turn|>\n')

    turns[-1:] = say(("user", "sure?"), ("assistant", "yes"))
    assert render(processor, turns, tools=[tool]) == called + (
        'response:get{value:<|"|>yes<|"|>}<tool_response|>'
        "<|turn>user\nsure?<turn|>\n<|turn>model\nyes<turn|>\n"
    )


def test_gemma3n_turns():
    _, processor = build("gemma3n")
    media = [{"type": "image"}, {"type": "audio"}, {"type": "text", "text": " hi "}]
    messages = say(("system", "be brief"), ("user", media), ("assistant", " yes "))
    assert render(processor, messages) == (
        "<bos><start_of_turn>user\nbe brief\n\n"
        "<image_soft_token><audio_soft_token>hi<end_of_turn>\n"
        "<start_of_turn>model\nyes<end_of_turn>\n"
    )
    for roles in ("uu", "a", "uaa", "ut"):
        names = {"u": "user", "a": "assistant", "t": "tool"}
        with pytest.raises(jinja2.TemplateError, match="alternate"):
            render(processor, say(*((names[role], "x") for role in roles)))


@pytest.mark.parametrize("family", FAMILIES)
def test_templates_mark_no_generation_as_the_released_ones_do_not(family):
    assert "generation %}" not in build(family)[1].chat_template


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=() if family in ("gemma4-e2b", "gemma3n") else pytest.mark.slow)
        for family in FAMILIES
    ],
)
def test_adapters_on_a_frozen_random_model_can_learn(family):
    model, processor = build(family)
    model = add_lora(model, LoraConfig(rank=16))
    rows = [("2 + 3", "five"), ("7 - 6", "one"), ("4 x 2", "eight"), ("9 / 3", "three")]
    texts = [render(processor, say(("user", q), ("assistant", a))) for q, a in rows]
    batch = processor(text=texts, padding=True, return_tensors="pt", add_special_tokens=False)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for row, (_, answer) in zip(labels, rows, strict=True):
        length = int((row != -100).sum())
        row[: length - len(answer) - 2] = -100
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.isfinite(losses).all()
    assert losses[0] > 4
    assert min(losses[-5:]) < 0.1


@pytest.mark.slow
def test_a_real_processor_on_tiny_layers(shared_data):
    folder = shared_data / "models" / "gemma-4-E2B-it"
    model, processor = build("gemma4-e2b", processor_from=folder)
    assert model.config.text_config.vocab_size == 262_144
    assert sum(parameter.numel() for parameter in model.parameters()) < 50e6
    text = render(
        processor, say(("user", [{"type": "image"}, {"type": "audio"}]), ("assistant", "Yes"))
    )
    batch = processor(
        text=[text],
        images=[[PIL.Image.new("RGB", (640, 480))]],
        audio=[np.zeros(48_000)],
        images_kwargs={"max_soft_tokens": 70},
        return_tensors="pt",
        add_special_tokens=False,
    )
    assert batch["input_ids"][0, :4].tolist() == [2, 105, 2364, 107]
    assert (batch["input_ids"] == 258_881).sum() == 75
    with torch.no_grad():
        assert torch.isfinite(model(**batch).logits).all()
    with pytest.raises(ConfigError, match=r"'gemma4'.*'gemma3n'"):
        build("gemma3n", processor_from=folder)


def test_an_unknown_family_is_refused():
    with pytest.raises(ConfigError, match=r"'gemma5'.*gemma4-e2b"):
        build("gemma5")
