"""``python -m gemma_tuner.doctor``: what ``gemma-tuner doctor`` does."""

import typer

from gemma_tuner.doctor.command import doctor

typer.run(doctor)
