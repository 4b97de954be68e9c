"""Batches: budgets, lengths, media counts, cuts and splits."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PILImage
from transformers import AutoProcessor

from gemma_tuner.batch import IGNORED, bucket_length
from gemma_tuner.collators.audio import AudioCollator
from gemma_tuner.collators.image import ImageCollator
from gemma_tuner.collators.multimodal import MultimodalCollator
from gemma_tuner.collators.text import TextCollator
from gemma_tuner.errors import ConfigError, DataError
from gemma_tuner.records import Example
from gemma_tuner.testing import FAMILIES, tiny_model
from tests.examples import example, picture, sound

PROCESSORS = {family: tiny_model(family)[1] for family in FAMILIES}
E2B = PROCESSORS["gemma4-e2b"]


@pytest.fixture(scope="module")
def released(shared_data):
    return AutoProcessor.from_pretrained(shared_data / "models" / "gemma-4-E2B-it")


def count_type(batch, code):
    return int((batch.inputs["mm_token_type_ids"] == code).sum())


@given(st.integers(0, 5000))
def test_buckets_hold_the_length_and_are_few(length):
    bucket = bucket_length(length)
    assert bucket >= length
    assert bucket == 16 or bucket < 1.5 * length
    assert len({bucket_length(n) for n in range(2049)}) == 15


@given(
    st.lists(st.text("abc xyz", min_size=1, max_size=40).filter(str.strip), min_size=1, max_size=4)
)
def test_targets_point_at_the_position_before_each_label(answers):
    batch = TextCollator(E2B)([example("q", answer=answer) for answer in answers])
    ids, labels = batch.inputs["input_ids"].flatten(), batch.labels.flatten()
    targets = batch.target_ids[: batch.num_target_tokens]
    starts = torch.arange(len(answers)).unsqueeze(1) * batch.labels.shape[1]
    positions = (batch.target_rows + starts).flatten()[batch.target_slots]
    positions = positions[: batch.num_target_tokens]
    assert (batch.target_ids[batch.num_target_tokens :] == IGNORED).all()
    assert (ids[positions + 1] == targets).all()
    assert (labels[positions + 1] == targets).all()
    assert int((labels != IGNORED).sum()) == batch.num_target_tokens
    padding = batch.inputs["attention_mask"].flatten() == 0
    assert (labels[padding] == IGNORED).all()
    assert (ids[padding] == E2B.tokenizer.pad_token_id).all()
    assert int((ids == E2B.tokenizer.bos_token_id).sum()) == len(answers)


@pytest.mark.parametrize("budget", [70, 140, 280, 560, 1120])
def test_the_image_budget_changes_the_token_count(released, budget):
    batch = ImageCollator(released, image_tokens=budget)([example(picture(size=(640, 480)), "?")])
    expected = {70: 63, 140: 130, 280: 266, 560: 540, 1120: 1064}[budget]
    assert count_type(batch, 1) == expected
    assert batch.inputs["pixel_values"].shape == (1, 9 * budget, 768)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_image_budget_that_is_not_offered(family):
    with pytest.raises(ConfigError, match=r"image_tokens is 100; Gemma .* offers"):
        ImageCollator(PROCESSORS[family], image_tokens=100)


@pytest.mark.parametrize(
    ("num_frames", "num_tokens"),
    [(38_560, 60), (48_000, 75), (48_800, 76), (99_360, 155), (480_000, 750)],
)
def test_golden_audio_token_counts(released, num_frames, num_tokens):
    batch = AudioCollator(released)([example(sound(num_frames))])
    assert count_type(batch, 3) == num_tokens


def test_long_audio_is_an_error_that_names_its_length():
    with pytest.raises(DataError, match=r"'call 3': a clip of 31.0 seconds .*max_seconds=30"):
        AudioCollator(E2B)([example(sound(31 * 16_000), key="call 3")])


@pytest.mark.parametrize("family", ["gemma4-e2b", "gemma4-12b", "gemma3n"])
def test_a_split_keeps_every_sample_before_the_whole_answer(family):
    collator = AudioCollator(PROCESSORS[family], max_seconds=1.0, long_audio="split")
    samples = sound(40_000)
    batch = collator([example(samples, "?", answer="the whole transcript")])
    assert batch.counts == {"split_clips": 1}
    assert len(batch.inputs["input_features"]) == 3
    pieces = collator.prepare_media(example(samples))[0].media
    assert np.array_equal(np.concatenate([np.asarray(p.source) for p in pieces]), samples)
    assert (
        batch.num_target_tokens
        == TextCollator(PROCESSORS[family])(
            [example("?", answer="the whole transcript")]
        ).num_target_tokens
    )


def test_max_seconds_beyond_what_the_model_hears():
    with pytest.raises(ConfigError, match=r"max_seconds is 40.* at most 30"):
        AudioCollator(E2B, max_seconds=40)


@pytest.mark.parametrize(("family", "num_frames"), [("gemma4-e2b", 20), ("gemma3n", 512)])
def test_a_clip_too_short_for_one_token(family, num_frames):
    with pytest.raises(DataError, match="audio"):
        AudioCollator(PROCESSORS[family])([example(sound(num_frames))])


@pytest.mark.parametrize("family", FAMILIES)
def test_several_media_in_one_example_and_rows_without_any(family):
    collator = MultimodalCollator(PROCESSORS[family])
    pictures = [example(picture(0), picture(1), "?"), example("?"), example(picture(2), "?")]
    batch = collator(pictures)
    assert len(batch.inputs["pixel_values"]) == 3
    if family not in {"gemma4-26b-a4b", "gemma4-31b"}:
        batch = collator([example(picture(), sound(), "?", sound(4_000)), example("?")])
        assert len(batch.inputs["pixel_values"]) == 1
        assert len(batch.inputs["input_features"]) == 2


def test_a_collator_refuses_media_that_it_does_not_take():
    with pytest.raises(DataError, match="'row': it holds image, which TextCollator does not take"):
        TextCollator(E2B)([example(picture(), key="row")])
    with pytest.raises(DataError, match="it holds audio, which ImageCollator does not take"):
        ImageCollator(E2B)([example(sound())])


def test_a_picture_too_thin_for_the_patch_grid(released):
    thin = PILImage.new("RGB", (20_000, 2))
    batch = ImageCollator(released, image_tokens=70)([example(thin, "?")])
    assert 0 < count_type(batch, 1) <= 70


@pytest.mark.parametrize("family", FAMILIES)
def test_half_of_a_character_is_refused(family):
    collator = TextCollator(PROCESSORS[family])
    for row in (example("half \ud83d", key="row"), Example("row", document="half \ud83d")):
        with pytest.raises(DataError, match="'row': its text holds half of a character"):
            collator([row])


def test_too_long_is_an_error_by_default():
    with pytest.raises(DataError, match=r"'long': \d+ tokens, \d+ more than max_tokens=64"):
        TextCollator(E2B, max_tokens=64)([example("x" * 200, key="long")])


@pytest.mark.parametrize(("family", "num_turns"), [("gemma4-e2b", 5), ("gemma3n", 4)])
def test_a_cut_takes_the_oldest_prompt_text_keeps_the_answer_and_counts(family, num_turns):
    processor = PROCESSORS[family]
    more = [("so " * 30 + "late", "yes")]
    rows = [example("early " * 30, answer="the answer", system="sys", more=more)]
    whole = TextCollator(processor)(rows)
    collator = TextCollator(processor, max_tokens=64, too_long="cut")
    cut = collator(rows)
    assert cut.num_tokens == 64
    assert cut.counts == {"cut_tokens": whole.num_tokens - 64, "cut_rows": 1}
    assert cut.num_target_tokens == whole.num_target_tokens
    text = processor.tokenizer.decode(cut.inputs["input_ids"][0])
    assert "late" in text
    assert text.count(collator.family.turn_open) == num_turns
    assert text.count(collator.family.turn_close) == num_turns


def test_an_answer_longer_than_max_tokens_is_never_cut():
    collator = TextCollator(E2B, max_tokens=64, too_long="cut")
    with pytest.raises(DataError, match=r"of which \d+ are the answer.*raise max_tokens"):
        collator([example("q", answer="x" * 200)])


def test_a_cut_document_keeps_its_beginning():
    collator = TextCollator(E2B, max_tokens=16, too_long="cut")
    batch = collator([Example("d", document="0123456789" * 10)])
    assert batch.num_tokens == 16
    assert batch.counts["cut_tokens"] > 0


def test_a_cut_never_takes_media():
    collator = ImageCollator(E2B, max_tokens=128, too_long="cut", image_tokens=70)
    batch = collator([example(picture(), "word " * 60, answer="a")])
    assert count_type(batch, 1) == sum(collator.family.count_tokens("image", batch.inputs))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"max_tokens": 4}, "max_tokens is 4"),
        ({"too_long": "drop"}, "too_long is 'drop'"),
        ({"train_on": "user"}, "train_on is 'user'"),
    ],
)
def test_settings_out_of_range(options, match):
    with pytest.raises(ConfigError, match=match):
        TextCollator(E2B, **options)


def test_a_collator_prints_its_settings_and_no_processor():
    assert repr(TextCollator(E2B, max_tokens=64)) == (
        "TextCollator(max_tokens=64, too_long='error', train_on='assistant', "
        "enable_thinking=False, text_is_rendered=False)"
    )
    shown = str(MultimodalCollator(E2B))
    assert "image_tokens=None" in shown
    assert len(shown) < 200


def test_settings_tell_templates_apart():
    assert TextCollator(E2B).settings() != TextCollator(PROCESSORS["gemma4-31b"]).settings()
