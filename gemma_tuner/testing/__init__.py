"""Tiny models, sample data and stand-ins, for this library's tests and for those of its users."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gemma_tuner.testing.samples import sample_data as sample_data
    from gemma_tuner.testing.tiny import FAMILIES as FAMILIES
    from gemma_tuner.testing.tiny import tiny_model as tiny_model

_HOME = {"FAMILIES": "tiny", "sample_data": "samples", "tiny_model": "tiny"}

__all__ = sorted(_HOME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'gemma_tuner.testing' has no attribute {name!r}")
    return getattr(importlib.import_module(f"gemma_tuner.testing.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
