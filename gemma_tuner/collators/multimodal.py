"""Text with pictures and sounds, in one example or mixed over a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gemma_tuner.collators.audio import AudioCollator
from gemma_tuner.collators.image import ImageCollator
from gemma_tuner.records import Audio, Image


@dataclass
class MultimodalCollator(ImageCollator, AudioCollator):
    """Make batches of examples with any media; takes the settings of both its parents."""

    media_types: ClassVar[tuple[type, ...]] = (Image, Audio)
