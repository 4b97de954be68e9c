"""The kinds of media, each with its names from the file's ending to the decoder's placeholders.

The names of the model's arguments are written here only. A new kind begins with an entry here and
one in each family that takes it (:mod:`gemma_tuner.models.families`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gemma_tuner.records import Audio, Image

MediaKind = Literal["image", "audio"]
Modality = Literal["text", MediaKind]
MODALITIES: tuple[Modality, ...] = ("text", "image", "audio")


@dataclass(frozen=True, slots=True, kw_only=True)
class Medium:
    """One kind of media.

    Args:
        modality: Its name.
        part: What holds it in an example.
        suffixes: Endings of its files, in lower case.
        inputs: The model's arguments, each ``[items, ...]``: the media, then what goes with it.
        varies: Whether the items' second axis (time) differs in length, and is padded.
        config: The part of the model's configuration that says whether there is a tower.
        token_id: The configuration's name for the placeholder.
        tower: The submodule of ``model.model`` that makes features.
        projector: The one that brings them to the decoder's width.
        method: The method of ``model.model`` that runs both.
    """

    modality: MediaKind
    part: type[Image | Audio]
    suffixes: frozenset[str]
    inputs: tuple[str, ...]
    varies: bool
    config: str
    token_id: str
    tower: str
    projector: str
    method: str


IMAGE = Medium(
    modality="image",
    part=Image,
    suffixes=frozenset(
        {
            *(".avif", ".bmp", ".gif", ".heic", ".heif", ".jp2", ".jpeg", ".jpg"),
            *(".png", ".ppm", ".tif", ".tiff", ".webp"),
        }
    ),
    inputs=("pixel_values", "image_position_ids"),
    varies=False,
    config="vision_config",
    token_id="image_token_id",
    tower="vision_tower",
    projector="embed_vision",
    method="get_image_features",
)
AUDIO = Medium(
    modality="audio",
    part=Audio,
    suffixes=frozenset(
        {
            *(".aac", ".aif", ".aiff", ".amr", ".au", ".caf", ".flac", ".m4a", ".mka", ".mp3"),
            *(".oga", ".ogg", ".opus", ".w64", ".wav", ".webm", ".wma"),
        }
    ),
    inputs=("input_features", "input_features_mask"),
    varies=True,
    config="audio_config",
    token_id="audio_token_id",
    tower="audio_tower",
    projector="embed_audio",
    method="get_audio_features",
)
MEDIA = (IMAGE, AUDIO)


def kind_of(part: object) -> MediaKind:
    """Tell which kind of media a part of an example is."""
    for medium in MEDIA:
        if isinstance(part, medium.part):
            return medium.modality
    raise TypeError(f"a part is Text, Image or Audio, and one is {type(part).__name__}")


def kind_of_suffix(suffix: str) -> MediaKind | None:
    """Tell which kind of media a file of this ending (``.wav``) holds; None where it is none."""
    return next((medium.modality for medium in MEDIA if suffix in medium.suffixes), None)
