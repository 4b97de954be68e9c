"""An adapter's folder as PEFT writes it, and beside it a fingerprint of the base."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from torch import Tensor

from gemma_tuner.disk import (
    check_room,
    disk_errors_explained,
    replaced,
    sync,
    sync_all,
    temporary_sibling,
)
from gemma_tuner.errors import MALFORMED, CheckpointError, ConfigError, DivergedError
from gemma_tuner.models.few_bits.grids import PACKED, Grid, name_grids
from gemma_tuner.models.identity import active_adapter, hash_decoder_norms, portable_name

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
MLX_WEIGHTS = "adapters.safetensors"
FINGERPRINT = "gemma_tuner.json"
"""Beside an adapter: ``base_norms_sha256`` of the release that it was trained on, the ``grid`` of
that one's packed weights, the ``step`` of the run that saved it, and the ``collator``'s settings;
beside a checkpoint with an adapter in it: ``merged``."""
QALORA = "qalora"
"""Beside an adapter of that variant in ``FINGERPRINT``: how its inputs are pooled."""
_POOLING = (
    "inputs are summed in groups and divided by the root of their size; gemma_tuner.load_adapter "
    "opens this adapter, PEFT does not"
)
TEMPLATE = "chat_template.jinja"
_HASH = "chat_template_sha256"


@dataclass(frozen=True, slots=True)
class TrainedWith:
    """How the prompts were written that an adapter was trained with.

    Args:
        collator: Settings of the collator, by name.
        chat_template: The processor's.
    """

    collator: Mapping[str, Any]
    chat_template: str

    def to_dict(self) -> dict[str, Any]:
        """The settings with the template's hash, as JSON has them."""
        return {**self.collator, _HASH: hash_text(self.chat_template)}


def trained_with(model: Any) -> TrainedWith | None:
    """How a model's active adapter, or what was merged into the model, was trained, if known."""
    return getattr(_holder(model), "trained_with", None)


def set_trained_with(model: Any, known: TrainedWith | None) -> None:
    """Let a model know how it was trained; whatever is saved of it will say so."""
    if (holder := _holder(model)) is not None:
        holder.trained_with = known


def _holder(model: Any) -> Any:
    if not isinstance(model, PeftModel):
        return model
    active = model.active_adapters  # several at once were not trained together
    return model.peft_config[active[0]] if len(active) == 1 else None


def write_trained_with(folder: Path, known: TrainedWith | None, **more: Any) -> None:
    """Write beside weights how they were trained, and what else is known of them."""
    write_json(folder / FINGERPRINT, {**more, **({"collator": known.to_dict()} if known else {})})
    if known:
        (folder / TEMPLATE).write_text(known.chat_template, encoding="utf-8")


def read_trained_with(folder: Path) -> TrainedWith | None:
    """Read how weights were trained; None where nothing beside them says it."""
    try:
        settings = json.loads((folder / FINGERPRINT).read_text(encoding="utf-8")).get("collator")
        if settings is None:
            return None
        template = (folder / TEMPLATE).read_text(encoding="utf-8")
        known = TrainedWith({k: v for k, v in settings.items() if k != _HASH}, template)
        is_whole = known.to_dict() == settings
    except FileNotFoundError:
        return None
    except (OSError, *MALFORMED) as error:
        raise _unreadable(folder, error) from None
    if not is_whole:
        raise CheckpointError(
            f"{TEMPLATE} of {folder.resolve().name} is not the one that it was trained with; put "
            f"the original back, or delete {FINGERPRINT} to go by your own settings"
        )
    return known


def read_fingerprint(folder: Path) -> dict[str, Any]:
    """Read what an adapter's folder says of the base that it was trained on; empty without."""
    path = folder / FINGERPRINT
    if not path.is_file():
        return {}
    try:
        known = dict(json.loads(path.read_text(encoding="utf-8")))
        for grid in known["grid"].split(" and ") if "grid" in known else ():
            Grid.parse(grid)
    except (OSError, ConfigError, *MALFORMED) as error:
        raise _unreadable(folder, error) from None
    return known


def _unreadable(folder: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{FINGERPRINT} of {folder.resolve().name} cannot be read ({type(error).__name__}); "
        "save the adapter again"
    )


