"""The identity of a model: its description in a saved run, a release's hash, a portable name."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from gemma_tuner.errors import ConfigError
from gemma_tuner.models.few_bits.layers import PackedLayer

# In every family, loaded with towers or without, and trained by no adapter; also under the names
# that other programs have for them.
_DECODER_NORMS = re.compile(
    r"(model\.)?(language_model\.)?(model\.)?(layers\.\d+\.\w*layernorm\.weight)"
)

# Of a packed weight, for its fingerprint.
_HASHED_NUMBERS = 256
# Who wrote a config, where it came from and how the model is run, rather than what it is. Keys
# that begin with an underscore are of the same kind.
_NOT_STRUCTURE = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_version",
    "revision",
    "transformers_version",
    "use_cache",
}


def describe_model(model: PeftModel) -> dict[str, Any]:
    """Describe, as JSON, all that must be equal for a saved run to continue on a model."""
    base = cast(PreTrainedModel, model.get_base_model())
    base_config = json.loads(base.config.to_json_string(use_diff=False))
    lora = {
        name: sorted(value) if isinstance(value, set) else value
        for name, value in model.peft_config[active_adapter(model)].to_dict().items()
    }
    packed = _hash_packed(model)
    return {
        "model_type": base_config["model_type"],  # first to be named where it differs
        "base": _structure(base_config),
        "base_norms_sha256": _hash_norms(model),
        **({"base_packed_sha256": packed} if packed else {}),
        "lora": _structure(json.loads(json.dumps(lora))),
        "trainable": {
            name: list(p.shape) for name, p in model.named_parameters() if p.requires_grad
        },
    }


def active_adapter(model: PeftModel) -> str:
    """Name the adapter of a model that is trained, saved and exported: the active one."""
    active = list(model.active_adapters)
    if len(active) != 1:
        raise ConfigError(
            f"{len(active)} adapters of the model are active ({', '.join(active) or 'none'}); "
            "choose the one that is meant: model.set_adapter(NAME)"
        )
    return active[0]


def hash_decoder_norms(names: Iterable[str], read: Callable[[str], Tensor]) -> str:
    """Fingerprint a release: a few small tensors tell it from another of the same shapes."""
    # Returns: SHA-256, the same for a checkpoint in bfloat16 and in float32.
    digest = hashlib.sha256()
    norms = {match[4]: name for name in names if (match := _DECODER_NORMS.fullmatch(name))}
    for short_name, name in sorted(norms.items()):
        digest.update(short_name.encode())
        rounded = read(name).detach().to("cpu", torch.bfloat16)
        digest.update(rounded.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def portable_name(name: str | None) -> str | None:
    """A model's name without the user's folders."""
    # google/gemma-4-E2B-it stays; so does the Hub's name in a path of its cache
    # (.../models--google--gemma-4-E2B-it/snapshots/8f3); /home/ada/my-gemma becomes my-gemma.
    if not name:
        return name
    if cached := re.search(r"models--([\w.-]+?)--([\w.-]+)", name):
        return f"{cached[1]}/{cached[2]}"
    if re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) and not Path(name).exists():
        return name
    return Path(name).resolve().name


def find_commit(path: Path) -> str | None:
    """The commit of a model, by a path of the Hub's cache."""
    found = re.search(r"/models--[^/]+/snapshots/([0-9a-f]{40})(/|$)", path.as_posix())
    return found[1] if found else None


def _structure(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _structure(value) if isinstance(value, Mapping) else value
        for name, value in config.items()
        if name not in _NOT_STRUCTURE and not name.startswith("_")
    }


def _hash_packed(model: PeftModel) -> str | None:
    """SHA-256 of a little of each packed weight, which tells how it was packed; None without."""
    digest, is_packed = hashlib.sha256(), False
    for name, module in model.named_modules():
        for part, buffer in module.named_buffers(recurse=False):
            if isinstance(module, PackedLayer):
                is_packed = True
                digest.update(f"{name}.{part}".encode())
                some = buffer.flatten()[:_HASHED_NUMBERS].to("cpu", torch.float32)
                digest.update(some.numpy().tobytes())
    return digest.hexdigest() if is_packed else None


def _hash_norms(model: PeftModel) -> str:
    """SHA-256 of the frozen vectors: small, and in memory whatever the plan for the matrices."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if parameter.ndim <= 1 and not parameter.requires_grad:
            digest.update(name.encode())
            digest.update(parameter.detach().to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()
