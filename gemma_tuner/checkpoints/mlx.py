"""Checkpoints of mlx-community as transformers reads them: dequantised, renamed, transposed.

A quantised row is a stream of ``bits``-bit numbers, the first in the lowest bits of little-endian
words. Every ``group_size`` of them share a scale and a bias of the checkpoint's dtype:
``weight = scale * number + bias``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemma_tuner.checkpoints.folders import new_folder
from gemma_tuner.checkpoints.formats import refuse_format
from gemma_tuner.checkpoints.mlx_names import mlx_name, transformers_name
from gemma_tuner.checkpoints.sources import Quantised, Source, join, plain, read_stored
from gemma_tuner.checkpoints.weights import (
    StoredTensor,
    find_checkpoint,
    list_stored,
    read_json,
    stored_name,
    tensor_bytes,
)
from gemma_tuner.checkpoints.writing import NewTensor, write_checkpoint
from gemma_tuner.errors import CheckpointError
from gemma_tuner.log import announce
from gemma_tuner.models.families import family_of_type
from gemma_tuner.models.few_bits.grids import PACKED, Grid, read_grids
from gemma_tuner.models.few_bits.layers import list_parts
from gemma_tuner.models.identity import portable_name

_BITS = (2, 3, 4, 5, 6, 8)
_GROUP_SIZES = (32, 64, 128)
_GATE, _UP = ".switch_glu.gate_proj.weight", ".switch_glu.up_proj.weight"


def dequantise(
    packed: Tensor, scales: Tensor, biases: Tensor, *, bits: int, group_size: int
) -> Tensor:
    """Unpack an affinely quantised MLX tensor, bit-equal to ``mx.dequantize`` on the CPU."""
    # packed: ``[..., columns * bits / 32]`` uint32.
    # scales: ``[..., columns / group_size]``, of the checkpoint's dtype.
    # Returns: ``[..., columns]`` in the dtype of the scales.
    numbers = read_numbers(packed, bits)
    grouped = numbers.unflatten(-1, (-1, group_size)).to(scales.dtype)
    return (scales[..., None] * grouped + biases[..., None]).flatten(-2)


def read_numbers(packed: Tensor, bits: int) -> Tensor:
    """Take a stream of numbers apart, one a byte."""
    # packed: ``[..., columns * bits / 32]`` uint32. Returns: ``[..., columns]`` uint8.
    in_bytes = packed.contiguous().view(torch.uint8)
    if 8 % bits == 0:
        places = torch.arange(0, 8, bits, dtype=torch.uint8)
        return ((in_bytes[..., None] >> places) & (2**bits - 1)).flatten(-2)
    # Eight numbers fill whole bytes whatever their bits are: as many bytes as each has bits.
    in_bytes = in_bytes.unflatten(-1, (-1, bits)).long()
    words = (in_bytes << (8 * torch.arange(bits))).sum(-1, keepdim=True)
    return ((words >> (bits * torch.arange(8))) & (2**bits - 1)).flatten(-2).to(torch.uint8)


def from_mlx(checkpoint: str | Path, path: str | Path, *, revision: str | None = None) -> Path:
    """Write a checkpoint of mlx-lm or mlx-vlm as one that ``load_model`` opens.

    Quantised weights are written out in full, in the dtype of their scales: a 4-bit checkpoint
    grows to about 3.6 times its size. One that mlx-lm made has no towers; load it with
    ``modalities=("text",)``; of Gemma 3n it cannot be used.

    Args:
        checkpoint: The MLX checkpoint's folder, or its name on the Hub if it is in the local
            cache.
        path: The new folder.
        revision: Of the checkpoint on the Hub.

    Returns:
        The folder.

    Raises:
        CheckpointError: The checkpoint is incomplete, quantised in another way (mxfp4, nvfp4), or
            Gemma 3n without its projectors; the folder exists already or cannot be written.
    """
    folder = find_checkpoint(checkpoint, revision)
    config = read_json(folder / "config.json")
    tensors = [source.tensor(name) for name, source in read_mlx(folder, config).items()]
    kept = {
        name: value
        for name, value in config.items()
        if name not in ("quantization", "quantization_config")
    }
    with new_folder(path, sum(tensor.num_bytes for tensor in tensors)) as temporary:
        write_checkpoint(temporary, folder, kept, tensors, "dequantising")
    return Path(path)


def to_mlx(checkpoint: str | Path, path: str | Path, *, revision: str | None = None) -> Path:
    """Write the decoder of a checkpoint that is packed on affine grids as mlx-lm has it.

    Every number, scale and bias stays as it is. What :func:`export_merged` makes of an adapter of
    the variant ``qalora`` becomes so a quantised model with what was learned in it. Towers and
    projectors are left out, as mlx-lm leaves them out.

    Args:
        checkpoint: The folder that ``pack(..., grid="affine")`` or ``export_merged`` wrote, or its
            name on the Hub if it is in the local cache.
        path: The new folder.
        revision: Of the checkpoint on the Hub.

    Returns:
        The folder.

    Raises:
        CheckpointError: The checkpoint is not packed, or on a symmetric grid, which MLX does not
            have; the folder exists already or cannot be written.
    """
    folder = find_checkpoint(checkpoint, revision)
    config = read_json(folder / "config.json")
    model_type = str(config.get("model_type"))
    grids = read_grids(config.pop(PACKED, None))
    if not grids or not all(grid.is_affine for grid in grids.values()):
        raise CheckpointError(
            f"{folder.resolve().name} has {'symmetric grids' if grids else 'no packed weights'}, "
            "which MLX does not quantise so; make it with pack(..., grid='affine')"
        )
    first = next(iter(grids.values()))
    settings: dict[str, Any] = _describe_grid(first)
    tensors = list_stored(folder)
    kept = (f"{family_of_type(model_type).decoder}.", "lm_head.")
    new: dict[str, NewTensor] = {
        name: NewTensor(name, stored.dtype, stored.shape, stored.copy)
        for name, stored in tensors.items()
        if name.startswith(kept)
    }
    num_left = len(tensors) - len(new)
    for module, grid in grids.items():
        own = stored_name(module, model_type)
        if grid != first:
            settings[mlx_name(module, model_type, "mlx-lm")] = _describe_grid(grid)
        for weight, targets in (
            ("weight", (own,)),
            ("gate_up_proj", (f"{own}.switch_glu.gate_proj", f"{own}.switch_glu.up_proj")),
            ("down_proj", (f"{own}.switch_glu.down_proj",)),
        ):
            for part, kind in zip(list_parts(own, weight), _MLX_PARTS, strict=True):
                if new.pop(part, None) is not None:
                    for tensor in _split_part(tensors[part], grid, kind, targets):
                        new[tensor.name] = tensor
    config["quantization"] = settings
    with new_folder(path, sum(tensor.num_bytes for tensor in new.values())) as temporary:
        write_checkpoint(temporary, folder, config, list(new.values()), "writing for MLX")
    announce(
        f"{Path(path).name}: the decoder for mlx-lm; {num_left} tensors of towers and projectors "
        "are not in it"
    )
    return Path(path)


_MLX_PARTS = ("weight", "scales", "biases")


def _describe_grid(grid: Grid) -> dict[str, Any]:
    return {"group_size": grid.group, "bits": grid.bits, "mode": "affine"}


def _split_part(
    stored: StoredTensor, grid: Grid, kind: str, targets: Sequence[str]
) -> Iterator[NewTensor]:
    """A part of a packed weight in MLX's order; gate and up of experts lie apart there."""
    *piles, rows, columns = stored.shape
    rows //= len(targets)

    def read(number: int) -> Iterator[bytes]:
        for _, at, block in stored.blocks(rows if len(targets) > 1 else None):
            if at.start // rows == number:
                yield from tensor_bytes(_join_pairs(grid, block) if kind == "weight" else block)

    dtype = stored.dtype
    if kind == "weight":
        dtype, columns = torch.uint32, columns // 4
    for number, target in enumerate(targets):
        yield NewTensor(f"{target}.{kind}", dtype, (*piles, rows, columns), partial(read, number))


