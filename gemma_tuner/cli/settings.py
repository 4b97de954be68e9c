"""The settings of commands, in groups that commands share; each field is an option.

Name, type, default and help of most are those of ``TrainConfig``, ``LoraConfig`` and
``StreamOptions``; the others stand here, their help in the docstring too. A settings file has the
same names, with underscores. No annotations as strings here: Typer reads options out of them.
"""

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import Field, dataclass, fields
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Literal,
    TypeVar,
    dataclass_transform,
    get_args,
    get_origin,
    get_type_hints,
)

import typer
from docstring_parser import google
from typer.core import TyperCommand, TyperGroup

from gemma_tuner.checks import split_union
from gemma_tuner.collators.settings import CollatorSettings
from gemma_tuner.habits import INSTEAD, SAME
from gemma_tuner.modalities import MediaKind
from gemma_tuner.models.lora_config import LoraConfig
from gemma_tuner.settings import TINY
from gemma_tuner.sources.columns import KEYWORDS
from gemma_tuner.streaming.options import StreamOptions
from gemma_tuner.training.config import TrainConfig

ALIASES = {
    **{
        theirs.replace("_", "-"): ours.replace("_", "-")
        for theirs, ours in SAME.items()
        if theirs not in ("grad_checkpoint", "max_tokens")  # flags of that name
    },
    "dataset-name": "data",
    "early-stopping-patience": "patience",
    "gradient-checkpointing": "grad-checkpoint",
    "no-gradient-checkpointing": "no-grad-checkpoint",
    "output-dir": "out",
    "resume-adapter-file": "adapter",
    "thinking": "enable-thinking",
    "train-file": "data",
}
"""What else options may be called: as mlx-lm, transformers, the recipes or ``TrainConfig`` do."""

PANELS = (
    *(None, "Model", "Data", "Columns, where names do not tell", "How data is read", "Rows"),
    *("What is trained", "How it is trained", "Memory", "The run", "The recipe"),
)
_, _MODEL, _DATA, _COLUMNS, _READING, _ROWS, _ADAPTER, _TRAINING, _MEMORY, _RUN, _RECIPE = PANELS
_METAVARS = {int: "N", float: "X", bool: "", Path: "FOLDER", tuple: "X X", Literal: "KIND"}
_MEMORY_FIELDS = ("gradient_checkpointing", "loss_chunk_tokens", "memory_gib", "feature_cache_gib")

Modality = Literal["text", "image", "audio", "multimodal"]


def list_media(modality: Modality | None) -> tuple[MediaKind, ...]:
    """The kinds of media that a modality means beside text."""
    if modality == "multimodal":
        return ("image", "audio")
    return () if modality in (None, "text") else (modality,)


_Settings: Any = object  # a base, so that type checkers allow for the fields that are read
_T = TypeVar("_T")


def normalize_flag(name: str) -> str:
    """Call an option by its name here, as Typer's ``token_normalize_func``."""
    return ALIASES.get(name, name)


class _Answers:
    # Not in normalize_flag, which is asked about choices too: bf16 is one, --bf16 a foreign flag.
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for given in args:
            name = given.partition("=")[0]
            if name.startswith("--") and (instead := INSTEAD.get(name[2:].replace("-", "_"))):
                raise typer.BadParameter(f"there is no {name}; {instead}", ctx=ctx)
        parsed: list[str] = super().parse_args(ctx, args)  # type: ignore[misc]
        return parsed


class AnsweringCommand(_Answers, TyperCommand):
    """A command that says what flags of other trainers are here."""


class AnsweringGroup(_Answers, TyperGroup):
    """Commands that say what flags of other trainers are here."""


# --- options from docstrings -------------------------------------------------------------------


@dataclass(frozen=True)
class _Otherwise:
    """What a command has otherwise than the class from which it has an option."""

    default: Any = None
    flags: tuple[str, ...] = ()
    shown: str | None = None  # what the help gives as the default, where that is no value


def make_option(
    name: str, hint: Any, given: Any, text: str, panel: str | None = None
) -> tuple[Any, Any]:
    """Make an option's type, as Typer reads it, and its default."""
    given = given if isinstance(given, _Otherwise) else _Otherwise(given)
    default = None if given.default == () else given.default
    members = split_union(hint)
    takes = Path if Path in members else members[0]
    takes = list[get_args(takes)] if get_origin(takes) is Sequence else takes
    flags = given.flags or ([f"--{name.replace('_', '-')}"] if default is False else [])
    option = typer.Option(
        # Without the dots, Typer would take the first flag for a default until it reads a group.
        *(..., *flags),
        help=_shorten(text) + " May be given several times." * (get_origin(takes) is list),
        metavar=_METAVARS.get(get_origin(takes) or takes, "NAME"),
        rich_help_panel=panel,
        show_default=given.shown or default is not False,
    )
    return Annotated[takes if default is not None else takes | None, option], default


def _shorten(text: str) -> str:
    """The first sentence of what a docstring says."""
    first = re.split(r"(?<=\.)\s+(?=[A-Z])", text.replace("``", ""), maxsplit=1)[0]
    return " ".join(first.split())


def read_help(docstring: str | None) -> dict[str, str]:
    """Read what a docstring says of each argument."""
    return {p.arg_name: p.description or "" for p in google.parse(docstring or "").params}


