"""Weights out of few bits, on each device by the fastest way that gives the same bits.

The CPU unpacks block by block. A GPU has a kernel that reads each number once and writes each
weight once: Triton's on CUDA, a Metal shader on MPS. Before its first use a kernel is compared
with plain torch on its device; where a bit differs or it cannot be made, plain torch unpacks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gemma_tuner.device import compile_shader, is_out_of_memory
from gemma_tuner.log import announce

# Unpacked at a time on the CPU, so that what is in between stays in its cache.
_BLOCK_ELEMENTS = 2**20
_SHADER = Path(__file__).with_name("unpack.metal")
_METAL_NAMES = {torch.float32: "float", torch.bfloat16: "bfloat"}


class Packed(NamedTuple):
    """What stands for a weight ``[..., out, in]``."""

    numbers: Tensor  # [..., out, in * bits / 8]: uint8 where affine, else int8
    scales: Tensor  # [..., out, in / group], of the weight's dtype
    biases: Tensor | None  # also; where affine

    def change(self, change: Callable[[Tensor], Tensor]) -> Packed:
        """Have each part changed."""
        biases = None if self.biases is None else change(self.biases)
        return Packed(change(self.numbers), change(self.scales), biases)


class Variant(NamedTuple):
    """What a kernel is made for; it takes any shape and group."""

    bits: int
    is_affine: bool
    dtype: torch.dtype

    def __str__(self) -> str:
        """Name it, for people."""
        kind = "affine" if self.is_affine else "symmetric"
        return f"{kind} {self.bits}-bit {str(self.dtype).removeprefix('torch.')}"


Unpack = Callable[[Packed], Tensor]

VARIANTS = tuple(
    Variant(bits, is_affine, dtype)
    for bits in (4, 8)
    for is_affine in (False, True)
    for dtype in _METAL_NAMES
)


def unpack(packed: Packed, bits: int, *, is_traced: bool = False) -> Tensor:
    """Return the weights, ``[..., in]`` in the scales' dtype.

    Multiplied, then added, each rounded, as MLX does: what is computed with equals to the bit
    what is merged into. Traced tensors have no values, and are unpacked by plain torch.
    """
    numbers, scales, biases = packed
    if is_traced:
        return unpack_plainly(packed, bits)
    if numbers.device.type == "cpu":
        return _unpack_in_blocks(packed, bits)
    return _choose(numbers.device, Variant(bits, biases is not None, scales.dtype))(packed)


def unpack_plainly(packed: Packed, bits: int) -> Tensor:
    """Unpack by torch's own operators."""
    weight = _make_room(packed, bits)
    _fill_plainly(weight, packed, bits)
    return weight


def _make_room(packed: Packed, bits: int) -> Tensor:
    *rows, row_bytes = packed.numbers.shape
    return packed.scales.new_empty(*rows, row_bytes * 8 // bits)


def _fill_plainly(weight: Tensor, packed: Packed, bits: int) -> None:
    numbers, scales, biases = packed
    if bits == 8:
        weight.copy_(numbers)
    else:
        low, high = weight.chunk(2, dim=-1)
        # Shifts of int8 are arithmetic: the sign comes along.
        low.copy_((numbers << 4) >> 4 if biases is None else numbers & 15)
        high.copy_(numbers >> 4)
    grouped = weight.unflatten(-1, (scales.shape[-1], -1))
    grouped.mul_(scales.unsqueeze(-1))
    if biases is not None:
        grouped.add_(biases.unsqueeze(-1))


def _unpack_in_blocks(packed: Packed, bits: int) -> Tensor:
    weight = _make_room(packed, bits)
    step = max(1, _BLOCK_ELEMENTS * len(weight) // max(1, weight.numel()))
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        block = packed.change(itemgetter(rows))
        _fill_plainly(weight[rows], block, bits)
    return weight


def make_kernel(device: torch.device, variant: Variant) -> Unpack | None:
    """Make a device's own kernel; None where it has none. Any error is that of a compiler."""
    match device.type:
        case "cuda":
            return _make_triton(variant)
        case "mps":
            return _make_metal(variant)
        case _:
            return None


def _make_triton(variant: Variant) -> Unpack:
    from gemma_tuner.models.few_bits.unpack_triton import fill  # noqa: PLC0415 - not on Macs

    def unpack_by_triton(packed: Packed) -> Tensor:
        weight = _make_room(packed, variant.bits)
        numbers, scales, biases = packed
        biases = scales if biases is None else biases.contiguous()
        fill(
            weight,
            numbers.contiguous(),
            scales.contiguous(),
            biases,
            bits=variant.bits,
            is_affine=variant.is_affine,
        )
        return weight

    return unpack_by_triton


def _make_metal(variant: Variant) -> Unpack:
    kind = "affine" if variant.is_affine else "symmetric"
    name = f"unpack_{kind}_{variant.bits}_{_METAL_NAMES[variant.dtype]}"
    kernel = getattr(_compile_metal(), name)

    def unpack_by_metal(packed: Packed) -> Tensor:
        weight = _make_room(packed, variant.bits)
        parts = [part.contiguous() for part in packed if part is not None]
        row_bytes = packed.numbers.shape[-1]
        group = weight.shape[-1] // packed.scales.shape[-1]
        threads = (row_bytes // 4, packed.numbers.numel() // row_bytes)
        kernel(weight, *parts, row_bytes, group.bit_length() - 1, threads=threads)
        return weight

    return unpack_by_metal


@cache
def _compile_metal() -> Any:
    return compile_shader(_SHADER.read_text(encoding="utf-8"))


@cache
def _choose(device: torch.device, variant: Variant) -> Unpack:
    """A device's kernel if it gives what plain torch gives there, else plain torch."""
    plain = partial(unpack_plainly, bits=variant.bits)
    try:
        kernel = make_kernel(device, variant)
        if kernel is None or agrees(kernel, device, variant):
            return kernel or plain
        reason = "its kernel gives other bits"
    except Exception as error:  # whatever it was, plain torch does without
        if is_out_of_memory(error):
            raise
        reason = f"its kernel cannot be made ({type(error).__name__})"
    announce(
        f"{variant} weights are unpacked by torch's operators on {device.type}, which is slower: "
        f"{reason}; gemma-tuner doctor --only kernels says more"
    )
    return plain


def agrees(kernel: Unpack, device: torch.device, variant: Variant) -> bool:
    """Whether a kernel gives what plain torch gives on the device, bit for bit."""
    for sample in make_samples(variant):
        packed = sample.change(lambda part: part.to(device))
        if not torch.equal(kernel(packed), unpack_plainly(packed, variant.bits)):
            return False
    return True


def make_samples(variant: Variant) -> Iterator[Packed]:
    """Make weights on the CPU to try a kernel with, of every group."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = 5, 19 * 128  # an odd number of groups: one lies in both halves of a row
    for group in (32, 64, 128):
        shape = (rows, columns * variant.bits // 8)
        numbers = torch.randint(256, shape, generator=generator).to(torch.uint8)
        scales, biases = torch.randn(2, rows, columns // group, generator=generator) * 0.02
        if variant.is_affine:
            yield Packed(numbers, scales.to(variant.dtype), biases.to(variant.dtype))
        else:
            yield Packed(numbers.view(torch.int8), scales.to(variant.dtype), None)
