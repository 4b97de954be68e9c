"""Formats of checkpoints that other programs quantised: which are packed, and which refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn

from gemma_tuner.errors import CheckpointError
from gemma_tuner.models.identity import portable_name

Format = Literal["MLX", "compressed-tensors", "GGUF"]

_SIZE = re.compile(r"gemma-?(4|3n)[-_]?(e2b|e4b|12b|26b-a4b|31b)", re.IGNORECASE)


def find_format(config: Mapping[str, Any], folder: Path) -> Format | None:
    """Tell which program quantised a checkpoint; None where ``load_model`` reads it as it is."""
    # folder: Where it lies, or its name on the Hub, of which GGUF is not recognised.
    # Returns: A format that ``pack`` takes without rounding anew; what is not taken is refused.
    of_mlx = config.get("quantization")
    settings = of_mlx or config.get("quantization_config")
    if settings is None:
        has_gguf = any(folder.glob("*.gguf")) and not any(folder.glob("*.safetensors"))
        return "GGUF" if has_gguf else None
    if not isinstance(settings, Mapping):
        refuse_format(folder, str(settings))
    method = settings.get("quant_method")
    if method == "compressed-tensors":
        if settings.get("format") != "pack-quantized":
            refuse_format(folder, f"compressed-tensors {settings.get('format')}")
        return "compressed-tensors"
    if method is not None or not {"bits", "group_size"} & settings.keys():
        if settings.get("load_in_4bit"):
            method = f"{method} {settings.get('bnb_4bit_quant_type', '4 bits')}"
        refuse_format(folder, str(method))
    if settings.get("mode", "affine") != "affine":
        refuse_format(folder, str(settings["mode"]))
    return "MLX"


def refuse_format(folder: Path, what: str) -> NoReturn:
    """Refuse a way to quantise, with the checkpoint to use instead."""
    name = portable_name(str(folder)) or ""
    size = _SIZE.search(name)
    if size is None:
        instead = "google/gemma-4-SIZE-it-qat-q4_0-unquantized (SIZE as E2B or 12B)"
    elif size[1].lower() == "3n":
        instead = f"google/gemma-3n-{size[2].upper()}-it"
    else:
        instead = f"google/gemma-4-{size[2].upper()}-it-qat-q4_0-unquantized"
    raise CheckpointError(
        f"{name} is quantised as {what!r}, which cannot be trained on here; use {instead} and "
        "gt.pack, the bfloat16 checkpoint that it was made from, or MLX's in 4 or 8 bits"
    )
