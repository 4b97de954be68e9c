"""Fine-tune Gemma 4 and Gemma 3n with LoRA on your own machine.

Importing this package does nothing but name its parts: each public name is imported when first
used (PEP 562), so ``import gemma_tuner`` needs neither torch nor a second.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gemma_tuner import testing as testing
    from gemma_tuner.batch import Batch as Batch
    from gemma_tuner.checkpoints.loading import load_model as load_model
    from gemma_tuner.checkpoints.mlx import from_mlx as from_mlx
    from gemma_tuner.checkpoints.mlx import to_mlx as to_mlx
    from gemma_tuner.checkpoints.packing import pack as pack
    from gemma_tuner.collators.audio import AudioCollator as AudioCollator
    from gemma_tuner.collators.image import ImageCollator as ImageCollator
    from gemma_tuner.collators.multimodal import MultimodalCollator as MultimodalCollator
    from gemma_tuner.collators.text import TextCollator as TextCollator
    from gemma_tuner.errors import CheckpointError as CheckpointError
    from gemma_tuner.errors import ConfigError as ConfigError
    from gemma_tuner.errors import DataError as DataError
    from gemma_tuner.errors import DivergedError as DivergedError
    from gemma_tuner.errors import GemmaTunerError as GemmaTunerError
    from gemma_tuner.errors import MemoryPlanError as MemoryPlanError
    from gemma_tuner.errors import ProcessError as ProcessError
    from gemma_tuner.errors import ResumeError as ResumeError
    from gemma_tuner.errors import SourceError as SourceError
    from gemma_tuner.evaluation.answers import Generation as Generation
    from gemma_tuner.evaluation.evaluate import evaluate as evaluate
    from gemma_tuner.evaluation.generation import generate as generate
    from gemma_tuner.evaluation.generation import generate_stream as generate_stream
    from gemma_tuner.evaluation.report import Report as Report
    from gemma_tuner.evaluation.samples import SampleGenerations as SampleGenerations
    from gemma_tuner.evaluation.scores import Score as Score
    from gemma_tuner.export.adapter import export_adapter as export_adapter
    from gemma_tuner.export.adapter import push_to_hub as push_to_hub
    from gemma_tuner.export.gguf import export_gguf as export_gguf
    from gemma_tuner.export.gguf import export_gguf_adapter as export_gguf_adapter
    from gemma_tuner.export.merged import export_merged as export_merged
    from gemma_tuner.export.mlx import export_mlx as export_mlx
    from gemma_tuner.export.mlx import import_mlx as import_mlx
    from gemma_tuner.models.lora import add_lora as add_lora
    from gemma_tuner.models.lora_config import LoraConfig as LoraConfig
    from gemma_tuner.planning.plan import Plan as Plan
    from gemma_tuner.planning.plan import plan as plan
    from gemma_tuner.records import Audio as Audio
    from gemma_tuner.records import Example as Example
    from gemma_tuner.records import Image as Image
    from gemma_tuner.records import Text as Text
    from gemma_tuner.records import Turn as Turn
    from gemma_tuner.storage.config import FetchConfig as FetchConfig
    from gemma_tuner.streaming.mixing import mix as mix
    from gemma_tuner.streaming.opening import stream_bigquery as stream_bigquery
    from gemma_tuner.streaming.opening import stream_gcs as stream_gcs
    from gemma_tuner.streaming.opening import stream_hub as stream_hub
    from gemma_tuner.streaming.opening import stream_local as stream_local
    from gemma_tuner.streaming.opening import stream_rows as stream_rows
    from gemma_tuner.streaming.stream import ExampleStream as ExampleStream
    from gemma_tuner.training.adapters import load_adapter as load_adapter
    from gemma_tuner.training.config import TrainConfig as TrainConfig
    from gemma_tuner.training.feed import Stream as Stream
    from gemma_tuner.training.trainer import Trainer as Trainer

__version__ = "0.1.0"

_HOME = {
    "Audio": "records",
    "AudioCollator": "collators.audio",
    "Batch": "batch",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "DataError": "errors",
    "DivergedError": "errors",
    "Example": "records",
    "ExampleStream": "streaming.stream",
    "FetchConfig": "storage.config",
    "GemmaTunerError": "errors",
    "Generation": "evaluation.answers",
    "Image": "records",
    "ImageCollator": "collators.image",
    "LoraConfig": "models.lora_config",
    "MemoryPlanError": "errors",
    "MultimodalCollator": "collators.multimodal",
    "Plan": "planning.plan",
    "ProcessError": "errors",
    "Report": "evaluation.report",
    "ResumeError": "errors",
    "SampleGenerations": "evaluation.samples",
    "Score": "evaluation.scores",
    "SourceError": "errors",
    "Stream": "training.feed",
    "Text": "records",
    "TextCollator": "collators.text",
    "TrainConfig": "training.config",
    "Trainer": "training.trainer",
    "Turn": "records",
    "add_lora": "models.lora",
    "evaluate": "evaluation.evaluate",
    "export_adapter": "export.adapter",
    "export_gguf": "export.gguf",
    "export_gguf_adapter": "export.gguf",
    "export_merged": "export.merged",
    "export_mlx": "export.mlx",
    "from_mlx": "checkpoints.mlx",
    "generate": "evaluation.generation",
    "generate_stream": "evaluation.generation",
    "import_mlx": "export.mlx",
    "load_adapter": "training.adapters",
    "load_model": "checkpoints.loading",
    "mix": "streaming.mixing",
    "pack": "checkpoints.packing",
    "plan": "planning.plan",
    "push_to_hub": "export.adapter",
    "stream_bigquery": "streaming.opening",
    "stream_gcs": "streaming.opening",
    "stream_hub": "streaming.opening",
    "stream_local": "streaming.opening",
    "stream_rows": "streaming.opening",
    "to_mlx": "checkpoints.mlx",
}

__all__ = [*sorted(_HOME), "testing"]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name == "testing":
        return importlib.import_module("gemma_tuner.testing")
    if name not in _HOME:
        suggest = importlib.import_module("gemma_tuner.checks").suggest
        hint = suggest(name, __all__, "; did you mean {!r}?")
        raise AttributeError(f"module 'gemma_tuner' has no attribute {name!r}{hint}")
    return getattr(importlib.import_module(f"gemma_tuner.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
