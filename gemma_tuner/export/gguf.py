"""GGUF files for llama.cpp and programs built on it: the merged decoder, or the adapter alone.

Tensors are written one after another, a block of rows at a time, from the base's files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import gguf
import torch
import transformers
from gguf import GGMLQuantizationType, GGUFWriter

from gemma_tuner.checkpoints.gguf_names import Names
from gemma_tuner.checkpoints.weights import UnpackedTensor, Weight, tensor_bytes
from gemma_tuner.checkpoints.writing import complete_config
from gemma_tuner.checks import check_path
from gemma_tuner.errors import CheckpointError, ConfigError
from gemma_tuner.export.bases import Base, open_base
from gemma_tuner.export.deltas import Adapter, Delta, Replacement, read_adapter
from gemma_tuner.export.gguf_metadata import add_sizes, add_tokenizer, rope_factors
from gemma_tuner.export.gguf_names import check_runs, is_adaptable
from gemma_tuner.export.gguf_tensors import (
    DTYPES,
    KINDS,
    FileType,
    GgufTensor,
    choose_kind,
    encode,
    encode_q4_1,
    float32_tensor,
    write_gguf,
)
from gemma_tuner.export.merged import MergeReport, pool_deltas
from gemma_tuner.log import announce
from gemma_tuner.models.few_bits.grids import Grid
from gemma_tuner.models.identity import portable_name

_EMBEDDING = "model.language_model.embed_tokens.weight"
_PER_LAYER_EMBEDDING = "model.language_model.embed_tokens_per_layer.weight"


@dataclass(frozen=True, slots=True)
class _Decoder:
    """The decoder of the checkpoint that an adapter belongs to."""

    base: Base
    text: Mapping[str, Any]  # its settings, as transformers reads them
    names: Names


def export_gguf(
    adapter: str | Path,
    path: str | Path,
    *,
    file_type: FileType = "bf16",
    base: str | Path | None = None,
    revision: str | None = None,
) -> MergeReport:
    """Write the base's decoder with an adapter merged in as one GGUF file.

    It runs in a llama.cpp that knows the model: for Gemma 4 one of April 2026 or later. The file
    holds the decoder, the tokenizer and the chat template. It holds no towers: for images and
    clips llama.cpp wants a second file, which for Gemma 4 its own ``convert_hf_to_gguf.py
    --mmproj`` makes of the folder that ``export_merged`` writes.

    Args:
        adapter: The adapter's folder (PEFT).
        path: The new file, ``NAME.gguf``.
        file_type: How matrices are kept: ``f32``, ``f16``, ``bf16``, ``q8_0`` (blocks of 32
            numbers of 8 bits), or ``q4_1``: of an adapter of the variant ``qalora`` on a base of 4
            bits in affine groups of 32, whose numbers stay as they are; what the base does not
            pack is bfloat16. Vectors, routers and AltUp's coefficients are float32 always, and
            with ``q8_0`` a matrix whose rows are no multiple of 32 is float16, as llama.cpp wants.
        base: The base's folder, or its name on the Hub if it is in the local cache; by default
            the one that the adapter names.
        revision: Of the base on the Hub; by default the adapter's.

    Returns:
        What was done, with the error that rounding made; ``num_copied`` are the decoder's other
        tensors.

    Raises:
        ConfigError: An unknown file type, or a path of another kind.
        CheckpointError: The adapter is for another base or also on the towers, llama.cpp has no
            such model or computes it differently, the base is incomplete or not there, the file
            exists already or cannot be written. Nothing half-written is left.
    """
    if file_type not in get_args(FileType):
        raise ConfigError(f"file_type is {file_type!r}; it may be {', '.join(get_args(FileType))}")
    _check_path(path)
    read = read_adapter(adapter)
    decoder = _open_decoder(read, base, revision, is_merged=True)
    found = decoder.base
    check_runs(found.model_type, decoder.text)
    pooled = pool_deltas(read, found)
    if file_type == "q4_1" and not (pooled and any(map(_is_q4_1, found.tensors.values()))):
        raise ConfigError(
            "file_type 'q4_1' is for an adapter of the variant 'qalora' on a base of "
            "pack(..., grid='affine', group=32): others would lose in 4 bits what was learned; "
            "use q8_0 or bf16"
        )
    kind, file_kind = KINDS[file_type]
    report = MergeReport(Path(path), len(found.deltas), dtypes=(file_type,))
    tensors = _plan_model(decoder, kind, report, pooled if file_type == "q4_1" else None)
    num_towers = sum(decoder.names.translate(name) is None for name in found.tensors)
    report.num_copied = len(found.tensors) - num_towers - report.num_merged
    report.num_bytes = sum(tensor.num_bytes for tensor in tensors)

    writer = GGUFWriter(None, decoder.names.architecture)
    writer.add_type(gguf.GGUFType.MODEL)
    _add_origin(writer, read, found)
    add_sizes(writer, found.model_type, decoder.text)
    writer.add_file_type(file_kind)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    template = read.trained and read.trained.chat_template
    add_tokenizer(writer, found.folder, found.tensors[_EMBEDDING].shape[0], template)
    write_gguf(writer, path, tensors, "writing GGUF")
    announce(
        f"{Path(path).name}: the decoder in {file_type}, {report.num_merged} weights with the "
        f"adapter merged in; {num_towers} tensors of towers and projectors are not in it (see "
        "export_gguf)"
    )
    return report


def export_gguf_adapter(
    adapter: str | Path,
    path: str | Path,
    *,
    base: str | Path | None = None,
    revision: str | None = None,
) -> Path:
    """Write a PEFT adapter as one that llama.cpp loads: ``llama-cli -m BASE.gguf --lora PATH``.

    Its matrices are kept in float32. llama.cpp has one alpha for all of them, so that where ranks
    or alphas differ, the difference goes into the second matrix.

    Args:
        adapter: The adapter's folder (PEFT).
        path: The new file, ``NAME.gguf``.
        base: The base's folder, or its name on the Hub if it is in the local cache; by default
            the one that the adapter names.
        revision: Of the base on the Hub; by default the adapter's.

    Returns:
        The file.

    Raises:
        ConfigError: A path of another kind.
        CheckpointError: The adapter is for another base, of a kind that llama.cpp does not have
            (DoRA, trained weights), or on weights where llama.cpp would not use it (towers,
            projectors, ``per_layer_model_projection``); the file exists already or cannot be
            written. Nothing half-written is left.
    """
    _check_path(path)
    read = read_adapter(adapter)
    decoder = _open_decoder(read, base, revision)
    found = decoder.base
    deltas = dict(zip(found.deltas, found.require_lora("llama.cpp"), strict=True))
    # llama.cpp takes an alpha of 0 for none at all
    alpha = max(delta.scale * delta.rank for delta in deltas.values()) or 1.0
    tensors: list[GgufTensor] = []
    for name, delta in deltas.items():
        own = str(decoder.names.translate(name))
        _check_adaptable(found, name, own, delta)
        a, b = (delta.a, delta.b) if delta.parameter == "weight" else delta.split_experts()
        if delta.scale * delta.rank != alpha:  # llama.cpp computes ``alpha / rank * b @ a``
            b = b * (delta.scale * delta.rank / alpha)
        tensors += [float32_tensor(f"{own}.lora_a", a), float32_tensor(f"{own}.lora_b", b)]

    writer = GGUFWriter(None, decoder.names.architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    _add_origin(writer, read, found)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    write_gguf(writer, path, tensors, "writing GGUF adapter")
    return Path(path)


def _check_path(path: str | Path) -> None:
    check_path("path", path)
    if Path(path).suffix != ".gguf":
        raise ConfigError(f"{Path(path).name!r} is no name for a GGUF file; end it in .gguf")


def _open_decoder(
    adapter: Adapter, base: str | Path | None, revision: str | None, *, is_merged: bool = False
) -> _Decoder:
    found = open_base(adapter, base, revision, is_merged=is_merged)
    folder = found.folder
    if _EMBEDDING not in found.tensors:
        raise CheckpointError(
            f"{folder.resolve().name} has no {_EMBEDDING}; give a whole Gemma checkpoint as base"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(folder).to_dict()
    except (KeyError, OSError, ValueError) as error:
        raise CheckpointError(
            f"config.json of {folder.resolve().name} cannot be read by transformers "
            f"({type(error).__name__}); download the checkpoint again"
        ) from None
    text = complete_config(config)["text_config"]
    found.require_tied("a GGUF file")
    names = Names(found.model_type, text["num_hidden_layers"])
    media = [name for name in found.deltas if names.translate(name) is None]
    if media:
        raise CheckpointError(
            f"the adapter is also on {len(media)} weights of towers and projectors (such as "
            f"{media[0]}), which a GGUF file of the decoder does not hold; use export_merged, and "
            "llama.cpp's convert_hf_to_gguf.py for both files"
        )
    return _Decoder(found, text, names)


def _add_origin(writer: GGUFWriter, adapter: Adapter, base: Base) -> None:
    name = portable_name(adapter.base or str(base.folder))
    if not name:
        return
    writer.add_name(f"{name} with a LoRA adapter")
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, name)
    if "/" in name:  # else it is no name on the Hub
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{name}")


def _check_adaptable(base: Base, name: str, own: str, delta: Delta) -> None:
    """Refuse an adapter that llama.cpp would load and not use, or use differently."""
    if delta.magnitude is not None:
        raise CheckpointError(
            f"the adapter is a DoRA (on {name}), which llama.cpp does not have; use export_gguf"
        )
    if not is_adaptable(own):
        raise CheckpointError(f"llama.cpp uses no adapter on {name}; use export_gguf")
    if name.endswith("experts.down_proj"):
        scales = name.replace("experts.down_proj", "router.per_expert_scale")
        if scales in base.tensors and not base.tensors[scales].read().eq(1).all():
            raise CheckpointError(
                f"llama.cpp does not multiply an adapter on {name} by {scales} as the model "
                "does; use export_gguf"
            )


def _is_q4_1(weight: Weight) -> bool:
    return isinstance(weight, UnpackedTensor) and weight.grid == Grid(4, 32, is_affine=True)


def _plan_model(
    decoder: _Decoder,
    kind: GGMLQuantizationType,
    report: MergeReport,
    pooled: Mapping[str, Delta | Replacement] | None,
) -> list[GgufTensor]:
    """All tensors of the file, in the order of the checkpoint."""
    # pooled: What is added to biases by their names, where packed weights stay packed.
    base = decoder.base
    parts: dict[str, list[str]] = {}
    for name in base.tensors:
        own = decoder.names.translate(name)
        if own is not None:
            parts.setdefault(own, []).append(name)
    tensors = []
    if base.model_type == "gemma3n":
        _check_complete(decoder, parts)
    else:
        tensors.append(float32_tensor("rope_freqs.weight", rope_factors(decoder.text)))
    for own, names in parts.items():
        shape = base.tensors[names[0]].shape
        if own.startswith("altup_"):
            shape = (len(names), *shape)
        own_kind = choose_kind(own, shape, kind)
        chunks = partial(_encode, base, sorted(names), own_kind, report)
        if names == [_PER_LAYER_EMBEDDING]:
            num_rows = shape[0]
            shape = (base.tensors[_EMBEDDING].shape[0], shape[1])
            chunks = partial(_encode_padded, base, own_kind, shape[0] - num_rows, report)
        if pooled is not None and _is_q4_1(base.tensors[names[0]]):
            own_kind = GGMLQuantizationType.Q4_1
            chunks = partial(_encode_packed, base, names, pooled, report)
        tensors.append(GgufTensor(own, shape, own_kind, chunks))
    return tensors


def _check_complete(decoder: _Decoder, parts: Mapping[str, Sequence[str]]) -> None:
    """Gemma 3n's layers that share keys and values have their own in released checkpoints."""
    wanted = [
        f"blk.{layer}.{name}.weight"
        for layer in range(decoder.text["num_hidden_layers"])
        for name in ("attn_k", "attn_v", "attn_k_norm")
    ]
    if absent := [name for name in wanted if name not in parts]:
        raise CheckpointError(
            f"{decoder.base.folder.resolve().name} lacks {len(absent)} weights that llama.cpp "
            f"loads without using them (such as {absent[0]}); transformers leaves them out when "
            "it saves: give the original checkpoint as base"
        )


