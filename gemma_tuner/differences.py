"""What differs between what was saved and what is here, in a few words."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

_NUM_TOLD = 3
_SHOWN_CHARACTERS = 40
_DIGEST = re.compile(r"[0-9a-f]{16,}")
_NAMES = {
    "base_norms_sha256": "fingerprint of the base's weights",
    "base_packed_sha256": "fingerprint of the base's packed weights",
    "fingerprint": "fingerprint of the data",
}


def list_differences(saved: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Name every value in which two nested mappings differ: ``lora.r: 16 → 8``."""
    left, right = _flatten(saved), _flatten(here)
    return [
        f"{_NAMES.get(name, name)}: {_show(left, name)} → {_show(right, name)}"
        for name in {**left, **right}
        if name not in left or name not in right or left[name] != right[name]
    ]


def shorten_differences(differences: Sequence[str]) -> str:
    """Make a part of a sentence of however many differences: three, and the number of others."""
    # The least nested tell most: the model's type before the shape of its hundredth matrix.
    told = sorted(differences, key=lambda line: line.partition(":")[0].count("."))[:_NUM_TOLD]
    num_more = len(differences) - len(told)
    return "; ".join([*told, *([f"and {num_more} more"] if num_more else [])])


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _show(flat: Mapping[str, Any], name: str) -> str:
    text = str(flat.get(name, "nothing"))
    if _DIGEST.fullmatch(text):
        return f"{text[:8]}…"
    if len(text) <= _SHOWN_CHARACTERS:
        return text
    return f"{text[:_SHOWN_CHARACTERS]}… ({len(text)} characters)"
