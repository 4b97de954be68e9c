"""A PEFT adapter, read from its folder as deltas of named weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemma_tuner.checkpoints.weights import read_file, read_json
from gemma_tuner.checks import check_path
from gemma_tuner.errors import CheckpointError
from gemma_tuner.models.adapter_files import (
    CONFIG,
    QALORA,
    WEIGHTS,
    TrainedWith,
    read_fingerprint,
    read_trained_with,
)
from gemma_tuner.models.adapter_names import (
    BASE_COPY,
    PREFIX,
    find_saved_module,
    find_unsupported,
    rank_and_scale,
    split_parameter,
)
from gemma_tuner.models.lora_linear import spread_groups


@dataclass(frozen=True, slots=True)
class Delta:
    """What an adapter adds to one weight: ``scale * b @ a``."""

    module: str  # such as model.language_model.layers.0.mlp.up_proj
    parameter: str  # weight, or a parameter that holds all experts, such as gate_up_proj
    # All float32. Experts lie one after another in a, side by side within each rank in b.
    a: Tensor  # [rank, in]; for experts [experts * rank, in]
    b: Tensor  # [out, rank]; for experts [out, rank * experts]
    magnitude: Tensor | None  # DoRA's, [out]
    rank: int  # of one expert
    scale: float

    @property
    def name(self) -> str:
        """The full name of the adapted weight."""
        return f"{self.module}.{self.parameter}"

    @property
    def num_experts(self) -> int:
        """How many matrices the adapted parameter holds; 1 for a linear layer."""
        return self.a.shape[0] // self.rank

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight that this fits."""
        matrix = (self.b.shape[0], self.a.shape[1])
        return matrix if self.parameter == "weight" else (self.num_experts, *matrix)

    def split_experts(self) -> tuple[Tensor, Tensor]:
        """Return ``a [experts, rank, in]`` and ``b [experts, out, rank]``."""
        # Source: ``ParamWrapper.get_delta_weight`` of PEFT 0.21.
        count = self.num_experts
        return (
            self.a.reshape(count, self.rank, -1),
            self.b.reshape(-1, self.rank, count).permute(2, 0, 1),
        )

    def pool(self, group: int) -> Delta:
        """What is added to the bias of each group, where it is the same for all of the group."""
        return replace(self, a=self.a[:, ::group])

    def merge(self, weight: Tensor, index: int, rows: slice) -> Tensor:
        """Merge some rows of one matrix, ``[rows, in]``, and do not round them."""
        # Source: ``DoraLinearVariant.merge_safe`` of PEFT 0.21.
        a, b = self.split_experts() if self.parameter != "weight" else (self.a[None], self.b[None])
        # Rounding is to be all the error there is. float64 changes nothing of what two bytes can
        # hold, and takes four times as long.
        dtype = torch.float32 if weight.dtype.itemsize == 2 else torch.float64
        factors = b[index, rows].to(dtype), a[index].to(dtype)
        merged = torch.addmm(weight.to(dtype), *factors, alpha=self.scale)
        if self.magnitude is not None:
            merged *= (self.magnitude[rows] / torch.linalg.norm(merged, dim=1))[:, None]
        return merged


@dataclass(frozen=True, slots=True)
class Replacement:
    """A weight that was trained itself (``LoraConfig(variant="full")``, ``modules_to_save``)."""

    name: str  # full, with the parameter's own at its end
    weight: Tensor  # of any shape, float32

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight that this replaces."""
        return tuple(self.weight.shape)

    def merge(self, weight: Tensor, index: int, rows: slice) -> Tensor:
        """Give some trained rows, ``[rows, in]`` float32, in place of those in ``weight``."""
        if self.weight.ndim == 3:
            return self.weight[index, rows]
        return self.weight[rows] if self.weight.ndim else self.weight


@dataclass(frozen=True, slots=True)
class Adapter:
    """A PEFT LoRA adapter as it lies in its folder."""

    config: Mapping[str, Any]  # adapter_config.json
    deltas: Mapping[str, Delta | Replacement]  # by the full name of the weight
    norms_sha256: str | None  # of the base's norms, see hash_decoder_norms
    trained: TrainedWith | None = None
    grid: str | None = None  # of the base's packed weights, see name_grids

    @property
    def group(self) -> int | None:
        """Of inputs that are seen as one, in QA-LoRA."""
        return self.config["qalora_group_size"] if self.config.get("use_qalora") else None

    @property
    def base(self) -> str | None:
        """The base model's name on the Hub, or its folder's last name."""
        return self.config.get("base_model_name_or_path")

    @property
    def revision(self) -> str | None:
        """The base's commit, where it is known."""
        return self.config.get("revision")


