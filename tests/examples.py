"""Small conversations with every kind of content, for tests."""

import numpy as np
import pytest
from PIL import Image as PILImage

from gemma_tuner.records import Audio, Example, Image, Text, Turn
from gemma_tuner.testing import FAMILIES

_FAST = ("gemma4-e2b", "gemma4-26b-a4b")
EVERY_FAMILY = [
    pytest.param(family, marks=() if family in _FAST else pytest.mark.slow) for family in FAMILIES
]
"""Of which those with layers of their own are fast: of shared keys and values, of experts."""


def picture(seed: int = 0, size: tuple[int, int] = (60, 48)) -> PILImage.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return PILImage.fromarray(pixels)


def sound(num_frames: int = 9_600, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, num_frames).astype(np.float32)


def example(*parts, answer="yes", key="example", system=None, more=()) -> Example:
    """One user turn made of ``parts`` (strings, pictures, samples) and its answer."""
    turns = [] if system is None else [Turn("system", (Text(system),))]
    turns.append(Turn("user", tuple(_part(part) for part in parts)))
    turns.append(Turn("assistant", (Text(answer),)))
    for question, reply in more:
        turns += [Turn("user", (Text(question),)), Turn("assistant", (Text(reply),))]
    return Example(key=key, turns=tuple(turns))


def _part(part):
    match part:
        case str():
            return Text(part)
        case np.ndarray():
            return Audio(part, 16_000)
        case _:
            return Image(part)
