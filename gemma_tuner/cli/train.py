"""``gemma-tuner train``."""

from __future__ import annotations

import shlex
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemma_tuner.cli.commands import command
from gemma_tuner.cli.defaults import Config, Places, list_forgotten, list_settings
from gemma_tuner.cli.opening import (
    choose_length,
    find_modality,
    fit,
    load,
    load_with_adapter,
    make_collator,
    make_config,
    make_lora,
    open_streams,
    say,
    show_losses,
    was_given,
)
from gemma_tuner.cli.settings import (
    AdapterSettings,
    DataSettings,
    ModelSettings,
    RowSettings,
    RunSettings,
)
from gemma_tuner.errors import ConfigError
from gemma_tuner.settings import FILE_NAME, TINY, Setting

if TYPE_CHECKING:
    from gemma_tuner.collators.text import TextCollator
    from gemma_tuner.evaluation.samples import SampleGenerations
    from gemma_tuner.streaming.stream import ExampleStream

_NUM_SAMPLES = 4


@command
def train(
    *,
    context: typer.Context,
    places: Places = None,
    model: ModelSettings,
    data: DataSettings,
    rows: RowSettings,
    adapter: AdapterSettings,
    run: RunSettings,
    config: Config = None,
    is_train: Annotated[
        bool, typer.Option("--train", hidden=True, help="As mlx-lm has it; it changes nothing.")
    ] = True,
) -> None:
    """Fine-tune a model on your data.

    Without options, the tiny model on bundled samples. The settings are
    saved as settings.yaml in the run's folder, and --config starts the same
    run again from there. Ctrl-C lets the step finish and saves; --resume goes on.
    """
    from gemma_tuner.models.lora import add_lora
    from gemma_tuner.training.checkpoint import latest_checkpoint, refuse_second_run
    from gemma_tuner.training.lock import refuse_running
    from gemma_tuner.training.trainer import Trainer

    settings = list_settings(context)
    run = choose_length(context, run, settings)
    train_config = make_config(run, seed=data.seed, is_tiny=model.model == TINY)
    settings["learning_rate"] = train_config.learning_rate
    refuse_running(run.out)
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
    model = find_modality(model, stream, held_out)
    say(stream.report())
    if run.from_adapter is None:
        gemma, processor = load(model)
        gemma = add_lora(gemma, make_lora(adapter, model, data.seed))
    else:
        gemma, processor = load_with_adapter(model, run.from_adapter, trainable=True)
        _refuse_new_adapter(context)
    collator = make_collator(model, rows, processor)
    samples = _make_samples(run, collator, held_out)
    trainer = Trainer(gemma, stream, collator, train_config, held_out, samples)
    result = fit(trainer, settings, resume=run.resume, go_on=_command_to_go_on(run.out))
    path = trainer.save(run.out / "adapter")
    if result.held_out:
        say(show_losses(result))
    say(f"adapter: {path}\nnext: {shlex.join(['gemma-tuner', 'evaluate', str(run.out)])}")


def _refuse_new_adapter(context: typer.Context) -> None:
    """Refuse settings of a new adapter where an old one goes on."""
    given = [f.name for f in fields(AdapterSettings) if was_given(context, f.name)]
    if given:
        raise ConfigError(
            f"--adapter goes on with an adapter as it is, and {', '.join(given)} would be of a "
            "new one; leave one of the two out"
        )


def _check_remembered(context: typer.Context, out: Path, settings: dict[str, Setting]) -> None:
    """Refuse to go on with defaults where the run had settings of its own."""
    if not (out / FILE_NAME).is_file():
        return
    if forgotten := list_forgotten(context, out / FILE_NAME, settings):
        raise ConfigError(
            f"the run in {str(out)!r} has other settings ({', '.join(forgotten)}); go on with: "
            f"{shlex.join(_command_to_go_on(out))}"
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


def _command_to_go_on(out: Path) -> list[str]:
    return ["gemma-tuner", "train", "--config", str(out / FILE_NAME), "--resume"]
