"""From settings to what the API takes: streams, models, collators."""

from __future__ import annotations

import dataclasses
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import typer

from gemma_tuner.cli.settings import (
    AdapterSettings,
    DataSettings,
    Modality,
    ModelSettings,
    RowSettings,
    RunSettings,
    list_media,
)
from gemma_tuner.display import quote_text
from gemma_tuner.errors import ConfigError
from gemma_tuner.models.lora_config import LoraConfig
from gemma_tuner.settings import TINY, Setting, save_settings
from gemma_tuner.streaming.options import StreamOptions
from gemma_tuner.training.config import TrainConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

    from gemma_tuner.collators.text import TextCollator
    from gemma_tuner.streaming.stream import ExampleStream
    from gemma_tuner.training.trainer import FitResult, Trainer

_FAMILY = "gemma4-e2b"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_FILE_SUFFIXES = {".csv", ".gz", ".json", ".jsonl", ".ndjson", ".parquet", ".tar"}
_HELD_OUT = 0.1


def say(text: object) -> None:
    """Write a line for the user on stdout, its control characters quoted."""
    sys.stdout.write(f"{quote_text(str(text))}\n")
    sys.stdout.flush()


def was_given(context: typer.Context, name: str) -> bool:
    """Whether a setting was given as a flag, not by a file and not by default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


# --- data ------------------------------------------------------------------------------------


def open_streams(
    data: DataSettings, modality: Modality | None
) -> tuple[ExampleStream, ExampleStream | None]:
    """Open what is trained on and what is held out."""
    held_out = data.held_out or (None if data.data else "test")
    return divide(partial(open_stream, data, modality), held_out, data.split)


def find_modality(model: ModelSettings, *streams: ExampleStream | None) -> ModelSettings:
    """Let the data say which towers a model needs; a modality that was given has narrowed it."""
    kinds = sorted({kind for stream in streams if stream for kind in stream.media_kinds})
    found = "multimodal" if len(kinds) > 1 else kinds[0] if kinds else "text"
    return dataclasses.replace(model, modality=found)


def divide(
    open_part: Callable[..., ExampleStream], held_out: str | None, whole: str | None = None
) -> tuple[ExampleStream, ExampleStream | None]:
    """Open what is trained on, and held out: a split, a fraction, or validation files beside."""
    try:
        fraction = _HELD_OUT if held_out is None else float(held_out)
    except ValueError:  # a split's name
        return open_part(split=whole or "train"), open_part(split=held_out)
    stream = open_part(split=whole)
    if held_out is None and "validation" in stream.report().splits_left_out:
        return stream, open_part(split="validation")
    return stream.split(fraction) if fraction else (stream, None)


def open_stream(data: DataSettings, modality: Modality | None, split: str | None) -> ExampleStream:
    """Open one stream of what ``--data`` names, without the media that a modality leaves out."""
    from gemma_tuner.streaming.report import explain_absence
    from gemma_tuner.testing.samples import sample_data

    options = {**_pick(data, StreamOptions), **({"split": split} if split else {})}
    kinds = list_media(modality)
    if modality is not None and data.data:
        options = {**{kind: False for kind in ("image", "audio") if kind not in kinds}, **options}
    places = list(data.data or ()) or [str(sample_data(modality or "text"))]
    stream = _open_places(places, options)
    if kinds and not stream.media_kinds:
        raise explain_absence(stream.report().parts, kinds, f"modality is {modality!r}")
    if modality is not None and (others := sorted(stream.media_kinds - set(kinds))):
        raise ConfigError(
            f"modality is {modality!r}, and rows hold {' and '.join(others)} too; leave modality "
            f"out, or turn their column off: {', '.join(f'{kind}=False' for kind in others)}"
        )
    return stream


def _pick(group: Any, kind: type[Any]) -> dict[str, Any]:
    """What a group of settings has for a class; what is not given is the class's default."""
    given = {field.name: getattr(group, field.name, None) for field in dataclasses.fields(kind)}
    return {name: value for name, value in given.items() if value is not None}


