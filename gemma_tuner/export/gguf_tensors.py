"""Tensors of GGUF files: their encoding, and the file around them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from torch import Tensor

from gemma_tuner.checkpoints.folders import new_file, progress_shown
from gemma_tuner.checkpoints.weights import tensor_bytes
from gemma_tuner.errors import CheckpointError
from gemma_tuner.models.few_bits.grids import Grid, Packed

FileType = Literal["f32", "f16", "bf16", "q8_0", "q4_1"]

KINDS = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q4_1": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_Q4_1),  # what is not packed
}
DTYPES = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
# Source: prepare_tensors in convert_hf_to_gguf.py of llama.cpp 0.5.0.
_ALWAYS_F32 = (
    "_norm.weight",
    "altup_correct_coef.weight",
    "altup_predict_coef.weight",
    "ffn_gate_inp.weight",
)


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor that will be written into a GGUF file."""

    name: str
    shape: tuple[int, ...]  # in torch's order
    kind: GGMLQuantizationType
    chunks: Callable[[], Iterator[bytes]]  # makes its bytes, once it is its turn

    @property
    def num_bytes(self) -> int:
        """Bytes in the file, without padding."""
        per_block, block_bytes = gguf.GGML_QUANT_SIZES[self.kind]
        return math.prod(self.shape) // per_block * block_bytes


def choose_kind(
    name: str, shape: Sequence[int], kind: GGMLQuantizationType
) -> GGMLQuantizationType:
    """Choose the kind of a tensor in a file of some kind, as llama.cpp's converter does."""
    if len(shape) <= 1 or name.endswith(_ALWAYS_F32) or not name.endswith(".weight"):
        return GGMLQuantizationType.F32
    if shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
        return GGMLQuantizationType.F16
    return kind


def encode(name: str, weight: Tensor, kind: GGMLQuantizationType) -> np.ndarray:
    """Round numbers to a kind; return as many rows of bytes."""
    # weight: ``[rows, in]`` or ``[in]`` float32.
    if not weight.sum().isfinite():  # faster than looking at each
        raise CheckpointError(
            f"{name} has infinite or undefined numbers; if the adapter is on it, its training "
            "diverged: use an earlier training checkpoint"
        )
    if kind not in DTYPES:
        return gguf.quantize(weight.numpy(), kind)
    rounded = weight.to(DTYPES[kind])
    if kind == GGMLQuantizationType.F16 and not rounded.isfinite().all():
        raise CheckpointError(
            f"{name} has numbers beyond float16's range ({weight.abs().max().item():.3g}); use "
            "file_type='bf16'"
        )
    return rounded.contiguous().view(torch.uint8).numpy()


def encode_q4_1(name: str, grid: Grid, packed: Packed) -> Tensor:
    """Put packed rows into blocks of Q4_1, whose steps and minima are float16."""
    # Returns: ``[rows, in / 32, 20]`` uint8: step, minimum, and 32 numbers, halves side by side.
    low, high = grid.split(packed.numbers).unflatten(-1, (-1, 2, 16)).unbind(-2)
    ends = torch.stack([part.half() for part in packed[1:] if part is not None], dim=-1)
    if not ends.isfinite().all():
        raise CheckpointError(
            f"{name} has steps or biases beyond float16's range, which Q4_1 has; use "
            "file_type='bf16'"
        )
    return torch.cat([ends.view(torch.uint8), low | high << 4], dim=-1)


def float32_tensor(name: str, tensor: Tensor) -> GgufTensor:
    """Make a tensor of a GGUF file of one in memory."""
    kind = GGMLQuantizationType.F32
    return GgufTensor(name, tuple(tensor.shape), kind, partial(tensor_bytes, tensor))


def write_gguf(
    writer: GGUFWriter, path: str | Path, tensors: Sequence[GgufTensor], what: str
) -> None:
    """Write a new file, tensor after tensor; show progress."""
    for tensor in tensors:
        writer.add_tensor_info(
            tensor.name,
            tensor.shape,
            np.dtype(np.float32),
            tensor.num_bytes,
            raw_dtype=tensor.kind,
        )
    total = sum(tensor.num_bytes for tensor in tensors)
    with (
        new_file(path, total) as temporary,
        closing(writer),
        progress_shown(what, total) as advance,
    ):
        writer.write_header_to_file(temporary)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for file in writer.fout or ():  # one
            writer.write_padding(file, file.tell())
            for tensor in tensors:
                for chunk in tensor.chunks():
                    file.write(chunk)
                    advance(len(chunk))
                writer.write_padding(file, tensor.num_bytes)
