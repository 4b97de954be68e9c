"""Which parts of a multimodal model are built: those that the data's modalities need."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from gemma_tuner.errors import ConfigError
from gemma_tuner.models.families import MODALITIES, Family, Modality

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def choose_left_out(
    name: str, family: Family, config: PreTrainedConfig, modalities: Sequence[Modality]
) -> list[str]:
    """Check the modalities, and find the submodules of ``model.model`` that they do not need."""
    if isinstance(modalities, str):
        raise ConfigError(f"modalities is the string {modalities!r}; write ({modalities!r},)")
    offered = family.modalities(config)
    for modality in modalities:
        if modality not in MODALITIES:
            raise ConfigError(
                f"modalities holds {modality!r}; it may hold {', '.join(MODALITIES)}"
            )
        if modality not in offered:
            raise ConfigError(
                f"{name} has no {modality} part; it offers {', '.join(offered)}. Leave "
                f"{modality!r} out, or use a checkpoint that has it"
            )
    return [
        module
        for modality, modules in family.towers.items()
        if modality in offered and modality not in modalities
        for module in modules
    ]


def without_modules(
    model_class: type[PreTrainedModel],
    family: Family,
    config: PreTrainedConfig,
    left_out: Collection[str],
) -> type[PreTrainedModel]:
    """Derive the class that loads without some parts; their keys are passed over silently."""
    # Where the configuration can say that a tower is absent, it does (``config`` is changed);
    # Gemma 3n always builds its towers, so they are taken off again, while they have no memory.
    if family.towers_optional:
        for modality, part in (("image", "vision_config"), ("audio", "audio_config")):
            if set(family.towers[modality]) & set(left_out):
                setattr(config, part, None)
    pattern = [rf"^model\.({'|'.join(left_out)})\."] if left_out else []

    class WithoutParts(model_class):
        _keys_to_ignore_on_load_unexpected = pattern

        def __init__(self, config: PreTrainedConfig) -> None:
            super().__init__(config)
            for name in left_out:
                parent, _, part = name.rpartition(".")
                setattr(self.model.get_submodule(parent), part, None)

    WithoutParts.__name__ = model_class.__name__
    WithoutParts.__module__ = model_class.__module__  # else it is taken for a checkpoint's code
    return WithoutParts
