"""Trained adapters: where a run keeps them, and putting one back on its base."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from gemma_tuner.checks import check_path, is_number
from gemma_tuner.collators.settings import OF_TRAINING_ALONE
from gemma_tuner.differences import list_differences, shorten_differences
from gemma_tuner.errors import MALFORMED, CheckpointError, ConfigError
from gemma_tuner.log import announce, logger
from gemma_tuner.modalities import MEDIA, Modality
from gemma_tuner.models.adapter_files import (
    CONFIG,
    FINGERPRINT,
    MLX_WEIGHTS,
    QALORA,
    WEIGHTS,
    TrainedWith,
    adapter_tensors,
    hash_base,
    read_fingerprint,
    read_trained_with,
    set_trained_with,
    trained_with,
)
from gemma_tuner.models.adapter_names import (
    BASE_COPY,
    PREFIX,
    full_name,
    is_endless,
    pin_config,
)
from gemma_tuner.models.families import family_of, loaded_modalities
from gemma_tuner.models.few_bits.grids import PACKED, name_grids
from gemma_tuner.models.identity import active_adapter, portable_name
from gemma_tuner.models.lora import check_model, list_packed, refuse_adapters, wrap_peft
from gemma_tuner.training.checkpoint import latest_checkpoint, read_state

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

    from gemma_tuner.collators.text import TextCollator

_TOWERS: Mapping[Modality, tuple[str, ...]] = {
    medium.modality: (f".{medium.tower}.", f".{medium.projector}.") for medium in MEDIA
}


def find_adapter(path: str | Path) -> Path:
    """Find the adapter in its folder, or in a run's: the saved one or the newest checkpoint."""
    check_path("path", path)
    folder = Path(path)
    adapter, checkpoint = folder / "adapter", latest_checkpoint(folder)
    found = [
        candidate
        for candidate in (folder, adapter, checkpoint)
        if candidate is not None and (candidate / CONFIG).is_file()
    ]
    if found == [adapter, checkpoint] and _is_behind(adapter, found[1]):
        announce(
            f"{folder.resolve().name} went on after its adapter was saved; its newest checkpoint "
            f"is used, {found[1].name}"
        )
        return found[1]
    if found:
        return found[0]
    raise CheckpointError(
        f"{folder.resolve().name!r} holds no adapter ({CONFIG}) and no checkpoint; give the "
        "folder of a run or of an adapter"
        if folder.is_dir()
        else f"there is no folder {folder.name!r}; give the folder of a run or of an adapter"
    )


def _is_behind(adapter: Path, checkpoint: Path) -> bool:
    """Whether an adapter says its step, and its run would save one of a later step by now."""
    step = read_fingerprint(adapter).get("step")
    if step is None or step >= int(checkpoint.name.removeprefix("step-")):
        return False
    best = read_state(checkpoint).totals.get("best") or {}
    # The best adapter is of an earlier step than the checkpoint beside which it was saved.
    return not best.get("is_kept") or step < best["step"]


def read_adapter_base(folder: Path) -> str | None:
    """The model that an adapter names as its base."""
    # A Hub name or a folder's; None if it does not.
    return _read_json(folder / CONFIG).get("base_model_name_or_path")


def list_adapter_modalities(folder: Path) -> tuple[Modality, ...]:
    """The parts of a model that an adapter needs, by the names of its weights."""
    return _list_modalities(_read_weights(folder))


def _list_modalities(names: Iterable[str]) -> tuple[Modality, ...]:
    media: list[Modality] = [
        modality
        for modality, parts in _TOWERS.items()
        if any(part in name for name in names for part in parts)
    ]
    return ("text", *media)


