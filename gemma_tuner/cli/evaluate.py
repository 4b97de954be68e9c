"""``gemma-tuner evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gemma_tuner.cli.commands import command
from gemma_tuner.cli.defaults import Run, find_settings
from gemma_tuner.cli.opening import (
    load_with_adapter,
    make_collator,
    open_stream,
    open_streams,
    say,
    was_given,
)
from gemma_tuner.cli.settings import DataSettings, ModelSettings, RowSettings
from gemma_tuner.errors import ConfigError


@command
def evaluate(
    *,
    context: typer.Context,
    model: ModelSettings,
    data: DataSettings,
    rows: RowSettings,
    run: Run = None,
    score: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="exact_match, wer, cer, anls or vqa_accuracy; by default exact_match. May be "
            "given several times.",
        ),
    ] = None,
    language: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Of the texts, such as en; for wer and cer."),
    ] = None,
    compare_base: Annotated[
        bool, typer.Option(help="Measure the model without its adapter as well.")
    ] = True,
    max_examples: Annotated[
        int | None,
        typer.Option(metavar="N", help="So many at most, spread evenly; by default all."),
    ] = None,
    batch_size: Annotated[int, typer.Option(metavar="N", help="Examples computed at a time.")] = 8,
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", help="The most tokens of an answer.")
    ] = 256,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="For the report, with every answer and the worst to read."
        ),
    ] = None,
) -> None:
    """Measure loss and answers on held-out data, adapter beside base.

    RUN is the folder of a run or of an adapter. A run's settings say which
    model and which data: its held-out part, or with --data all of that.
    Without RUN the model is measured by itself.
    """
    from gemma_tuner.evaluation.evaluate import evaluate as measure

    if run is not None and (run / "config.json").is_file():
        raise ConfigError(
            f"{str(run)!r} is a whole model, not a run or an adapter; give it as --model {run}"
        )
    if run is not None and find_settings(run) is None and not data.data:
        raise ConfigError(
            f"{str(run)!r} does not say what it was trained on (a script or a recipe made it); "
            "give what it is to be measured on with --data, and --modality where that is not text"
        )
    if was_given(context, "data") and not was_given(context, "held_out"):
        split = data.split if was_given(context, "split") else None  # not the run's
        stream = open_stream(data, model.modality, split)
    else:
        stream = open_streams(data, model.modality)[1]
    if stream is None:
        raise ConfigError("nothing was held out; give data with --data, or --held-out")
    gemma, processor = load_with_adapter(model, run)
    report = measure(
        gemma,
        stream,
        make_collator(model, rows, processor),
        scores=score or ("exact_match",),
        language=language,
        compare_base=compare_base,
        max_examples=max_examples,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        output=output,
    )
    say(report)
    if output is not None:
        say(f"report: {output / 'report.md'}")
