"""The protocol that ``SampleGenerations`` fulfils, and when a trainer calls it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from gemma_tuner.device import is_out_of_memory
from gemma_tuner.training.micro_batches import free
from gemma_tuner.training.reporting.reports import Reports


class Samples(Protocol):
    """Answers to a few questions at intervals; ``SampleGenerations`` is what there is."""

    def begin(self, folder: str | Path, step: int) -> None:
        """Get ready to write into a run's folder, where so many steps are done."""
        ...

    def is_due(self, step: int, total_steps: int) -> bool:
        """Whether answers are wanted after a step."""
        ...

    def write(self, model: Any, step: int) -> Sequence[object]:
        """Answer, and write the answers."""
        ...


def take_samples(
    samples: Samples, model: Any, step: int, device: torch.device, reports: Reports
) -> None:
    """Answer the questions; where there is no memory for that, the run goes on without."""
    reports.note(step, "sampling")
    try:
        samples.write(model, step)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    else:
        return
    free(device)
    reports.event(step, "samples_skipped", "out of memory: sample answers were left out this time")
