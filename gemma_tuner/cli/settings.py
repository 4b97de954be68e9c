"""The settings of commands, in groups that commands share; each field is an option.

A settings file has the same names, with underscores. No annotations as strings here: Typer reads
the options out of them.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from gemma_tuner.settings import TINY

ALIASES = {
    "fine-tune-type": "variant",
    "gradient-checkpointing": "grad-checkpoint",
    "no-gradient-checkpointing": "no-grad-checkpoint",
    "iters": "max-steps",
    "lr": "learning-rate",
    "max-seq-length": "max-tokens",
    "num-layers": "layers",
    "report-to": "trackers",
    "save-every": "save-every-steps",
    "steps": "max-steps",
    "steps-per-eval": "eval-every-steps",
    "steps-per-report": "log-every-steps",
}
"""What else options may be called: as mlx-lm, transformers, the recipes or ``TrainConfig`` do."""

_MODEL, _DATA, _COLUMNS, _ROWS = "Model", "Data", "Columns, where names do not tell", "Rows"
_ADAPTER, _TRAINING, _MEMORY, _RUN = "What is trained", "How it is trained", "Memory", "The run"

Modality = Literal["text", "image", "audio", "multimodal"]


def normalize_flag(name: str) -> str:
    """Call an option by its name here, as Typer's ``token_normalize_func``."""
    return ALIASES.get(name, name)


def _option(*flags: str, panel: str, help: str, **more: Any) -> Any:  # noqa: A002 - Typer's name
    # Without the dots, Typer would take the first flag for a default until it reads the group.
    return typer.Option(..., *flags, help=help, rich_help_panel=panel, **more)


def _column(help: str) -> Any:  # noqa: A002
    return _option(metavar="NAME", help=help, panel=_COLUMNS)


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Which model, and what of it."""

    model: Annotated[
        str,
        _option(
            metavar="NAME",
            help="A name on the Hugging Face Hub, a folder, or 'tiny': a small random model to "
            "try things out with.",
            panel=_MODEL,
        ),
    ] = TINY
    modality: Annotated[
        Modality,
        _option(metavar="KIND", help="text, image, audio or multimodal.", panel=_MODEL),
    ] = "text"
    revision: Annotated[
        str | None,
        _option(metavar="NAME", help="Branch, tag or commit on the Hub.", panel=_MODEL),
    ] = None
    device: Annotated[
        str | None,
        _option(
            metavar="NAME",
            help="mps, cuda, cuda:N or cpu; by default what is there.",
            panel=_MODEL,
        ),
    ] = None
    dtype: Annotated[
        str | None,
        _option(
            metavar="NAME",
            help="bfloat16 or float32; by default what suits the device.",
            panel=_MODEL,
        ),
    ] = None

    @property
    def modalities(self) -> tuple[Literal["text", "image", "audio"], ...]:
        """The parts of a model that are loaded."""
        if self.modality == "multimodal":
            return ("text", "image", "audio")
        return ("text",) if self.modality == "text" else ("text", self.modality)


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Which data, and what its columns mean."""

    data: Annotated[
        list[str] | None,
        _option(
            metavar="PLACE",
            help="A file, folder or glob; gs://bucket/...; bq://project.dataset.table; "
            "hf://owner/name or owner/name. By default bundled samples. May be given several "
            "times.",
            panel=_DATA,
        ),
    ] = None
    split: Annotated[
        str | None, _option(metavar="NAME", help="The split to train on.", panel=_DATA)
    ] = None
    held_out: Annotated[
        str | None,
        _option(
            metavar="PART",
            help="What is kept for evaluation: a fraction, 0 for nothing, or the name of a split, "
            "such as valid. By default 0.1; of the samples their split test.",
            panel=_DATA,
        ),
    ] = None
    seed: Annotated[
        int,
        _option(metavar="N", help="Decides order, dropout and first weights.", panel=_DATA),
    ] = 0
    max_bad_fraction: Annotated[
        float | None,
        _option(
            metavar="X",
            help="How much of the data may be unusable and is passed over; by default 0.01, "
            "and 0 of local files.",
            panel=_DATA,
        ),
    ] = None
    cache_dir: Annotated[
        Path | None,
        _option(
            metavar="FOLDER",
            help="Where manifests, media and quarantines are kept; by default "
            "~/.cache/gemma_tuner.",
            panel=_DATA,
        ),
    ] = None
    messages: Annotated[str | None, _column("Whole conversations.")] = None
    prompt: Annotated[str | None, _column("What is asked.")] = None
    response: Annotated[str | None, _column("What shall be answered.")] = None
    text: Annotated[str | None, _column("Plain documents.")] = None
    system: Annotated[str | None, _column("System turns.")] = None
    image: Annotated[str | None, _column("Pictures: paths or URIs.")] = None
    audio: Annotated[str | None, _column("Sounds: paths or URIs.")] = None
    id: Annotated[str | None, _column("Keys of the rows.")] = None


