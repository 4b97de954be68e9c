"""Tiny models, sample data and stand-ins, for this library's tests and for those of its users."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gemma_tuner.testing.bigquery_server import BigQueryFault as BigQueryFault
    from gemma_tuner.testing.bigquery_server import BigQueryServer as BigQueryServer
    from gemma_tuner.testing.gcs_faults import Fault as Fault
    from gemma_tuner.testing.gcs_faults import FlipBit as FlipBit
    from gemma_tuner.testing.gcs_faults import Overwrite as Overwrite
    from gemma_tuner.testing.gcs_faults import Refuse as Refuse
    from gemma_tuner.testing.gcs_faults import Reset as Reset
    from gemma_tuner.testing.gcs_faults import Stall as Stall
    from gemma_tuner.testing.gcs_faults import Truncate as Truncate
    from gemma_tuner.testing.gcs_server import GcsServer as GcsServer
    from gemma_tuner.testing.local_cloud import LocalCloud as LocalCloud
    from gemma_tuner.testing.pretend_device import pretend_mps as pretend_mps
    from gemma_tuner.testing.samples import sample_data as sample_data
    from gemma_tuner.testing.tiny import FAMILIES as FAMILIES
    from gemma_tuner.testing.tiny import save_tiny_model as save_tiny_model
    from gemma_tuner.testing.tiny import tiny_model as tiny_model

_HOME = {
    "BigQueryFault": "bigquery_server",
    "BigQueryServer": "bigquery_server",
    "FAMILIES": "tiny",
    "Fault": "gcs_faults",
    "FlipBit": "gcs_faults",
    "GcsServer": "gcs_server",
    "LocalCloud": "local_cloud",
    "Overwrite": "gcs_faults",
    "Refuse": "gcs_faults",
    "Reset": "gcs_faults",
    "Stall": "gcs_faults",
    "Truncate": "gcs_faults",
    "pretend_mps": "pretend_device",
    "sample_data": "samples",
    "save_tiny_model": "tiny",
    "tiny_model": "tiny",
}

__all__ = sorted(_HOME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'gemma_tuner.testing' has no attribute {name!r}")
    return getattr(importlib.import_module(f"gemma_tuner.testing.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
