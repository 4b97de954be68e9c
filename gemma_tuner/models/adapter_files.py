"""An adapter's folder as PEFT writes it, and beside it a fingerprint of the base."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from torch import Tensor

from gemma_tuner.disk import (
    check_room,
    disk_errors_explained,
    sync,
    sync_all,
    temporary_sibling,
)
from gemma_tuner.errors import CheckpointError
from gemma_tuner.models.identity import hash_decoder_norms, portable_name

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
FINGERPRINT = "gemma_tuner.json"
"""Beside an adapter: ``base_norms_sha256`` says which release it was trained on, and ``step`` how
far a run was that has saved it."""


def save_adapter(model: PeftModel, path: str | Path, step: int | None = None) -> Path:
    """Write the adapter as a standard PEFT folder."""
    # An existing folder keeps its other files; its adapter is replaced once the new one is
    # complete.
    folder = Path(path)
    with saving_explained("save an adapter", folder):
        folder.mkdir(parents=True, exist_ok=True)
        check_room(folder, sum(tensor.nbytes for tensor in adapter_tensors(model).values()))
        with temporary_sibling(folder / "adapter") as temporary:
            temporary.mkdir()
            write_adapter(model, temporary, step=step)
            sync_all(temporary)
            for name in (FINGERPRINT, WEIGHTS, CONFIG):
                (temporary / name).replace(folder / name)
            sync(folder)
    return folder


def write_adapter(model: PeftModel, folder: Path, *, step: int | None = None) -> None:
    """Write an adapter's files into a folder that is empty."""
    model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
    # The model card that PEFT adds names the base by its local path.
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / CONFIG
    config = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = portable_name(config["base_model_name_or_path"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    base: Any = model.get_base_model()
    norms_sha256 = hash_decoder_norms(dict(base.named_parameters()), base.get_parameter)
    fingerprint = {"base_norms_sha256": norms_sha256} | ({} if step is None else {"step": step})
    (folder / FINGERPRINT).write_text(json.dumps(fingerprint, indent=2) + "\n", encoding="utf-8")


def adapter_tensors(model: PeftModel) -> dict[str, Tensor]:
    """The adapter under PEFT's file names; the tensors share the parameters' memory."""
    # "auto" would ask the Hub whether the base's vocabulary was resized.
    return get_peft_model_state_dict(model, save_embedding_layers=False)


def saving_explained(what: str, folder: Path) -> AbstractContextManager[None]:
    """Turn what can go wrong with a disk into a CheckpointError with a remedy."""
    return disk_errors_explained(
        lambda reason: CheckpointError(
            f"cannot {what} in {folder.resolve().name!r}: {reason}. What was saved before is "
            "untouched. Free disk space there, or choose another folder, and resume"
        ),
        SafetensorError,
    )
