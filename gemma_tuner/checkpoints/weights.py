"""Weights in safetensors files, read one tensor at a time: a checkpoint may exceed memory."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from gemma_tuner.checks import check_path
from gemma_tuner.errors import MALFORMED, CheckpointError
from gemma_tuner.models.families import family_of_type
from gemma_tuner.models.few_bits.grids import PACKED, Grid, Packed, read_grids
from gemma_tuner.models.few_bits.layers import list_parts

INDEX = "model.safetensors.index.json"
HEAD = "lm_head.weight"
_CHUNK_BYTES = 16 * 2**20
_BLOCK_ELEMENTS = 2**22
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file, not read yet."""

    path: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # of its bytes in the file

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        """Read it."""
        with safe_open(self.path, "pt") as file:
            return file.get_tensor(self.name)

    def blocks(self, step: int | None = None) -> Iterator[tuple[int, slice, Tensor]]:
        """Read a matrix, or a pile of them, in blocks of rows that take little memory."""
        # A vector is one block, and so is what is no pile of matrices, as a convolution's weight.
        # step: Rows of a block.
        # Yields: For each block the matrix's number, its rows, and the block ``[rows, in]``.
        if len(self.shape) not in (2, 3):
            yield 0, slice(None), self.read()
            return
        *piles, num_rows, num_columns = self.shape
        step = step or max(1, _BLOCK_ELEMENTS // num_columns)
        with safe_open(self.path, "pt") as file:
            part = file.get_slice(self.name)
            for index in range(math.prod(piles)):
                for start in range(0, num_rows, step):
                    rows = slice(start, min(start + step, num_rows))
                    yield index, rows, part[index, rows] if piles else part[rows]

    def copy(self) -> Iterator[bytes]:
        """Read its bytes in chunks, which costs no memory of its size."""
        with self.path.open("rb") as file:
            file.seek(self.start)
            left = self.num_bytes
            while left:
                chunk = file.read(min(left, _CHUNK_BYTES))
                if not chunk:
                    raise SafetensorError(f"{self.path.name} ended early")
                left -= len(chunk)
                yield chunk


@dataclass(frozen=True, slots=True)
class UnpackedTensor:
    """A weight that is packed in a file: what it stands for, made as it is read."""

    name: str
    grid: Grid
    parts: tuple[StoredTensor, ...]  # numbers, scales, biases if the grid has them

    @property
    def dtype(self) -> torch.dtype:
        """Of the weight."""
        return self.parts[1].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        *rows, groups = self.parts[1].shape
        return (*rows, groups * self.grid.group)

    @property
    def num_bytes(self) -> int:
        """Bytes of the weight."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        """Unpack it."""
        return self.grid.unpack(self._join(*(part.read() for part in self.parts)))

    def blocks(self) -> Iterator[tuple[int, slice, Tensor]]:
        """Unpack it in blocks of rows, as :meth:`StoredTensor.blocks` reads."""
        for index, rows, packed in self.packed_blocks():
            yield index, rows, self.grid.unpack(packed)

    def packed_blocks(self) -> Iterator[tuple[int, slice, Packed]]:
        """Read it as it is packed, in the same blocks."""
        step = max(1, _BLOCK_ELEMENTS // self.shape[-1])
        for blocks in zip(*(part.blocks(step) for part in self.parts), strict=True):
            index, rows, _ = blocks[0]
            yield index, rows, self._join(*(block for _, _, block in blocks))

    def copy(self) -> Iterator[bytes]:
        """Unpack its bytes in chunks."""
        for _, _, block in self.blocks():
            yield from tensor_bytes(block)

    @staticmethod
    def _join(numbers: Tensor, scales: Tensor, biases: Tensor | None = None) -> Packed:
        return Packed(numbers, scales, biases)


Weight: TypeAlias = StoredTensor | UnpackedTensor


def find_checkpoint(name_or_path: str | Path, revision: str | None = None) -> Path:
    """Find the folder of a checkpoint without using a network."""
    check_path("base", name_or_path)
    folder = Path(name_or_path)
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(str(name_or_path), revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        name = folder.name if folder.is_absolute() else name_or_path
        at, option = (
            (f" at revision {revision}", f" --revision {revision}") if revision else ("", "")
        )
        raise CheckpointError(
            f"{name} is no folder, and not in the local cache{at}; fetch it with `hf download "
            f"{name}{option}`, or give the checkpoint's folder"
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file of a checkpoint."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, *MALFORMED) as error:
        raise CheckpointError(
            f"{path.parent.resolve().name} has no readable {path.name} "
            f"({type(error).__name__}); download the checkpoint again, or give its folder"
        ) from None
    if not isinstance(document, dict):
        raise CheckpointError(f"{path.name} holds no JSON object; download the checkpoint again")
    return document


def stored_name(name: str, model_type: str) -> str:
    """Translate a weight's name in the model to its name in the files of a checkpoint."""
    for own, stored in family_of_type(model_type).stored_names:
        name = name.replace(own, stored)
    return name


def list_tensors(folder: Path) -> dict[str, Weight]:
    """List all tensors of a checkpoint, in the order of its files; packed ones as weights."""
    packed = read_json(folder / "config.json").get(PACKED)
    return _list_unpacked(list_stored(folder), read_grids(packed))


def _list_unpacked(
    stored: Mapping[str, StoredTensor], grids: Mapping[str, Grid]
) -> dict[str, Weight]:
    tensors: dict[str, Weight] = dict(stored)
    for module, grid in grids.items():
        for weight in ("weight", "gate_up_proj", "down_proj"):
            parts = list_parts(module, weight)
            if parts[0] not in stored:
                continue
            found = tuple(stored[part] for part in parts if part in stored)
            for part in found:
                del tensors[part.name]
            name = f"{module}.{weight}"
            tensors[name] = UnpackedTensor(name, grid, found)
    return tensors


def list_stored(folder: Path) -> dict[str, StoredTensor]:
    """List all tensors of a checkpoint as they are stored, in the order of its files."""
    name = folder.resolve().name
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map", {})
        if not _is_index(weight_map):
            raise CheckpointError(f"{INDEX} of {name} is damaged; download the checkpoint again")
        files = sorted(set(weight_map.values()))
    else:
        weight_map = {}
        files = ["model.safetensors"]
    # Path's would raise where a name is too long.
    absent = [file for file in files if not os.path.isfile(folder / file)]  # noqa: PTH113
    if absent:
        raise CheckpointError(
            f"{name} lacks {len(absent)} of {len(files)} weight files ({', '.join(absent[:5])}); "
            "download the checkpoint again"
        )
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        tensors |= list_file(folder / file)
    lost = sorted(weight_map.keys() - tensors.keys())
    if lost:
        raise CheckpointError(
            f"{name} lacks {len(lost)} tensors that its index names ({', '.join(lost[:5])}); "
            "download the checkpoint again"
        )
    return tensors


def _is_index(weight_map: Any) -> bool:
    """Whether an index names a file for each tensor, all of them in its own folder."""
    return isinstance(weight_map, dict) and all(
        isinstance(file, str) and Path(file).name == file for file in weight_map.values()
    )


def list_file(path: Path) -> dict[str, StoredTensor]:
    """List the tensors of one safetensors file, in the order of their bytes."""
    try:
        with safe_open(path, "pt"):  # checks the header against the file's size
            pass
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(header_bytes))
    except (OSError, SafetensorError) as error:
        detail = "" if isinstance(error, OSError) else f": {error}"
        raise CheckpointError(
            f"{path.name} is missing, damaged or incomplete ({type(error).__name__}{detail}); "
            "download it again"
        ) from None
    header.pop("__metadata__", None)
    unknown = sorted({entry["dtype"] for entry in header.values()} - DTYPES.keys())
    if unknown:
        raise CheckpointError(
            f"{path.name} holds {', '.join(unknown)} tensors, which cannot be exported; use the "
            "checkpoint in bfloat16 or float32"
        )
    return {
        name: StoredTensor(
            path,
            name,
            DTYPES[entry["dtype"]],
            tuple(entry["shape"]),
            8 + header_bytes + entry["data_offsets"][0],
        )
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"][0])
    }


def read_file(path: Path) -> dict[str, Tensor]:
    """Read all tensors of one safetensors file."""
    list_file(path)  # says what is wrong with a damaged one
    return load_file(path)


def tensor_bytes(tensor: Tensor) -> Iterator[bytes]:
    """Yield a tensor's bytes as safetensors holds them."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    for start in range(0, len(flat), _CHUNK_BYTES):
        yield flat[start : start + _CHUNK_BYTES].tobytes()
