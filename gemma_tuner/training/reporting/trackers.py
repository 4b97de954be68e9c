"""Experiment trackers (TensorBoard, Weights & Biases, MLflow, ...), through accelerate.

They get numbers and settings: no text of the data, no path, no name of a machine's folder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import LoggerType

from gemma_tuner.errors import ConfigError
from gemma_tuner.training.config import TrainConfig
from gemma_tuner.training.reporting.metrics import EvalRecord, StepRecord

_STEP_VALUES = (
    *("loss", "learning_rate", "grad_norm", "tokens", "target_tokens", "tokens_per_second"),
    *("target_tokens_per_second", "data_wait_seconds", "memory_bytes", "skipped_steps", "epoch"),
)
_EVAL_VALUES = ("loss", "perplexity")


class Trackers:
    """Send a run's numbers to the trackers that its settings name.

    Raises:
        ConfigError: A tracker that is not installed.
    """

    def __init__(self, config: TrainConfig, device: torch.device, step: int) -> None:
        names = list(config.trackers)
        self._accelerator = Accelerator(
            cpu=device.type == "cpu",
            log_with=[LoggerType(name) for name in names],
            project_dir=str(Path(config.output_dir)),
        )
        # accelerate passes over what is not installed without a word.
        opened = [str(tracker) for tracker in self._accelerator.log_with]
        if lacking := [name for name in names if name not in opened]:
            raise ConfigError(
                f"the tracker {lacking[0]!r} is not installed here; `pip install {lacking[0]}`, "
                "or leave it out of trackers"
            )
        # What a stopped run logged beyond the step it resumes from would be drawn twice.
        options = {"tensorboard": {"purge_step": step + 1}} if "tensorboard" in names else {}
        self._accelerator.init_trackers(
            "gemma_tuner", config=_list_settings(config), init_kwargs=options
        )

    def step(self, record: StepRecord) -> None:
        """Send a step's record."""
        self._log("train", _STEP_VALUES, dataclasses.asdict(record))

    def evaluation(self, record: EvalRecord) -> None:
        """Send a held-out loss."""
        self._log("held_out", _EVAL_VALUES, dataclasses.asdict(record))

    def close(self) -> None:
        """Write what is not yet written."""
        for tracker in self._accelerator.trackers:
            tracker.finish()
        self._accelerator.trackers = []

    def _log(self, group: str, names: tuple[str, ...], record: Mapping[str, Any]) -> None:
        values = {f"{group}/{name}": record[name] for name in names}
        self._accelerator.log(values, step=record["step"])


def _list_settings(config: TrainConfig) -> dict[str, Any]:
    """The settings as trackers take them: numbers, switches and words."""
    settings = {k: v for k, v in config.to_dict().items() if k != "output_dir" and v is not None}
    return {k: v if isinstance(v, int | float | str) else str(v) for k, v in settings.items()}
