"""``gemma-tuner plan``."""

from __future__ import annotations

from typing import Annotated

import typer

from gemma_tuner.cli.commands import command
from gemma_tuner.cli.defaults import Config
from gemma_tuner.cli.opening import make_lora, open_base, refuse_bits, say
from gemma_tuner.cli.settings import AdapterSettings, ModelSettings, RowSettings


@command
def plan(
    *,
    model: ModelSettings,
    rows: RowSettings,
    adapter: AdapterSettings,
    memory_gib: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="What the device may hold; by default what is here. A Mac lets a process have "
            "two thirds of its memory up to 32 GiB, and three quarters beyond.",
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(metavar="N", min=1, help="Rows computed at a time.")
    ] = 4,
    target_share: Annotated[
        float,
        typer.Option(metavar="X", min=0, max=1, help="Tokens of answers of all in a row."),
    ] = 0.25,
    config: Config = None,
) -> None:
    """Tell whether a training run fits, and what it holds.

    A step is tried on the model's configuration without its weights. With
    --memory-gib and --device the machine need not be here.
    """
    from gemma_tuner.planning.plan import plan as plan_run

    refuse_bits(model.model, model.bits)
    with open_base(model.model) as base:
        say(
            plan_run(
                str(base),
                memory_gib=memory_gib,
                modalities=model.modalities,
                max_tokens=rows.max_tokens,
                batch_size=batch_size,
                target_share=target_share,
                lora=make_lora(adapter, model),
                image_tokens=rows.image_tokens,
                max_seconds=rows.max_seconds,
                device=model.device,
                dtype=model.dtype,
                bits=model.bits,
                revision=model.revision,
            )
        )