def load_adapter(
    model: PreTrainedModel, path: str | Path, *, trainable: bool = False
) -> PeftModel:
    """Put a trained adapter on the model that it was trained on.

    It may be of this library or of PEFT, trained on the whole model or on a class for text alone,
    whose names for the layers are shorter; ``import_mlx`` makes one of mlx-lm's.

    Args:
        model: From ``load_model``.
        path: The folder of an adapter, or of a run: its saved adapter or newest checkpoint.
        trainable: To go on training it, with ``Trainer``; by default it is only used.

    Returns:
        The same model, wrapped as ``add_lora`` does.

    Raises:
        ConfigError: The model is none of this library's, or has adapters already.
        CheckpointError: The folder holds no LoRA adapter, a damaged one, or one for another model
            or for parts that were not loaded.
    """
    refuse_adapters(check_model(model))
    folder = find_adapter(path)
    saved = _read_weights(folder)
    settings = _read_json(folder / CONFIG)
    what = f"the adapter {folder.resolve().name}"
    known = read_fingerprint(folder)
    _check_kind(settings, known, what)
    for field, value in settings.items():
        patterns = value if isinstance(value, list | dict) else [value]  # keys of the latter
        if field.endswith(("_modules", "_pattern")) and any(map(is_endless, patterns)):
            raise CheckpointError(
                f"{what} has a regular expression in {field} that may never end (a repeat or a "
                "choice within a repeat, or too many); write the names of the modules there"
            )
    base, own = settings.get("base_model_name_or_path"), portable_name(model.name_or_path)
    remedy = f"give the model that it was trained on, {base or 'which it does not name'}"
    if (expected := known.get("base_norms_sha256")) is not None:
        if expected != hash_base(model):
            raise CheckpointError(
                f"{what} is not for {own or 'this model'}, whose weights are others; {remedy}"
            )
        _compare_grids(what, known.get("grid"), model.config)
    elif base and own and portable_name(base) != own:
        announce(f"{what} names {portable_name(base)} as its base, and is put on {own}")
    family = family_of(model.config)
    here = {PREFIX + full_name(key.removeprefix(PREFIX), family): saved[key] for key in saved}
    _check_parts(model, here, what)
    try:
        sides = [side for tensor in saved.values() for side in tensor.shape]
        ranks = (settings.get("r"), *dict(settings.get("rank_pattern") or {}).values())
        if any(is_number(rank) and rank > max(sides, default=0) for rank in ranks):
            raise CheckpointError(f"{what} has a rank in {CONFIG} that its weights do not have")
        config = _choose_config(model, settings, saved, is_renamed=here.keys() != saved.keys())
        wrapped = wrap_peft(model, config)
    except (ImportError, NotImplementedError, re.error, *MALFORMED) as error:
        raise CheckpointError(
            f"{what} has settings ({CONFIG}) that PEFT cannot use here ({type(error).__name__}); "
            "save it again with the PEFT that made it, and load the model again"
        ) from error
    own_tensors = adapter_tensors(wrapped)
    if differences := list_differences(_list_shapes(here), _list_shapes(own_tensors)):
        raise CheckpointError(
            f"{what} is not for {own or 'this model'} (adapter → model: "
            f"{shorten_differences(differences)}); {remedy}"
        )
    with torch.no_grad():
        for key, tensor in here.items():
            own_tensors[key].copy_(tensor)
    set_trained_with(wrapped, read_trained_with(folder))
    if not trainable:
        wrapped.requires_grad_(requires_grad=False)
    return wrapped


def _compare_grids(what: str, trained: str | None, config: Any) -> None:
    """Say where an adapter's base had other values of the same release."""
    grids = trained, name_grids(getattr(config, PACKED, None))
    as_trained, as_here = (f"packed as {grid}" if grid else "not packed" for grid in grids)
    if as_trained != as_here:
        logger.warning(
            "%s was trained on weights that were %s, and these are %s: together they are another "
            "model; load_model(..., bits=...) loads what it was trained on",
            what,
            as_trained,
            as_here,
        )


def _check_kind(settings: Mapping[str, Any], known: Mapping[str, Any], what: str) -> None:
    """Refuse an adapter that is no LoRA, or computes otherwise than those here."""
    if settings.get("peft_type") != "LORA" or settings.get("alora_invocation_tokens"):
        kind = "aLoRA" if settings.get("peft_type") == "LORA" else settings.get("peft_type")
        raise CheckpointError(f"{what} is of PEFT's type {kind}; only LORA can be used here")
    if settings.get("use_qalora") and QALORA not in known:
        raise CheckpointError(
            f"{what} is a QA-LoRA that does not say in {FINGERPRINT} how it pools its inputs, as "
            "those of Trainer.save and export_adapter do; PEFT's own pools otherwise"
        )


def _check_parts(model: PreTrainedModel, names: Collection[str], what: str) -> None:
    """Refuse an adapter on towers that were not loaded, or on modules that the model lacks."""
    needed, loaded = _list_modalities(names), loaded_modalities(model)
    if not {*needed} <= {*loaded}:
        raise CheckpointError(
            f"{what} is also on the model's {' and '.join(m for m in needed if m not in loaded)}; "
            f"load it with load_model(..., modalities={needed})"
        )
    trained = {name.removeprefix(PREFIX).rpartition(".")[0] for name in names}
    if packed := sorted(trained.intersection(list_packed(model))):
        raise CheckpointError(
            f"{what} trained {', '.join(packed[:3])} themselves, whose weights are packed here; "
            "load the checkpoint that they were packed from"
        )


