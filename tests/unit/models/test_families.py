from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from transformers import AutoConfig

from gemma_tuner.errors import CheckpointError
from gemma_tuner.models.families import family_of, family_of_processor
from gemma_tuner.testing import FAMILIES, tiny_model


def build(name: str) -> tuple[Any, Any]:
    return tiny_model(name)


def process(processor, images=None, audio=None):
    family = family_of_processor(processor)
    given = {"image": images or [], "audio": audio or []}
    text = "".join(form.token * len(given[kind]) for kind, form in family.media.items())
    return processor(
        text=[text], images=[images] if images else None, audio=audio, return_tensors="pt"
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_found_by_configuration_and_by_processor(name, modalities):
    model, processor = build(name)
    family = family_of(model.config)
    assert family == family_of_processor(processor)
    assert type(model).__name__ == family.model_class
    assert family.modalities(model.config) == modalities[name]
    ids = processor.tokenizer.convert_tokens_to_ids(
        [*family.media_tokens, family.turn_open, family.turn_close]
    )
    assert processor.tokenizer.unk_token_id not in ids
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("name", FAMILIES)
def test_counts_are_what_the_towers_return(name, modalities):
    model, processor = build(name)
    family = family_of(model.config)
    rng = np.random.default_rng(0)
    images = [
        PIL.Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8))
        for size in ((20, 400), (90, 90), (61, 40))
    ]
    batch = process(processor, images=images)
    counts = family.count_tokens("image", batch)
    media = {k: v for k, v in batch.items() if k in {"pixel_values", "image_position_ids"}}
    with torch.no_grad():
        features = model.model.get_image_features(**media, return_dict=True).pooler_output
    assert counts == [len(feature) for feature in features]
    assert sum(counts) == (batch["input_ids"] == processor.image_token_id).sum()
    assert family.count_tokens("audio", batch) == []

    if "audio" not in modalities[name]:
        return
    clips = [rng.normal(scale=0.1, size=size) for size in (500, 16_000, 38_561)]
    batch = process(processor, audio=clips)
    counts = family.count_tokens("audio", batch)
    assert sum(counts) == (batch["input_ids"] == processor.audio_token_id).sum()
    assert family.count_tokens("image", batch) == []
    # The model raises when features and placeholders differ in number.
    with torch.no_grad():
        assert torch.isfinite(model(**batch).logits).all()
    if family.media["audio"].fixed_tokens:
        assert counts == [188, 188, 188]
    else:
        with torch.no_grad():
            outputs = model.model.get_audio_features(
                batch["input_features"], batch["input_features_mask"], return_dict=True
            )
        assert counts == outputs.attention_mask.sum(-1).tolist()


@pytest.mark.parametrize("budget", [70, 140, 280, 560, 1120])
def test_gemma4_processors_keep_to_every_budget(budget):
    for name in ("gemma4-e2b", "gemma4-12b"):
        processor = build(name)[1]
        family = family_of_processor(processor)
        assert budget in family.image_budgets(processor)
        batch = processor(
            text=[family.media["image"].token],
            images=[[PIL.Image.new("RGB", (320, 200))]],
            images_kwargs={family.image_budget_option: budget},
            return_tensors="pt",
        )
        (count,) = family.count_tokens("image", batch)
        assert 0.8 * budget <= count <= budget


@pytest.mark.parametrize(
    ("num_samples", "num_tokens"),
    [(38_560, 60), (48_000, 75), (48_800, 76), (99_360, 155), (640_000, 750)],
)
def test_golden_audio_counts(num_samples, num_tokens):
    processor = build("gemma4-e2b")[1]
    batch = process(processor, audio=[np.zeros(num_samples, dtype=np.float32)])
    assert family_of_processor(processor).count_tokens("audio", batch) == [num_tokens]


def test_limits_come_from_the_processor():
    for name in ("gemma4-e2b", "gemma4-12b", "gemma3n"):
        processor = build(name)[1]
        assert family_of_processor(processor).max_audio_seconds(processor) == 30.0
    assert family_of_processor(processor).image_budgets(processor) == (4,)
    family = family_of(transformers.Gemma3nConfig())
    assert family.count_tokens("image", {"pixel_values": torch.zeros(2, 3, 8, 8)}) == [256, 256]


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        ("gemma-4-E2B-it", ("text", "image", "audio")),
        ("gemma-4-31B-it", ("text", "image")),
    ],
)
def test_released_configurations(shared_data, folder, expected):
    config = AutoConfig.from_pretrained(shared_data / "models" / folder)
    family = family_of(config)
    assert (family.model_type, family.pooling) == ("gemma4", 3)
    assert family.modalities(config) == expected


def test_released_processor(shared_data):
    processor = transformers.AutoProcessor.from_pretrained(
        shared_data / "models" / "gemma-4-E2B-it"
    )
    family = family_of_processor(processor)
    assert family.max_audio_seconds(processor) == 30.0
    image = PIL.Image.new("RGB", (640, 480))
    assert family.count_tokens("image", process(processor, images=[image])) == [266]


def test_other_models_are_refused_by_name():
    with pytest.raises(CheckpointError, match=r"'llama'.*gemma4, gemma4_unified, gemma3n"):
        family_of(transformers.LlamaConfig())
    with pytest.raises(CheckpointError, match=r"'object'.*Gemma4Processor"):
        family_of_processor(object())
