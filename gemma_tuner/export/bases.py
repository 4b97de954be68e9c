"""The checkpoint that an adapter belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gemma_tuner.checkpoints.cache import pack_once
from gemma_tuner.checkpoints.weights import (
    HEAD,
    Weight,
    find_checkpoint,
    list_tensors,
    read_json,
    stored_name,
)
from gemma_tuner.differences import shorten_differences
from gemma_tuner.errors import CheckpointError
from gemma_tuner.export.deltas import Adapter, Delta, Replacement, read_adapter
from gemma_tuner.log import logger
from gemma_tuner.models.adapter_names import full_name
from gemma_tuner.models.families import family_of_type
from gemma_tuner.models.few_bits.grids import PACKED, Grid, name_grids
from gemma_tuner.models.few_bits.tables import name_table
from gemma_tuner.models.identity import find_commit, hash_decoder_norms, portable_name


@dataclass(frozen=True, slots=True)
class Base:
    """The checkpoint that an adapter belongs to, and the adapter by that checkpoint's names."""

    folder: Path
    config: Mapping[str, Any]  # config.json
    tensors: Mapping[str, Weight]
    deltas: Mapping[str, Delta | Replacement]  # by names in tensors
    embedding: str  # its name in tensors
    is_untied: bool  # whether the adapter parts the head from the embedding, its twin here
    other: str | None  # where it is not what the adapter was trained on: what it is

    def require_tied(self, program: str) -> None:
        """Refuse such an adapter for a file that holds one weight for both."""
        if self.is_untied:
            trained = [name for name in (self.embedding, HEAD) if name in self.deltas]
            raise CheckpointError(
                f"the adapter trained {' and '.join(trained)}, and the base has one weight for "
                f"embedding and head, as {program} has; use export_merged, which writes two"
            )

    def require_lora(self, program: str) -> list[Delta]:
        """The adapter for a program that adds to weights and does not replace them."""
        deltas = [delta for delta in self.deltas.values() if isinstance(delta, Delta)]
        if len(deltas) < len(self.deltas):
            raise CheckpointError(
                f"{len(self.deltas) - len(deltas)} weights were trained themselves (variant "
                f"'full'), which an adapter for {program} cannot hold; export the merged model"
            )
        return deltas

    @property
    def model_type(self) -> str:
        """Of its configuration."""
        return str(self.config.get("model_type"))


def open_base(
    adapter: Adapter, base: str | Path | None, revision: str | None, *, is_merged: bool = False
) -> Base:
    """Find the checkpoint that an adapter belongs to, and refuse any other."""
    # is_merged: Whether its weights are read, which are then what the adapter was trained on,
    # unless another form of the checkpoint is given.
    folder = find_base(adapter, base, revision)
    if is_merged and base is None:
        folder = find_packed(folder, adapter.grid)
    config = read_json(folder / "config.json")
    grid = name_grids(config.get(PACKED))
    other = None
    if adapter.norms_sha256 is not None and grid != adapter.grid:
        forms = [f"packed as {each}" if each else "not packed" for each in (grid, adapter.grid)]
        other = f"{forms[0]}, and the adapter was trained on it {forms[1]}: another model"
    if is_merged and other:
        logger.warning(
            "the base %s is %s. Without base=, or with what pack(..., grid=...) writes of it, the "
            "adapter is merged into what it was trained on",
            portable_name(str(folder)),
            other,
        )
    tensors = list_tensors(folder)
    model_type = str(config.get("model_type"))
    deltas = check_fits(adapter, tensors, folder, model_type)
    _check_same_release(adapter, folder, tensors)
    embedding = name_embedding(model_type)
    is_tied = HEAD in tensors or {HEAD, embedding}.isdisjoint(deltas)
    if not is_tied and _is_same(deltas.get(HEAD), deltas.get(embedding)):
        del deltas[HEAD]  # trained as one, they stay one
        is_tied = True
    return Base(folder, config, tensors, deltas, embedding, not is_tied, other)


def find_trained_base(adapter: str | Path, base: str | Path | None, revision: str | None) -> Path:
    """Find what an adapter was trained on: a checkpoint, or that packed as it was."""
    read = read_adapter(adapter)
    return find_packed(find_base(read, base, revision), read.grid)


def find_packed(folder: Path, grid: str | None) -> Path:
    """Find a checkpoint as it was trained on: packed on a grid, in the cache."""
    if grid is None or read_json(folder / "config.json").get(PACKED) or " and " in grid:
        return folder
    return pack_once(str(folder), find_commit(folder), Grid.parse(grid), lambda: folder)


def find_base(adapter: Adapter, base: str | Path | None, revision: str | None) -> Path:
    """Find the folder of the checkpoint that an adapter belongs to."""
    source = base if base is not None else adapter.base
    if source is None:
        raise CheckpointError("the adapter does not name its base; pass base=FOLDER_OR_HUB_NAME")
    if revision is None and source == adapter.base:
        revision = adapter.revision
    return find_checkpoint(source, revision)


def check_fits(
    adapter: Adapter, tensors: Mapping[str, Weight], folder: Path, model_type: str
) -> dict[str, Delta | Replacement]:
    """Give the adapter's deltas by the checkpoint's names; refuse one of other shapes."""
    base = portable_name(str(folder))
    embedding = name_embedding(model_type)
    deltas: dict[str, Delta | Replacement] = {}
    for delta in map(partial(_name_fully, model_type), adapter.deltas.values()):
        deltas[stored_name(delta.name, model_type)] = delta
    differences = []
    for name, delta in deltas.items():
        stored = tensors.get(name) or (tensors.get(embedding) if name == HEAD else None)
        if stored is None:
            differences.append(f"{name}: {list(delta.shape)} against nothing")
        elif not stored.dtype.is_floating_point:
            raise CheckpointError(
                f"{base} is quantised; give the original in bfloat16 or float32 as base, or make "
                "one of it with from_mlx"
            )
        elif stored.shape != delta.shape:
            differences.append(f"{name}: {list(delta.shape)} against {list(stored.shape)}")
    if differences:
        raise CheckpointError(
            f"the adapter is for another model than {base} ({len(differences)} of {len(deltas)} "
            f"weights; adapter against checkpoint: {shorten_differences(differences)}); "
            f"{f'it was trained on {adapter.base}: ' if adapter.base else ''}give that checkpoint "
            "as base"
        )
    return deltas


def _name_fully(model_type: str, delta: Delta | Replacement) -> Delta | Replacement:
    family = family_of_type(model_type)
    if isinstance(delta, Delta):
        return replace(delta, module=full_name(delta.module, family))
    return replace(delta, name=full_name(delta.name, family))


def _is_same(one: Delta | Replacement | None, other: Delta | Replacement | None) -> bool:
    if isinstance(one, Replacement) and isinstance(other, Replacement):
        return torch.equal(one.weight, other.weight)
    return False


def name_embedding(model_type: str) -> str:
    """Name the vocabulary's embedding in the files of a checkpoint."""
    return f"{name_table(model_type)}.weight"


def _check_same_release(adapter: Adapter, folder: Path, tensors: Mapping[str, Weight]) -> None:
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
    commit = find_commit(folder)
    if adapter.revision and commit and not commit.startswith(adapter.revision):
        raise CheckpointError(
            f"the adapter was trained on revision {adapter.revision} of {adapter.base}, and "
            f"{name} is at {commit}; pass revision={adapter.revision!r}"
        )
