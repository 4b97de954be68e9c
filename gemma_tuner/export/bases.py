"""The checkpoint that an adapter belongs to."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_tuner.differences import shorten_differences
from gemma_tuner.errors import CheckpointError
from gemma_tuner.export.deltas import Adapter, Delta, Replacement
from gemma_tuner.export.weights import StoredTensor, find_checkpoint, list_tensors, read_json
from gemma_tuner.models.families import family_of_type
from gemma_tuner.models.identity import hash_decoder_norms, portable_name


@dataclass(frozen=True, slots=True)
class Base:
    """The checkpoint that an adapter belongs to, and the adapter by that checkpoint's names."""

    folder: Path
    config: Mapping[str, Any]  # config.json
    tensors: Mapping[str, StoredTensor]
    deltas: Mapping[str, Delta | Replacement]  # by names in tensors

    @property
    def model_type(self) -> str:
        """Of its configuration."""
        return str(self.config.get("model_type"))


def open_base(adapter: Adapter, base: str | Path | None, revision: str | None) -> Base:
    """Find the checkpoint that an adapter belongs to, and refuse any other."""
    folder = find_base(adapter, base, revision)
    config = read_json(folder / "config.json")
    tensors = list_tensors(folder)
    deltas = check_fits(adapter, tensors, folder, str(config.get("model_type")))
    _check_same_release(adapter, folder, tensors)
    return Base(folder, config, tensors, deltas)


def find_base(adapter: Adapter, base: str | Path | None, revision: str | None) -> Path:
    """Find the folder of the checkpoint that an adapter belongs to."""
    source = base if base is not None else adapter.base
    if source is None:
        raise CheckpointError("the adapter does not name its base; pass base=FOLDER_OR_HUB_NAME")
    if revision is None and source == adapter.base:
        revision = adapter.revision
    return find_checkpoint(source, revision)


def check_fits(
    adapter: Adapter, tensors: Mapping[str, StoredTensor], folder: Path, model_type: str
) -> dict[str, Delta | Replacement]:
    """Give the adapter's deltas by the checkpoint's names; refuse one of other shapes."""
    base = portable_name(str(folder))
    deltas = {stored_name(name, model_type): delta for name, delta in adapter.deltas.items()}
    differences = []
    for name, delta in deltas.items():
        if name in tensors and not tensors[name].dtype.is_floating_point:
            raise CheckpointError(
                f"{base} is quantised; give the original in bfloat16 or float32 as base, or make "
                "one of it with from_mlx"
            )
        if name not in tensors:
            differences.append(f"{name}: {list(delta.shape)} against nothing")
        elif tensors[name].shape != delta.shape:
            differences.append(f"{name}: {list(delta.shape)} against {list(tensors[name].shape)}")
    if differences:
        raise CheckpointError(
            f"the adapter is for another model than {base} ({len(differences)} of {len(deltas)} "
            f"weights; adapter against checkpoint: {shorten_differences(differences)}); "
            f"{f'it was trained on {adapter.base}: ' if adapter.base else ''}give that checkpoint "
            "as base"
        )
    return deltas


def _check_same_release(
    adapter: Adapter, folder: Path, tensors: Mapping[str, StoredTensor]
) -> None:
    """Refuse a base of the same shapes that is another release, where the adapter can tell."""
    name = portable_name(str(folder))
    if adapter.norms_sha256 is not None:
        if adapter.norms_sha256 != hash_decoder_norms(tensors, lambda key: tensors[key].read()):
            raise CheckpointError(
                f"the adapter was trained on {adapter.base or 'another model'}, and {name} has "
                "the same shapes but other weights (another release, or fine-tuned since); give "
                "the checkpoint that it was trained on"
            )
        return
    cached = re.search(r"snapshots/([0-9a-f]{40})", folder.as_posix())
    if adapter.revision and cached and not cached[1].startswith(adapter.revision):
        raise CheckpointError(
            f"the adapter was trained on revision {adapter.revision} of {adapter.base}, and "
            f"{name} is at {cached[1]}; pass revision={adapter.revision!r}"
        )


def stored_name(name: str, model_type: str) -> str:
    """Translate a weight's name in the model to its name in the files of a checkpoint."""
    for own, stored in family_of_type(model_type).stored_names:
        name = name.replace(own, stored)
    return name