def _open_places(places: list[str], options: dict[str, Any]) -> ExampleStream:
    from gemma_tuner.storage.stores import SCHEMES
    from gemma_tuner.streaming import opening

    kinds = {_kind_of(place) for place in places}
    if len(kinds) > 1:
        raise ConfigError(
            f"data is of several kinds ({', '.join(sorted(kinds))}); give one kind, or mix "
            "streams with gemma_tuner.mix in a script"
        )
    names = [place.partition("://")[2] if "://" in place else place for place in places]
    match kinds.pop():
        case "local":
            return opening.stream_local(names, **options)
        case kind if kind in SCHEMES:
            return opening.stream_gcs(places, **options)
        case kind if len(places) > 1:
            raise ConfigError(f"{kind}:// takes one name, and there are {len(places)}; give one")
        case "hf":
            return opening.stream_hub(names[0], **options)
        case _:
            return opening.stream_bigquery(names[0], **options)


def is_local(data: DataSettings) -> bool:
    """Whether the data are files of this machine."""
    return all(_kind_of(place) == "local" for place in data.data or ())


def _kind_of(place: str) -> str:
    from gemma_tuner.storage.stores import SCHEMES

    scheme, separator, _ = place.partition("://")
    if separator:
        if scheme not in {*SCHEMES, "hf", "bq"}:
            raise ConfigError(
                f"data begins with {scheme}://; give a path, gs://bucket/..., hf://owner/name or "
                "bq://project.dataset.table"
            )
        return scheme
    is_hub_name = _HUB_NAME.fullmatch(place) and Path(place).suffix not in _FILE_SUFFIXES
    return "hf" if is_hub_name and not Path(place).parent.exists() else "local"


# --- models ----------------------------------------------------------------------------------


def load(settings: ModelSettings) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Load a model and its processor, or make the tiny one, and say so."""
    if settings.model == TINY:
        from gemma_tuner.testing.models.tiny import tiny_model

        refuse_bits(settings.model, settings.bits)
        _announce_tiny()
        model, processor = tiny_model(_FAMILY)
        return model.to(_choose_device(settings.device)), processor
    from gemma_tuner.checkpoints.loading import load_model

    return load_model(
        settings.model,
        modalities=settings.modalities,
        device=settings.device,
        dtype=settings.dtype,
        bits=settings.bits,
        revision=settings.revision,
    )


def refuse_bits(model: str, bits: int | None) -> None:
    """Refuse what the tiny model does not take: it is no checkpoint that could be packed."""
    if model == TINY and bits is not None:
        raise ConfigError(f"bits is {bits}, and {TINY!r} is not packed; give a model with --model")


def _announce_tiny() -> None:
    sys.stderr.write(
        "NO REAL MODEL: this is 'tiny', a small random one, which shows that everything works "
        "and can say nothing; give --model google/gemma-4-E2B-it\n"
    )


def _choose_device(device: str | None) -> Any:
    from gemma_tuner.device import choose_device

    return choose_device(device or "cpu")[0]


def load_with_adapter(
    settings: ModelSettings, run: Path | None, *, trainable: bool = False
) -> tuple[Any, Any]:
    """Load a model, and put a trained adapter on it."""
    if run is None:
        return load(settings)
    from gemma_tuner.models.adapter_files import MLX_WEIGHTS, read_fingerprint
    from gemma_tuner.models.few_bits.grids import find_bits
    from gemma_tuner.training.adapters import (
        find_adapter,
        follow_training,
        list_adapter_modalities,
        load_adapter,
        read_adapter_base,
    )

    if run.name == MLX_WEIGHTS:  # as mlx-lm names it
        run = run.parent
    if (run / MLX_WEIGHTS).is_file():
        return _load_with_mlx(settings, run, trainable=trainable)
    adapter = find_adapter(run)
    needed = {*settings.modalities, *list_adapter_modalities(adapter)}
    if needed > set(settings.modalities):
        modality = (needed - {"text"}).pop() if len(needed) == 2 else "multimodal"
        settings = dataclasses.replace(settings, modality=modality)
    if settings.bits is None and (grid := read_fingerprint(adapter).get("grid")):
        settings = dataclasses.replace(settings, bits=find_bits(grid))
    base = read_adapter_base(adapter)
    if settings.model == TINY and base:
        settings = dataclasses.replace(settings, model=base)
    model, processor = load(settings)
    model = load_adapter(model, adapter, trainable=trainable)
    return model, follow_training(model, processor)


def _load_with_mlx(settings: ModelSettings, folder: Path, *, trainable: bool) -> tuple[Any, Any]:
    """Load a model with an adapter of mlx-lm or mlx-vlm, made PEFT's on the way."""
    from gemma_tuner.export.mlx import import_mlx

    with open_base(settings.model) as base, TemporaryDirectory() as temporary:
        made = import_mlx(folder, Path(temporary) / "adapter", base=base)
        return load_with_adapter(settings, made, trainable=trainable)


