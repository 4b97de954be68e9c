"""What recipes share with the command: options, settings files, and how a run ends."""

from __future__ import annotations

import inspect
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemma_tuner.cli import opening
from gemma_tuner.cli.commands import place_panel
from gemma_tuner.cli.defaults import GROUPS, config_option, list_settings
from gemma_tuner.cli.opening import show_losses as show_losses
from gemma_tuner.cli.settings import (
    PANELS,
    AnsweringCommand,
    RecipeSettings,
    RunSettings,
    make_option,
    normalize_flag,
)
from gemma_tuner.errors import ConfigError, GemmaTunerError
from gemma_tuner.records import Example
from gemma_tuner.settings import RECIPE, TINY, expand_home

if TYPE_CHECKING:
    from gemma_tuner.streaming.stream import ExampleStream
    from gemma_tuner.training.trainer import FitResult, Trainer

ANSWERS = ("answers", "answer_tokens")
"""The options of recipes that let the model answer held-out examples afterwards."""

_GROUPS = (*GROUPS, RecipeSettings)
_STEPS = 240


def run(main: Callable[[], object]) -> None:
    """Call a recipe's main function; an error of this library is one line on stderr."""
    try:
        main()
    except GemmaTunerError as error:
        sys.stderr.write(f"{type(error).__name__}: {' '.join(str(error).split())}\n")
        raise SystemExit(1) from None


def read_arguments(
    script: str, arguments: Sequence[str] | None, *names: str, data: str | None = None
) -> SimpleNamespace:
    """Read the options that are named, and those of every run, as the command does."""
    # What comes back has a value for each, and ``config``, the TrainConfig that they make. For the
    # help, ``data`` says what the rows of --data hold.
    given = list(sys.argv[1:] if arguments is None else arguments)
    read: dict[str, Any] = {}
    not_taken = ("from_adapter", "sample_every_steps")
    run_names = [field.name for field in fields(RunSettings) if field.name not in not_taken]

    def collect(called: typer.Context, **values: Any) -> None:
        settings = list_settings(called, _GROUPS)
        run = RunSettings(**{name: values[name] for name in run_names})
        run = _fill_run(opening.choose_length(called, run, settings))
        opening.refuse_bits(values["model"], values["bits"])
        config = opening.make_config(run, seed=0, is_tiny=values["model"] == TINY)
        chosen = {"max_steps": config.max_steps, "learning_rate": config.learning_rate}
        settings |= {**chosen, RECIPE: str(Path(script).absolute())}
        read.update(expand_home(values), config=config, settings=settings)

    names = (
        "model",
        "bits",
        *(["data", "held_out"] if data else []),
        *names,
        "max_tokens",
        *run_names,
    )
    out = Path("runs") / Path(script).stem.removeprefix("stream_")
    defaults = {"max_tokens": 1024, "warmup_steps": None, "out": out}
    parameters = _list_parameters(names, defaults, data)
    collect.__signature__ = inspect.Signature(parameters)
    collect.__annotations__ = {}
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    summary, *_ = Path(script).read_text(encoding="utf-8").removeprefix('"""').split("\n\n")
    aliases = {"token_normalize_func": normalize_flag}
    app.command(help=summary, cls=AnsweringCommand, context_settings=aliases)(collect)
    try:
        app(given, prog_name=f"python {os.path.relpath(script)}")
    except SystemExit:
        if not read:  # --help, or what cannot be read
            raise
    if data and not read["data"]:  # the samples have a split to hold out
        read["held_out"] = read["held_out"] or "test"
    return SimpleNamespace(**read, command=[script, *given])


def _list_parameters(
    names: Iterable[str], defaults: dict[str, Any], data: str | None
) -> list[inspect.Parameter]:
    keyword = inspect.Parameter.KEYWORD_ONLY
    known = {field.name: field for group in _GROUPS for field in fields(group)}
    hints = {
        "called": typer.Context,
        "config": Annotated[Path | None, config_option(_GROUPS, is_explained=False)],
    }
    hints |= {name: known[name].type for name in names}
    if data:
        text = f"Files or folders: {data}; by default bundled samples."
        hints["data"], _ = make_option("data", Sequence[str], None, text, PANELS[2])
    defaults = {"config": None, **{name: known[name].default for name in names}, **defaults}
    parameters = [
        inspect.Parameter(
            name, keyword, annotation=hint, default=defaults.get(name, inspect.Parameter.empty)
        )
        for name, hint in hints.items()
    ]
    return sorted(parameters, key=place_panel)


def _fill_run(run: RunSettings) -> RunSettings:
    """Choose what follows from how long a run is."""
    if run.max_steps is None and run.epochs is None:
        run = replace(run, max_steps=_STEPS)
    steps = run.max_steps or _STEPS
    chosen = {"warmup_steps": min(10, steps // 10), "eval_every_steps": max(1, steps // 4)}
    return replace(run, **{k: v for k, v in chosen.items() if getattr(run, k) is None})


def open_splits(
    open_stream: Callable[..., ExampleStream], held_out: str | None
) -> tuple[ExampleStream, ExampleStream]:
    """Open what is trained on, and what is held out."""
    train, rest = opening.divide(open_stream, held_out)
    if rest is None:
        raise ConfigError("a recipe measures what is held out; leave held_out at 0.1")
    return train, rest


def fit(trainer: Trainer, args: SimpleNamespace) -> FitResult:
    """Train, and keep the settings in the run's folder: ``--config`` of them starts it again."""
    script, *given = args.command
    flags = [argument for argument in given if argument != "--resume"]
    go_on = ["python", os.path.relpath(script), *flags, "--resume"]
    return opening.fit(trainer, args.settings, resume=args.resume, go_on=go_on)


def rate_guessing(train: Iterable[Example], held_out: Iterable[Example]) -> float:
    """Measure how often an answer is right that was guessed without a look at the media."""
    # The guess is the commonest answer of training to the same words, or, where they are new, of
    # all; what a model has learned to see or hear is what it is right beyond that.
    answers: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for example in train:
        *asked, answer = (turn.text for turn in example.turns)
        answers["\n".join(asked)][answer] += 1
    commonest = {question: given.most_common(1)[0][0] for question, given in answers.items()}
    overall = sum(answers.values(), Counter()).most_common(1)[0][0]
    is_right = []
    for example in held_out:
        *asked, answer = (turn.text for turn in example.turns)
        is_right.append(commonest.get("\n".join(asked), overall) == answer)
    return sum(is_right) / len(is_right)
