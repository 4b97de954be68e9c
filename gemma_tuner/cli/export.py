"""``gemma-tuner export``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from gemma_tuner.cli.commands import command
from gemma_tuner.cli.defaults import from_run
from gemma_tuner.cli.opening import load_with_adapter, open_base, say, was_given
from gemma_tuner.cli.settings import ModelSettings

if TYPE_CHECKING:
    from gemma_tuner.export.merged import MergeReport

app = typer.Typer(no_args_is_help=True, help="Carry a trained adapter away, in some form.")

_Run = Annotated[
    Path,
    typer.Argument(
        is_eager=True,
        callback=from_run(ModelSettings),
        metavar="RUN",
        help="The folder of a run, or of an adapter.",
        show_default=False,
    ),
]
_Target = Annotated[
    Path, typer.Argument(metavar="TARGET", help="What is written.", show_default=False)
]


@app.command()
@command
def adapter(run: _Run, target: _Target, model: ModelSettings) -> None:
    """Write a PEFT folder with a model card: transformers and peft open it."""
    from gemma_tuner.export.adapter import export_adapter
    from gemma_tuner.training.checkpoint import latest_checkpoint, read_state

    checkpoint = latest_checkpoint(run)
    state = read_state(checkpoint) if checkpoint else None
    gemma, processor = load_with_adapter(model, run)
    say(
        export_adapter(
            gemma,
            target,
            processor=processor,
            data=state.stream if state else None,
            training=state.config if state else None,
        )
    )


@app.command()
@command
def merged(
    *,
    context: typer.Context,
    run: _Run,
    target: _Target,
    model: str | None = None,
    revision: str | None = None,
) -> None:
    """Write the whole model with the adapter merged in, for any program.

    Args:
        model: The base: a folder, or a name on the Hub in the local cache; by default the run's,
            packed as it was in training.
        revision: Of the base on the Hub.
    """
    from gemma_tuner.export.merged import export_merged

    with _open(run, model, revision, is_packed=not was_given(context, "model")) as (folder, base):
        _say_merged(export_merged(folder, target, base=base, revision=revision))


@app.command()
@command
def mlx(
    *,
    run: _Run,
    target: _Target,
    model: str | None = None,
    revision: str | None = None,
    program: Literal["mlx-lm", "mlx-vlm"] = "mlx-lm",
) -> None:
    """Write an adapter for MLX: mlx_lm.generate --adapter-path TARGET.

    Args:
        model: The base: a folder, or a name on the Hub in the local cache; by default the run's.
        revision: Of the base on the Hub.
        program: mlx-lm, for text alone, or mlx-vlm.
    """
    from gemma_tuner.export.mlx import export_mlx

    with _open(run, model, revision) as (folder, base):
        say(export_mlx(folder, target, program=program, base=base, revision=revision))


@app.command()
@command
def gguf(
    *,
    context: typer.Context,
    run: _Run,
    target: _Target,
    model: str | None = None,
    revision: str | None = None,
    file_type: Literal["f32", "f16", "bf16", "q8_0", "q4_1"] = "bf16",
    adapter_only: bool = False,
) -> None:
    """Write the decoder with the adapter merged in as a GGUF file, for llama.cpp.

    TARGET is a file, NAME.gguf. Towers are not in it.

    Args:
        model: The base: a folder, or a name on the Hub in the local cache; by default the run's.
        revision: Of the base on the Hub.
        file_type: How weights are kept: f32, f16, bf16, q8_0, or q4_1 of a qalora.
        adapter_only: Only the adapter, for llama.cpp's --lora.
    """
    from gemma_tuner.export.gguf import export_gguf, export_gguf_adapter

    is_packed = not (adapter_only or was_given(context, "model"))
    with _open(run, model, revision, is_packed=is_packed) as (folder, base):
        source = {"base": base, "revision": revision}
        if adapter_only:
            say(export_gguf_adapter(folder, target, **source))
        else:
            _say_merged(export_gguf(folder, target, file_type=file_type, **source))


def _say_merged(report: MergeReport) -> None:
    from gemma_tuner.display import show_bytes

    say(
        f"{report.path}: {report.num_merged} weights merged, {report.num_copied} as they were, "
        f"{show_bytes(report.num_bytes, binary=True)}; rounding took {report.lost:.1e} of the "
        "adapter away"
    )


@contextmanager
def _open(
    run: Path, model: str | None, revision: str | None, *, is_packed: bool = False
) -> Iterator[tuple[Path, str | Path | None]]:
    """Find a run's adapter and its base: what was given, or what the adapter names."""
    # is_packed: Whether the base is wanted packed, where it was so in training.
    from gemma_tuner.export.bases import find_trained_base
    from gemma_tuner.training.adapters import find_adapter, read_adapter_base

    adapter = find_adapter(run)
    with open_base(model or read_adapter_base(adapter)) as base:
        yield adapter, find_trained_base(adapter, base, revision) if is_packed else base
