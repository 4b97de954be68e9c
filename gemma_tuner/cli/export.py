"""``gemma-tuner export``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from gemma_tuner.cli.commands import command
from gemma_tuner.cli.defaults import from_run
from gemma_tuner.cli.opening import load_with_adapter, open_base, say
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
_Model = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="The base model: a folder, or a name on the Hub that is in the local cache; by "
        "default the run's.",
    ),
]
_Revision = Annotated[str | None, typer.Option(metavar="NAME", help="Of the base on the Hub.")]


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
def merged(run: _Run, target: _Target, model: _Model = None, revision: _Revision = None) -> None:
    """Write the whole model with the adapter merged in, for any program."""
    from gemma_tuner.export.merged import export_merged

    folder = _adapter_of(run)
    with open_base(_base_of(folder, model)) as base:
        _say_merged(export_merged(folder, target, base=base, revision=revision))


@app.command()
@command
def mlx(
    *,
    run: _Run,
    target: _Target,
    model: _Model = None,
    revision: _Revision = None,
    program: Annotated[
        Literal["mlx-lm", "mlx-vlm"],
        typer.Option(metavar="NAME", help="mlx-lm, for text alone, or mlx-vlm."),
    ] = "mlx-lm",
) -> None:
    """Write an adapter for MLX: mlx_lm.generate --adapter-path TARGET."""
    from gemma_tuner.export.mlx import export_mlx

    folder = _adapter_of(run)
    with open_base(_base_of(folder, model)) as base:
        say(export_mlx(folder, target, program=program, base=base, revision=revision))


@app.command()
@command
def gguf(
    *,
    run: _Run,
    target: _Target,
    model: _Model = None,
    revision: _Revision = None,
    file_type: Annotated[
        Literal["f32", "f16", "bf16", "q8_0"],
        typer.Option(metavar="KIND", help="How weights are kept: f32, f16, bf16 or q8_0."),
    ] = "bf16",
    adapter_only: Annotated[
        bool,
        typer.Option(
            "--adapter-only", metavar="", help="Only the adapter, for llama.cpp's --lora."
        ),
    ] = False,
) -> None:
    """Write the decoder with the adapter merged in as a GGUF file, for llama.cpp.

    TARGET is a file, NAME.gguf. Towers are not in it.
    """
    from gemma_tuner.export.gguf import export_gguf, export_gguf_adapter

    folder = _adapter_of(run)
    with open_base(_base_of(folder, model)) as base:
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


def _adapter_of(run: Path) -> Path:
    from gemma_tuner.training.adapters import find_adapter

    return find_adapter(run)


def _base_of(adapter: Path, model: str | None) -> str | None:
    """The base that was given, or the run's, or what the adapter names."""
    from gemma_tuner.training.adapters import read_adapter_base

    return model or read_adapter_base(adapter)
