"""CollatorSettings: how an example becomes a row of tokens. It needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from gemma_tuner.checks import bounds, check_fields, name_nearest

TooLong = Literal["error", "cut"]
TrainOn = Literal["assistant", "last", "all"]
LongAudio = Literal["error", "split"]

OF_TRAINING_ALONE = ("max_tokens", "too_long", "train_on")
"""Settings that do not change what a model is asked."""


@name_nearest
@dataclass(frozen=True, kw_only=True)
class CollatorSettings:
    """What collators are told, what the command line takes, and what lies beside an adapter.

    Args:
        max_tokens: The longest row, in tokens.
        too_long: What happens to a longer row: 'error', or 'cut', which takes the oldest text out
            of the prompt and counts it.
        train_on: 'assistant' trains every answer, 'last' the last one, 'all' every token.
        enable_thinking: Lets the model think before it answers, where its family can.
        text_is_rendered: Documents are conversations that this model's own template has written.
        image_tokens: Of an image: 70, 140, 280, 560 or 1120; by default as the model's processor
            says.
        max_seconds: The longest clip.
        long_audio: What happens to a longer clip: 'error', or 'split' into several.

    Raises:
        ConfigError: An unknown setting, or a value out of its range or of another type.
    """

    max_tokens: int = field(default=2048, metadata=bounds(at_least=16))
    too_long: TooLong = "error"
    train_on: TrainOn = "assistant"
    enable_thinking: bool = False
    text_is_rendered: bool = False
    image_tokens: int | None = field(default=None, metadata=bounds(at_least=1))
    max_seconds: float = field(default=30.0, metadata=bounds(above=0))
    long_audio: LongAudio = "error"

    def __post_init__(self) -> None:
        check_fields(self)
