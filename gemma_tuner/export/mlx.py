"""LoRA adapters from PEFT to mlx-lm and mlx-vlm and back.

MLX multiplies from the right, so its matrices are PEFT's transposed: ``lora_a [in, rank]``,
``lora_b [rank, out]``, DoRA's ``m [out]``; experts have ``lora_a [experts, rank, in]`` and
``lora_b [experts, out, rank]``, with gate and up apart. An MLX adapter has one rank and one scale:
smaller adapters are padded with zeros, which changes nothing, and a different scale goes into
``lora_b``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad

from gemma_tuner.checkpoints.folders import new_folder
from gemma_tuner.checkpoints.mlx_names import Program, check_program, mlx_name, transformers_name
from gemma_tuner.checkpoints.weights import list_tensors, read_file, read_json
from gemma_tuner.checks import check_path
from gemma_tuner.errors import CheckpointError, ConfigError
from gemma_tuner.export.bases import Base, check_fits, find_base, open_base
from gemma_tuner.export.deltas import (
    Adapter,
    Delta,
    collect_deltas,
    read_adapter,
)
from gemma_tuner.log import announce
from gemma_tuner.models.adapter_files import (
    CONFIG,
    MLX_WEIGHTS,
    WEIGHTS,
    read_trained_with,
    write_json,
    write_trained_with,
)
from gemma_tuner.models.adapter_names import PREFIX, pin_config, rank_and_scale
from gemma_tuner.models.families import family_of_type
from gemma_tuner.models.identity import portable_name

_GATE, _UP = "experts.switch_glu.gate_proj", "experts.switch_glu.up_proj"


def export_mlx(
    adapter: str | Path,
    path: str | Path,
    *,
    program: Program = "mlx-lm",
    base: str | Path | None = None,
    revision: str | None = None,
) -> Path:
    """Write a PEFT adapter as one that MLX loads: ``mlx_lm.generate --adapter-path PATH``.

    Args:
        adapter: The adapter's folder (PEFT).
        path: The new folder.
        program: ``mlx-lm``, which has the language model alone, or ``mlx-vlm``.
        base: The base's folder, or its name on the Hub if it is in the local cache; by default
            the one that the adapter names.
        revision: Of the base on the Hub; by default the adapter's.

    Returns:
        The folder. It also keeps PEFT's settings, for :func:`import_mlx`.

    Raises:
        ConfigError: An unknown program, or one that cannot run this adapter.
        CheckpointError: The adapter is for another base, the folder exists already or cannot be
            written.
    """
    check_program(program)
    read = read_adapter(adapter)
    found = open_base(read, base, revision)
    if program == "mlx-vlm":
        _announce_faults(found)
    if read.grid:
        announce(
            f"the adapter was trained on {portable_name(read.base)} packed as {read.grid}, and is "
            "written to lie beside it: on a base in other bits MLX runs another model. Fusing and "
            "quantising anew to 4 bits undoes most of a short run"
        )
    found.require_tied("MLX")
    deltas = found.require_lora("MLX")
    rank = max(delta.rank for delta in deltas)
    scale = max(delta.scale for delta in deltas)
    tensors: dict[str, Tensor] = {}
    for delta in deltas:
        tensors |= _to_mlx(delta, found.model_type, program, rank, scale)
    keys = sorted({name.rpartition(".")[0] for name in tensors})
    model = portable_name(read.base)
    settings = {
        "fine_tune_type": "dora" if read.config.get("use_dora") else "lora",
        "num_layers": -1,  # all; keys say which
        "lora_parameters": {
            "rank": rank,
            "scale": scale,
            "dropout": read.config.get("lora_dropout", 0.0),
            "keys": keys,
        },
        "model": model,
        "peft_config": {**_name_fully(read, found), "base_model_name_or_path": model},
    }
    with new_folder(path, sum(tensor.nbytes for tensor in tensors.values())) as temporary:
        save_file(tensors, temporary / MLX_WEIGHTS, metadata={"format": "mlx"})
        write_json(temporary / CONFIG, settings)
        if read.trained:
            write_trained_with(temporary, read.trained)
    return Path(path)


def _name_fully(adapter: Adapter, base: Base) -> Mapping[str, Any]:
    """PEFT's settings by the names of the class with all parts."""
    if adapter.deltas.keys() == {delta.name for delta in base.deltas.values()}:
        return adapter.config
    paths = [
        name.removesuffix(".weight")
        if name.endswith(".weight")
        else _wrapper_path(adapter.config, name)
        for name in adapter.deltas
    ]
    keys = [f"{PREFIX}{path}.lora_A.weight" for path in paths]
    return pin_config(adapter.config, keys, family_of_type(base.model_type))


