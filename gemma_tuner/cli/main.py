"""The commands of ``gemma-tuner``; each loads what it needs when it runs."""

from __future__ import annotations

import typer

from gemma_tuner.doctor.command import doctor

app = typer.Typer(no_args_is_help=True, add_completion=False)
app.command()(doctor)


@app.callback()
def describe() -> None:
    """Fine-tune Gemma with LoRA on your own machine."""
