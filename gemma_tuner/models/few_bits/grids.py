"""Weights in few bits: a number for each, and a scale, or a scale and a bias, for each group.

Symmetric is ``scale * number``, numbers in two's complement (Gemma's QAT, GGUF's Q4_0,
compressed-tensors); affine is ``scale * number + bias``, numbers from 0 (MLX). Groups run along
the last axis. In four bits a byte holds column ``j`` of ``in`` in its low half and column
``j + in / 2`` in its high one, so that a row is unpacked as two plain halves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from gemma_tuner.errors import CheckpointError, ConfigError
from gemma_tuner.models.few_bits.unpacking import Packed, unpack

PACKED = "packed"
"""The key of config.json that names packed modules and their grids."""
GROUPS = (32, 64, 128)
_KINDS = ("symmetric", "affine")
# Numbers of which each is tried as that of a group's extreme, from the lowest.
_TRIES = 8


@dataclass(frozen=True, slots=True)
class Grid:
    """The values that weights can have: ``bits`` for each, ``group`` of which share a scale."""

    bits: int
    group: int
    is_affine: bool = False

    def __post_init__(self) -> None:
        """Check what is asked for."""
        if self.bits not in (4, 8):
            raise ConfigError(f"bits is {self.bits!r}; weights are packed in 4 or 8")
        if self.group not in GROUPS:
            raise ConfigError(f"group is {self.group!r}; it may be 32, 64 or 128")

    @classmethod
    def choose(cls, bits: int, kind: str | None = None, group: int | None = None) -> Grid:
        """Fill in what is not given: symmetric in 4 bits, as QAT's weights lie; else affine."""
        is_affine = kind == "affine" or (kind is None and bits == 8)
        return cls(bits, group or (64 if is_affine else 32), is_affine=is_affine)

    @property
    def kind(self) -> Literal["symmetric", "affine"]:
        """By the name that it has in configurations."""
        return "affine" if self.is_affine else "symmetric"

    @classmethod
    def parse(cls, text: str) -> Grid:
        """Read what ``str`` writes: ``symmetric-4-32``."""
        kind, *numbers = text.split("-") if isinstance(text, str) else ("",)
        if kind not in _KINDS or len(numbers) != 2 or not all(map(str.isdecimal, numbers)):
            raise ConfigError(f"{text!r} is no grid of weights; one is written symmetric-4-32")
        return cls(int(numbers[0]), int(numbers[1]), is_affine=kind == "affine")

    def __str__(self) -> str:
        """Name it, as configurations do."""
        return f"{self.kind}-{self.bits}-{self.group}"

    def fits(self, columns: int) -> bool:
        """Whether rows of so many columns have whole groups."""
        return columns % self.group == 0

    def empty(self, *shape: int, dtype: torch.dtype, device: torch.device) -> Packed:
        """Make room for a weight of some shape."""
        *rows, columns = shape
        kind = torch.uint8 if self.is_affine else torch.int8
        numbers = torch.empty(*rows, columns * self.bits // 8, dtype=kind, device=device)
        scales = torch.empty(*rows, columns // self.group, dtype=dtype, device=device)
        return Packed(numbers, scales, torch.empty_like(scales) if self.is_affine else None)

    def pack(self, weight: Tensor) -> Packed:
        """Take the nearest values to ``[..., in]`` weights."""
        grouped = weight.float().unflatten(-1, (-1, self.group))
        find = _find_affine if self.is_affine else _find_symmetric
        numbers, scales, biases = find(grouped, self.bits, weight.dtype)
        numbers = numbers.flatten(-2).to(torch.uint8 if self.is_affine else torch.int8)
        return Packed(self.join(numbers), scales, biases)

    def join(self, numbers: Tensor) -> Tensor:
        """Put ``[..., in]`` numbers, one a byte, into as few bytes as they need."""
        if self.bits == 8:
            return numbers
        low, high = numbers.chunk(2, dim=-1)
        return (low & 15) | (high << 4)

    def split(self, numbers: Tensor) -> Tensor:
        """Take numbers apart again, one a byte; of an affine grid, whose have no sign."""
        return numbers if self.bits == 8 else torch.cat([numbers & 15, numbers >> 4], dim=-1)

    def unpack(self, packed: Packed, *, is_traced: bool = False) -> Tensor:
        """Return the weights, ``[..., in]`` in the scales' dtype."""
        return unpack(packed, self.bits, is_traced=is_traced)


def read_grids(packed: Any) -> dict[str, Grid]:
    """Read which modules of a checkpoint are packed, and on which grids."""
    # packed: What ``config.json`` has under ``PACKED``; None where it has nothing.
    try:
        return {name: Grid.parse(text) for name, text in (packed or {}).items()}
    except (AttributeError, ConfigError) as error:
        raise CheckpointError(
            f"config.json says of packed weights what cannot be read ({error}); pack the "
            "checkpoint again"
        ) from None


def name_grids(packed: Any) -> str | None:
    """Name the grids of packed weights, as a configuration has them; None where there are none."""
    return " and ".join(sorted({str(grid) for grid in read_grids(packed).values()})) or None


def find_bits(grids: str) -> int | None:
    """The bits of a name that ``name_grids`` gave; None where there are several grids."""
    return None if " and " in grids else Grid.parse(grids).bits


def stored_bits(config: Any) -> int | None:
    """The fewest bits that a checkpoint has a weight packed in, by its configuration."""
    grids = read_grids(getattr(config, PACKED, None))
    return min((grid.bits for grid in grids.values()), default=None)


def choose_grid(name: str, config: Any, bits: int | None) -> Grid | None:
    """Choose the grid on which a checkpoint is to be packed; None where it stays as it is."""
    grid, stored = None if bits is None else Grid.choose(bits), stored_bits(config)
    if grid is None or grid.bits == stored:
        return None
    if stored is not None:
        raise ConfigError(
            f"bits is {bits}, and the weights of {name} are packed in {stored} already; leave "
            "bits out, or give the checkpoint that it was made from"
        )
    return grid


def _find_affine(
    weight: Tensor, bits: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As ``mx.quantize``: the extreme of larger magnitude is on the grid, and so is zero."""
    low, high = weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True)
    steps = 2**bits - 1
    scale = ((high - low) / steps).clamp_min(1e-7)
    from_low = low.abs() > high.abs()
    scale = torch.where(from_low, scale, -scale)
    edge = torch.where(from_low, low, high)
    at = torch.round(edge / scale)
    scale = torch.where(at != 0, edge / at, scale)
    bias = torch.where(at == 0, torch.zeros_like(edge), edge)
    numbers = torch.round((weight - bias) / scale).clamp(0, steps)
    return numbers, scale.squeeze(-1).to(dtype), bias.squeeze(-1).to(dtype)


def _find_symmetric(
    weight: Tensor, bits: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Search the step: weights of QAT lie on a grid whose extreme need not be its last value."""
    # llama.cpp's extreme / -8 finds another grid, and with it 2.5 to 7.6 % of error.
    lowest = -(2 ** (bits - 1))
    extreme = weight.gather(-1, weight.abs().argmax(-1, keepdim=True))
    least = torch.full_like(extreme, torch.inf)
    scale = torch.ones_like(extreme)
    for number in _list_candidates(lowest):
        step = (extreme / number).to(dtype).float()  # as it will be stored
        step = torch.where(step == 0, torch.ones_like(step), step)
        found = torch.round(weight / step).clamp_(lowest, -lowest - 1)
        error = found.mul_(step).sub_(weight).square_().sum(-1, keepdim=True)
        # Of equals the first: the coarsest grid that holds the weights.
        better = error < least * (1 - 1e-6)
        least, scale = torch.where(better, error, least), torch.where(better, step, scale)
    numbers = torch.round(weight / scale).clamp_(lowest, -lowest - 1)
    return numbers, scale.squeeze(-1).to(dtype), None


def _list_candidates(lowest: int) -> list[int]:
    """The numbers that a group's extreme may have, largest magnitude first."""
    # The highest number is one less in magnitude than the lowest.
    rest = range(lowest + 1, lowest + _TRIES)
    return [lowest, *(number for low in rest for number in (low, -low))]