def _announce_faults(base: Base) -> None:
    """Say what mlx-vlm cannot do, or does wrongly, with this base."""
    if base.model_type == "gemma4" and base.config.get("audio_config"):
        announce(
            "mlx-vlm up to 0.7.10 cannot load adapters into a Gemma 4 that hears (it fails with "
            "'_no_grad'); if yours cannot, use export_merged"
        )
    if base.model_type == "gemma3n":
        announce(
            "mlx-vlm 0.7.10 computes Gemma 3n wrongly, with adapters or without (it does not "
            "scale the embeddings of text, and rotates the queries of layers that share keys by "
            "wrong positions); for text use program='mlx-lm'"
        )


def _to_mlx(
    delta: Delta, model_type: str, program: Program, rank: int, scale: float
) -> dict[str, Tensor]:
    module = mlx_name(delta.module, model_type, program)
    b = delta.b if delta.scale == scale else delta.b * (delta.scale / scale)
    missing = rank - delta.rank
    if delta.parameter == "weight":
        tensors = {
            f"{module}.lora_a": pad(delta.a, (0, 0, 0, missing)).T.contiguous(),
            f"{module}.lora_b": pad(b, (0, missing)).T.contiguous(),
        }
        if delta.magnitude is not None:
            tensors[f"{module}.m"] = delta.magnitude
        return tensors
    if program == "mlx-vlm":
        raise ConfigError(
            f"the adapter is on the experts ({delta.name}), to which mlx-vlm cannot add adapters; "
            "use program='mlx-lm', or export_merged"
        )
    a, b = dataclasses.replace(delta, b=b).split_experts()
    a, b = pad(a, (0, 0, 0, missing)), pad(b, (0, missing))
    if delta.parameter == "down_proj":
        parts = {"down_proj": b}
    else:
        gate, up = b.chunk(2, dim=1)
        parts = {"gate_proj": gate, "up_proj": up}
    # Tensors of one file may not share memory.
    return {
        f"{module}.switch_glu.{name}.{kind}": tensor.clone(memory_format=torch.contiguous_format)
        for name, part in parts.items()
        for kind, tensor in (("lora_a", a), ("lora_b", part))
    }


def import_mlx(
    adapter: str | Path,
    path: str | Path,
    *,
    base: str | Path | None = None,
    revision: str | None = None,
) -> Path:
    """Write an adapter of mlx-lm or mlx-vlm as a standard PEFT folder.

    Args:
        adapter: The MLX adapter's folder.
        path: The new folder.
        base: The transformers checkpoint that it belongs to: a folder, or a name on the Hub that
            is in the local cache; by default the model that the adapter names.
        revision: Of the base on the Hub.

    Returns:
        The folder, which ``peft.PeftModel.from_pretrained`` opens. Of an adapter that
        :func:`export_mlx` wrote, every tensor is as it was, bit for bit, unless it had to be
        scaled by other than a power of two.

    Raises:
        CheckpointError: The adapter is damaged, of a kind that PEFT does not have, or for another
            base; the folder exists already or cannot be written.
    """
    check_path("adapter", adapter)
    folder = Path(adapter)
    name = folder.resolve().name
    mlx_config = read_json(folder / CONFIG)
    parameters = mlx_config.get("lora_parameters")
    if mlx_config.get("fine_tune_type", "lora") not in ("lora", "dora") or parameters is None:
        raise CheckpointError(
            f"{name} holds no LoRA adapter of mlx-lm or mlx-vlm 0.6 and newer (fine_tune_type is "
            f"{mlx_config.get('fine_tune_type')!r}); train it with fine_tune_type lora or dora"
        )
    stored = read_file(folder / MLX_WEIGHTS)
    config = mlx_config.get("peft_config")
    named = Adapter(config or {"base_model_name_or_path": mlx_config.get("model")}, {}, None)
    checkpoint = find_base(named, base, revision)
    model_type = str(read_json(checkpoint / "config.json").get("model_type"))
    modules = _group(name, stored, model_type)
    if config is None:
        config = _make_config(mlx_config, modules)
    config["base_model_name_or_path"] = portable_name(named.base)
    tensors: dict[str, Tensor] = {}
    for module, parts in modules.items():
        tensors |= _from_mlx(config, module, parts, parameters["scale"])
    read = Adapter(config, collect_deltas(name, config, tensors), None)
    check_fits(read, list_tensors(checkpoint), checkpoint, model_type)
    with new_folder(path, sum(tensor.nbytes for tensor in tensors.values())) as temporary:
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        write_json(temporary / CONFIG, config)
        if known := read_trained_with(folder):
            write_trained_with(temporary, known)
    announce(f"{name}: {len(modules)} adapters read from MLX")
    return Path(path)