@dataclass_transform(frozen_default=True, kw_only_default=True)
def options(
    panel: str,
    of: type[Any] | None = None,
    *,
    but: Collection[str] = (),
    panels: Callable[[Field[Any]], str] | None = None,
) -> Callable[[type[_T]], type[_T]]:
    """Make a group of options: the fields of a public dataclass, and those that it spells out."""

    def decorate(group: type[_T]) -> type[_T]:
        hints: dict[str, Any] = {}

        def add(name: str, hint: Any, given: Any, text: str, panel: str) -> None:
            hints[name], default = make_option(name, hint, given, text, panel)
            setattr(group, name, default)

        own, own_texts = group.__annotations__, read_help(group.__doc__)
        types, texts = (get_type_hints(of), read_help(of.__doc__)) if of else ({}, {})
        for field in fields(of) if of else ():
            if field.name not in (*but, *own):
                given = vars(group).get(field.name, field.default)
                where = panels(field) if panels else panel
                add(field.name, types[field.name], given, texts.get(field.name, ""), where)
        for name, hint in own.items():
            add(name, hint, vars(group)[name], own_texts.get(name, ""), panel)
        group.__annotations__ = hints
        return dataclass(frozen=True, kw_only=True)(group)

    return decorate


# --- groups ------------------------------------------------------------------------------------


@options(_MODEL)
class ModelSettings:
    """Which model, and what of it.

    Args:
        model: A name on the Hugging Face Hub, a folder, or 'tiny': a small random model to try
            things out with.
        modality: text, image, audio or multimodal; by default what the data holds. A narrower one
            reads the data without the columns of other media.
        revision: Branch, tag or commit on the Hub.
        device: mps, cuda, cuda:N or cpu; by default what is there.
        dtype: bfloat16 or float32; by default what suits the device.
        bits: 4 or 8, of the decoder's large matrices: the model is packed once, and kept. By
            default as they are stored.
    """

    model: str = TINY
    modality: Modality | None = None
    revision: str | None = None
    device: str | None = None
    dtype: str | None = None
    bits: int | None = None

    @property
    def modalities(self) -> tuple[Literal["text", "image", "audio"], ...]:
        """The parts of a model that are loaded."""
        return ("text", *list_media(self.modality))


def _panel_of_stream(field: Field[Any]) -> str:
    return _COLUMNS if field.name in (*KEYWORDS, "ignore") else _READING


@options(_DATA, StreamOptions, but=("fetch", "gcs_client"), panels=_panel_of_stream)
class DataSettings(_Settings):
    """Which data, and what its columns mean.

    Args:
        data: A file, folder or glob; gs://bucket/...; bq://project.dataset.table; hf://owner/name
            or owner/name; by default bundled samples.
        split: The split to train on.
        held_out: What is kept for evaluation: a fraction, 0 for nothing, or the name of a split,
            such as valid; by default the data's files of that split, or else 0.1.
        seed: Decides order, dropout and first weights.
    """

    data: Sequence[str] | None = None
    split: str | None = None
    held_out: str | None = None
    seed: int = 0
    max_bad_fraction = _Otherwise(shown="0.01; 0 while local files are read")


@options(_ROWS, CollatorSettings, but=("train_on",))
class RowSettings(_Settings):
    """How an example becomes a row of tokens.

    Args:
        mask_prompt: Train on answers only, or on every token.
    """

    mask_prompt: bool = True


@options(_ADAPTER, LoraConfig, but=("seed",))
class AdapterSettings(_Settings):
    """What of the model is trained."""

    layers = _Otherwise(-1)
    targets = _Otherwise(shown="language, and the towers of the modality")


def _panel_of_run(field: Field[Any]) -> str:
    if field.name in _MEMORY_FIELDS:
        return _MEMORY
    return _RUN if field.metadata.get("free_on_resume") else _TRAINING


@options(_RUN, TrainConfig, but=("seed", "output_dir"), panels=_panel_of_run)
class RunSettings(_Settings):
    """How long and how a run trains, and where it is kept.

    Args:
        sample_every_steps: Steps between two rounds of answers to four held-out examples, which
            are written into the run's folder; by default none.
        from_adapter: The folder of an adapter or a run, or of mlx-lm's adapter, to go on training.
        out: The folder of the run: settings, log, checkpoints, adapter.
        resume: Go on with the run in --out.
    """

    epochs = _Otherwise(shown="1 without --max-steps")
    batch_size = 4
    gradient_accumulation = 2
    learning_rate = _Otherwise(shown="2e-4; 5e-3 of 'tiny'")
    # In full it would not fit into the help's first column.
    gradient_checkpointing = _Otherwise(flags=("--grad-checkpoint/--no-grad-checkpoint",))
    early_stopping_patience = _Otherwise(flags=("--patience",))
    sample_every_steps: int | None = None
    from_adapter: Path | None = _Otherwise(None, ("--adapter",))  # pyright: ignore[reportAssignmentType]
    out: Path = _Otherwise(Path("runs/default"), ("--out", "--adapter-path"))  # pyright: ignore[reportAssignmentType]
    resume: bool = False


@options(_RECIPE)
class RecipeSettings:
    """What recipes alone take.

    Args:
        answers: Held-out examples to score; 0: none.
        answer_tokens: The longest answer.
        language: Of the transcripts, such as en: how scores normalise.
        table: project.dataset.table; by default samples, from local servers.
        recipe: The path of the recipe whose settings these are.
    """

    answers: int = 100
    answer_tokens: int = 128
    language: str | None = None
    table: str | None = None
    recipe: str | None = None