@dataclass(frozen=True, kw_only=True)
class RowSettings:
    """How an example becomes a row of tokens."""

    max_tokens: Annotated[
        int, _option(metavar="N", help="The longest row, in tokens.", panel=_ROWS)
    ] = 2048
    too_long: Annotated[
        Literal["error", "cut"],
        _option(
            metavar="KIND",
            help="What happens to a longer row: 'error', or 'cut', which takes the oldest text "
            "out of the prompt and counts it.",
            panel=_ROWS,
        ),
    ] = "error"
    mask_prompt: Annotated[
        bool, _option(metavar="", help="Train on answers only, or on every token.", panel=_ROWS)
    ] = True
    image_tokens: Annotated[
        int | None,
        _option(
            metavar="N",
            help="Of a picture: 70, 140, 280, 560 or 1120; by default as the model's processor "
            "says.",
            panel=_ROWS,
        ),
    ] = None
    max_seconds: Annotated[float, _option(metavar="X", help="The longest clip.", panel=_ROWS)] = (
        30.0
    )


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """What of the model is trained."""

    variant: Annotated[
        Literal["lora", "dora", "rslora", "full"],
        _option(
            metavar="KIND",
            help="Adapters: lora, dora or rslora; or full: the chosen layers themselves.",
            panel=_ADAPTER,
        ),
    ] = "lora"
    layers: Annotated[
        int,
        _option(metavar="N", help="The last N layers of the decoder; -1: all.", panel=_ADAPTER),
    ] = -1
    rank: Annotated[int, _option(metavar="N", help="Of the adapters.", panel=_ADAPTER)] = 16
    alpha: Annotated[
        float, _option(metavar="X", help="Their scale is alpha / rank.", panel=_ADAPTER)
    ] = 32.0
    dropout: Annotated[
        float, _option(metavar="X", help="Before the adapters.", panel=_ADAPTER)
    ] = 0.0
    targets: Annotated[
        list[str] | None,
        _option(
            metavar="PART",
            help="language, vision, audio, projectors, experts or a regular expression; by "
            "default language, and the towers of the modality. May be given several times.",
            panel=_ADAPTER,
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """How long and how a run trains, and where it is kept."""

    max_steps: Annotated[
        int | None,
        _option(metavar="N", help="Optimizer steps; by default one epoch.", panel=_TRAINING),
    ] = None
    epochs: Annotated[
        int | None, _option(metavar="N", help="Passes over the data, instead.", panel=_TRAINING)
    ] = None
    batch_size: Annotated[
        int, _option(metavar="N", help="Examples computed at a time.", panel=_TRAINING)
    ] = 4
    gradient_accumulation: Annotated[
        int, _option(metavar="N", help="Such batches in a step.", panel=_TRAINING)
    ] = 2
    learning_rate: Annotated[
        float | None,
        _option(metavar="X", help="The peak; by default 2e-4, of 'tiny' 5e-3.", panel=_TRAINING),
    ] = None
    schedule: Annotated[
        Literal["constant", "cosine", "linear"],
        _option(
            metavar="KIND",
            help="How it goes on after the peak: constant, cosine or linear.",
            panel=_TRAINING,
        ),
    ] = "cosine"
    warmup_steps: Annotated[
        int, _option(metavar="N", help="Steps up to the peak.", panel=_TRAINING)
    ] = 0
    weight_decay: Annotated[float, _option(metavar="X", help="AdamW's.", panel=_TRAINING)] = 0.0
    gradient_checkpointing: Annotated[
        bool | None,
        _option(
            # In full it would not fit into the help's first column.
            "--grad-checkpoint/--no-grad-checkpoint",
            metavar="",
            help="Compute layers twice and keep less; by default where memory needs it.",
            panel=_MEMORY,
        ),
    ] = None
    memory_gib: Annotated[
        float | None,
        _option(
            metavar="X",
            help="What the run may hold; by default what the device has.",
            panel=_MEMORY,
        ),
    ] = None
    log_every_steps: Annotated[
        int, _option(metavar="N", help="Steps between two records.", panel=_RUN)
    ] = 10
    eval_every_steps: Annotated[
        int | None,
        _option(
            metavar="N",
            help="Steps between two held-out losses; by default before and after.",
            panel=_RUN,
        ),
    ] = None
    sample_every_steps: Annotated[
        int | None,
        _option(
            metavar="N",
            help="Steps between two rounds of answers to four held-out examples, which are "
            "written into the run's folder; by default none.",
            panel=_RUN,
        ),
    ] = None
    save_every_steps: Annotated[
        int, _option(metavar="N", help="Steps between two checkpoints.", panel=_RUN)
    ] = 100
    trackers: Annotated[
        list[str] | None,
        _option(
            metavar="NAME",
            help="Experiment trackers: tensorboard, wandb, mlflow, ... May be given several "
            "times.",
            panel=_RUN,
        ),
    ] = None
    watch: Annotated[
        bool,
        _option("--watch", metavar="", help="Open a live page of the run.", panel=_RUN),
    ] = False
    out: Annotated[
        Path,
        _option(
            "--out",
            "--adapter-path",
            metavar="FOLDER",
            help="Of the run: settings, log, checkpoints, adapter.",
            panel=_RUN,
        ),
    ] = Path("runs/default")
    resume: Annotated[
        bool, _option("--resume", metavar="", help="Go on with the run in --out.", panel=_RUN)
    ] = False
