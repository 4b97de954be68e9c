"""Embedding and head are one weight in the base; an adapter that trains either parts them."""

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import gemma_tuner as gt
from gemma_tuner.errors import CheckpointError
from gemma_tuner.export.gguf import export_gguf
from gemma_tuner.export.merged import export_merged
from gemma_tuner.export.mlx import export_mlx
from tests.export_parts import logits, save_base, text_inputs

_ATTENTION = r".*language_model.*\.q_proj"
WAYS = {
    "embed_tokens": {"target_modules": _ATTENTION, "modules_to_save": ["embed_tokens"]},
    "lm_head": {"target_modules": _ATTENTION, "modules_to_save": ["lm_head"]},
    "both": {"target_modules": _ATTENTION, "modules_to_save": ["lm_head", "embed_tokens"]},
    "both as one": {
        "target_modules": _ATTENTION,
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
    "an adapter on the head": {"target_modules": rf"lm_head|{_ATTENTION}"},
    "a norm": {"target_modules": _ATTENTION, "modules_to_save": ["language_model.norm"]},
}
REFUSED = {
    "an adapter on the embedding": {"target_modules": rf".*\.embed_tokens|{_ATTENTION}"},
    "some tokens": {"target_modules": _ATTENTION, "trainable_token_indices": [5, 6]},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tied") / "base"
    save_base("gemma4-e2b", folder)
    return folder


def save_trained(base, settings, folder):
    """Train, as it were, with PEFT alone; return the logits."""
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_pretrained(base)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, **settings)).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return logits(model, text_inputs())


@pytest.mark.parametrize("way", WAYS)
def test_a_merged_model_computes_what_peft_does(base, way, tmp_path):
    wanted = save_trained(base, WAYS[way], tmp_path / "adapter")
    export_merged(tmp_path / "adapter", tmp_path / "merged", base=base)
    merged = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(merged, text_inputs()), wanted, rtol=0, atol=2e-4)
    ours, _ = gt.load_model(tmp_path / "merged", device="cpu")
    torch.testing.assert_close(logits(ours, text_inputs()), wanted, rtol=0, atol=2e-4)
    is_parted = way in ("embed_tokens", "lm_head", "both", "an adapter on the head")
    has_head = "lm_head.weight" in load_file(tmp_path / "merged" / "model.safetensors")
    assert has_head == is_parted
    if is_parted:
        with pytest.raises(CheckpointError, match="one weight for embedding and head"):
            export_gguf(tmp_path / "adapter", tmp_path / "model.gguf", base=base)
        with pytest.raises(CheckpointError, match=r"merged model|one weight"):
            export_mlx(tmp_path / "adapter", tmp_path / "mlx", base=base)


@pytest.mark.parametrize("way", REFUSED)
def test_what_cannot_be_merged_is_refused_by_name(base, way, tmp_path):
    save_trained(base, REFUSED[way], tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"lora_embedding|trainable_token_indices"):
        export_merged(tmp_path / "adapter", tmp_path / "merged", base=base)


@pytest.mark.parametrize("way", ["lm_head", "an adapter on the head"])
def test_a_head_that_is_trained_has_no_loss_here(base, way, tmp_path):
    settings = WAYS[way]
    model = gt.load_model(base, device="cpu")[0]
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, **settings))
    (tmp_path / "rows.jsonl").write_text('{"prompt": "q", "response": "a"}\n')
    processor = transformers.AutoProcessor.from_pretrained(base)
    trainer = gt.Trainer(
        model,
        gt.stream_local(tmp_path / "rows.jsonl", cache_dir=tmp_path / "cache"),
        gt.TextCollator(processor),
        gt.TrainConfig(max_steps=1, output_dir=tmp_path / "run", progress=False),
    )
    with pytest.raises(gt.ConfigError, match="lm_head"):
        trainer.fit()
