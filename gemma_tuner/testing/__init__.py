"""Tiny models, sample data and stand-ins, for this library's tests and for those of its users."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gemma_tuner.testing.cloud.bigquery.server import BigQueryFault as BigQueryFault
    from gemma_tuner.testing.cloud.bigquery.server import BigQueryServer as BigQueryServer
    from gemma_tuner.testing.cloud.gcs.faults import Fault as Fault
    from gemma_tuner.testing.cloud.gcs.faults import FlipBit as FlipBit
    from gemma_tuner.testing.cloud.gcs.faults import Overwrite as Overwrite
    from gemma_tuner.testing.cloud.gcs.faults import Refuse as Refuse
    from gemma_tuner.testing.cloud.gcs.faults import Reset as Reset
    from gemma_tuner.testing.cloud.gcs.faults import Stall as Stall
    from gemma_tuner.testing.cloud.gcs.faults import Truncate as Truncate
    from gemma_tuner.testing.cloud.gcs.server import GcsServer as GcsServer
    from gemma_tuner.testing.cloud.local_cloud import LocalCloud as LocalCloud
    from gemma_tuner.testing.models.tiny import FAMILIES as FAMILIES
    from gemma_tuner.testing.models.tiny import save_tiny_model as save_tiny_model
    from gemma_tuner.testing.models.tiny import tiny_model as tiny_model
    from gemma_tuner.testing.mps.pretend_device import pretend_mps as pretend_mps
    from gemma_tuner.testing.samples import sample_data as sample_data

_HOME = {
    "BigQueryFault": "cloud.bigquery.server",
    "BigQueryServer": "cloud.bigquery.server",
    "FAMILIES": "models.tiny",
    "Fault": "cloud.gcs.faults",
    "FlipBit": "cloud.gcs.faults",
    "GcsServer": "cloud.gcs.server",
    "LocalCloud": "cloud.local_cloud",
    "Overwrite": "cloud.gcs.faults",
    "Refuse": "cloud.gcs.faults",
    "Reset": "cloud.gcs.faults",
    "Stall": "cloud.gcs.faults",
    "Truncate": "cloud.gcs.faults",
    "pretend_mps": "mps.pretend_device",
    "sample_data": "samples",
    "save_tiny_model": "models.tiny",
    "tiny_model": "models.tiny",
}

__all__ = sorted(_HOME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'gemma_tuner.testing' has no attribute {name!r}")
    return getattr(importlib.import_module(f"gemma_tuner.testing.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
