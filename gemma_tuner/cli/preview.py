"""``gemma-tuner preview``."""

from __future__ import annotations

from typing import Annotated

import typer

from gemma_tuner.cli.commands import command
from gemma_tuner.cli.defaults import Config, Places
from gemma_tuner.cli.opening import find_modality, make_collator, open_streams, read_processor, say
from gemma_tuner.cli.settings import DataSettings, ModelSettings, RowSettings
from gemma_tuner.errors import ConfigError


@command
def preview(
    *,
    places: Places = None,
    model: ModelSettings,
    data: DataSettings,
    rows: RowSettings,
    index: Annotated[
        int, typer.Option(metavar="N", min=0, help="The first example's place in the data.")
    ] = 0,
    count: Annotated[int, typer.Option(metavar="N", min=1, help="How many examples.")] = 1,
    config: Config = None,
) -> None:
    """Show the data as it will be trained on.

    What the data is made of, and examples as the model will read them,
    with the trained tokens marked. No weights are loaded.
    """
    from rich.console import Console
    from rich.text import Text

    from gemma_tuner.collators.preview import preview_row

    stream, held_out = open_streams(data, model.modality)
    model = find_modality(model, stream, held_out)
    say(stream.report())
    say(f"held out: {len(held_out):,} rows" if held_out else "held out: nothing")
    if index >= len(stream):
        raise ConfigError(f"index is {index}; the stream has {len(stream):,} rows, from 0")
    processor = read_processor(model)
    collator = make_collator(model, rows, processor)
    console = Console(soft_wrap=True, highlight=False)
    for place in range(index, min(index + count, len(stream))):
        shown = preview_row(collator([stream[place]]), collator.tokenizer)
        text = Text(f"\n{shown}")
        text.highlight_regex(r"⟦[^⟧]*⟧", "bold green")
        console.print(text)
