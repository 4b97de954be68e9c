"""GGUF files beside their configuration: Q4_0 and Q8_0 keep their numbers; others are written out.

Q4_0 and Q8_0 are symmetric, groups of 32 with a float16 step, which stays float16: unpacked in
float32 they are what ``gguf.dequantize`` returns to the bit.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from gemma_tuner.checkpoints.gguf_names import Names
from gemma_tuner.checkpoints.sources import Quantised, Reader, Source
from gemma_tuner.checkpoints.weights import stored_name
from gemma_tuner.errors import CheckpointError
from gemma_tuner.log import announce
from gemma_tuner.models.few_bits.grids import Grid

_PLAIN = {Kind.F32: torch.float32, Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}
_BITS = {Kind.Q4_0: 4, Kind.Q8_0: 8}
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
# Factors of rotary frequencies are computed; layers that share keys and values use none of these.
_PASSED_OVER = re.compile(r"rope_freqs\.weight|blk\.\d+\.attn_(k|v|k_norm)\.weight")


def read_gguf(folder: Path, model: Any) -> dict[str, Source]:
    """List the decoder's tensors as transformers has them."""
    model_type = model.config.model_type
    tensors = _read_tensors(folder)
    names = Names(model_type, model.config.get_text_config().num_hidden_layers)
    parts: dict[str, list[str]] = {}
    shapes = {}
    for key, tensor in model.state_dict().items():
        own = None if key == "lm_head.weight" else names.translate(key)
        if own is not None:
            parts.setdefault(own, []).append(key)
            shapes[key] = tuple(tensor.shape)
    sources = {}
    for own, tensor in tensors.items():
        keys = sorted(parts.get(own, ()))
        if not keys and not _PASSED_OVER.fullmatch(own):
            sources[f"{own} of the GGUF file"] = _read(tensor, np.asarray(tensor.data))
        for index, key in enumerate(keys):
            data = tensor.data[index] if len(keys) > 1 else tensor.data
            if key.endswith("embed_tokens_per_layer.weight"):
                data = data[: shapes[key][0]]  # of Gemma 3n, padded to a row for every token
            sources[stored_name(key, model_type)] = _read(tensor, data)
    unknown = [name for name in sources if name.endswith(" of the GGUF file")]
    if unknown:
        raise CheckpointError(
            f"{folder.resolve().name} has {len(unknown)} tensors that its configuration does not "
            f"have ({', '.join(unknown[:5])}); give the config.json of the model that it was made "
            "from"
        )
    return sources


def _read_tensors(folder: Path) -> dict[str, Any]:
    files = sorted(folder.glob("*.gguf"))
    towers = [file.name for file in files if "mmproj" in file.name.lower()]
    files = [file for file in files if file.name not in towers]
    if not files or (len(files) > 1 and not all(_SHARD.search(file.stem) for file in files)):
        raise CheckpointError(
            f"{folder.resolve().name} has {len(files)} GGUF files of a model "
            f"({', '.join(file.name for file in files[:5])}); leave one beside its config.json"
        )
    announce(
        f"{folder.resolve().name}: a GGUF file has no towers"
        + (f" ({', '.join(towers)} is not read)" if towers else "")
        + "; load what is packed with modalities=('text',). Its float16 steps stay as they are; a "
        "model loaded in bfloat16 rounds them"
    )
    tensors: dict[str, Any] = {}
    for file in files:
        try:
            tensors |= {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
        except (OSError, ValueError, IndexError, KeyError) as error:
            raise CheckpointError(
                f"{file.name} is damaged or incomplete ({type(error).__name__}); download it again"
            ) from None
    return tensors


def _read(tensor: Any, data: np.ndarray) -> Source:
    kind = tensor.tensor_type
    if kind in _PLAIN:
        dtype = _PLAIN[kind]

        def read_plain(start: int, stop: int) -> Tensor:
            block = torch.from_numpy(np.array(data[start:stop]))
            return block.view(dtype)

        columns = data.shape[-1] * data.dtype.itemsize // dtype.itemsize
        return Source(dtype, (*data.shape[:-1], columns), read_plain)
    per_block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    shape = (*data.shape[:-1], data.shape[-1] // block_bytes * per_block)

    def read(start: int, stop: int) -> Tensor:
        found = gguf.dequantize(np.ascontiguousarray(data[start:stop]), kind)
        return torch.from_numpy(found).to(torch.bfloat16)

    quantised = None
    if kind in _BITS:
        grid = Grid(_BITS[kind], 32)
        readers = (_read_numbers(data, grid.bits), _read_steps(data, grid.bits))
        quantised = Quantised(grid, readers, torch.float16)
    return Source(torch.bfloat16, shape, read, quantised, is_quantised=True)


def _take_blocks(data: np.ndarray, bits: int, start: int, stop: int) -> Tensor:
    block = torch.from_numpy(np.array(data[start:stop]))
    return block.unflatten(-1, (-1, 2 + 4 * bits))  # a step, then 32 numbers


def _read_numbers(data: np.ndarray, bits: int) -> Reader:
    def read(start: int, stop: int) -> Tensor:
        numbers = _take_blocks(data, bits, start, stop)[..., 2:]
        if bits == 4:  # the first half in the low bits, each with 8 added
            numbers = torch.cat((numbers & 15, numbers >> 4), dim=-1) - 8
        return numbers.contiguous().view(torch.int8).flatten(-2)

    return read


def _read_steps(data: np.ndarray, bits: int) -> Reader:
    def read(start: int, stop: int) -> Tensor:
        steps = _take_blocks(data, bits, start, stop)[..., :2]
        return steps.contiguous().view(torch.float16).squeeze(-1)

    return read
