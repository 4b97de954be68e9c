"""What a run's held-out losses come to: the best adapter, when to stop, and a sentence on both.

::

    output_dir/best/step-00000040/    the adapter of the lowest held-out loss, as Trainer.save
                                      writes one

An older best one stays as long as a checkpoint that is kept has it as its best: a run that resumes
from there may need it.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gemma_tuner.disk import remove_folder
from gemma_tuner.errors import CheckpointError
from gemma_tuner.log import announce
from gemma_tuner.models.adapter_files import (
    CONFIG,
    copy_adapter,
    save_adapter,
    saving_explained,
)
from gemma_tuner.training.checkpoint import list_checkpoints, read_state
from gemma_tuner.training.config import TrainConfig
from gemma_tuner.training.processes import Processes
from gemma_tuner.training.reporting.metrics import EvalRecord
from gemma_tuner.training.reporting.reports import Reports

if TYPE_CHECKING:
    from peft import PeftModel

FOLDER = "best"
"""Its name in a run's folder."""


@dataclass
class Standing:
    """Where a run stands by its held-out losses; saved in its checkpoints under these names.

    Args:
        step: Optimizer steps done when the lowest finite loss was measured; None before one was.
        loss: That loss, in nats.
        train_loss: The mean of the training losses that were logged on the way to it.
        is_kept: Whether its adapter was written to the run's folder.
        num_since: Evaluations since.
        loss_sum: Of the training losses logged since the last evaluation.
        num_losses: How many those are.
        rise: The sentence that says that the loss has risen since; "" where there is none.
    """

    step: int | None = None
    loss: float | None = None
    train_loss: float | None = None
    is_kept: bool = False
    num_since: int = 0
    loss_sum: float = 0.0
    num_losses: int = 0
    rise: str = ""

    def note_train_loss(self, loss: float) -> None:
        """Count a logged training loss."""
        if math.isfinite(loss):
            self.train_loss = loss if self.train_loss is None else self.train_loss
            self.loss_sum += loss
            self.num_losses += 1

    def note_held_out(self, record: EvalRecord, *, is_last: bool) -> bool:
        """Count a held-out loss; whether it is the lowest."""
        recent = self.loss_sum / self.num_losses if self.num_losses else None
        self.loss_sum, self.num_losses = 0.0, 0
        if math.isfinite(record.loss) and (self.loss is None or record.loss < self.loss):
            self.step, self.loss, self.num_since, self.rise = record.step, record.loss, 0, ""
            self.train_loss = self.train_loss if recent is None else recent
            return True
        self.num_since += 1
        # One loss above the best may be noise, unless it is the one that the run ends with.
        if self.num_since > 1 or is_last:
            self.rise = self._describe_rise(record, recent) or self.rise
        return False

    def _describe_rise(self, record: EvalRecord, recent: float | None) -> str:
        if self.loss is None or self.train_loss is None or recent is None:
            return ""
        if not (record.loss > self.loss and recent < self.train_loss):
            return ""
        return (
            f"the held-out loss has risen from {self.loss:.4f} (step {self.step}) to "
            f"{record.loss:.4f} (step {record.step}), while the training loss has fallen from "
            f"{self.train_loss:.4f} to {recent:.4f}: the run learns its rows by heart. Fewer "
            "steps, a lower learning rate or more data help"
        )


class BestAdapter:
    """Keep the best held-out adapter of a run, and say when no better one comes.

    Attributes:
        standing: What the run's checkpoints hold of it.
    """

    def __init__(self, config: TrainConfig, model: PeftModel, processes: Processes) -> None:
        self.standing = Standing()
        self._config = config
        self._model = model
        self._processes = processes
        self._folder = Path(config.output_dir) / FOLDER

    @property
    def is_out_of_patience(self) -> bool:
        """Whether so many evaluations have brought nothing better that the run is to stop."""
        patience = self._config.early_stopping_patience
        return patience is not None and self.standing.num_since >= patience

    def note(self, record: EvalRecord, reports: Reports, *, is_last: bool) -> None:
        """Take up a held-out loss: keep the adapter where it is the lowest, tell that it rises."""
        standing, rise = self.standing, self.standing.rise
        is_last |= self._config.early_stopping_patience == 1
        if standing.note_held_out(record, is_last=is_last):
            standing.is_kept = self._config.keep_best
            if standing.is_kept and self._processes.is_main:
                folder = self._folder / f"step-{record.step:08d}"
                save_adapter(self._model, folder, step=record.step)
                self.prune()
                reports.note(record.step, FOLDER, loss=record.loss, message=self.describe())
        elif standing.rise and not rise:
            reports.event(record.step, "overfitting", standing.rise)

    def describe(self) -> str:
        """Name the best held-out loss, its step, and where its adapter lies; "" without one."""
        standing = self.standing
        if standing.step is None:
            return ""
        when = f"step {standing.step}" if standing.step else "before the first step"
        kept = f"; its adapter is {FOLDER}/step-{standing.step:08d}" if standing.is_kept else ""
        return f"best held-out loss {standing.loss:.4f} ({when}){kept}"

    def describe_stop(self) -> str:
        """Say why a run without patience left stops."""
        standing = self.standing
        best = "was finite" if standing.step is None else "was lower"
        return (
            f"stopped early: no held-out loss of the last {standing.num_since} evaluations {best} "
            f"(early_stopping_patience={self._config.early_stopping_patience}). A larger one, or "
            "None, and fit(resume=True) train on"
        )

    def list_notes(self) -> list[str]:
        """What a run's end says of its held-out losses."""
        return [sentence for sentence in (self.describe(), self.standing.rise) if sentence]

    def save(self, path: Path, step: int, *, best: bool) -> None:
        """Write the best adapter where one is kept and wanted, or that of the last step."""
        standing = self.standing
        if not (best and standing.is_kept and self._config.keep_best):
            save_adapter(self._model, path, step=step)
            return
        kept = self._folder / f"step-{standing.step:08d}"
        if not (kept / CONFIG).is_file():
            raise CheckpointError(
                f"the best adapter, {FOLDER}/{kept.name}, is no longer in the run's folder; "
                "save(path, best=False) writes that of the last step"
            )
        copy_adapter(kept, path)
        if standing.step != step:
            announce(
                f"{path.name} holds the adapter of step {standing.step}, whose held-out loss "
                f"{standing.loss:.4f} is the lowest; save(path, best=False) writes that of the "
                f"last step, {step}"
            )

    def complete(self, step: int) -> None:
        """Write this step's adapter if it is the best and the main process is gone before it did.

        Those of earlier steps are whole: it goes on to the next step once it has written one.
        """
        folder = self._folder / f"step-{step:08d}"
        is_best = self.standing.is_kept and self.standing.step == step
        if is_best and not (folder / CONFIG).is_file():  # which is written last
            save_adapter(self._model, folder, step=step)

    def prune(self) -> None:
        """Delete adapters that are the best of neither this run nor a checkpoint that is kept."""
        kept = {self.standing.step}
        try:
            for checkpoint in list_checkpoints(self._config.output_dir):
                kept.add((read_state(checkpoint).totals.get(FOLDER) or {}).get("step"))
        except CheckpointError:
            return  # a damaged checkpoint says nothing: none is deleted
        with saving_explained("delete old adapters", self._folder):
            names = {f"step-{step:08d}" for step in kept if step is not None}
            for folder in self._folder.glob("step-*"):
                if folder.name not in names:
                    remove_folder(folder)
            for leftover in self._folder.glob(".step-*"):  # of a killed run
                shutil.rmtree(leftover)