def read_adapter(path: str | Path) -> Adapter:
    """Read a PEFT LoRA adapter into memory, as float32."""
    check_path("adapter", path)
    folder = Path(path)
    name = folder.resolve().name
    if not (folder / CONFIG).is_file():
        raise CheckpointError(
            f"{name} holds no adapter ({CONFIG} is not there); give the folder that Trainer.save "
            "or save_pretrained wrote"
        )
    config = read_json(folder / CONFIG)
    known = read_fingerprint(folder)
    _check_config(name, {**config, "use_qalora": False} if QALORA in known else config)
    tensors = read_file(folder / WEIGHTS)
    tensors = {key: tensor for key, tensor in tensors.items() if not key.endswith(BASE_COPY)}
    deltas = collect_deltas(name, config, tensors)
    norms, grid = known.get("base_norms_sha256"), known.get("grid")
    return Adapter(config, deltas, norms, read_trained_with(folder), grid)


def _check_config(name: str, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{name} is a PEFT adapter of type {config.get('peft_type')!r}; only LORA can be "
            "exported"
        )
    if setting := find_unsupported(config):
        raise CheckpointError(
            f"{name} was trained with {setting}, which cannot be exported (the base's weights "
            "change with some); merge it with PEFT itself, or train without it"
        )


def collect_deltas(
    name: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, Delta | Replacement]:
    """Pair the tensors of an adapter."""
    parts: dict[str, dict[str, Tensor]] = {}
    deltas: dict[str, Delta | Replacement] = {}
    suffixes = config.get("modules_to_save") or ()
    saved = {key: find_saved_module(config, key.removeprefix(PREFIX)) or "" for key in tensors}
    if lacking := [m for m in suffixes if not any(path.endswith(m) for path in saved.values())]:
        raise CheckpointError(
            f"{name} has no {lacking[0]}, though its modules_to_save names it; save it again"
        )
    for key, tensor in tensors.items():
        if key.startswith(PREFIX) and saved[key]:
            replacement = Replacement(key.removeprefix(PREFIX), tensor.float())
            deltas[replacement.name] = replacement
            continue
        match = re.fullmatch(
            rf"{re.escape(PREFIX)}(.+)\.(lora_A\.weight|lora_B\.weight|lora_magnitude_vector)", key
        )
        if match is None:
            raise CheckpointError(
                f"{name} holds {key}, which is no LoRA of a linear layer and cannot be exported"
            )
        parts.setdefault(match[1], {})[match[2].split(".")[0]] = tensor.float()
    for path, found in parts.items():
        if not {"lora_A", "lora_B"} <= found.keys():
            raise CheckpointError(f"{name} lacks one half of its adapter on {path}; save it again")
        module, parameter = split_parameter(config, path)
        rank, scale = rank_and_scale(config, f"{module}.{parameter}".removesuffix(".weight"))
        if config.get("use_qalora"):
            found["lora_A"] = spread_groups(found["lora_A"], config["qalora_group_size"])
        delta = Delta(
            module,
            parameter,
            found["lora_A"],
            found["lora_B"],
            found.get("lora_magnitude_vector"),
            rank,
            scale,
        )
        if delta.a.shape[0] != delta.b.shape[1] or delta.a.shape[0] % rank:
            raise CheckpointError(
                f"{name} says rank {rank} for {path}, but its tensors are {list(delta.a.shape)} "
                f"and {list(delta.b.shape)}; save it again"
            )
        deltas[delta.name] = delta
    return deltas
