"""``python -m gemma_tuner.cli``: the command ``gemma-tuner``."""

from gemma_tuner.cli.main import app

app(prog_name="gemma-tuner")
