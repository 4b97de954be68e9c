"""The Gemma families: what their checkpoints, processors and prompts have in common and apart.

A family is found by ``config.model_type`` or by the processor's class, never by a model's name.
Numbers that a checkpoint may set differently (pooling, fixed token counts) are read from the
configuration or processor at hand. This module needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from gemma_tuner.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig

Modality = Literal["text", "image", "audio"]
MODALITIES: tuple[Modality, ...] = ("text", "image", "audio")


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family, bound to the numbers of one checkpoint.

    Args:
        name: For messages.
        model_type: ``config.model_type``.
        model_class: Name of the full multimodal class in transformers.
        processor_class: Name of the processor class in transformers.
        turn_open, turn_close: Tokens around a turn; ``turn_close`` is also the stop token.
        image_begin, image_token, image_end: Tokens around a picture; ``image_token`` is both what
            the template writes and what is repeated once for each soft token.
        audio_begin, audio_token, audio_end: Likewise for a sound.
        video_token: Soft token of video frames, None where there is none.
        token_type_name: The processor's output that tells media tokens from text.
        has_tools, has_thinking: Whether prompts can hold tool calls and thought channels.
        image_budget_option: Image processor option that bounds the soft tokens of a picture; None
            where their number is fixed.
        image_token_budgets: What that option takes; empty where the number is fixed.
        towers: For each modality the submodules of ``model.model`` that nothing else uses.
        towers_optional: Whether a configuration without a tower's part builds no tower.
        pooling: Positions along one side of a soft token (the 12B's processor has merged them).
        image_fixed_tokens, audio_fixed_tokens: Soft tokens of any picture or clip; 0 where their
            number follows from its size.
    """

    name: str
    model_type: str
    model_class: str
    processor_class: str
    turn_open: str
    turn_close: str
    image_begin: str
    image_token: str
    image_end: str
    audio_begin: str
    audio_token: str
    audio_end: str
    video_token: str | None
    token_type_name: str
    has_tools: bool
    has_thinking: bool
    image_budget_option: str | None
    image_token_budgets: tuple[int, ...]
    towers: Mapping[str, tuple[str, ...]]
    towers_optional: bool
    pooling: int = 1
    image_fixed_tokens: int = 0
    audio_fixed_tokens: int = 0

    @property
    def media_tokens(self) -> tuple[str, ...]:
        """Every token that stands for media or wraps it."""
        tokens = (
            *(self.image_begin, self.image_token, self.image_end),
            *(self.audio_begin, self.audio_token, self.audio_end),
        )
        return tokens if self.video_token is None else (*tokens, self.video_token)

    def control_tokens(self, tokenizer: Any) -> list[str]:
        """List what no text may spell: special tokens, and the turns', which 3n leaves unnamed."""
        return [*tokenizer.all_special_tokens, self.turn_open, self.turn_close]

    def modalities(self, config: PreTrainedConfig) -> tuple[Modality, ...]:
        """What a checkpoint offers; 26B-A4B and 31B have no audio part."""
        parts = {"image": "vision_config", "audio": "audio_config"}
        return tuple(
            modality
            for modality in MODALITIES
            if modality not in parts or getattr(config, parts[modality], None) is not None
        )

    def image_budgets(self, processor: Any) -> tuple[int, ...]:
        """The numbers of soft tokens that a picture may be bounded to."""
        return self.image_token_budgets or (processor.image_seq_length,)

    def max_audio_seconds(self, processor: Any) -> float:
        """Tell the longest clip."""
        # The feature extractors of Gemma 4 and 3n drop the rest silently.
        # Source: ``max_length=480_000`` samples of both feature extractors in transformers 5.23;
        # Gemma 4's processors state it as ``audio_seq_length`` tokens of ``audio_ms_per_token``.
        if self.audio_fixed_tokens:
            return 480_000 / 16_000
        return processor.audio_seq_length * processor.audio_ms_per_token / 1000

    def count_image_tokens(self, inputs: Mapping[str, Tensor]) -> list[int]:
        """Count the features that the vision part returns for each picture."""
        if "pixel_values" not in inputs:
            return []
        if self.image_fixed_tokens:
            return [self.image_fixed_tokens] * len(inputs["pixel_values"])
        valid_patches = (inputs["image_position_ids"] != -1).all(-1).sum(-1)
        return (valid_patches // self.pooling**2).tolist()

    def count_audio_tokens(self, inputs: Mapping[str, Tensor]) -> list[int]:
        """Count the features that the audio part returns for each clip."""
        if "input_features_mask" not in inputs:
            return []
        mask = inputs["input_features_mask"]
        if self.audio_fixed_tokens:  # of a clip too short for one frame nothing is heard
            return [self.audio_fixed_tokens if heard else 0 for heard in mask.any(-1).tolist()]
        if self.model_type == "gemma4":  # two convolutions of stride 2
            mask = mask[:, ::2][:, ::2]
        return mask.sum(-1).tolist()


_GEMMA4 = Family(
    name="Gemma 4",
    model_type="gemma4",
    model_class="Gemma4ForConditionalGeneration",
    processor_class="Gemma4Processor",
    turn_open="<|turn>",
    turn_close="<turn|>",
    image_begin="<|image>",
    image_token="<|image|>",
    image_end="<image|>",
    audio_begin="<|audio>",
    audio_token="<|audio|>",
    audio_end="<audio|>",
    video_token="<|video|>",
    token_type_name="mm_token_type_ids",
    has_tools=True,
    has_thinking=True,
    image_budget_option="max_soft_tokens",
    image_token_budgets=(70, 140, 280, 560, 1120),
    towers={"image": ("vision_tower", "embed_vision"), "audio": ("audio_tower", "embed_audio")},
    towers_optional=True,
)
_GEMMA4_UNIFIED = replace(
    _GEMMA4,
    name="Gemma 4 (12B, without encoders)",
    model_type="gemma4_unified",
    model_class="Gemma4UnifiedForConditionalGeneration",
    processor_class="Gemma4UnifiedProcessor",
    towers={"image": ("embed_vision",), "audio": ("embed_audio",)},
)
_GEMMA3N = Family(
    name="Gemma 3n",
    model_type="gemma3n",
    model_class="Gemma3nForConditionalGeneration",
    processor_class="Gemma3nProcessor",
    turn_open="<start_of_turn>",
    turn_close="<end_of_turn>",
    image_begin="<start_of_image>",
    image_token="<image_soft_token>",
    image_end="<end_of_image>",
    audio_begin="<start_of_audio>",
    audio_token="<audio_soft_token>",
    audio_end="<end_of_audio>",
    video_token=None,
    token_type_name="token_type_ids",
    has_tools=False,
    has_thinking=False,
    image_budget_option=None,
    image_token_budgets=(),
    # embed_vision and embed_audio stay: the model's forward calls both for text as well
    towers={"image": ("vision_tower",), "audio": ("audio_tower",)},
    towers_optional=False,
)
_FAMILIES = (_GEMMA4, _GEMMA4_UNIFIED, _GEMMA3N)


def family_of(config: PreTrainedConfig) -> Family:
    """Find the family of a model's configuration."""
    model_type = getattr(config, "model_type", None)
    for family in _FAMILIES:
        if family.model_type == model_type:
            break
    else:
        raise CheckpointError(
            _describe_unsupported("model_type", model_type, [f.model_type for f in _FAMILIES])
        )
    if family is _GEMMA3N:
        return replace(
            family,
            image_fixed_tokens=config.vision_soft_tokens_per_image,
            audio_fixed_tokens=config.audio_soft_tokens_per_image,
        )
    if family is _GEMMA4 and config.vision_config is not None:
        return replace(family, pooling=config.vision_config.pooling_kernel_size)
    return family


def loaded_modalities(model: Any) -> tuple[Modality, ...]:
    """Find what a model can read: towers that were left out when it was loaded are not there."""
    towers = family_of(model.config).towers
    return tuple(
        modality
        for modality in MODALITIES
        if all(getattr(model.model, name, None) is not None for name in towers.get(modality, ()))
    )


def family_of_processor(processor: Any) -> Family:
    """Find the family of a processor, for code that has no model."""
    classes = {cls.__name__ for cls in type(processor).__mro__}
    for family in _FAMILIES:
        if family.processor_class in classes:
            break
    else:
        supported = [f.processor_class for f in _FAMILIES]
        raise CheckpointError(
            _describe_unsupported("processor", type(processor).__name__, supported)
        )
    if family is _GEMMA3N:
        return replace(
            family,
            image_fixed_tokens=processor.image_seq_length,
            audio_fixed_tokens=processor.audio_seq_length,
        )
    if family is _GEMMA4:
        return replace(family, pooling=processor.image_processor.pooling_kernel_size)
    return family


def _describe_unsupported(what: str, found: Any, supported: list[str]) -> str:
    return (
        f"{what} {found!r} is not one this library fine-tunes; use a Gemma 4 or Gemma 3n "
        f"checkpoint ({what} {', '.join(supported)})"
    )
