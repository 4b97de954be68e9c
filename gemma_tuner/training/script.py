"""What scripts that train share: flags and their file, the settings they mean, how they end."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gemma_tuner.errors import ConfigError, GemmaTunerError
from gemma_tuner.records import Example
from gemma_tuner.settings import (
    RECIPE,
    Setting,
    expand_home,
    pin_paths,
    read_settings,
    save_settings,
)
from gemma_tuner.training.config import TrainConfig

if TYPE_CHECKING:
    from gemma_tuner.streaming.stream import ExampleStream
    from gemma_tuner.training.trainer import FitResult, Trainer

_NOT_SETTINGS = {"config", "resume"}  # how a script is started, not what it does


def run_script(main: Callable[[], object]) -> None:
    """Call a script's main function; an error of this library is one line on stderr."""
    try:
        main()
    except GemmaTunerError as error:
        sys.stderr.write(f"{type(error).__name__}: {' '.join(str(error).split())}\n")
        raise SystemExit(1) from None


# --- flags ----------------------------------------------------------------------------------


def parse_arguments(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, *, out: str
) -> argparse.Namespace:
    """Add the flags that all recipes share, and read them from a file and the command line."""
    # ``--config FILE`` gives any of the flags by name (:mod:`gemma_tuner.settings`), checked as
    # those of the command line are, which win.
    parser.formatter_class = argparse.RawTextHelpFormatter
    add = parser.add_argument
    add("--config", metavar="FILE", help="YAML or JSON file of flags; those given here win")
    add("--model", help="Hub name or folder (default: a tiny random model)")
    add("--held-out", metavar="SPLIT", help="name of the held-out split (default: a tenth)")
    add("--out", default=out, help="folder of the run (default: %(default)s)")
    add("--steps", type=int, default=240, help="optimizer steps (default: %(default)s)")
    add("--batch-size", type=int, default=4, help="examples on the device (default: %(default)s)")
    add("--gradient-accumulation", type=int, default=2, help="such batches in a step (default: 2)")
    add("--learning-rate", type=float, help="its peak (default: 2e-4; tiny model: 5e-3)")
    add("--max-tokens", type=int, default=1024, help="longest example (default: %(default)s)")
    add("--resume", action="store_true", help="continue the run in --out")
    args = parser.parse_args(arguments)
    if args.config:
        given = sys.argv[1:] if arguments is None else arguments
        args = parser.parse_args([*_read_flags(parser, args.config), *given])
    if args.learning_rate is None:
        args.learning_rate = 2e-4 if args.model else 5e-3
    vars(args).update(expand_home(vars(args)))
    return args


def add_answer_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of recipes that let the model answer held-out examples afterwards."""
    add = parser.add_argument
    add("--answers", type=int, default=100, help="held-out examples to score; 0: none")
    add("--answer-tokens", type=int, default=128, help="longest answer (default: %(default)s)")


def _read_flags(parser: argparse.ArgumentParser, path: str) -> list[str]:
    """Read a settings file as a command line, so that it is checked as one."""
    known = vars(parser.parse_args([])).keys() - _NOT_SETTINGS
    flags = []
    for name, value in read_settings(path, known | {RECIPE}).items():
        if name == RECIPE:
            continue
        if isinstance(value, bool | list):
            raise ConfigError(
                f"the setting {name!r} in {Path(path).name!r} is {value!r}; it takes one number "
                "or text"
            )
        if value is not None:
            flags.append(f"--{name.replace('_', '-')}={value}")
    return flags


def make_config(args: argparse.Namespace) -> TrainConfig:
    """Make the settings of training of the flags that all recipes share."""
    return TrainConfig(
        max_steps=args.steps,
        batch_size=args.batch_size,
        gradient_accumulation=args.gradient_accumulation,
        learning_rate=args.learning_rate,
        warmup_steps=min(10, args.steps // 10),
        eval_every_steps=max(1, args.steps // 4),
        output_dir=args.out,
    )


# --- data -----------------------------------------------------------------------------------


def open_splits(
    open_stream: Callable[..., ExampleStream], held_out: str | None
) -> tuple[ExampleStream, ExampleStream]:
    """Open what is trained on, and what is held out."""
    if held_out is None:
        return open_stream().split(0.1)
    return open_stream(split="train"), open_stream(split=held_out)


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


# --- training -------------------------------------------------------------------------------


def fit(
    trainer: Trainer, args: argparse.Namespace, script: str, arguments: Sequence[str] | None
) -> FitResult:
    """Train, and keep the settings in the run's folder: ``--config`` of them starts it again."""
    from gemma_tuner.training.checkpoint import latest_checkpoint  # noqa: PLC0415 - imports torch

    settings: dict[str, Setting] = {
        name: value for name, value in vars(args).items() if name not in _NOT_SETTINGS
    }
    settings = pin_paths(settings) | {RECIPE: str(Path(script).absolute())}
    is_main = trainer.processes.is_main
    # A run that is there already may refuse these settings, and keeps its own until it has not.
    if is_main and latest_checkpoint(args.out) is None:
        save_settings(args.out, settings)
    result = trainer.fit(resume=args.resume)
    if is_main:
        save_settings(args.out, settings)
    exit_if_stopped(result, script, arguments)
    return result


def exit_if_stopped(result: FitResult, script: str, arguments: Sequence[str] | None) -> None:
    """End the process where a signal has stopped the run, and say how to go on."""
    if result.stopped_by is None:
        return
    given = sys.argv[1:] if arguments is None else arguments
    flags = [argument for argument in given if argument != "--resume"]
    command = shlex.join(["python", os.path.relpath(script), *flags, "--resume"])
    sys.stderr.write(f"stopped after step {result.step}, which is saved; go on with: {command}\n")
    number = signal.SIGINT if result.stopped_by == "SIGINT" else signal.SIGTERM
    raise SystemExit(128 + number)


def show_losses(result: FitResult) -> str:
    """Write a run's held-out losses as one line."""
    losses = " → ".join(f"{record.loss:.4f} (step {record.step})" for record in result.held_out)
    return f"held-out loss: {losses}"