def _choose_config(
    model: PreTrainedModel, settings: dict[str, Any], keys: Iterable[str], *, is_renamed: bool
) -> peft.PeftConfig:
    """PEFT's settings as they are, or pinned where they would mean other modules here."""
    pinned = pin_config(settings, keys, family_of(model.config))
    configs = [
        peft.PeftConfig.from_peft_type(**{**each, "inference_mode": False})
        for each in (settings, pinned)
    ]
    modules = [name for name, _ in model.named_modules()]
    meant, wanted = (
        [name for name in modules if check_target_module_exists(config, name)]
        for config in configs
    )
    return configs[is_renamed or meant != wanted]


def note_collator(model: PeftModel, collator: TextCollator) -> None:
    """Let the adapter know what it is trained with, and say what was otherwise before."""
    compare_collator(model, collator, "this run trains it")
    template = str(collator.processor.chat_template or "")
    set_trained_with(model, TrainedWith(collator.list_settings(), template))


def compare_collator(model: Any, collator: TextCollator, what: str) -> None:
    """Say where prompts are written otherwise than those that the model was trained with."""
    if (known := trained_with(model)) is None:
        return
    here = TrainedWith(collator.list_settings(), str(collator.processor.chat_template or ""))
    before, now = known.to_dict(), here.to_dict()
    shared = (before.keys() & now.keys()).difference(OF_TRAINING_ALONE)
    differences = list_differences(*({n: d[n] for n in sorted(shared)} for d in (before, now)))
    if differences:
        logger.warning(
            "the adapter was trained with other prompts than %s with: %s",
            what,
            shorten_differences(differences),
        )


def follow_training(model: Any, processor: ProcessorMixin) -> ProcessorMixin:
    """The processor, with the chat template that the model was trained with."""
    known = trained_with(model)
    if known is None or known.chat_template == str(processor.chat_template or ""):
        return processor
    announce("the adapter was trained with another chat template than the base's; that is used")
    processor = copy.copy(processor)
    processor.chat_template = known.chat_template
    return processor


def list_trainable(model: PeftModel) -> list[torch.nn.Parameter]:
    """List what a run trains: parameters of the active adapter, all of which are saved."""
    name = active_adapter(model)
    config: Any = model.peft_config[name]
    if config.is_prompt_learning or getattr(config, "alora_invocation_tokens", None):
        raise ConfigError(
            f"the model's adapter is a {config.peft_type.value}, which works on prompts, not on "
            "layers; train a LoRA: add_lora(model)"
        )
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise ConfigError(
            f"no parameter of the adapter {name!r} is trainable; to go on training it, load it "
            "with load_adapter(model, FOLDER, trainable=True), or with PEFT's "
            "from_pretrained(model, FOLDER, is_trainable=True)"
        )
    saved = {tensor.data_ptr() for tensor in adapter_tensors(model).values()}
    if lost := [n for n, parameter in trainable.items() if parameter.data_ptr() not in saved]:
        raise ConfigError(
            f"{len(lost)} trainable parameters (such as {lost[0]}) are not of the active adapter "
            f"{name!r}, with which they would not be saved; freeze them, or call "
            "model.set_adapter(NAME) with the adapter that is to be trained"
        )
    return list(trainable.values())


def _list_shapes(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


def _read_weights(folder: Path) -> dict[str, Tensor]:
    name = folder.resolve().name
    if not (folder / WEIGHTS).is_file():
        if (folder / MLX_WEIGHTS).is_file():
            raise CheckpointError(
                f"{name} holds an adapter of MLX; make a PEFT adapter of it first: "
                "import_mlx(FOLDER, NEW_FOLDER, base=MODEL)"
            )
        if any(folder.glob("*.bin")):
            raise CheckpointError(
                f"the adapter {name} is pickled (.bin), which can run code; save it again with "
                "save_pretrained in a place that you trust"
            )
    try:
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise _damaged(folder, error) from None
    return {key: tensor for key, tensor in tensors.items() if not key.endswith(BASE_COPY)}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, *MALFORMED) as error:
        raise _damaged(path.parent, error) from None


def _damaged(folder: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"the adapter {folder.resolve().name} is incomplete or damaged ({type(error).__name__}); "
        "save it again, or take an earlier checkpoint"
    )
