"""``python -m gemma_tuner.watch``: what ``gemma-tuner watch`` does."""

import sys

import typer

from gemma_tuner.errors import GemmaTunerError
from gemma_tuner.watch.command import watch

try:
    typer.run(watch)
except GemmaTunerError as error:
    sys.stderr.write(f"{type(error).__name__}: {' '.join(str(error).split())}\n")
    sys.exit(1)
