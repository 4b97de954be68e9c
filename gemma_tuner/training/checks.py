"""Checks, before anything runs, that a model, data, a collator and settings go together."""

from __future__ import annotations

from collections.abc import Collection

from peft import PeftModel

from gemma_tuner.batch import Batch
from gemma_tuner.collators.text import TextCollator
from gemma_tuner.errors import ConfigError, DataError
from gemma_tuner.modalities import MEDIA, Modality
from gemma_tuner.models.families import family_of, loaded_modalities
from gemma_tuner.models.lora import unwrap_peft
from gemma_tuner.training.config import TrainConfig

_GIVE_COLLATOR = "give TextCollator(processor) or one of its kin"


def check_kinds(model: object, collator: object, config: object) -> None:
    """Refuse arguments of the trainer that are something else."""
    for name, given, kind, remedy in (
        ("model", model, PeftModel, "wrap what load_model returns first: add_lora(model)"),
        ("collator", collator, TextCollator, _GIVE_COLLATOR),
        ("config", config, TrainConfig, "give TrainConfig(max_steps=...)"),
    ):
        if not isinstance(given, kind):
            raise ConfigError(f"{name} is a {type(given).__name__}; {remedy}")


def check_collator(model: PeftModel, collator: TextCollator) -> None:
    """Refuse a collator whose prompts or media are not for this model."""
    if not isinstance(collator, TextCollator):
        raise ConfigError(f"collator is a {type(collator).__name__}; {_GIVE_COLLATOR}")
    gemma = unwrap_peft(model)
    family = family_of(gemma.config)
    if collator.family.model_type != family.model_type:
        raise ConfigError(
            f"the model is {family.name} ({family.model_type}), but the collator's processor is "
            f"of {collator.family.name} ({collator.family.model_type}); give the collator the "
            "processor that load_model returned together with the model"
        )
    takes = [medium.modality for medium in MEDIA if medium.part in collator.media_types]
    # One for all media serves data of text alone as well; one for a single kind says what comes.
    if len(takes) == 1 and takes[0] not in (has := loaded_modalities(gemma)):
        raise ConfigError(
            f"{type(collator).__name__} is for {takes[0]}, but the model has no part for that (it "
            f"has {', '.join(has)}); load it with load_model(..., modalities=('text', "
            f"'{takes[0]}')) if its checkpoint offers it, or use TextCollator"
        )


def check_media(batch: Batch, modalities: Collection[Modality]) -> None:
    """Refuse media for which the model was loaded without a tower."""
    for medium in MEDIA:
        if medium.inputs[0] in batch.inputs and medium.modality not in modalities:
            raise DataError(
                f"it holds {medium.modality}, but the model has no part for that; load it with "
                f"load_model(..., modalities=('text', '{medium.modality}'))",
                key=batch.keys[0],
            )
