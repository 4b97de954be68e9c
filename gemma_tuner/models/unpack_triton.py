"""Weights out of few bits on CUDA, in one pass. Triton comes with torch on Linux alone."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024  # bytes of a row, for each program


@triton.jit
def _unpack(
    out: Any,
    numbers: Any,
    scales: Any,
    biases: Any,
    row_bytes: Any,
    group: tl.constexpr,
    bits: tl.constexpr,
    is_affine: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    byte = tl.program_id(1) * block + tl.arange(0, block)
    is_inside = byte < row_bytes
    both = tl.load(numbers + row * row_bytes + byte, mask=is_inside).to(tl.int32)
    for side in tl.static_range(8 // bits):
        if bits == 8:
            number = both
        elif side == 1:
            number = both >> 4
        elif is_affine:
            number = both & 15
        else:
            number = ((both & 15) ^ 8) - 8
        weight = row * row_bytes * (8 // bits) + byte + side * row_bytes
        scale = tl.load(scales + weight // group, mask=is_inside)
        value = (number.to(tl.float32) * scale.to(tl.float32)).to(scale.dtype)
        if is_affine:
            bias = tl.load(biases + weight // group, mask=is_inside)
            value = (value.to(tl.float32) + bias.to(tl.float32)).to(scale.dtype)
        tl.store(out + weight, value, mask=is_inside)


def fill(
    weight: Tensor, numbers: Tensor, scales: Tensor, biases: Tensor | None, *, bits: int
) -> None:
    """Write into ``weight`` ``[..., in]`` what its contiguous parts stand for."""
    row_bytes = numbers.shape[-1]
    grid = (numbers.numel() // row_bytes, triton.cdiv(row_bytes, _BLOCK))
    _unpack[grid](
        weight,
        numbers,
        scales,
        scales if biases is None else biases,
        row_bytes,
        group=weight.shape[-1] // scales.shape[-1],
        bits=bits,
        is_affine=biases is not None,
        block=_BLOCK,
        enable_fp_fusion=False,  # products and sums are rounded each, as torch rounds them
    )
