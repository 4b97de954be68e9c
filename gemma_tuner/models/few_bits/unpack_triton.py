"""Weights out of few bits on CUDA, in one pass. Triton comes with torch on Linux alone."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

# Neither a half of a row nor a group ends within so many numbers: all of them have one scale.
_UNIT = 16
_NUM_UNITS = 64  # for each program


@triton.jit
def _unpack(
    out: tl.tensor,
    numbers: tl.tensor,
    scales: tl.tensor,
    biases: tl.tensor,
    row_bytes: tl.tensor,
    group: tl.constexpr,
    bits: tl.constexpr,
    is_affine: tl.constexpr,
    num_units: tl.constexpr,
    unit: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * row_bytes
    start = (tl.program_id(1) * num_units + tl.arange(0, num_units)) * unit
    within = tl.arange(0, unit)[None, :]
    has_start = start < row_bytes
    is_inside = has_start[:, None] & (within < unit)
    both = tl.load(numbers + (row + start)[:, None] + within, mask=is_inside).to(tl.int32)
    for side in tl.static_range(8 // bits):  # pyright: ignore[reportGeneralTypeIssues]
        if bits == 8:
            number = both
        elif side == 1:
            number = both >> 4
        elif is_affine:
            number = both & 15
        else:
            number = ((both & 15) ^ 8) - 8
        weight = row * (8 // bits) + start + side * row_bytes
        scale = tl.load(scales + weight // group, mask=has_start)[:, None]
        value = (number.to(tl.float32) * scale.to(tl.float32)).to(scale.dtype)
        if is_affine:
            bias = tl.load(biases + weight // group, mask=has_start)[:, None]
            value = (value.to(tl.float32) + bias.to(tl.float32)).to(scale.dtype)
        tl.store(out + weight[:, None] + within, value, mask=is_inside)


def fill(
    weight: Tensor,
    numbers: Tensor,
    scales: Tensor,
    biases: Tensor,
    *,
    bits: int,
    is_affine: bool,
) -> None:
    """Write into ``weight`` ``[..., in]`` what contiguous parts stand for."""
    # biases: As scales; read where is_affine alone.
    row_bytes = numbers.shape[-1]
    grid = (numbers.numel() // row_bytes, triton.cdiv(row_bytes, _UNIT * _NUM_UNITS))
    _unpack[grid](
        weight,
        numbers,
        scales,
        biases,
        row_bytes,
        group=weight.shape[-1] // scales.shape[-1],
        bits=bits,
        is_affine=is_affine,
        num_units=_NUM_UNITS,
        unit=_UNIT,
        # Products and sums are rounded each, as torch rounds them.
        enable_fp_fusion=False,  # pyright: ignore[reportCallIssue]
    )
