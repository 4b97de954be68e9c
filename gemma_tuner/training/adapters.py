"""Trained adapters: where a run keeps them, and putting one back on its base."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from gemma_tuner.differences import list_differences, shorten_differences
from gemma_tuner.errors import CheckpointError
from gemma_tuner.log import announce
from gemma_tuner.modalities import MEDIA, Modality
from gemma_tuner.models.adapter_files import CONFIG, FINGERPRINT, WEIGHTS
from gemma_tuner.models.identity import hash_decoder_norms, portable_name
from gemma_tuner.models.lora import wrap_peft
from gemma_tuner.training.checkpoint import latest_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TOWERS: Mapping[Modality, tuple[str, ...]] = {
    medium.modality: (f".{medium.tower}.", f".{medium.projector}.") for medium in MEDIA
}


def find_adapter(path: str | Path) -> Path:
    """Find the adapter in its folder, or in a run's: the saved one or the newest checkpoint."""
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
    """Whether an adapter says its step, and a checkpoint of its run is of a later one."""
    fingerprint = adapter / FINGERPRINT
    step = _read_json(fingerprint).get("step") if fingerprint.is_file() else None
    return step is not None and step < int(checkpoint.name.removeprefix("step-"))


def read_adapter_base(folder: Path) -> str | None:
    """The model that an adapter names as its base."""
    # A Hub name or a folder's; None if it does not.
    return _read_json(folder / CONFIG).get("base_model_name_or_path")


def list_adapter_modalities(folder: Path) -> tuple[Modality, ...]:
    """The parts of a model that an adapter needs, by the names of its weights."""
    names = _read_weights(folder)
    media: list[Modality] = [
        modality
        for modality, parts in _TOWERS.items()
        if any(part in name for name in names for part in parts)
    ]
    return ("text", *media)


def load_adapter(model: PreTrainedModel, path: str | Path) -> PeftModel:
    """Put a trained adapter on the model that it was trained on, to be used, not trained on."""
    folder = find_adapter(path)
    saved = _read_weights(folder)
    what = f"the adapter {folder.resolve().name} is not for {_name_of(model)}"
    trained_on = read_adapter_base(folder) or "which it does not name"
    remedy = f"give the model that it was trained on, {trained_on}"
    if (folder / FINGERPRINT).is_file():
        expected = _read_json(folder / FINGERPRINT).get("base_norms_sha256")
        if expected != hash_decoder_norms(dict(model.named_parameters()), model.get_parameter):
            raise CheckpointError(f"{what}, whose weights are others; {remedy}")
    config = peft.PeftConfig.from_pretrained(str(folder))
    config.inference_mode = False  # wrapped as for training, so that it computes the same
    try:
        wrapped = wrap_peft(model, config)
    except ValueError as error:  # none of its modules is there
        raise CheckpointError(f"{what} ({error}); {remedy}") from None
    here = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    if differences := list_differences(_list_shapes(saved), _list_shapes(here)):
        raise CheckpointError(
            f"{what} (adapter → model: {shorten_differences(differences)}); {remedy}"
        )
    with torch.no_grad():
        for key, tensor in saved.items():
            here[key].copy_(tensor)
    wrapped.requires_grad_(requires_grad=False)
    return wrapped


def _name_of(model: PreTrainedModel) -> str:
    return portable_name(model.name_or_path) or "this model"


def _list_shapes(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


def _read_weights(folder: Path) -> dict[str, Tensor]:
    try:
        return load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise _damaged(folder, error) from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise _damaged(path.parent, error) from None


def _damaged(folder: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"the adapter {folder.resolve().name} is incomplete or damaged ({type(error).__name__}); "
        "save it again, or take an earlier checkpoint"
    )
