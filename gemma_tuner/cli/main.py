"""The commands of ``gemma-tuner``; each loads what it needs when it runs."""

from __future__ import annotations

import typer

from gemma_tuner.cli import cache, export, runs
from gemma_tuner.cli.check import check
from gemma_tuner.cli.commands import command
from gemma_tuner.cli.convert import convert
from gemma_tuner.cli.evaluate import evaluate
from gemma_tuner.cli.generate import generate
from gemma_tuner.cli.plan import plan
from gemma_tuner.cli.preview import preview
from gemma_tuner.cli.quarantine import quarantine
from gemma_tuner.cli.settings import AnsweringGroup, normalize_flag
from gemma_tuner.cli.train import train
from gemma_tuner.doctor.command import doctor
from gemma_tuner.watch.command import watch

app = typer.Typer(
    cls=AnsweringGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"token_normalize_func": normalize_flag},
)
for function in (train, check, plan, preview, evaluate, generate, convert):
    app.command()(function)
app.add_typer(export.app, name="export")
app.add_typer(runs.app, name="runs")
app.add_typer(cache.app, name="cache")
for function in (command(watch), quarantine, command(doctor)):
    app.command()(function)


@app.callback()
def describe() -> None:
    """Fine-tune Gemma with LoRA on your own machine."""