def _join_pairs(grid: Grid, numbers: Tensor) -> Tensor:
    """The bytes of MLX's words: of two numbers in one, the first is in the low half."""
    if grid.bits == 8:
        return numbers
    low, high = grid.split(numbers).unflatten(-1, (-1, 2)).unbind(-1)
    return low | high << 4


def read_mlx(folder: Path, config: Mapping[str, Any]) -> dict[str, Source]:
    """List a checkpoint's tensors as transformers has them."""
    model_type = str(config.get("model_type"))
    settings = config.get("quantization") or config.get("quantization_config") or {}
    sources = _translate(_read_sources(folder, settings), model_type)
    if model_type == "gemma3n" and not any("embed_vision" in name for name in sources):
        raise CheckpointError(
            f"{portable_name(str(folder))} has no projectors, without which transformers cannot "
            "run Gemma 3n even on text (mlx-lm drops them); use a checkpoint that mlx-vlm made"
        )
    return sources


def _read_sources(folder: Path, settings: Mapping[str, Any]) -> dict[str, Source]:
    """Dequantise what is quantised: a module is, if and only if it has scales."""
    tensors = list_stored(folder)
    sources = {}
    for name, stored in tensors.items():
        module, _, part = name.rpartition(".")
        scales = tensors.get(f"{module}.scales")
        if scales is None or part not in ("weight", "scales", "biases"):
            sources[name] = plain(stored)
        elif part == "weight":
            own = settings.get(module)
            own = {**settings, **own} if isinstance(own, Mapping) else settings
            biases = tensors.get(f"{module}.biases")
            if own.get("mode", "affine") != "affine" or biases is None:
                mode = own.get("mode", "affine without biases")
                refuse_format(folder, f"{mode} ({module})")
            sources[name] = _quantised(module, (stored, scales, biases), own)
    return sources


