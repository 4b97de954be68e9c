"""``gemma-tuner evaluate``."""

from __future__ import annotations

from pathlib import Path

import typer

from gemma_tuner.cli.commands import command
from gemma_tuner.cli.defaults import Run, find_settings
from gemma_tuner.cli.opening import (
    find_modality,
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
    score: list[str] | None = None,
    language: str | None = None,
    compare_base: bool = True,
    max_examples: int | None = None,
    batch_size: int = 8,
    max_new_tokens: int = 256,
    output: Path | None = None,
) -> None:
    """Measure loss and answers on held-out data, adapter beside base.

    RUN is the folder of a run or of an adapter. A run's settings say which
    model and which data: its held-out part, or with --data all of that.
    Without RUN the model is measured by itself.

    Args:
        score: exact_match, wer, cer, anls or vqa_accuracy; by default exact_match.
        language: Of the texts, such as en; for wer and cer.
        compare_base: Measure the model without its adapter as well.
        max_examples: So many at most, spread evenly; by default all.
        batch_size: Examples computed at a time.
        max_new_tokens: The most tokens of an answer.
        output: For the report, with every answer and the worst to read.
    """
    from gemma_tuner.evaluation.evaluate import evaluate as measure

    if run is not None and (run / "config.json").is_file():
        raise ConfigError(
            f"{str(run)!r} is a whole model, not a run or an adapter; give it as --model {run}"
        )
    if run is not None and find_settings(run) is None and not data.data:
        raise ConfigError(
            f"{str(run)!r} does not say what it was trained on (a script or a recipe made it); "
            "give what it is to be measured on with --data"
        )
    if was_given(context, "data") and not was_given(context, "held_out"):
        split = data.split if was_given(context, "split") else None  # not the run's
        stream = open_stream(data, model.modality, split)
    else:
        stream = open_streams(data, model.modality)[1]
    if stream is None:
        raise ConfigError("nothing was held out; give data with --data, or --held-out")
    model = find_modality(model, stream)
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
