"""``gemma-tuner quarantine``."""

from __future__ import annotations

from collections import Counter
from typing import Annotated

import typer

from gemma_tuner.cli.commands import command
from gemma_tuner.cli.defaults import Run
from gemma_tuner.cli.opening import open_stream, say
from gemma_tuner.cli.settings import DataSettings, ModelSettings


@command
def quarantine(
    *,
    data: DataSettings,
    model: ModelSettings,
    run: Run = None,
    retry: Annotated[
        bool,
        typer.Option(
            "--retry", metavar="", help="Try each again, and release those that can be used now."
        ),
    ] = False,
) -> None:
    """List the examples that could not be used, and why.

    RUN is the folder of a run, whose settings say which data; or give
    --data, as for train.
    """
    stream = open_stream(data, model.modality, data.split)
    if retry:
        released, remaining = stream.retry_quarantine()
        say(f"released: {released:,}; in quarantine: {remaining:,}")
    records = stream.inspect_quarantine()
    for record in records:
        say(f"{record.key}\n  {record.stage}: {record.reason}")
    counts = Counter(record.stage for record in records).most_common()
    say(f"in quarantine: {len(records):,}; usable: {len(stream):,}")
    for stage, count in counts:
        say(f"  {stage}: {count:,}")