def _encode(
    base: Base, names: Sequence[str], kind: GGMLQuantizationType, report: MergeReport
) -> Iterator[bytes]:
    """Yield a tensor's bytes: the weights of ``names`` one after another, merged."""
    for name in names:
        stored, delta = base.tensors[name], base.deltas.get(name)
        if delta is None and stored.dtype == DTYPES.get(kind):
            yield from stored.copy()
            continue
        for index, rows, block in stored.blocks():
            if delta is None:
                yield encode(name, block.float(), kind).tobytes()
                continue
            merged = delta.merge(block, index, rows)
            rounded = encode(name, merged.float(), kind)
            report.add(block, merged, torch.from_numpy(gguf.dequantize(rounded, kind)))
            yield rounded.tobytes()


def _encode_packed(
    base: Base,
    names: Sequence[str],
    pooled: Mapping[str, Delta | Replacement],
    report: MergeReport,
) -> Iterator[bytes]:
    """Yield the bytes of weights that stay packed, with the adapter in their biases."""
    for name in names:
        weight = base.tensors[name]
        if not isinstance(weight, UnpackedTensor):
            raise TypeError(name)
        delta = pooled.get(weight.parts[2].name)
        for index, rows, packed in weight.packed_blocks():
            biases: Any = packed.biases
            if delta is not None:
                merged = delta.merge(biases, index, rows)
                report.add(biases, merged, merged.half())
                biases = merged
            yield from tensor_bytes(encode_q4_1(name, weight.grid, packed._replace(biases=biases)))


def _encode_padded(
    base: Base, kind: GGMLQuantizationType, num_missing: int, report: MergeReport
) -> Iterator[bytes]:
    """Yield the per-layer embedding's bytes with a row for every token."""
    # Gemma 3n's has none for media tokens; transformers gives these the first row.
    yield from _encode(base, [_PER_LAYER_EMBEDDING], kind, report)
    _, _, block = next(base.tensors[_PER_LAYER_EMBEDDING].blocks())
    yield encode(_PER_LAYER_EMBEDDING, block[:1].float(), kind).tobytes() * num_missing
