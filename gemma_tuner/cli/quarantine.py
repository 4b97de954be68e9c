"""``gemma-tuner quarantine``."""

from __future__ import annotations

from collections import Counter

from gemma_tuner.cli.commands import command
from gemma_tuner.cli.defaults import Run
from gemma_tuner.cli.opening import open_streams, say
from gemma_tuner.cli.settings import DataSettings, ModelSettings
from gemma_tuner.display import quote_line


@command
def quarantine(
    *,
    data: DataSettings,
    model: ModelSettings,
    run: Run = None,
    retry: bool = False,
) -> None:
    """List the examples that could not be used, and why.

    RUN is the folder of a run, whose settings say which data; or give
    --data, as for train.

    Args:
        retry: Try each again, and release those that can be used now.
    """
    from gemma_tuner.streaming.view import list_bad, retry_bad

    streams = [stream for stream in open_streams(data, model.modality) if stream is not None]
    views = [view for stream in streams for view in stream.views]
    if retry:
        released, remaining = retry_bad(views)
        say(f"released: {released:,}; in quarantine: {remaining:,}")
    records = list_bad(views)
    for record in records:
        say(f"{quote_line(record.key)}\n  {record.stage}: {quote_line(record.reason)}")
    counts = Counter(record.stage for record in records).most_common()
    say(f"in quarantine: {len(records):,}; usable: {sum(map(len, views)):,}")
    for stage, count in counts:
        say(f"  {stage}: {count:,}")
