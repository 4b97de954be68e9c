"""A processor that was used by other tools and saved hears what a fresh one hears."""

import numpy as np
import pytest
import torch
import transformers

from gemma_tuner.collators.audio import AudioCollator
from gemma_tuner.records import Audio, Example, Text, Turn
from gemma_tuner.testing.models.processor import tiny_processor

# 1.03 seconds, no multiple of the 128 samples that feature extractors pad to.
SOUND = np.random.default_rng(0).normal(scale=0.1, size=16_500).astype(np.float32)
EXAMPLE = Example(
    "spoken",
    (Turn("user", (Audio(SOUND, 16_000), Text("Write it."))), Turn("assistant", (Text("yes"),))),
)


@pytest.mark.parametrize("family", ["gemma4-e2b", "gemma4-12b", "gemma3n"])
@pytest.mark.parametrize(
    "options",
    [
        {"padding": True},
        {"truncation": True, "max_length": 2048},
        {"padding": "max_length", "max_length": 2048, "pad_to_multiple_of": 8},
    ],
    ids=["padding", "truncation", "fixed"],
)
def test_what_a_tokenizer_was_used_with_cuts_no_sound(family, options, tmp_path):
    processor = tiny_processor(family)
    expected = AudioCollator(processor).encode(EXAMPLE)

    # tokenizer.json keeps what the tokenizer was last called with
    processor.tokenizer(["some text"], **options)
    processor.save_pretrained(tmp_path)
    row = AudioCollator(transformers.AutoProcessor.from_pretrained(tmp_path)).encode(EXAMPLE)

    assert torch.equal(row.input_ids, expected.input_ids)
    assert row.media.keys() == expected.media.keys()
    assert all(torch.equal(row.media[name], expected.media[name]) for name in expected.media)
