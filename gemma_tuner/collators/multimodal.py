"""Text with images and clips, in one example or mixed over a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gemma_tuner.checks import name_nearest
from gemma_tuner.collators.audio import AudioCollator
from gemma_tuner.collators.image import ImageCollator
from gemma_tuner.records import Audio, Image


@name_nearest
@dataclass
class MultimodalCollator(ImageCollator, AudioCollator):
    """Make batches of examples with images, clips, both or neither.

    Args:
        processor, max_tokens, too_long, train_on, enable_thinking: As in ``TextCollator``.
        image_tokens: As in ``ImageCollator``.
        max_seconds, long_audio: As in ``AudioCollator``.

    Raises:
        ConfigError: A setting outside its range, or one that the family does not offer.
    """

    media_types: ClassVar[tuple[type, ...]] = (Image, Audio)
