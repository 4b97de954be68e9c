"""The Gemma families: what their checkpoints, processors and prompts have in common and apart.

A family is found by ``config.model_type`` or by the processor's class, never by a model's name.
Numbers that a checkpoint may set differently (pooling, fixed token counts) are read from the
configuration or processor at hand. A new family is one entry here; one without media has an empty
``media``. This module needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from gemma_tuner.errors import CheckpointError
from gemma_tuner.modalities import AUDIO, IMAGE, MEDIA, MediaKind, Modality

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig


@dataclass(frozen=True, kw_only=True)
class MediaForm:
    """How a family takes one kind of media.

    Args:
        begin, token, end: Tokens around an item; ``token``, the placeholder, is both what the
            template writes and what is repeated once for each feature.
        modules: The submodules of ``model.model`` that nothing else uses.
        fixed_tokens: Placeholders of any item; 0 where their number follows from its size.
    """

    begin: str
    token: str
    end: str
    modules: tuple[str, ...]
    fixed_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family, bound to the numbers of one checkpoint.

    Args:
        name: For messages.
        model_type: ``config.model_type``.
        model_class: Name of the class in transformers that has all parts and the head.
        processor_class: Name of the class of its processor, or of its tokenizer where it reads
            text alone.
        decoder: Name of the decoder within that class, as weights and adapters are called.
        norm: Name of the RMS norm's class in transformers.
        norm_offset: What the norm adds to its weight.
        turn_open, turn_close: Tokens around a turn; ``turn_close`` is also the stop token.
        media: What the family takes beside text.
        other_media_tokens: Tokens of media that this library does not read.
        token_type_name: The processor's output that tells media tokens from text, None for none.
        has_tools, has_thinking: Whether prompts can hold tool calls and thought channels.
        image_budget_option: Image processor option that bounds the placeholders of an image; None
            where their number is fixed.
        image_token_budgets: What that option takes; empty where the number is fixed.
        towers_optional: Whether a configuration without a tower's part builds no tower.
        lays_features_only: Whether its forward lays nothing but features over the embeddings of
            the ids.
        pooling: Positions along one side of a placeholder (the 12B's processor has merged them).
        audio_convolutions: Of stride 2, through which the mask of a clip's frames goes.
        stored_names: What differs between a module's name and that in a checkpoint's files.
        gguf: llama.cpp's name for the architecture; None where it has none.
        mlx_decoder: The decoder's name in mlx-lm.
    """

    name: str
    model_type: str
    model_class: str
    processor_class: str
    decoder: str
    norm: str
    norm_offset: float = 0.0
    turn_open: str
    turn_close: str
    media: Mapping[MediaKind, MediaForm] = field(default_factory=dict)
    other_media_tokens: tuple[str, ...] = ()
    token_type_name: str | None = None
    has_tools: bool = False
    has_thinking: bool = False
    image_budget_option: str | None = None
    image_token_budgets: tuple[int, ...] = ()
    towers_optional: bool = False
    lays_features_only: bool = False
    pooling: int = 1
    audio_convolutions: int = 0
    stored_names: tuple[tuple[str, str], ...] = ()
    gguf: str | None
    mlx_decoder: str

    @property
    def media_tokens(self) -> tuple[str, ...]:
        """Every token that stands for media or wraps it."""
        forms = self.media.values()
        tokens = (token for form in forms for token in (form.begin, form.token, form.end))
        return (*tokens, *self.other_media_tokens)

    def control_tokens(self, tokenizer: Any) -> list[str]:
        """List what no text may spell: special tokens, and the turns', which 3n leaves unnamed."""
        return [*tokenizer.all_special_tokens, self.turn_open, self.turn_close]

    def modalities(self, config: PreTrainedConfig) -> tuple[Modality, ...]:
        """What a checkpoint offers; 26B-A4B and 31B have no audio part."""
        media = [medium for medium in MEDIA if getattr(config, medium.config, None) is not None]
        return ("text", *(m.modality for m in media if m.modality in self.media))

    def image_budgets(self, processor: Any) -> tuple[int, ...]:
        """The numbers of placeholders that an image may be bounded to."""
        if "image" not in self.media:
            return ()
        return self.image_token_budgets or (processor.image_seq_length,)

    def max_audio_seconds(self, processor: Any) -> float:
        """Tell the longest clip."""
        if "audio" not in self.media:
            return math.inf  # none will come
        # The feature extractors of Gemma 4 and 3n drop the rest silently.
        # Source: ``max_length=480_000`` samples of both feature extractors in transformers 5.23;
        # Gemma 4's processors state it as ``audio_seq_length`` tokens of ``audio_ms_per_token``.
        if self.media["audio"].fixed_tokens:
            return 480_000 / 16_000
        return processor.audio_seq_length * processor.audio_ms_per_token / 1000

    def count_tokens(self, kind: MediaKind, inputs: Mapping[str, Tensor]) -> list[int]:
        """Count the features that the model makes of each item, in reading order."""
        count = {"image": self._count_image_tokens, "audio": self._count_audio_tokens}[kind]
        return count(inputs) if kind in self.media else []

    def _count_image_tokens(self, inputs: Mapping[str, Tensor]) -> list[int]:
        pixels, positions = IMAGE.inputs  # positions: [N, patches, 2], padding -1
        if pixels not in inputs:
            return []
        if fixed := self.media["image"].fixed_tokens:
            return [fixed] * len(inputs[pixels])
        valid_patches = (inputs[positions] != -1).all(-1).sum(-1)
        return (valid_patches // self.pooling**2).tolist()

    def _count_audio_tokens(self, inputs: Mapping[str, Tensor]) -> list[int]:
        _, mask_name = AUDIO.inputs  # [N, frames] bool, True where a frame is valid
        if mask_name not in inputs:
            return []
        mask = inputs[mask_name]
        if fixed := self.media["audio"].fixed_tokens:  # too short for one frame: nothing is heard
            return [fixed if heard else 0 for heard in mask.any(-1).tolist()]
        for _ in range(self.audio_convolutions):  # of stride 2
            mask = mask[:, ::2]
        return mask.sum(-1).tolist()


_GEMMA4 = Family(
    name="Gemma 4",
    model_type="gemma4",
    model_class="Gemma4ForConditionalGeneration",
    processor_class="Gemma4Processor",
    decoder="model.language_model",
    norm="Gemma4RMSNorm",
    turn_open="<|turn>",
    turn_close="<turn|>",
    media={
        "image": MediaForm(
            begin="<|image>",
            token="<|image|>",
            end="<image|>",
            modules=("vision_tower", "embed_vision"),
        ),
        "audio": MediaForm(
            begin="<|audio>",
            token="<|audio|>",
            end="<audio|>",
            modules=("audio_tower", "embed_audio"),
        ),
    },
    other_media_tokens=("<|video|>",),
    token_type_name="mm_token_type_ids",
    has_tools=True,
    has_thinking=True,
    image_budget_option="max_soft_tokens",
    image_token_budgets=(70, 140, 280, 560, 1120),
    towers_optional=True,
    lays_features_only=True,
    audio_convolutions=2,
    gguf="gemma4",
    mlx_decoder="language_model.model",
)
_GEMMA4_UNIFIED = replace(
    _GEMMA4,
    name="Gemma 4 (12B, without encoders)",
    model_type="gemma4_unified",
    model_class="Gemma4UnifiedForConditionalGeneration",
    processor_class="Gemma4UnifiedProcessor",
    norm="Gemma4UnifiedRMSNorm",
    media={kind: replace(form, modules=form.modules[1:]) for kind, form in _GEMMA4.media.items()},
    audio_convolutions=0,
    # Source: ``conversion_mapping.py`` of transformers 5.23, "gemma4_unified".
    stored_names=(
        (
            "embed_vision.multimodal_embedder.embedding_projection",
            "embed_vision.embedding_projection",
        ),
    ),
)
_GEMMA3N = Family(
    name="Gemma 3n",
    model_type="gemma3n",
    model_class="Gemma3nForConditionalGeneration",
    processor_class="Gemma3nProcessor",
    decoder="model.language_model",
    norm="Gemma3nRMSNorm",
    turn_open="<start_of_turn>",
    turn_close="<end_of_turn>",
    # embed_vision and embed_audio stay: the model's forward calls both for text as well
    media={
        "image": MediaForm(
            begin="<start_of_image>",
            token="<image_soft_token>",
            end="<end_of_image>",
            modules=("vision_tower",),
        ),
        "audio": MediaForm(
            begin="<start_of_audio>",
            token="<audio_soft_token>",
            end="<end_of_audio>",
            modules=("audio_tower",),
        ),
    },
    token_type_name="token_type_ids",
    gguf="gemma3n",
    mlx_decoder="model.language_model",
)
FAMILIES = (_GEMMA4, _GEMMA4_UNIFIED, _GEMMA3N)


def family_of(config: PreTrainedConfig) -> Family:
    """Find the family of a model's configuration, with its numbers."""
    family = family_of_type(getattr(config, "model_type", None))
    if family.model_type == "gemma3n":
        images, clips = config.vision_soft_tokens_per_image, config.audio_soft_tokens_per_image
        return _with_fixed_tokens(family, image=images, audio=clips)
    if family.model_type == "gemma4" and config.vision_config is not None:
        return replace(family, pooling=config.vision_config.pooling_kernel_size)
    return family


def family_of_type(model_type: str | None) -> Family:
    """Find a family by ``config.model_type``, without a checkpoint's numbers."""
    for family in FAMILIES:
        if family.model_type == model_type:
            return family
    raise _unsupported("model_type", model_type, [f.model_type for f in FAMILIES])


def family_of_processor(processor: Any) -> Family:
    """Find the family of a processor, with its numbers, for code that has no model."""
    classes = {cls.__name__ for cls in type(processor).__mro__}
    for family in FAMILIES:
        if family.processor_class in classes:
            break
    else:
        supported = [f.processor_class for f in FAMILIES]
        raise _unsupported("processor", type(processor).__name__, supported)
    if family.model_type == "gemma3n":
        images, clips = processor.image_seq_length, processor.audio_seq_length
        return _with_fixed_tokens(family, image=images, audio=clips)
    if family.model_type == "gemma4":
        return replace(family, pooling=processor.image_processor.pooling_kernel_size)
    return family


def loaded_modalities(model: Any) -> tuple[Modality, ...]:
    """Find what a model can read: towers that were left out when it was loaded are not there."""
    media = family_of(model.config).media
    return (
        "text",
        *(
            kind
            for kind, form in media.items()
            if all(getattr(model.model, name, None) is not None for name in form.modules)
        ),
    )


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer of a processor, which families without media have in its place."""
    return getattr(processor, "tokenizer", processor)


def _with_fixed_tokens(family: Family, **counts: int) -> Family:
    media = {kind: replace(form, fixed_tokens=counts[kind]) for kind, form in family.media.items()}
    return replace(family, media=media)


def _unsupported(what: str, found: Any, supported: list[str]) -> CheckpointError:
    return CheckpointError(
        f"{what} {found!r} is not one this library fine-tunes; use a Gemma 4 or Gemma 3n "
        f"checkpoint ({what} {', '.join(supported)})"
    )
