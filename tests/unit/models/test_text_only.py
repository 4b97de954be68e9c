"""A family without media is one entry: Gemma 3's text models, which are not in it yet."""

import copy

import peft
import pytest
import torch
import transformers

import gemma_tuner as gt
from gemma_tuner.errors import CheckpointError, ConfigError
from gemma_tuner.models import families, norms
from gemma_tuner.models.families import Family, family_of, loaded_modalities
from gemma_tuner.models.loss import target_loss_sum
from gemma_tuner.models.modes import begin_training
from gemma_tuner.models.norms import LeanNorm
from gemma_tuner.models.target_only import target_only_of
from gemma_tuner.testing import sample_data
from gemma_tuner.testing.models import processor as tiny
from gemma_tuner.testing.models.tiny import _spread_weights
from tests.examples import example, picture
from tests.stock import stock_parts

GEMMA3 = Family(
    name="Gemma 3 (text)",
    model_type="gemma3_text",
    model_class="Gemma3ForCausalLM",
    processor_class="GemmaTokenizer",
    decoder="model",
    norm="Gemma3RMSNorm",
    norm_offset=1.0,
    turn_open="<start_of_turn>",
    turn_close="<end_of_turn>",
    gguf="gemma3",
    mlx_decoder="model",
)


@pytest.fixture(scope="module", autouse=True)
def entry():
    with pytest.MonkeyPatch.context() as patch:
        for module in (families, norms):
            patch.setattr(module, "FAMILIES", (*families.FAMILIES, GEMMA3))
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Random weights, and a tokenizer in place of a processor."""
    folder = tmp_path_factory.mktemp("gemma3")
    tokenizer = tiny._build_tokenizer({}, (), tiny._GEMMA3N_TURN_TOKENS)
    tokenizer.chat_template = tiny._GEMMA3N_TEMPLATE
    config = transformers.Gemma3TextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=6,
        layer_types=[*["sliding_attention"] * 2, "full_attention"] * 2,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=32,
    )
    torch.manual_seed(0)
    model = transformers.Gemma3ForCausalLM(config)
    with torch.no_grad():
        _spread_weights(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def loaded(checkpoint):
    model, processor = gt.load_model(checkpoint, device="cpu", dtype="float32")
    return gt.add_lora(model, gt.LoraConfig(rank=4)), processor


def test_it_needs_no_media_tokens(loaded):
    model, processor = loaded
    assert GEMMA3.media_tokens == ()
    assert isinstance(processor, transformers.GemmaTokenizer)
    assert loaded_modalities(model.get_base_model()) == ("text",)
    batch = gt.TextCollator(processor)([example("Hi", answer="Hello")])
    assert batch.inputs.keys() == {"input_ids", "attention_mask"}
    with pytest.raises(gt.DataError, match="does not read"):
        gt.MultimodalCollator(processor)([example("Hi", picture())])


def test_media_are_refused_when_it_is_loaded(checkpoint):
    with pytest.raises(ConfigError, match="has no image part; it offers text"):
        gt.load_model(checkpoint, modalities=("text", "image"))


def test_three_steps_are_those_of_transformers_and_peft(loaded, checkpoint):
    model, processor = loaded
    gemma = model.get_base_model()
    assert not [m for m in gemma.modules() if m.__class__.__name__ == "Gemma3RMSNorm"]
    assert isinstance(gemma.model.norm, LeanNorm)
    plain = transformers.Gemma3ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    config = copy.deepcopy(model.peft_config["default"])
    plain = peft.get_peft_model(plain.requires_grad_(False), config)
    peft.set_peft_model_state_dict(plain, peft.get_peft_model_state_dict(model))
    rows = [example(f"How much is {n} and {n}?", answer=f"{2 * n}, I think.") for n in range(40)]
    collator = gt.TextCollator(processor)
    begin_training(model)
    mine, theirs = (
        torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2)
        for m in (model, plain)
    )
    for step in range(3):
        batch = collator(rows[4 * step : 4 * step + 4])
        loss = target_loss_sum(model, batch, chunk_tokens=16) / batch.num_target_tokens
        expected = plain(**batch.inputs, labels=batch.labels).loss
        assert abs(loss - expected) < 1e-4 * expected
        for value, optimizer in ((loss, mine), (expected, theirs)):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    assert target_only_of(gemma).reason is None
    assert target_only_of(gemma).first_layer == 5
    with stock_parts(model), torch.no_grad():
        assert torch.isfinite(model(**collator(rows[:2]).inputs).logits).all()


def test_it_is_planned_trained_and_saved(loaded, checkpoint, tmp_path):
    model, processor = loaded
    assert "decoder" in gt.plan(checkpoint, memory_gib=8, device="cpu").footprint.resident
    stream = gt.stream_local(sample_data("text"), cache_dir=tmp_path / "cache")
    settings = gt.TrainConfig(max_steps=3, output_dir=tmp_path / "run", progress=False)
    trainer = gt.Trainer(model, stream, gt.TextCollator(processor), settings)
    trainer.fit()
    adapter = trainer.save(tmp_path / "adapter")
    again, _ = gt.load_model(checkpoint, device="cpu", dtype="float32")
    again = peft.PeftModel.from_pretrained(again, adapter)
    batch = gt.TextCollator(processor)([example("Hi", answer="Hello")])
    with torch.no_grad():
        torch.testing.assert_close(again(**batch.inputs).logits, model(**batch.inputs).logits)
    answer = gt.generate(model, processor, "How much is 1 and 1?", max_new_tokens=4)
    assert len(answer.token_ids) == 4


def test_another_tokenizer_is_refused(checkpoint):
    assert family_of(transformers.AutoConfig.from_pretrained(checkpoint)) == GEMMA3
    with pytest.raises(CheckpointError, match="not one this library fine-tunes"):
        gt.TextCollator(transformers.ByT5Tokenizer())
