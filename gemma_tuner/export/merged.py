"""A checkpoint with the adapter merged in, written tensor by tensor from the base's files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from gemma_tuner.checkpoints.folders import new_folder
from gemma_tuner.checkpoints.weights import (
    UnpackedTensor,
    Weight,
    list_stored,
    tensor_bytes,
)
from gemma_tuner.checkpoints.writing import (
    SHARD_BYTES,
    NewTensor,
    write_checkpoint,
    write_processor,
)
from gemma_tuner.errors import CheckpointError
from gemma_tuner.export.bases import HEAD, Base, open_base
from gemma_tuner.export.cards import write_merged_card
from gemma_tuner.export.deltas import Adapter, Delta, Replacement, read_adapter
from gemma_tuner.models.few_bits.grids import PACKED


@dataclass
class MergeReport:
    """What a merge did.

    Args:
        path: The new checkpoint.
        num_merged: Weights that the adapter changed.
        num_copied: Tensors that are the base's, bit for bit.
        num_bytes: Of all tensors.
        dtypes: Of the merged weights.
        lost: How much of the adapter rounding to the checkpoint's dtype took away:
            ``|rounded - exact| / |exact - base|`` over all merged weights. Next to nothing in
            float32; in bfloat16 often a tenth, as small updates vanish.
        max_rounding: The largest single change by rounding.
    """

    path: Path
    num_merged: int = 0
    num_copied: int = 0
    num_bytes: int = 0
    dtypes: tuple[str, ...] = ()
    lost: float = 0.0
    max_rounding: float = 0.0
    _squares: list[float] = field(default_factory=lambda: [0.0, 0.0], repr=False)

    def add(self, base: torch.Tensor, exact: torch.Tensor, rounded: torch.Tensor) -> None:
        """Take some merged rows into account."""
        error = rounded.to(exact.dtype) - exact
        self._squares[0] += torch.linalg.vector_norm(error).item() ** 2
        self._squares[1] += torch.linalg.vector_norm(exact - base).item() ** 2
        self.max_rounding = max(self.max_rounding, error.abs().max().item())
        if self._squares[1]:
            self.lost = (self._squares[0] / self._squares[1]) ** 0.5


def export_merged(
    adapter: str | Path,
    path: str | Path,
    *,
    base: str | Path | None = None,
    revision: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> MergeReport:
    """Write the base checkpoint with an adapter merged in; no device and no model are needed.

    Every tensor of the base is in the result under its name, towers included, whether or not the
    adapter was trained with them loaded. A merged weight is computed in float32 (in float64 where
    the base has more than two bytes) and rounded once to the base's dtype; all others are copied
    bit for bit. Of a packed base, packed weights become what they stand for. Where embedding or
    head was trained, and the base has one weight for both, the
    result has two (``tie_word_embeddings`` is false). Memory holds a part of one weight.

    Of an adapter of the variant ``qalora`` and the packed base that it was trained on, the result
    is as packed as the base: only biases differ, each computed in float32 and rounded once.
    :func:`to_mlx` makes of it what mlx-lm opens.

    Args:
        adapter: The adapter's folder (PEFT).
        path: The new folder.
        base: The base's folder, or its name on the Hub if it is in the local cache; by default
            the one that the adapter names, packed as it was in training. For an adapter of packed
            weights the original of two bytes is another model, often a better one: the card and
            a warning say so.
        revision: Of the base on the Hub; by default the adapter's.
        shard_bytes: The most bytes of one weight file.

    Returns:
        What was done, with the error that rounding made.

    Raises:
        CheckpointError: The adapter is for another base, the base is incomplete or not there, the
            folder exists already or cannot be written. Nothing half-written is left.
    """
    read = read_adapter(adapter)
    found = open_base(read, base, revision, is_merged=True)
    tensors: dict[str, Weight] = dict(found.tensors)
    deltas, config = found.deltas, found.config
    if biases := pool_deltas(read, found):
        tensors, deltas = dict[str, Weight](list_stored(found.folder)), biases
    elif found.is_untied:
        tensors[HEAD] = tensors[found.embedding]
        text = {**config.get("text_config", {}), "tie_word_embeddings": False}
        config = {**config, "tie_word_embeddings": False, "text_config": text}
    if not biases:
        config = {key: value for key, value in config.items() if key != PACKED}
    report = MergeReport(Path(path), len(deltas), len(tensors) - len(deltas))
    report.dtypes = tuple(
        sorted({str(tensors[key].dtype).removeprefix("torch.") for key in deltas})
    )
    report.num_bytes = sum(tensor.num_bytes for tensor in tensors.values())
    plan = [
        NewTensor(
            key,
            stored.dtype,
            stored.shape,
            partial(_merge, stored, deltas[key], report) if key in deltas else stored.copy,
        )
        for key, stored in tensors.items()
    ]
    with new_folder(path, report.num_bytes) as temporary:
        write_checkpoint(temporary, found.folder, config, plan, "merging", shard_bytes)
        write_processor(temporary, read.trained, found.model_type)
        into = found.other or (read.grid and f"packed as {read.grid}, as in training")
        write_merged_card(temporary, read, report.lost, report.dtypes, into)
    return report


def pool_deltas(adapter: Adapter, base: Base) -> dict[str, Delta | Replacement]:
    """What a QA-LoRA adds to the biases of its packed base, by their names in its files."""
    # Returns: Nothing, where the adapter or the base is of another kind.
    pooled: dict[str, Delta | Replacement] = {}
    for name, delta in base.deltas.items():
        weight = base.tensors.get(name)
        if not (adapter.group and isinstance(delta, Delta) and isinstance(weight, UnpackedTensor)):
            return {}
        if not weight.grid.is_affine or weight.grid.group != adapter.group:
            return {}
        pooled[weight.parts[2].name] = delta.pool(adapter.group)
    return pooled


def _merge(stored: Weight, delta: Delta | Replacement, report: MergeReport) -> Iterator[bytes]:
    for index, rows, block in stored.blocks():
        merged = delta.merge(block, index, rows)
        rounded = merged.to(stored.dtype)
        if not rounded.to(merged.dtype).sum().isfinite():  # faster than looking at each
            raise CheckpointError(
                f"merging {delta.name} gives infinite or undefined numbers; the adapter is broken "
                "(did its training diverge?): use an earlier training checkpoint"
            )
        report.add(block, merged, rounded)
        yield from tensor_bytes(rounded)