def read_processor(settings: ModelSettings) -> ProcessorMixin:
    """Read a model's processor, and nothing else of it."""
    if settings.model == TINY:
        from gemma_tuner.testing.models.processor import tiny_processor

        _announce_tiny()
        return tiny_processor(_FAMILY)
    from gemma_tuner.checkpoints import loading

    return loading.read_processor(settings.model, settings.revision)


@contextmanager
def open_base(model: str | None) -> Iterator[str | None]:
    """Give a model's folder or name; the tiny one gets a folder for as long as it is needed."""
    if model != TINY:
        yield model
        return
    from gemma_tuner.testing.models.tiny import save_tiny_model

    _announce_tiny()
    with TemporaryDirectory() as folder:
        path = Path(folder) / TINY
        save_tiny_model(_FAMILY, path)
        yield str(path)


def make_collator(settings: ModelSettings, rows: RowSettings, processor: Any) -> TextCollator:
    """Make the collator of a modality."""
    from gemma_tuner.collators.audio import AudioCollator
    from gemma_tuner.collators.image import ImageCollator
    from gemma_tuner.collators.multimodal import MultimodalCollator
    from gemma_tuner.collators.text import TextCollator

    kinds = {"text": TextCollator, "image": ImageCollator, "audio": AudioCollator}
    kind = kinds.get(settings.modality or "text", MultimodalCollator)
    train_on = "assistant" if rows.mask_prompt else "all"
    return kind(processor, **{**_pick(rows, kind), "train_on": train_on})


def make_lora(adapter: AdapterSettings, model: ModelSettings, seed: int = 0) -> LoraConfig:
    """Say what of a model is trained."""
    towers = {"image": "vision", "audio": "audio"}
    targets = ["language", *(towers[kind] for kind in list_media(model.modality))]
    layers = None if adapter.layers == -1 else adapter.layers
    given = {"targets": targets, **_pick(adapter, LoraConfig), "layers": layers, "seed": seed}
    return LoraConfig(**given)


# --- runs ------------------------------------------------------------------------------------


def choose_length(
    context: typer.Context, run: RunSettings, settings: dict[str, Setting]
) -> RunSettings:
    """Let a flag win over a file that says the run's length in the other way."""
    for name, other in (("max_steps", "epochs"), ("epochs", "max_steps")):
        if was_given(context, name) and not was_given(context, other):
            settings.pop(other, None)
            return dataclasses.replace(run, **{other: None})
    return run


def make_config(run: RunSettings, *, seed: int, is_tiny: bool) -> TrainConfig:
    """Say how a run trains."""
    given = {"learning_rate": 5e-3 if is_tiny else 2e-4, **_pick(run, TrainConfig)}
    if run.max_steps is None and run.epochs is None:
        given["epochs"] = 1
    return TrainConfig.from_dict(given | {"seed": seed, "output_dir": run.out})


def fit(
    trainer: Trainer, settings: Mapping[str, Setting], *, resume: bool, go_on: list[str]
) -> FitResult:
    """Train, keep the settings in the run's folder, and end where a signal has stopped the run."""
    from gemma_tuner.training.checkpoint import latest_checkpoint
    from gemma_tuner.training.interrupt import EARLY_STOPPING
    from gemma_tuner.training.lock import refuse_running

    out = trainer.config.output_dir
    is_main = trainer.processes.is_main
    if is_main:  # which may hold the folder before the others come here
        refuse_running(out)
    # A run that is there already may refuse these settings, and keeps its own until it has not.
    if is_main and latest_checkpoint(out) is None:
        save_settings(out, settings)
    result = trainer.fit(resume=resume)
    if is_main:
        save_settings(out, settings)
    if result.stopped_by not in (None, EARLY_STOPPING):
        sys.stderr.write(
            f"stopped after step {result.step}, which is saved; go on with: {shlex.join(go_on)}\n"
        )
        number = signal.SIGINT if result.stopped_by == "SIGINT" else signal.SIGTERM
        raise SystemExit(128 + number)
    return result


def show_losses(result: FitResult) -> str:
    """Write a run's held-out losses as one line, and what there is to say of them."""
    losses = " → ".join(f"{record.loss:.4f} (step {record.step})" for record in result.held_out)
    return "\n".join([f"held-out loss: {losses}", *result.notes])
