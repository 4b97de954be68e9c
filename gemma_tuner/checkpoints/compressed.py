"""Checkpoints of compressed-tensors, ``pack-quantized``: symmetric numbers in 4 or 8 bits.

A row is MLX's stream of numbers, each with half its range added. A scale is a group's, or a row's.
Source: ``pack_to_int32`` of compressed-tensors 0.20.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemma_tuner.checkpoints.formats import refuse_format
from gemma_tuner.checkpoints.mlx import read_numbers
from gemma_tuner.checkpoints.sources import Quantised, Source, plain, read_stored
from gemma_tuner.checkpoints.weights import StoredTensor, list_stored
from gemma_tuner.errors import CheckpointError
from gemma_tuner.models.few_bits.grids import GROUPS, Grid

_PARTS = ("weight_packed", "weight_scale", "weight_shape")


def read_compressed(folder: Path, config: Mapping[str, Any]) -> dict[str, Source]:
    """List a checkpoint's tensors as transformers has them."""
    groups = (config["quantization_config"].get("config_groups") or {}).values()
    stated = {(group.get("weights") or {}).get("num_bits") for group in groups}
    tensors = list_stored(folder)
    sources = {}
    for name, stored in tensors.items():
        module, _, part = name.rpartition(".")
        if f"{module}.weight_packed" not in tensors:
            sources[name] = plain(stored)
        elif part == "weight_packed":
            if f"{module}.weight_zero_point" in tensors or f"{module}.weight_g_idx" in tensors:
                refuse_format(
                    folder, f"compressed-tensors with zero points or reordered ({module})"
                )
            found = [tensors.get(f"{module}.{part}") for part in _PARTS]
            sources[f"{module}.weight"] = _quantised(module, found, stated)
        elif part not in _PARTS:
            sources[name] = plain(stored)
    return sources


def _quantised(module: str, parts: list[StoredTensor | None], stated: set[Any]) -> Source:
    packed, scales, shape_tensor = parts
    if packed is None or scales is None or shape_tensor is None:
        raise CheckpointError(f"{module} lacks its scales or its shape; download it again")
    shape = tuple(shape_tensor.read().tolist())
    num_words, num_groups = packed.shape[-1], scales.shape[-1]
    columns = shape[-1]
    bits, rest = divmod(32 * num_words, columns)
    size = columns // max(1, num_groups)
    # A row's one scale is that of each of its groups.
    group = size if size in GROUPS else next((g for g in GROUPS[::-1] if size % g == 0), 0)
    if (
        rest
        or bits not in (4, 8)
        or bits not in stated
        or not group
        or size * num_groups != columns
        or (size != group and num_groups != 1)
        or len(shape) != 2
        or packed.shape[:-1] != shape[:-1]
        or scales.shape[:-1] != shape[:-1]
    ):
        raise CheckpointError(
            f"{module} does not fit its configuration ({stated} bits; weight {list(packed.shape)} "
            f"for {list(shape)}, scales {list(scales.shape)}); download it again"
        )

    def read_one_a_byte(start: int, stop: int) -> Tensor:
        numbers = read_numbers(read_stored(packed, start, stop), bits)
        return (numbers - 2 ** (bits - 1)).view(torch.int8)

    def read(start: int, stop: int) -> Tensor:
        numbers = read_one_a_byte(start, stop).to(scales.dtype).unflatten(-1, (num_groups, -1))
        return (numbers * read_stored(scales, start, stop)[..., None]).flatten(-2)

    grid = Grid(bits, group)
    read_scales = partial(read_stored, scales)
    if size != group:
        repeat = size // group

        def read_scales(start: int, stop: int) -> Tensor:
            return read_stored(scales, start, stop).repeat_interleave(repeat, dim=-1)

    return Source(
        scales.dtype,
        shape,
        read,
        Quantised(grid, (read_one_a_byte, read_scales), scales.dtype),
        is_quantised=True,
    )
