"""From a configuration to a model: the class that leaves parts out, and what every model is given.

Loading and planning both build in these steps, with weights and without: a layer that is to stand
in for one of transformers' is put in by the class, a patch of a whole model by
:func:`finish_model`, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import transformers

from gemma_tuner.errors import ConfigError
from gemma_tuner.modalities import MEDIA, MODALITIES, Modality
from gemma_tuner.models.attention import use_attention
from gemma_tuner.models.embeddings import NAME, Placement
from gemma_tuner.models.families import Family, family_of
from gemma_tuner.models.few_bits.grids import PACKED, read_grids
from gemma_tuner.models.few_bits.layers import replace_packed
from gemma_tuner.models.few_bits.tables import replace_table
from gemma_tuner.models.norms import use_lean_norms

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def choose_left_out(
    name: str,
    family: Family,
    config: PreTrainedConfig,
    modalities: Sequence[Modality],
    placement: Placement | None,
) -> list[str]:
    """Check the modalities, and name the submodules that they do not need or that stay on disk."""
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
    left_out = [
        f"model.{module}"
        for kind, form in family.media.items()
        if kind in offered and kind not in modalities
        for module in form.modules
    ]
    return [*left_out, f"{family.decoder}.{NAME}"] if placement == "disk" else left_out


def make_partial_class(
    family: Family, config: PreTrainedConfig, left_out: Collection[str]
) -> type[PreTrainedModel]:
    """Derive the class that is built without some submodules, and does not miss their weights."""
    # Where the configuration can say that a tower is absent, it does (``config`` is changed);
    # Gemma 3n always builds its towers, so they are taken off again, while they have no memory.
    if family.towers_optional:
        absent = {
            kind
            for kind, form in family.media.items()
            if any(f"model.{module}" in left_out for module in form.modules)
        }
        for medium in MEDIA:
            if medium.modality in absent:
                setattr(config, medium.config, None)
    full_class = getattr(transformers, family.model_class)
    grids = read_grids(getattr(config, PACKED, None))

    class WithoutParts(full_class):
        _keys_to_ignore_on_load_unexpected = [rf"^({'|'.join(left_out)})\."] if left_out else []

        def __init__(self, config: PreTrainedConfig) -> None:
            super().__init__(config)
            for name in left_out:
                parent, _, part = name.rpartition(".")
                setattr(self.get_submodule(parent), part, None)
            layers = replace_table(self, grids, is_filled=False)
            replace_packed(self, layers, is_filled=False)

    WithoutParts.__name__ = full_class.__name__
    WithoutParts.__module__ = full_class.__module__  # else it is taken for a checkpoint's code
    return WithoutParts


def finish_model(model: Any) -> Any:
    """Give a model its full class and this library's attention and norms; freeze it."""
    model.__class__ = getattr(transformers, family_of(model.config).model_class)
    use_attention(model)
    use_lean_norms(model)
    return model.eval().requires_grad_(requires_grad=False)
