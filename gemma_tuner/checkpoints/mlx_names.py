"""Names of a Gemma model's modules in mlx-lm, mlx-vlm and transformers.

==================  ==================================  ====================================
transformers        ``model.language_model.layers.0``   ``model.vision_tower.encoder...``
mlx-vlm             ``language_model.model.layers.0``   ``vision_tower.encoder...``
mlx-lm              ``language_model.model.layers.0``   (it has no towers)
mlx-lm, Gemma 3n    ``model.language_model.layers.0``
==================  ==================================  ====================================

Source: ``sanitize`` of gemma3n, gemma4 and gemma4_unified in mlx-lm 0.32.2 and mlx-vlm 0.7.10.
"""

from __future__ import annotations

from typing import Literal, get_args

from gemma_tuner.checkpoints.weights import stored_name
from gemma_tuner.errors import ConfigError
from gemma_tuner.models.families import family_of_type

Program = Literal["mlx-lm", "mlx-vlm"]

_MLX_VLM_DECODER = "language_model.model"


def check_program(program: str) -> None:
    """Raise unless the program is one of MLX's."""
    if program not in get_args(Program):
        raise ConfigError(f"program is {program!r}; it may be {' or '.join(get_args(Program))}")


def mlx_name(name: str, model_type: str, program: Program) -> str:
    """Translate a module's name from transformers to MLX."""
    # model.language_model.layers.0.mlp.up_proj -> language_model.model.layers.0.mlp.up_proj
    # model.audio_tower.layers.1.self_attn.post -> audio_tower.layers.1.self_attn.post
    family = family_of_type(model_type)
    if name.startswith(f"{family.decoder}."):
        decoder = family.mlx_decoder if program == "mlx-lm" else _MLX_VLM_DECODER
        return decoder + name.removeprefix(family.decoder)
    if program == "mlx-lm":
        raise ConfigError(
            f"the adapter is also on {name}, which mlx-lm does not have (it loads the language "
            "model alone); export it with program='mlx-vlm'"
        )
    return stored_name(name, model_type).removeprefix("model.")


def transformers_name(name: str, model_type: str) -> str:
    """Translate a name from MLX to transformers; the inverse of :func:`mlx_name`."""
    family = family_of_type(model_type)
    if name.startswith("language_model."):
        rest = name.removeprefix("language_model.").removeprefix("model.")
        return f"{family.decoder}.{rest}"
    full = name if name.startswith("model.") else f"model.{name}"
    for own, stored in family.stored_names:
        full = full if own in full else full.replace(stored, own)
    return full
