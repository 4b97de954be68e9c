"""A checkpoint with the adapter merged in, written tensor by tensor from the base's files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gemma_tuner.errors import CheckpointError
from gemma_tuner.export.bases import check_fits, check_same_base, find_base
from gemma_tuner.export.cards import write_merged_card
from gemma_tuner.export.deltas import Delta, Replacement, read_adapter
from gemma_tuner.export.folders import new_folder
from gemma_tuner.export.weights import (
    INDEX,
    SHARD_BYTES,
    NewTensor,
    StoredTensor,
    list_tensors,
    read_json,
    tensor_bytes,
    write_weights,
)

# Configuration, tokenizer, processor, chat template; neither weights nor the base's own card.
_COPIED = (".json", ".jinja", ".model", ".txt")


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
    bit for bit. Memory holds a part of one weight.

    Args:
        adapter: The adapter's folder (PEFT).
        path: The new folder.
        base: The base's folder, or its name on the Hub if it is in the local cache; by default
            the one that the adapter names.
        revision: Of the base on the Hub; by default the adapter's.
        shard_bytes: The most bytes of one weight file.

    Returns:
        What was done, with the error that rounding made.

    Raises:
        CheckpointError: The adapter is for another base, the base is incomplete or not there, the
            folder exists already or cannot be written. Nothing half-written is left.
    """
    read = read_adapter(adapter)
    folder = find_base(read, base, revision)
    config = read_json(folder / "config.json")
    tensors = list_tensors(folder)
    deltas = check_fits(read, tensors, folder, str(config.get("model_type")))
    check_same_base(read, folder, tensors)

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
        copy_settings(folder, temporary)
        (temporary / "config.json").write_text(
            json.dumps(complete_config(config), indent=2) + "\n", encoding="utf-8"
        )
        write_weights(temporary, plan, "merging", shard_bytes)
        write_merged_card(temporary, read, report.lost, report.dtypes)
    return report


def _merge(
    stored: StoredTensor, delta: Delta | Replacement, report: MergeReport
) -> Iterator[bytes]:
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


def copy_settings(source: Path, target: Path) -> None:
    """Copy what belongs to a checkpoint beside its weights: tokenizer, processor, template."""
    for file in sorted(source.iterdir()):
        if file.suffix in _COPIED and file.name != INDEX and file.is_file():
            shutil.copyfile(file, target / file.name)


def complete_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Add what MLX and llama.cpp's converter read and transformers 5 no longer writes."""
    # Where these are missing MLX takes those of one release, or fails; the converter fails.
    # Source: ``ModelArgs`` and ``TextConfig`` of gemma4, gemma4_text and gemma3n in mlx-lm 0.32.2,
    # ``VisionConfig`` of gemma4_unified in mlx-vlm 0.7.10; ``Gemma4Model.set_gguf_parameters`` in
    # llama.cpp 0.5.0.
    named = {name: value for name, value in config.items() if name != "_name_or_path"}
    text = dict(config.get("text_config") or {})
    if not text:
        return named
    missing: dict[str, Any] = {}
    layers = (text.get("per_layer_config") or {}).values()
    for name, per_layer in (
        ("global_head_dim", "head_dim"),
        ("num_global_key_value_heads", "num_key_value_heads"),
    ):
        values = {layer[per_layer] for layer in layers if per_layer in layer}
        if len(values) == 1:
            missing[name] = values.pop()
    if config.get("model_type") == "gemma4_unified":
        missing |= {"hidden_size_per_layer_input": 0, "moe_intermediate_size": None}
        if vision := named.get("vision_config"):
            size = vision["patch_size"] * vision["pooling_kernel_size"]
            named["vision_config"] = {"model_patch_size": size, **vision}
    if config.get("model_type") == "gemma3n":
        rope = text.get("rope_parameters") or {}
        for name, kind in (
            ("rope_theta", "full_attention"),
            ("rope_local_base_freq", "sliding_attention"),
        ):
            if kind in rope:
                missing[name] = rope[kind]["rope_theta"]
    return {"vocab_size": text["vocab_size"], **named, "text_config": {**missing, **text}}
