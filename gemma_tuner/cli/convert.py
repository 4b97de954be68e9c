"""``gemma-tuner convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from gemma_tuner.cli.commands import command
from gemma_tuner.cli.opening import say


@command
def convert(
    *,
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="A folder, or a model's name on the Hub.", show_default=False
        ),
    ],
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="What is written.", show_default=False)
    ],
    bits: int = 4,
    grid: Literal["symmetric", "affine"] | None = None,
    group: int | None = None,
    revision: str | None = None,
) -> None:
    """Write a checkpoint whose decoder has its matrices in 4 or 8 bits.

    --model FOLDER then trains on it. The same is done once, out of sight, by
    --bits with the checkpoint itself.

    Args:
        bits: 4 or 8.
        grid: symmetric, or affine as MLX has it; by default symmetric in 4 bits.
        group: Weights that share a scale: 32, 64 or 128.
        revision: Branch, tag or commit on the Hub.
    """
    from gemma_tuner.checkpoints.packing import pack

    say(pack(source, folder, bits=bits, grid=grid, group=group, revision=revision))
