"""Weights of other programs' checkpoints, under the names and in the layouts of transformers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from safetensors import safe_open
from torch import Tensor

from gemma_tuner.checkpoints.weights import StoredTensor, stored_name, tensor_bytes
from gemma_tuner.checkpoints.writing import NewTensor
from gemma_tuner.errors import CheckpointError
from gemma_tuner.models.families import family_of
from gemma_tuner.models.few_bits.grids import Grid

Reader: TypeAlias = Callable[[int, int], Tensor]
"""Reads a part of a tensor along its first axis, from a row to before another."""

# What is read at once.
_BLOCK_ELEMENTS = 2**24
_NAMES_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Quantised:
    """The numbers behind a weight: one a byte, scales, and biases where the grid is affine."""

    grid: Grid
    readers: tuple[Reader, ...]
    dtype: torch.dtype  # of scales and biases

    def on(self, grid: Grid) -> Quantised:
        """Have the same values on a grid of no fewer bits and no larger groups."""
        repeat = self.grid.group // grid.group
        if repeat == 1:
            return Quantised(grid, self.readers, self.dtype)

        def read(reader: Reader, start: int, stop: int) -> Tensor:
            return reader(start, stop).repeat_interleave(repeat, dim=-1)

        numbers, *others = self.readers
        return Quantised(
            grid, (numbers, *(partial(read, reader) for reader in others)), self.dtype
        )

    def list_parts(self, names: Sequence[str], shape: tuple[int, ...]) -> Iterator[NewTensor]:
        """Lay the numbers out as packed layers hold them; nothing is rounded."""

        def join(start: int, stop: int) -> Tensor:
            return self.grid.join(self.readers[0](start, stop))

        meta = torch.device("meta")
        parts = self.grid.empty(*shape, dtype=self.dtype, device=meta)
        for name, part, read in zip(names, parts, (join, *self.readers[1:]), strict=False):
            if part is not None:
                source = Source(part.dtype, tuple(part.shape), read)
                yield source.tensor(name)


@dataclass(frozen=True, slots=True)
class Source:
    """A tensor, read in parts along its first axis."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Reader
    quantised: Quantised | None = None
    is_quantised: bool = False
    """Whether its file has it in fewer bits than ``dtype`` has."""

    def tensor(self, name: str) -> NewTensor:
        """Have it written in full."""
        return NewTensor(name, self.dtype, self.shape, self._chunks)

    def _chunks(self) -> Iterator[bytes]:
        if not self.shape:
            yield from tensor_bytes(self.read(0, 1))
            return
        rows = max(1, _BLOCK_ELEMENTS // max(1, math.prod(self.shape[1:])))
        for start in range(0, self.shape[0], rows):
            yield from tensor_bytes(self.read(start, min(start + rows, self.shape[0])))


def meet(first: Quantised | None, second: Quantised | None) -> Grid | None:
    """Find the grid that holds the values of both."""
    if first is None or second is None or first.dtype != second.dtype:
        return None
    a, b = first.grid, second.grid
    if a.is_affine != b.is_affine:
        return None
    return Grid(max(a.bits, b.bits), min(a.group, b.group), is_affine=a.is_affine)


def join(first: Source, second: Source) -> Source:
    """Put experts' gate and up one above the other within each expert."""
    experts, rows, columns = first.shape

    def both(a: Reader, b: Reader) -> Reader:
        return lambda start, stop: torch.cat([a(start, stop), b(start, stop)], dim=1)

    quantised = None
    if (grid := meet(first.quantised, second.quantised)) and first.quantised and second.quantised:
        above, below = first.quantised.on(grid), second.quantised.on(grid)
        readers = tuple(map(both, above.readers, below.readers))
        quantised = Quantised(grid, readers, above.dtype)
    shape = (experts, rows + second.shape[1], columns)
    return Source(first.dtype, shape, both(first.read, second.read), quantised, first.is_quantised)


def read_stored(stored: StoredTensor, start: int, stop: int) -> Tensor:
    """Read a part of a tensor in a safetensors file."""
    with safe_open(stored.path, "pt") as file:
        if not stored.shape:
            return file.get_tensor(stored.name)
        return file.get_slice(stored.name)[start:stop]


def plain(stored: StoredTensor) -> Source:
    """Take a tensor as it is stored."""
    return Source(stored.dtype, stored.shape, partial(read_stored, stored))


def check_sources(name: str, sources: Mapping[str, Source], model: Any) -> None:
    """Refuse a decoder whose tensors are not exactly the model's."""
    # Towers may be left out by the program; load_model says so where they are asked for.
    start = f"{family_of(model.config).decoder}."
    passed_over = model._keys_to_ignore_on_load_unexpected or ()  # noqa: SLF001
    wanted = {
        stored_name(key, model.config.model_type): tuple(tensor.shape)
        for key, tensor in model.state_dict().items()
        if key.startswith(start)
    }
    faults = {
        "missing": wanted.keys() - sources.keys(),
        "unexpected": {
            key
            for key in sources.keys() - wanted.keys()
            if key.startswith(start) and not any(re.search(part, key) for part in passed_over)
        },
        "of another shape": {
            f"{key} {list(sources[key].shape)} for {list(shape)}"
            for key, shape in wanted.items()
            if key in sources and sources[key].shape != shape
        },
    }
    if any(faults.values()):
        raise CheckpointError(
            f"the weights of {name} are not those of its configuration: "
            f"{'; '.join(filter(None, (name_keys(*fault) for fault in faults.items())))}. "
            "Download the checkpoint again, or use another one"
        )


def name_keys(what: str, keys: Collection[str]) -> str:
    """Say how many tensors have a fault, and name some."""
    if not keys:
        return ""
    shown = ", ".join(sorted(keys)[:_NAMES_SHOWN])
    return f"{len(keys)} {what} ({shown}{', ...' if len(keys) > _NAMES_SHOWN else ''})"
