"""Checkpoints of packed weights, written tensor by tensor: a base of a quarter of the memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import transformers

from gemma_tuner.checkpoints.compressed import read_compressed
from gemma_tuner.checkpoints.folders import new_folder
from gemma_tuner.checkpoints.formats import Format, find_format
from gemma_tuner.checkpoints.mlx import read_mlx
from gemma_tuner.checkpoints.sources import Source, check_sources, meet
from gemma_tuner.checkpoints.weights import (
    HEAD,
    StoredTensor,
    find_checkpoint,
    list_stored,
    read_json,
    stored_name,
    tensor_bytes,
)
from gemma_tuner.checkpoints.writing import NewTensor, write_checkpoint
from gemma_tuner.checks import check_value
from gemma_tuner.display import show_bytes
from gemma_tuner.errors import CheckpointError, ConfigError
from gemma_tuner.log import announce, logger
from gemma_tuner.models.adapter_files import read_fingerprint
from gemma_tuner.models.few_bits.grids import PACKED, Grid, Packed, name_grids
from gemma_tuner.models.few_bits.layers import list_packable, list_parts
from gemma_tuner.models.few_bits.tables import name_table
from gemma_tuner.models.identity import portable_name
from gemma_tuner.models.meta import build_meta_model

_TABLE = Grid(8, 64, is_affine=True)
_WEIGHTS = ("weight", "gate_up_proj", "down_proj")


def pack(
    checkpoint: str | Path,
    path: str | Path,
    *,
    bits: int | None = None,
    grid: Literal["symmetric", "affine"] | None = None,
    group: int | None = None,
    head_bits: Literal[8] | None = None,
    revision: str | None = None,
) -> Path:
    """Write a checkpoint whose decoder has its large matrices in 4 or 8 bits.

    ``load_model`` opens it, and what is trained on it is LoRA on exactly the values that the
    packed numbers stand for. Towers, projectors, norms, routers and the per-layer embeddings stay
    as they are, and so do embedding and head, unless ``head_bits`` says otherwise.

    Args:
        checkpoint: The folder of a checkpoint in bfloat16, float16 or float32, or its name on the
            Hub if it is in the local cache. Best is one of Google's ``-qat-q4_0-unquantized``,
            whose weights lie on the symmetric grid already. One that MLX,
            compressed-tensors (``pack-quantized``) or llama.cpp (a GGUF file beside its
            configuration and tokenizer; Q4_0, Q8_0) quantised keeps its numbers, each module on
            its own grid: nothing is rounded anew. What is quantised otherwise, or is not packed
            here (embeddings, towers), is written in full.
        path: The new folder.
        bits: Of a weight, 4 or 8; by default 4. This, ``grid`` and ``group`` are the file's own
            where it is quantised already.
        grid: ``symmetric``, a scale for each group of weights, its step searched; or ``affine``,
            a scale and a bias, as MLX has. By default symmetric in 4 bits, and affine in 8.
        group: Weights that share a scale, 32, 64 or 128; by default 32 symmetric, 64 affine.
        head_bits: 8 packs the table of embedding and head too, affine in groups of 64; None, the
            default, leaves it.
        revision: Of the checkpoint on the Hub.

    Returns:
        The folder.

    Raises:
        ConfigError: Another number of bits or of a group's weights, or any for a checkpoint that
            is quantised already.
        CheckpointError: The checkpoint is packed already, quantised in a way that is not taken,
            its tensors are not the model's, or it has a head apart from its embedding and
            ``head_bits`` is given; the folder exists already or cannot be written.
    """
    check_value("head_bits", head_bits, Literal[8] | None)
    check_value("grid", grid, Literal["symmetric", "affine"] | None)
    folder = find_checkpoint(checkpoint, revision)
    name = portable_name(str(folder)) or ""
    config = read_json(folder / "config.json")
    if config.get(PACKED):
        raise CheckpointError(f"{name} is packed already; load_model opens it")
    quantised_by = find_format(config, folder)
    model = _build_model(folder)
    if quantised_by is None:
        chosen = Grid.choose(bits or 4, grid, group)
        grids = _choose_grids(name, model, folder, chosen, head_bits)
        tensors = _pack_tensors(folder, str(config.get("model_type")), grids)
        _warn_of_merged(name, folder, chosen)
    else:
        sources = _read_sources(quantised_by, folder, config, model)
        check_sources(name, sources, model)
        grids, tensors = _lay_out(sources, model)
        wishes = {"bits": bits, "grid": grid, "group": group, "head_bits": head_bits}
        _refuse_wishes(name, grids, wishes)
        _announce(name, quantised_by, sources, grids)
    for key in ("quantization", "quantization_config"):
        config.pop(key, None)
    config[PACKED] = {module: str(grid) for module, grid in grids.items()}
    num_bytes = sum(tensor.num_bytes for tensor in tensors)
    announce(
        f"{name}: packing {len(grids)} modules as {name_grids(config[PACKED])}; "
        f"{show_bytes(num_bytes)} on the disk"
    )
    with new_folder(path, num_bytes) as temporary:
        write_checkpoint(temporary, folder, config, tensors, "packing")
    return Path(path)


def _read_sources(
    quantised_by: Format, folder: Path, config: Mapping[str, Any], model: Any
) -> dict[str, Source]:
    match quantised_by:
        case "MLX":
            return read_mlx(folder, config)
        case "compressed-tensors":
            return read_compressed(folder, config)
        case "GGUF":
            from gemma_tuner.checkpoints.gguf import read_gguf  # noqa: PLC0415 - loads gguf

            return read_gguf(folder, model)


def _build_model(folder: Path) -> Any:
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    return build_meta_model(
        config, modalities=("text",), dtype=torch.bfloat16, per_layer_embeddings=None
    )


def _choose_grids(
    name: str, model: Any, folder: Path, grid: Grid, head_bits: int | None
) -> dict[str, Grid]:
    """Name what is to be packed, and on which grid."""
    grids = list_packable(model, grid)
    if not grids:
        raise CheckpointError(
            f"no matrix of {name} has rows of whole groups of {grid.group} weights; give a "
            "smaller group, or use the checkpoint as it is"
        )
    if head_bits is not None:
        if HEAD in list_stored(folder):
            raise CheckpointError(
                f"{name} has a head apart from its embedding, and head_bits packs one table for "
                "both; leave head_bits out"
            )
        grids[name_table(model.config.model_type)] = _TABLE
    return grids


def _warn_of_merged(name: str, folder: Path, grid: Grid) -> None:
    if grid.bits == 4 and read_fingerprint(folder).get("merged"):
        logger.warning(
            "%s has an adapter merged in, and 4 bits undo most of a short training (a held-out "
            "loss of 0.22 became 2.35 on a Gemma 3 270M, 0.22 in 8 bits): measure it before use; "
            "8 bits, bfloat16, or the adapter beside its base keep what was learned",
            name,
        )


def _pack_tensors(folder: Path, model_type: str, grids: Mapping[str, Grid]) -> list[NewTensor]:
    """Round what is to be packed to its grid, and copy the rest."""
    tensors: list[NewTensor] = []
    packed = {
        stored_name(f"{module}.{weight}", model_type): (
            grid,
            list_parts(stored_name(module, model_type), weight),
        )
        for module, grid in grids.items()
        for weight in _WEIGHTS
    }
    for name, tensor in list_stored(folder).items():
        if name in packed:
            grid, parts = packed[name]
            tensors += _Packing(tensor, grid).list_parts(parts)
        else:
            tensors.append(NewTensor(name, tensor.dtype, tensor.shape, tensor.copy))
    return tensors


def _lay_out(sources: Mapping[str, Source], model: Any) -> tuple[dict[str, Grid], list[NewTensor]]:
    """Take the numbers of what is quantised already; write in full what is not packed here."""
    model_type = model.config.model_type
    grids: dict[str, Grid] = {}
    parts: dict[str, list[NewTensor]] = {}
    for module in list_packable(model, Grid(8, 32)):
        stored = stored_name(module, model_type)
        names = {
            weight: f"{stored}.{weight}" for weight in _WEIGHTS if f"{stored}.{weight}" in sources
        }
        found = [sources[name].quantised for name in names.values()]
        # Experts' two piles have one grid.
        grid = meet(found[0], found[-1])
        if grid is None:
            continue
        grids[module] = grid
        for (weight, name), quantised in zip(names.items(), found, strict=True):
            if quantised is not None:
                parts[name] = [
                    *quantised.on(grid).list_parts(list_parts(stored, weight), sources[name].shape)
                ]
    tensors: list[NewTensor] = []
    for name, source in sources.items():
        tensors += parts.get(name) or [source.tensor(name)]
    return grids, tensors


def _refuse_wishes(name: str, grids: Mapping[str, Grid], wishes: Mapping[str, Any]) -> None:
    for option, value in wishes.items():
        if value is not None:
            found = ", ".join(sorted({str(grid) for grid in grids.values()})) or "no packed layer"
            raise ConfigError(
                f"{option} is {value!r}, but {name} is quantised already ({found}) and keeps its "
                f"numbers; leave {option} out, or give the checkpoint in bfloat16"
            )


def _announce(
    name: str, quantised_by: Format, sources: Mapping[str, Source], grids: Mapping[str, Grid]
) -> None:
    counts = Counter(map(str, grids.values()))
    kept = ", ".join(f"{count} on {grid}" for grid, count in sorted(counts.items())) or "none"
    num_quantised = sum(source.is_quantised for source in sources.values())
    num_kept = sum(f"{module}.{weight}" in sources for module in grids for weight in _WEIGHTS)
    num_others = num_quantised - num_kept
    announce(
        f"{name}: layers of {quantised_by} that keep their numbers: {kept}; {num_others} "
        "other quantised tensors (embeddings, head, towers) are written in full"
    )


class _Packing:
    """A tensor that is packed once for its three parts, which are written one after another."""

    def __init__(self, stored: StoredTensor, grid: Grid) -> None:
        self._stored, self._grid = stored, grid
        self._packed: list[Packed] = []

    def list_parts(self, names: Sequence[str]) -> Iterator[NewTensor]:
        """What will be written."""
        meta = torch.device("meta")
        parts = self._grid.empty(*self._stored.shape, dtype=self._stored.dtype, device=meta)
        for name, part, index in zip(names, parts, range(3), strict=True):
            if part is not None:
                last = index == 1 + self._grid.is_affine
                yield NewTensor(
                    name, part.dtype, tuple(part.shape), partial(self._read, index, is_last=last)
                )

    def _read(self, index: int, *, is_last: bool) -> Iterator[bytes]:
        if not self._packed:
            self._packed = [self._grid.pack(block) for _, _, block in self._stored.blocks()]
        for packed in self._packed:
            if (part := packed[index]) is not None:
                yield from tensor_bytes(part)
        if is_last:
            self._packed = []
