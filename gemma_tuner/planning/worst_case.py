"""The largest example that a collator's settings let through, for planning without data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import PIL.Image
import torch

from gemma_tuner.batch import Batch, Row, pad_rows
from gemma_tuner.checkpoints.loading import read_processor
from gemma_tuner.collators.multimodal import MultimodalCollator
from gemma_tuner.media.audio import SAMPLE_RATE_HZ
from gemma_tuner.modalities import Modality
from gemma_tuner.models.families import family_of
from gemma_tuner.records import Audio, Example, Image, Text, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def make_worst_case(
    source: str,
    config: PreTrainedConfig,
    modalities: Sequence[Modality],
    max_tokens: int,
    image_tokens: int | None,
    max_seconds: float,
    revision: str | None,
) -> Batch:
    """Make one row with the largest media that a collator of these settings lets through."""
    if set(modalities) == {"text"}:
        ids = torch.ones(16, dtype=torch.int64)
        row = Row("", ids, torch.zeros_like(ids), ids > 0)
        name = family_of(config).token_type_name
        return pad_rows([row], max_tokens=16, pad_token_id=0, token_type_name=name)
    collator = MultimodalCollator(
        read_processor(source, revision),
        max_tokens=max_tokens,
        image_tokens=image_tokens,
        max_seconds=max_seconds,
    )
    parts: list[Image | Audio | Text] = [Text("?")]
    if "image" in modalities:
        parts.append(Image(PIL.Image.new("RGB", (1536, 1536))))
    if "audio" in modalities:
        silence = np.zeros(int(max_seconds * SAMPLE_RATE_HZ), dtype=np.float32)
        parts.append(Audio(silence, SAMPLE_RATE_HZ))
    turns = (Turn("user", tuple(parts)), Turn("assistant", (Text("."),)))
    return collator([Example("imagined", turns)])