def hash_text(text: str) -> str:
    """SHA-256 of a text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def save_adapter(model: PeftModel, path: str | Path, step: int | None = None) -> Path:
    """Write the active adapter as a PEFT folder; replace an earlier one once this is whole."""
    num_bytes = sum(tensor.nbytes for tensor in adapter_tensors(model).values())
    return _place(Path(path), num_bytes, lambda folder: write_adapter(model, folder, step=step))


def copy_adapter(source: Path, path: str | Path) -> Path:
    """Write a saved adapter's folder again elsewhere, as :func:`save_adapter` does."""
    num_bytes = sum(file.stat().st_size for file in source.iterdir())
    return _place(
        Path(path),
        num_bytes,
        lambda folder: shutil.copytree(source, folder, dirs_exist_ok=True),
    )


def _place(folder: Path, num_bytes: int, write: Callable[[Path], object]) -> Path:
    """Have an adapter's files written beside their places, and put there once they are whole."""
    place = folder.resolve()
    with saving_explained("save an adapter", folder):
        place.mkdir(parents=True, exist_ok=True)
        check_room(place, num_bytes)
        if _holds_adapter_alone(place):
            with replaced(place) as temporary:
                temporary.mkdir()
                write(temporary)
            return folder
        with temporary_sibling(place / "adapter") as temporary:
            temporary.mkdir()
            write(temporary)
            sync_all(temporary)
            # Without its settings nothing opens the folder: they go first, and come last.
            (place / CONFIG).unlink(missing_ok=True)
            sync(place)
            for file in sorted(temporary.iterdir(), key=lambda file: file.name == CONFIG):
                file.replace(place / file.name)
            sync(place)
    return folder


def _holds_adapter_alone(folder: Path) -> bool:
    """Whether a folder can be exchanged as a whole: not a disk, nor where this process works."""
    names = {path.name for path in folder.iterdir()}
    is_fixed = folder.is_mount() or Path.cwd().is_relative_to(folder)
    return CONFIG in names <= {CONFIG, WEIGHTS, FINGERPRINT, TEMPLATE} and not is_fixed


def write_adapter(model: PeftModel, folder: Path, *, step: int | None = None) -> None:
    """Write the active adapter's files into an empty folder."""
    refuse_nonfinite(adapter_tensors(model))
    name = active_adapter(model)
    model.save_pretrained(
        str(folder), safe_serialization=True, save_embedding_layers=False, selected_adapters=[name]
    )
    if name != "default":  # PEFT has made a folder of that name
        named = folder / name
        for file in named.iterdir():
            file.replace(folder / file.name)
        named.rmdir()
    # The model card that PEFT adds names the base by its local path.
    (folder / "README.md").unlink(missing_ok=True)
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = portable_name(config["base_model_name_or_path"])
    write_json(folder / CONFIG, config)
    base: Any = model.get_base_model()
    more: dict[str, Any] = {"base_norms_sha256": hash_base(base)}
    if grid := name_grids(getattr(base.config, PACKED, None)):
        more["grid"] = grid
    if config.get("use_qalora"):
        more[QALORA] = _POOLING
    write_trained_with(
        folder, trained_with(model), **more, **({} if step is None else {"step": step})
    )


def refuse_nonfinite(tensors: Mapping[str, Tensor]) -> None:
    """Refuse to save what no training can go on from, and nobody can use."""
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise DivergedError(
            f"{len(broken)} of {len(tensors)} trained tensors are infinite or undefined "
            f"({broken[0]}{', ...' if len(broken) > 1 else ''}): they are not saved, and what was "
            "saved before stays. With a lower learning rate begin a run from there, "
            "load_adapter(model, FOLDER, trainable=True), or anew"
        )


def hash_base(model: Any) -> str:
    """Fingerprint the release that a model is of, whether or not PEFT has wrapped its layers."""
    names = {
        name.replace(".original_module", ""): name
        for name, _ in model.named_parameters()
        if ".modules_to_save." not in name
    }
    return hash_decoder_norms(names, lambda name: model.get_parameter(names[name]))


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a JSON object as PEFT writes its settings: indented, its keys in order."""
    path.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def adapter_tensors(model: PeftModel) -> dict[str, Tensor]:
    """The active adapter under PEFT's file names; the tensors share the parameters' memory."""
    # "auto" would ask the Hub whether the base's vocabulary was resized.
    return get_peft_model_state_dict(
        model, adapter_name=active_adapter(model), save_embedding_layers=False
    )


def saving_explained(what: str, folder: Path) -> AbstractContextManager[None]:
    """Turn a disk's errors into a CheckpointError with a remedy."""
    return disk_errors_explained(
        lambda reason: CheckpointError(
            f"cannot {what} in {folder.resolve().name!r}: {reason}. What was saved before is "
            "untouched. Free disk space there, or choose another folder, and resume"
        ),
        SafetensorError,
    )
