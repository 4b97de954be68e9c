"""``gemma-tuner check``."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import replace
from functools import partial

import typer

from gemma_tuner.cli.commands import command
from gemma_tuner.cli.defaults import Config, Places
from gemma_tuner.cli.opening import (
    find_modality,
    is_local,
    make_collator,
    open_streams,
    read_processor,
    say,
    was_given,
)
from gemma_tuner.cli.settings import (
    AdapterSettings,
    DataSettings,
    ModelSettings,
    RowSettings,
    RunSettings,
)
from gemma_tuner.display import quote_line


@command
def check(
    *,
    context: typer.Context,
    places: Places = None,
    model: ModelSettings,
    data: DataSettings,
    rows: RowSettings,
    adapter: AdapterSettings,
    run: RunSettings,
    config: Config = None,
) -> None:
    """Look at all data before it is trained on; takes what train takes.

    How long rows are, what --max-tokens would cut or refuse, and every row
    that cannot be used, with the reason. Media in buckets are not downloaded.
    No weights are loaded. train does the same for --check-seconds.
    """
    from gemma_tuner.training.data_check import check_rows

    # Of files at hand all rows that cannot be read are wanted; they would end the reading at once.
    lenient = replace(data, max_bad_fraction=1.0, max_consecutive_bad=sys.maxsize)
    streams = open_streams(lenient if is_local(data) else data, model.modality)
    model = find_modality(model, *streams)
    collator = make_collator(model, rows, read_processor(model))
    limit = run.check_seconds if was_given(context, "check_seconds") else math.inf
    end = time.monotonic() + limit
    found = []
    for name, stream in zip(("trained on", "held out"), streams, strict=True):
        if stream is None:
            continue
        say(f"{name}: {stream.report()}")
        is_over = partial(_is_past, end)
        found.append(check_rows(stream, collator, model.modalities, is_over=is_over))
        say(f"{found[-1]}\n")
    for record in streams[0].inspect_quarantine():
        if record.stage == "row":
            say(quote_line(f"cannot be read: {record.key}: {record.reason}"))
    # What train will say of it.
    strict = open_streams(replace(data, refresh=False), model.modality)
    allowed = [each.num_allowed_bad for each in strict if each]
    for each, number in zip(found, allowed, strict=True):
        replace(each, allowed=number).refuse_beyond_budget()


def _is_past(end: float) -> bool:
    return time.monotonic() > end
