"""Checks, before anything runs, that a model, data, a collator and settings go together."""

from __future__ import annotations

import math
from collections.abc import Collection

from peft import PeftModel

from gemma_tuner.batch import Batch
from gemma_tuner.collators.text import TextCollator
from gemma_tuner.errors import ConfigError, DataError
from gemma_tuner.log import announce
from gemma_tuner.modalities import MEDIA, Modality
from gemma_tuner.models.families import family_of, loaded_modalities
from gemma_tuner.models.lora import unwrap_peft
from gemma_tuner.streaming.quarantine import read_reason
from gemma_tuner.streaming.report import explain_absence
from gemma_tuner.streaming.stream import ExampleStream
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


def check_media_kinds(
    model: PeftModel, collator: TextCollator, stream: object, found: Collection[str]
) -> None:
    """Refuse data without the media that collator or adapters are for, or with other media."""
    name = type(collator).__name__
    takes = [medium.modality for medium in MEDIA if medium.part in collator.media_types]
    if others := [kind for kind in sorted(found) if kind not in takes]:
        raise ConfigError(
            f"the data holds {' and '.join(others)}, which {name} does not take; use "
            f"{others[0].title()}Collator or MultimodalCollator, and load the model with that "
            f"modality, or read the data without: {', '.join(f'{kind}=False' for kind in others)}"
        )
    parts = stream.report().parts if isinstance(stream, ExampleStream) else ()
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    for medium in MEDIA:
        is_trained = any(f".{medium.tower}." in parameter for parameter in trained)
        if is_trained and medium.modality not in found:
            what = f"adapters are in the {medium.tower.replace('_', ' ')}"
            raise explain_absence(parts, [medium.modality], what)
    if not found and any(f".{m.projector}." in name for name in trained for m in MEDIA):
        raise explain_absence(parts, [m.modality for m in MEDIA], "adapters are in a projector")
    if len(takes) == 1 and takes[0] not in found:
        raise explain_absence(parts, takes, f"{name} is for {takes[0]}")
    if takes and not found:  # one for all media serves data of text alone as well
        announce(
            f"no row of the data holds {' or '.join(takes)}: it is trained as text alone; where "
            f"media are meant, name their column with {' or '.join(f'{kind}=' for kind in takes)}"
        )


def check_media(batch: Batch, modalities: Collection[Modality]) -> None:
    """Refuse media for which the model was loaded without a tower."""
    check_inputs(batch.inputs, modalities, batch.keys[0])


def check_inputs(inputs: Collection[str], modalities: Collection[Modality], key: str) -> None:
    """Refuse what a model is given, by its names, for which it was loaded without a tower."""
    for medium in MEDIA:
        if medium.inputs[0] in inputs and medium.modality not in modalities:
            raise DataError(
                f"it holds {medium.modality}, but the model has no part for that; load it with "
                f"load_model(..., modalities=('text', '{medium.modality}'))",
                key=key,
            )


def explain_resuming(error: DataError, step: int, num_rows: int) -> DataError:
    """Say of a row that ends a run in its middle what lets the run go on."""
    if not step:
        return error
    enough = math.ceil(1e4 / num_rows) / 1e4
    return DataError(
        f"{read_reason(error)}. What was trained is saved, up to step {step}; it is resumed, with "
        "fit(resume=True), once its media are as they were or mended (then open the stream with "
        "refresh=True), with other max_tokens, too_long or "
        f"long_audio, or where the stream's max_bad_fraction (above {enough:g} allows a row more) "
        "lets it be passed over; with rows changed it would be other data, for a new run",
        key=error.key,
    )