def _quantised(
    module: str, parts: tuple[StoredTensor, StoredTensor, StoredTensor], own: Mapping[str, Any]
) -> Source:
    packed, scales, biases = parts
    bits, group_size = own.get("bits", 4), own.get("group_size", 64)
    if (
        bits not in _BITS
        or group_size not in _GROUP_SIZES
        or packed.shape[-1] * 32 != scales.shape[-1] * group_size * bits
        or packed.shape[:-1] != scales.shape[:-1]
        or biases.shape != scales.shape
        or biases.dtype != scales.dtype
        or packed.dtype != torch.uint32
    ):
        raise CheckpointError(
            f"{module} does not fit its configuration ({bits} bits in groups of {group_size}; "
            f"weight {list(packed.shape)}, scales {list(scales.shape)}); download it again"
        )

    def read(start: int, stop: int) -> Tensor:
        read_parts = (read_stored(part, start, stop) for part in parts)
        return dequantise(*read_parts, bits=bits, group_size=group_size)

    def read_one_a_byte(start: int, stop: int) -> Tensor:
        return read_numbers(read_stored(packed, start, stop), bits)

    # A number of 2 or 3 bits is one of 4 as well, and one of 5 or 6 one of 8.
    grid = Grid(4 if bits <= 4 else 8, group_size, is_affine=True)
    readers = (read_one_a_byte, partial(read_stored, scales), partial(read_stored, biases))
    shape = (*packed.shape[:-1], scales.shape[-1] * group_size)
    return Source(
        scales.dtype, shape, read, Quantised(grid, readers, scales.dtype), is_quantised=True
    )


def _translate(sources: Mapping[str, Source], model_type: str) -> dict[str, Source]:
    """Give tensors the names and layouts of transformers."""
    translated = {}
    for name, source in sources.items():
        target = stored_name(transformers_name(name, model_type), model_type)
        if target.endswith(_UP):
            continue
        if target.endswith(_GATE):
            target = target.replace(_GATE, ".gate_up_proj")
            translated[target] = join(source, sources[name.replace(_GATE, _UP)])
            continue
        target = target.replace(".switch_glu.down_proj.weight", ".down_proj")
        translated[target] = _transpose(target, source)
    return translated


def _transpose(name: str, source: Source) -> Source:
    """Convolutions have their channels last in MLX, and second in torch."""
    if len(source.shape) == 4:
        order = (0, 3, 1, 2)
    elif "conv1d" in name and len(source.shape) == 3:
        order = (0, 2, 1)
    else:
        return source
    return Source(
        source.dtype,
        tuple(source.shape[axis] for axis in order),
        lambda start, stop: source.read(start, stop).permute(order),
    )
