"""``gemma-tuner train``."""

from __future__ import annotations

import dataclasses
import shlex
import signal
import sys
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from gemma_tuner.cli.commands import command
from gemma_tuner.cli.defaults import Config, list_forgotten, list_settings
from gemma_tuner.cli.opening import (
    load,
    make_collator,
    make_lora,
    open_streams,
    say,
    was_given,
)
from gemma_tuner.cli.settings import (
    TINY,
    AdapterSettings,
    DataSettings,
    ModelSettings,
    RowSettings,
    RunSettings,
)
from gemma_tuner.errors import ConfigError
from gemma_tuner.settings import FILE_NAME, Setting, save_settings

if TYPE_CHECKING:
    from gemma_tuner.collators.text import TextCollator
    from gemma_tuner.evaluation.samples import SampleGenerations
    from gemma_tuner.streaming.stream import ExampleStream
    from gemma_tuner.training.config import TrainConfig
    from gemma_tuner.training.trainer import FitResult

_NUM_SAMPLES = 4


@command
def train(
    *,
    context: typer.Context,
    model: ModelSettings,
    data: DataSettings,
    rows: RowSettings,
    adapter: AdapterSettings,
    run: RunSettings,
    config: Config = None,
) -> None:
    """Fine-tune a model on your data.

    Without options, the tiny model on bundled samples. The settings are
    saved as settings.yaml in the run's folder, and --config starts the same
    run again from there. Ctrl-C lets the step finish and saves; --resume goes on.
    """
    from gemma_tuner.models.lora import add_lora
    from gemma_tuner.training.checkpoint import latest_checkpoint, refuse_second_run
    from gemma_tuner.training.trainer import Trainer

    settings = list_settings(context)
    run = _choose_length(context, run, settings)
    train_config = _make_config(run, seed=data.seed, is_tiny=model.model == TINY)
    settings["learning_rate"] = train_config.learning_rate
    if not run.resume:
        refuse_second_run(run.out)
    elif latest_checkpoint(run.out) is None:
        raise ConfigError(
            f"there is no run in {str(run.out)!r} to go on with; check --out, or leave --resume "
            "out to begin one"
        )
    elif config is None:
        _check_remembered(context, run.out, settings)
    stream, held_out = open_streams(data, model.modality)
    say(stream.report())
    gemma, processor = load(model)
    gemma = add_lora(gemma, make_lora(adapter, model, data.seed))
    collator = make_collator(model, rows, processor)
    samples = _make_samples(run, collator, held_out)
    trainer = Trainer(gemma, stream, collator, train_config, held_out, samples)
    is_main = trainer.processes.is_main
    if is_main and not run.resume:
        save_settings(run.out, settings)
    result = trainer.fit(resume=run.resume)
    if is_main:  # the settings of a resumed run have not been refused
        save_settings(run.out, settings)
    _exit_if_stopped(result, run.out)
    path = trainer.save(run.out / "adapter")
    if result.held_out:
        losses = (f"{record.loss:.4f} (step {record.step})" for record in result.held_out)
        say(f"held-out loss: {' → '.join(losses)}")
    say(f"adapter: {path}\nnext: {shlex.join(['gemma-tuner', 'evaluate', str(run.out)])}")


def _choose_length(
    context: typer.Context, run: RunSettings, settings: dict[str, Setting]
) -> RunSettings:
    """Let a flag win over a file that says the run's length in the other way."""
    for name, other in (("max_steps", "epochs"), ("epochs", "max_steps")):
        if was_given(context, name) and not was_given(context, other):
            settings.pop(other, None)
            return dataclasses.replace(run, **{other: None})
    return run


def _check_remembered(context: typer.Context, out: Path, settings: dict[str, Setting]) -> None:
    """Refuse to go on with defaults where the run had settings of its own."""
    if not (out / FILE_NAME).is_file():
        return
    if forgotten := list_forgotten(context, out / FILE_NAME, settings):
        raise ConfigError(
            f"the run in {str(out)!r} has other settings ({', '.join(forgotten)}); go on with: "
            f"{_command_to_go_on(out)}"
        )


def _make_samples(
    run: RunSettings, collator: TextCollator, held_out: ExampleStream | None
) -> SampleGenerations | None:
    from gemma_tuner.evaluation.samples import SampleGenerations

    if run.sample_every_steps is None:
        return None
    if held_out is None:
        raise ConfigError("there is nothing held out to take samples of; leave held_out at 0.1")
    read = held_out.read_rows(range(len(held_out)))  # None for one that cannot be used
    examples = islice((example for example in read if example is not None), _NUM_SAMPLES)
    return SampleGenerations(collator, list(examples), run.sample_every_steps)


def _make_config(run: RunSettings, *, seed: int, is_tiny: bool) -> TrainConfig:
    from gemma_tuner.training.config import TrainConfig

    learning_rate = run.learning_rate
    if learning_rate is None:
        learning_rate = 5e-3 if is_tiny else 2e-4
    return TrainConfig(
        max_steps=run.max_steps,
        epochs=1 if run.max_steps is None and run.epochs is None else run.epochs,
        batch_size=run.batch_size,
        gradient_accumulation=run.gradient_accumulation,
        learning_rate=learning_rate,
        schedule=run.schedule,
        warmup_steps=run.warmup_steps,
        weight_decay=run.weight_decay,
        seed=seed,
        gradient_checkpointing=run.gradient_checkpointing,
        memory_gib=run.memory_gib,
        log_every_steps=run.log_every_steps,
        eval_every_steps=run.eval_every_steps,
        save_every_steps=run.save_every_steps,
        output_dir=run.out,
        trackers=tuple(run.trackers or ()),
        watch=run.watch,
    )


def _exit_if_stopped(result: FitResult, out: Path) -> None:
    """End where a signal has stopped the run, with its status, and say how to go on."""
    if result.stopped_by is None:
        return
    sys.stderr.write(
        f"stopped after step {result.step}, which is saved; go on with: {_command_to_go_on(out)}\n"
    )
    number = signal.SIGINT if result.stopped_by == "SIGINT" else signal.SIGTERM
    raise SystemExit(128 + number)


def _command_to_go_on(out: Path) -> str:
    return shlex.join(["gemma-tuner", "train", "--config", str(out / FILE_NAME), "--resume"])
