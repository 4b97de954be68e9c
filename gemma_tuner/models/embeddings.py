"""The per-layer-embedding table, read where it lies in the checkpoint.

Gemma 4 E2B, E4B and Gemma 3n look up one row per token in a table that is nearly half of the
checkpoint (4.7 GB of E2B's 10.2 in bfloat16) and does no arithmetic. A training step needs a few
thousand of its 262,144 rows, some 18 kB each: mapped into memory, the file costs what is read of
it, and the system may take that back.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from gemma_tuner.errors import CheckpointError, ConfigError
from gemma_tuner.models.families import family_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Placement = Literal["disk", "device"]

NAME = "embed_tokens_per_layer"

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_INTEGERS = {2: np.int16, 4: np.int32}  # numpy has no bfloat16: rows travel as their bits


class MappedEmbedding(nn.Module):
    """A scaled embedding whose table stays in a safetensors file.

    It holds no parameter: neither a state dict nor a saved model has the table.

    Raises:
        CheckpointError: The file does not hold such a table.
    """

    def __init__(self, path: Path, key: str, *, scale: float, dtype: torch.dtype) -> None:
        super().__init__()
        with safe_open(path, "np"), path.open("rb") as file:  # which checks the header's numbers
            header_bytes = int.from_bytes(file.read(8), "little")
            entry = json.loads(file.read(header_bytes)).get(key)
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if entry is None or entry["dtype"] not in _DTYPES or len(entry["shape"]) != 2:
            raise CheckpointError(
                f"{path.name} holds no table {key} of floating-point numbers; download the "
                "checkpoint again, or load it with per_layer_embeddings='device'"
            )
        mapped.madvise(mmap.MADV_RANDOM)  # or each row would bring its neighbours along
        self._stored_dtype = _DTYPES[entry["dtype"]]
        rows, columns = entry["shape"]
        self._table = np.frombuffer(
            mapped,
            dtype=_INTEGERS[self._stored_dtype.itemsize],
            count=rows * columns,
            offset=8 + header_bytes + entry["data_offsets"][0],
        ).reshape(rows, columns)
        self._scale = scale
        self._dtype = dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of the table, which are not in memory."""
        return self._table.nbytes

    def forward(self, input_ids: Tensor) -> Tensor:
        """Look up rows; waits for the ids where they are on a device."""
        # input_ids: ``[...]`` int64.
        # Returns: ``[..., columns]`` in the embedding's dtype, on the device of the ids.
        rows = self._gather(input_ids).view(self._stored_dtype)
        rows = rows.to(input_ids.device).to(self._dtype)
        return rows * torch.tensor(self._scale, dtype=self._dtype)

    def warm(self, input_ids: Tensor) -> None:
        """Bring rows that will be looked up soon from the disk into the system's page cache."""
        # input_ids: ``[...]`` int64 on the CPU.
        self._gather(input_ids)

    def _gather(self, input_ids: Tensor) -> Tensor:
        ids = input_ids.cpu().numpy()
        return torch.from_numpy(np.take(self._table, ids, axis=0))


def choose_placement(
    config: PreTrainedConfig, device: torch.device, wanted: str | None
) -> Placement | None:
    """Decide where the per-layer table is."""
    if wanted not in (None, *get_args(Placement)):
        raise ConfigError(f"per_layer_embeddings={wanted!r}; give 'disk', 'device' or None")
    if not getattr(config.get_text_config(), "hidden_size_per_layer_input", 0):
        return None
    if wanted is None:
        return "disk" if device.type == "mps" else "device"
    return cast("Placement", wanted)


def map_per_layer_embeddings(
    model: nn.Module, find_file: Callable[[str], Path | None], dtype: torch.dtype
) -> MappedEmbedding:
    """Give a model that was loaded without its per-layer table one that is mapped."""
    gemma: Any = model
    key = f"{family_of(gemma.config).decoder}.{NAME}.weight"
    index = find_file("model.safetensors.index.json")
    name = "model.safetensors"
    if index is not None:
        name = json.loads(index.read_text(encoding="utf-8"))["weight_map"].get(key, name)
    path = find_file(name)
    if path is None:
        raise CheckpointError(f"the checkpoint has no {name}; download it again")
    text = gemma.config.get_text_config()
    table = MappedEmbedding(path, key, scale=text.hidden_size_per_layer_input**0.5, dtype=dtype)
    setattr(gemma.get_decoder(), NAME, table)
    return table


def find_mapped_embedding(model: nn.Module) -> MappedEmbedding | None:
    """Return a model's mapped table, or None where it has none."""
    return next((part for part in model.modules() if isinstance(part, MappedEmbedding)), None)
