"""Tiny checkpoints on disk, one of each family, and batches with all that a family takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from gemma_tuner.models.families import family_of_processor
from gemma_tuner.testing import FAMILIES, save_tiny_model


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    folders = {}
    for family in FAMILIES:
        folders[family] = tmp_path_factory.mktemp(family)
        save_tiny_model(family, folders[family])
    return folders


@pytest.fixture(scope="session")
def make_batch() -> Callable:
    """A right-padded batch: one row with media, one without; sound only where the model hears."""

    def make(processor, *kinds: str) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng(0)
        pixels = rng.integers(0, 255, (100, 160, 3), dtype=np.uint8)
        media = [{"type": kind} for kind in kinds]
        texts = [
            processor.apply_chat_template(
                [
                    {"role": "user", "content": [*content, {"type": "text", "text": "what?"}]},
                    {"role": "assistant", "content": "a cat on a mat"},
                ]
            )
            for content in (media, [])
        ]
        batch = processor(
            text=texts,
            images=[[PIL.Image.fromarray(pixels)], []] if "image" in kinds else None,
            audio=[rng.normal(scale=0.1, size=9_000)] if "audio" in kinds else None,
            padding=True,
            return_tensors="pt",
            add_special_tokens=False,
        )
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        media_ids = processor.tokenizer.convert_tokens_to_ids(
            list(family_of_processor(processor).media_tokens)
        )
        labels[torch.isin(labels, torch.tensor(media_ids))] = -100
        return {**batch, "labels": labels}

    return make


@pytest.fixture(scope="session")
def modalities() -> dict[str, tuple[str, ...]]:
    """What each family takes."""
    deaf = {"gemma4-26b-a4b", "gemma4-31b"}
    return {f: ("text", "image") if f in deaf else ("text", "image", "audio") for f in FAMILIES}