def _group(
    name: str, stored: Mapping[str, Tensor], model_type: str
) -> dict[str, dict[str, Tensor]]:
    """Collect an MLX adapter's tensors by the module or expert parameter in transformers."""
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in stored.items():
        module, _, kind = key.rpartition(".")
        if kind not in ("lora_a", "lora_b", "m"):
            raise CheckpointError(
                f"{name} holds {key}, which is no LoRA or DoRA tensor of mlx-lm or of mlx-vlm 0.6 "
                "and newer; save the adapter again with one of these"
            )
        modules.setdefault(transformers_name(module, model_type), {})[kind] = tensor
    for module, parts in modules.items():
        if not {"lora_a", "lora_b"} <= parts.keys():
            raise CheckpointError(f"{name} lacks one half of its adapter on {module}")
    return _join_experts(name, modules)


def _join_experts(
    name: str, modules: Mapping[str, dict[str, Tensor]]
) -> dict[str, dict[str, Tensor]]:
    """Put gate and up of experts together, as transformers holds both in one parameter."""
    joined: dict[str, dict[str, Tensor]] = {}
    for module, parts in modules.items():
        if module.endswith(_UP):
            if module.replace(_UP, _GATE) not in modules:
                raise CheckpointError(
                    f"{name} has an adapter on {module} and none on its gate; PEFT adapts both "
                    "together"
                )
        elif module.endswith(_GATE):
            up = modules.get(module.replace(_GATE, _UP))
            if up is None or not torch.equal(up["lora_a"], parts["lora_a"]):
                raise CheckpointError(
                    f"{name} has adapters of their own on gate and up of {module}; PEFT adapts "
                    "both by one, so this adapter cannot be carried over"
                )
            joined[module.replace(_GATE, "experts.gate_up_proj")] = {
                "lora_a": parts["lora_a"],
                "lora_b": torch.cat([parts["lora_b"], up["lora_b"]], dim=1),
            }
        else:
            joined[module.replace("experts.switch_glu.", "experts.")] = parts
    return joined


def _make_config(mlx_config: Mapping[str, Any], modules: Iterable[str]) -> dict[str, Any]:
    """PEFT's settings for an adapter that MLX trained."""
    parameters = mlx_config["lora_parameters"]
    experts = sorted(name for name in modules if ".experts." in name)
    config = peft.LoraConfig(
        r=parameters["rank"],
        lora_alpha=parameters["scale"] * parameters["rank"],
        lora_dropout=parameters.get("dropout", 0.0),
        target_modules=sorted(set(modules) - set(experts)),
        target_parameters=experts or None,
        use_dora=mlx_config.get("fine_tune_type") == "dora",
        task_type="CAUSAL_LM",
        inference_mode=True,
    ).to_dict()
    return {
        name: sorted(value) if isinstance(value, set) else value for name, value in config.items()
    }


def _from_mlx(
    config: Mapping[str, Any], name: str, parts: Mapping[str, Tensor], scale: float
) -> dict[str, Tensor]:
    rank, own_scale = rank_and_scale(config, name)
    a, b = parts["lora_a"], parts["lora_b"]
    if own_scale != scale:
        b = b / (own_scale / scale)
    if a.ndim == 2:
        path = f"{PREFIX}{name}"
        tensors = {"lora_A.weight": a.T[:rank], "lora_B.weight": b.T[:, :rank]}
        if "m" in parts:
            tensors["lora_magnitude_vector"] = parts["m"]
    else:
        path = PREFIX + _wrapper_path(config, name)
        tensors = {
            "lora_A.weight": a[:, :rank].reshape(-1, a.shape[-1]),
            "lora_B.weight": b[:, :, :rank].permute(1, 2, 0).reshape(b.shape[1], -1),
        }
    return {f"{path}.{kind}": tensor.contiguous() for kind, tensor in tensors.items()}


def _wrapper_path(config: Mapping[str, Any], name: str) -> str:
    """Where PEFT keeps the adapter of an expert parameter: gate_up_proj is inside down_proj."""
    module, _, parameter = name.rpartition(".")
    others = config.get("target_parameters") or ()
    is_inside = parameter == "gate_up_proj" and any(
        f".{module}.down_proj".endswith(f".{other}") for other in others
    )
    return f"{module}.base_layer" if is_inside else module
