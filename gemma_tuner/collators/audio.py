"""Text with clips to batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from gemma_tuner.checks import name_nearest
from gemma_tuner.collators.settings import CollatorSettings, LongAudio
from gemma_tuner.collators.text import TextCollator
from gemma_tuner.errors import ConfigError, DataError
from gemma_tuner.media.audio import SAMPLE_RATE_HZ
from gemma_tuner.records import Audio, Example, Part

# What is not said here a tokenizer says, which was once used with padding or a length and then
# saved: transformers gives what its file holds to the audio part too, and 2,048 tokens of text
# become 2,048 samples of audio. Lengths are checked below; the rest is what the feature extractors
# of transformers 5.23 have as defaults. Source: ProcessorMixin._merge_kwargs.
_AUDIO_OPTIONS = {
    "padding": "longest",
    "max_length": None,
    "truncation": False,
    "pad_to_multiple_of": 128,
}


@name_nearest
@dataclass
class AudioCollator(TextCollator):
    """Make batches of examples with clips (rows without one are welcome).

    Args:
        processor, max_tokens, too_long, train_on, enable_thinking: As in ``TextCollator``.
        max_seconds: The longest clip; the model hears at most 30 seconds of one clip, and its
            processor would drop the rest without a word.
        long_audio: What happens to a longer clip. ``error`` raises; ``split`` cuts it into equal
            consecutive clips, all of which stay in the prompt before the whole answer, and counts
            them in ``Batch.counts``.

    Raises:
        ConfigError: ``max_seconds`` beyond what the model hears.
    """

    max_seconds: float = CollatorSettings.max_seconds
    long_audio: LongAudio = CollatorSettings.long_audio
    media_types: ClassVar[tuple[type, ...]] = (Audio,)

    def __post_init__(self) -> None:
        super().__post_init__()
        hears = self.family.max_audio_seconds(self.processor)
        if self.max_seconds > hears:
            raise ConfigError(
                f"max_seconds is {self.max_seconds}; it must be above 0 and at most {hears}, the "
                f"longest clip that {self.family.name} hears"
            )

    def prepare_media(self, example: Example) -> tuple[Example, Mapping[str, int]]:
        """Check the clips' lengths; split what is configured to be split."""
        example, counts = super().prepare_media(example)
        max_frames = round(self.max_seconds * SAMPLE_RATE_HZ)
        split_clips = 0

        def fit(part: Part) -> tuple[Part, ...]:
            nonlocal split_clips
            if not isinstance(part, Audio):
                return (part,)
            samples = np.asarray(part.source)  # decoded: that is what this class is given
            if len(samples) <= max_frames:
                return (part,)
            if self.long_audio == "error":
                raise DataError(
                    f"a clip of {len(samples) / SAMPLE_RATE_HZ:.1f} seconds is longer than "
                    f"max_seconds={self.max_seconds}; cut the recording together with its "
                    "transcript, or set long_audio='split'",
                    key=example.key,
                )
            split_clips += 1
            pieces = np.array_split(samples, -(-len(samples) // max_frames))
            return tuple(replace(part, source=piece) for piece in pieces)

        turns = tuple(
            replace(turn, parts=tuple(piece for part in turn.parts for piece in fit(part)))
            for turn in example.turns
        )
        if not split_clips:
            return example, counts
        return replace(example, turns=turns), {**counts, "split_clips": split_clips}

    def processor_options(self) -> dict[str, Any]:
        """The processor's keyword arguments for media: clips are never cut."""
        return {**super().processor_options(), "audio_kwargs": dict(_AUDIO_OPTIONS)}
