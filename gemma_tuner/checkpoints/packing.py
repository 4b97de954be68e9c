"""Checkpoints of packed weights, written tensor by tensor: a base of a quarter of the memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import transformers

from gemma_tuner.checkpoints.folders import new_folder
from gemma_tuner.checkpoints.weights import (
    HEAD,
    StoredTensor,
    find_checkpoint,
    list_stored,
    read_json,
    stored_name,
    tensor_bytes,
)
from gemma_tuner.checkpoints.writing import NewTensor, write_checkpoint
from gemma_tuner.checks import check_value
from gemma_tuner.display import show_bytes
from gemma_tuner.errors import CheckpointError
from gemma_tuner.log import announce, logger
from gemma_tuner.models.adapter_files import read_fingerprint
from gemma_tuner.models.grids import PACKED, Grid, Packed
from gemma_tuner.models.identity import portable_name
from gemma_tuner.models.meta import build_meta_model
from gemma_tuner.models.packed import list_packable, list_parts
from gemma_tuner.models.packed_tables import name_table

_TABLE = Grid(8, 64, is_affine=True)


def pack(
    checkpoint: str | Path,
    path: str | Path,
    *,
    bits: int = 4,
    grid: Literal["symmetric", "affine"] | None = None,
    group: int | None = None,
    head_bits: Literal[8] | None = None,
    revision: str | None = None,
) -> Path:
    """Write a checkpoint whose decoder has its large matrices in 4 or 8 bits.

    ``load_model`` opens it, and what is trained on it is LoRA on exactly the values that the
    packed numbers stand for. Towers, projectors, norms, routers and the per-layer embeddings stay
    as they are, and so do embedding and head, unless ``head_bits`` says otherwise.

    Args:
        checkpoint: The folder of a checkpoint in bfloat16, float16 or float32, or its name on the
            Hub if it is in the local cache. Best is one of Google's ``-qat-q4_0-unquantized``,
            whose weights lie on the symmetric grid already.
        path: The new folder.
        bits: Of a weight, 4 or 8.
        grid: ``symmetric``, a scale for each group of weights, its step searched; or ``affine``,
            a scale and a bias, as MLX has. By default symmetric in 4 bits, and affine in 8.
        group: Weights that share a scale, 32, 64 or 128; by default 32 symmetric, 64 affine.
        head_bits: 8 packs the table of embedding and head too, affine in groups of 64; None, the
            default, leaves it.
        revision: Of the checkpoint on the Hub.

    Returns:
        The folder.

    Raises:
        ConfigError: Another number of bits or of a group's weights.
        CheckpointError: The checkpoint is quantised already or incomplete, or has a head apart
            from its embedding and ``head_bits`` is given; the folder exists already or cannot be
            written.
    """
    check_value("head_bits", head_bits, Literal[8] | None)
    check_value("grid", grid, Literal["symmetric", "affine"] | None)
    chosen = Grid.choose(bits, grid, group)
    folder = find_checkpoint(checkpoint, revision)
    name = portable_name(str(folder))
    config = read_json(folder / "config.json")
    if any(config.get(key) for key in (PACKED, "quantization", "quantization_config")):
        raise CheckpointError(
            f"{name} is quantised already; give the checkpoint in bfloat16 that it was made from"
        )
    modules = _list_modules(folder, chosen)
    if not modules:
        raise CheckpointError(
            f"no matrix of {name} has rows of whole groups of "
            f"{chosen.group} weights; give a smaller group, or use the checkpoint as it is"
        )
    tensors: list[NewTensor] = []
    stored = list_stored(folder)
    model_type = str(config.get("model_type"))
    if head_bits is not None:
        if HEAD in stored:
            raise CheckpointError(
                f"{folder.resolve().name} has a head apart from its embedding, and head_bits "
                "packs one table for both; leave head_bits out"
            )
        modules[name_table(model_type)] = _TABLE
    of_weight = {
        stored_name(f"{module}.{weight}", model_type): (
            list_parts(stored_name(module, model_type), weight),
            own_grid,
        )
        for module, own_grid in modules.items()
        for weight in ("weight", "gate_up_proj", "down_proj")
    }
    for key, tensor in stored.items():
        if key in of_weight:
            parts, own_grid = of_weight[key]
            tensors += _Packing(tensor, own_grid).list_parts(parts)
        else:
            tensors.append(NewTensor(key, tensor.dtype, tensor.shape, tensor.copy))
    config[PACKED] = {module: str(own_grid) for module, own_grid in modules.items()}
    if bits == 4 and read_fingerprint(folder).get("merged"):
        logger.warning(
            "%s has an adapter merged in, and 4 bits undo most of a short training (a held-out "
            "loss of 0.23 became 2.39 on a Gemma 3 270M, 0.24 in 8 bits): measure it before use; "
            "8 bits, bfloat16, or the adapter beside its base keep what was learned",
            name,
        )
    num_bytes = sum(tensor.num_bytes for tensor in tensors)
    announce(
        f"{name}: packing {len(modules)} modules as {chosen}; {show_bytes(num_bytes)} on the disk"
    )
    with new_folder(path, num_bytes) as temporary:
        write_checkpoint(temporary, folder, config, tensors, "packing")
    return Path(path)


def _list_modules(folder: Path, grid: Grid) -> dict[str, Grid]:
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    model = build_meta_model(
        config, modalities=("text",), dtype=torch.bfloat16, per_layer_embeddings=None
    )
    return list_packable(model, grid)


class _Packing:
    """A tensor that is packed once for its three parts, which are written one after another."""

    def __init__(self, stored: StoredTensor, grid: Grid) -> None:
        self._stored, self._grid = stored, grid
        self._packed: list[Packed] = []

    def list_parts(self, names: Sequence[str]) -> Iterator[NewTensor]:
        """What will be written."""
        meta = torch.device("meta")
        parts = self._grid.empty(*self._stored.shape, dtype=self._stored.dtype, device=meta)
        for name, part, index in zip(names, parts, range(3), strict=True):
            if part is not None:
                last = index == 1 + self._grid.is_affine
                yield NewTensor(
                    name, part.dtype, tuple(part.shape), partial(self._read, index, is_last=last)
                )

    def _read(self, index: int, *, is_last: bool) -> Iterator[bytes]:
        if not self._packed:
            self._packed = [self._grid.pack(block) for _, _, block in self._stored.blocks()]
        for packed in self._packed:
            if (part := packed[index]) is not None:
                yield from tensor_bytes(part)
        if is_last:
            self._packed = []
