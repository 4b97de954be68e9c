"""``gemma-tuner generate``."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from gemma_tuner.cli.commands import command
from gemma_tuner.cli.defaults import from_run
from gemma_tuner.cli.opening import load_with_adapter, say
from gemma_tuner.cli.settings import ModelSettings
from gemma_tuner.display import quote_text


@command
def generate(
    *,
    model: ModelSettings,
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", metavar="TEXT", help="What is asked; - reads stdin.")
    ],
    system: str | None = None,
    image: list[Path] | None = None,
    audio: list[Path] | None = None,
    adapter: Annotated[
        Path | None,
        typer.Option(
            "--adapter",
            "--adapter-path",
            metavar="FOLDER",
            is_eager=True,
            callback=from_run(ModelSettings),
            help="Of a run or an adapter; a run's settings say which model.",
        ),
    ] = None,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int | None = None,
    # In a panel of its own: its two names and those of --adapter do not fit beside each other.
    enable_thinking: Annotated[
        bool | None,
        typer.Option(
            "--enable-thinking/--no-enable-thinking",
            help="Let the model think first; by default as the adapter was trained.",
            rich_help_panel="Rows",
        ),
    ] = None,
    image_tokens: int | None = None,
    max_seconds: float | None = None,
    long_audio: Literal["error", "split"] | None = None,
) -> None:
    """Ask a model, with an adapter or without; the answer is written as it comes.

    Args:
        system: What the model is told beforehand.
        image: An image to look at.
        audio: A clip to listen to.
        max_new_tokens: The most tokens of the answer.
        temperature: Above 0: tokens are drawn.
        top_p: Draw from the likeliest of this sum.
        top_k: Draw from the N likeliest.
        seed: Makes drawing repeatable.
        image_tokens: The most tokens of an image; by default as the adapter was trained.
        max_seconds: The longest clip; by default as the adapter was trained.
        long_audio: What happens to a longer clip: error or split.
    """
    from gemma_tuner.evaluation.generation import generate_stream

    modalities = {*model.modalities, *(["image"] if image else []), *(["audio"] if audio else [])}
    if len(modalities) > len(model.modalities):
        modality = "multimodal" if len(modalities) > 2 else (modalities - {"text"}).pop()
        model = dataclasses.replace(model, modality=modality)
    text = sys.stdin.read() if prompt == "-" else prompt
    messages = [{"role": "user", "content": text}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    gemma, processor = load_with_adapter(model, adapter)
    options = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
    options = {name: value for name, value in options.items() if value is not None}
    with generate_stream(
        gemma,
        processor,
        messages,
        image=[str(path) for path in image] if image else None,
        audio=[str(path) for path in audio] if audio else None,
        enable_thinking=enable_thinking,
        image_tokens=image_tokens,
        max_seconds=max_seconds,
        long_audio=long_audio,
        max_new_tokens=max_new_tokens,
        **options,
    ) as answer:
        for piece in answer:
            sys.stdout.write(quote_text(piece))
            sys.stdout.flush()
    say("")
