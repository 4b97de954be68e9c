"""New checkpoints, written tensor by tensor: a checkpoint may exceed memory."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gemma_tuner.checkpoints.folders import progress_shown
from gemma_tuner.checkpoints.weights import DTYPES, INDEX, read_json
from gemma_tuner.disk import find_home, is_within
from gemma_tuner.log import logger
from gemma_tuner.models.adapter_files import TrainedWith, write_json, write_trained_with
from gemma_tuner.models.families import family_of_type

SHARD_BYTES = 5 * 10**9
# Configuration, tokenizer, processor, chat template; neither weights nor the base's own card.
COPIED = (".json", ".jinja", ".model", ".txt")
"""Endings of the files that a new checkpoint has from its source."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class NewTensor:
    """A tensor that will be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: Callable[[], Iterator[bytes]]  # makes its bytes, once it is its turn

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_checkpoint(
    folder: Path,
    source: Path,
    config: Mapping[str, Any],
    tensors: Sequence[NewTensor],
    what: str,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write weights, and beside them the tokenizer, processor and template of ``source``."""
    for file in list_own_files(source):
        if file.suffix in COPIED and file.name != INDEX:
            shutil.copyfile(file, folder / file.name)
    (folder / "config.json").write_text(
        json.dumps(complete_config(config), indent=2) + "\n", encoding="utf-8"
    )
    _write_weights(folder, tensors, what, shard_bytes)


def list_own_files(folder: Path) -> list[Path]:
    """List a checkpoint's files by name, without links to what lies elsewhere on the machine."""
    home = find_home(folder)
    files = [file for file in sorted(folder.iterdir()) if file.is_file()]
    own = [file for file in files if is_within(file, (home,))]
    if left_out := [file.name for file in files if file not in own]:
        logger.warning(
            "left out of %s, as they are links that lead out of its folder: %s; where they belong "
            "to it, put the files themselves there",
            home.name,
            ", ".join(left_out),
        )
    return own


def write_processor(folder: Path, known: TrainedWith | None, model_type: str) -> None:
    """Let a checkpoint's processor write prompts as they were written in training."""
    write_trained_with(folder, known, merged=True)
    if known is None:
        return
    option = family_of_type(model_type).image_budget_option
    budget = known.collator.get("image_tokens")
    for name in ("tokenizer_config.json", "processor_config.json", "preprocessor_config.json"):
        if not (folder / name).is_file():
            continue
        document = read_json(folder / name)
        document.pop("chat_template", None)  # the file's goes before chat_template.jinja
        for part in (document, document.get("image_processor") or {}):
            if budget is not None and option is not None and option in part:
                part[option] = budget
        write_json(folder / name, document)


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


def _write_weights(
    folder: Path, tensors: Sequence[NewTensor], what: str, shard_bytes: int
) -> None:
    """Write tensors one by one into as few files as ``shard_bytes`` allows; show progress."""
    shards = _group(tensors, shard_bytes)
    names = (
        ["model.safetensors"]
        if len(shards) == 1
        else [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    )
    total = sum(tensor.num_bytes for tensor in tensors)
    with progress_shown(what, total) as advance:
        for name, shard in zip(names, shards, strict=True):
            with (folder / name).open("wb") as file:
                file.write(_header(shard))
                for tensor in shard:
                    for chunk in tensor.chunks():
                        file.write(chunk)
                        advance(len(chunk))
    if len(shards) > 1:
        weight_map = {
            t.name: name for name, shard in zip(names, shards, strict=True) for t in shard
        }
        index: Mapping[str, Any] = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _group(tensors: Sequence[NewTensor], shard_bytes: int) -> list[list[NewTensor]]:
    """Fill shards in order; within one, tensors that would leave others unaligned come last."""
    shards: list[list[NewTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.num_bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.num_bytes
    return [sorted(shard, key=_place) for shard in shards]


def _place(tensor: NewTensor) -> int:
    return 0 if tensor.num_bytes % 8 == 0 else 9 - tensor.dtype.itemsize


def _header(tensors: Sequence[NewTensor]) -> bytes:
    """Return a safetensors header: its length, then names, dtypes, shapes and places."""
    # Source: the safetensors README, "Format".
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.num_bytes
        entries[tensor.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
