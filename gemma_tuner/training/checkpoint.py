"""Training checkpoints that are either whole or not there, and that resume bit for bit.

::

    output_dir/checkpoints/step-00000010/
        adapter_config.json        the adapter as PEFT writes it: PeftModel.from_pretrained
        adapter_model.safetensors  loads this folder
        gemma_tuner.json           a fingerprint of the base, checked when it is exported
        optimizer.safetensors      of AdamW "<parameter>.exp_avg", ".exp_avg_sq", ".step"
        trainer_state.json         step, stream, settings, totals, identity, versions

A checkpoint is written beside its place under a hidden name, forced to the disk and renamed, so a
killed or failed save leaves what was there before. One run owns its ``output_dir``: hidden
leftovers of a killed save are removed by the next one, and when the run is resumed.

No random state is kept, as nothing depends on one: a step seeds its dropout with its number.
Tensors are safetensors, the rest is JSON, nothing is pickled: loading runs no code. No file holds
training data or a path of the user's machine.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from gemma_tuner.differences import list_differences, shorten_differences
from gemma_tuner.disk import check_room, remove_folder, replaced
from gemma_tuner.errors import MALFORMED, CheckpointError, ConfigError, ResumeError
from gemma_tuner.models.adapter_files import (
    WEIGHTS,
    adapter_tensors,
    refuse_nonfinite,
    saving_explained,
    write_adapter,
)
from gemma_tuner.models.identity import describe_model
from gemma_tuner.training.optim import try_step

_OPTIMIZER = "optimizer.safetensors"
_STATE = "trainer_state.json"
_FORMAT = 1
_FOLDER = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True, slots=True)
class TrainerState:
    """What a run needs to continue, beside tensors. All of it is JSON.

    Args:
        step: Optimizer steps done.
        stream: The training stream's state after this step.
        config: The settings of the run, ``TrainConfig.to_dict()``; ``output_dir`` is not kept.
        totals: Running sums, such as tokens seen and steps skipped.
    """

    step: int
    stream: Mapping[str, Any]
    config: Mapping[str, Any]
    totals: Mapping[str, Any]


_STATE_NAMES = tuple(field.name for field in fields(TrainerState))


def save_checkpoint(
    output_dir: str | Path,
    state: TrainerState,
    model: PeftModel,
    optimizer: Optimizer,
    *,
    keep: int,
) -> Path:
    """Write a checkpoint, then delete the oldest beyond ``keep``."""
    folder = Path(output_dir) / "checkpoints" / name_checkpoint(state.step)
    kept = _optimizer_tensors(model, optimizer)
    refuse_nonfinite({**adapter_tensors(model), **kept})
    document = _encode_state(state, model)
    tensors = [*adapter_tensors(model).values(), *kept.values()]
    with saving_explained("save a checkpoint", Path(output_dir)):
        folder.parent.mkdir(parents=True, exist_ok=True)
        check_room(folder.parent, sum(tensor.nbytes for tensor in tensors))
        with replaced(folder) as temporary:
            temporary.mkdir()
            write_adapter(model, temporary)
            save_file(kept, temporary / _OPTIMIZER)
            (temporary / _STATE).write_text(document, encoding="utf-8")
    prune_checkpoints(output_dir, keep=keep)
    return folder


def prune_checkpoints(output_dir: str | Path, *, keep: int) -> None:
    """Delete the oldest checkpoints beyond ``keep``, and what a killed save left."""
    folder = Path(output_dir) / "checkpoints"
    with saving_explained("delete old checkpoints", folder):
        for leftover in folder.glob(".step-*"):
            shutil.rmtree(leftover)
        for old in list_checkpoints(output_dir)[:-keep]:
            remove_folder(old)


def name_checkpoint(step: int) -> str:
    """The folder of a step's checkpoint."""
    return f"step-{step:08d}"


def latest_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest whole checkpoint of a run."""
    checkpoints = list_checkpoints(output_dir)
    return checkpoints[-1] if checkpoints else None


def refuse_second_run(output_dir: str | Path) -> None:
    """Refuse to begin a run where there is one."""
    checkpoint = latest_checkpoint(output_dir)
    if checkpoint is not None:
        raise ConfigError(
            f"output_dir {show_folder(output_dir)!r} already holds a run ({checkpoint.name}); "
            "continue it with fit(resume=True), or choose another folder"
        )


def show_folder(output_dir: str | Path) -> str:
    """A run's folder as the user gave it; of an absolute path, which tells much, its last part."""
    path = Path(output_dir)
    return path.name if path.is_absolute() else str(path)


def load_checkpoint(
    path: str | Path,
    model: PeftModel,
    optimizer: Optimizer,
    *,
    check: Callable[[TrainerState], None] | None = None,
) -> TrainerState:
    """Put a run back to where it was saved: adapter and optimizer, bit for bit."""
    # Everything is read and compared, and ``check`` may refuse, before anything is changed.
    folder = Path(path)
    state, identity = _read_state(folder)
    adapter = _read_tensors(folder / WEIGHTS)
    kept = _read_tensors(folder / _OPTIMIZER)

    here = adapter_tensors(model)
    differences = (
        list_differences(identity, describe_model(model))
        or _compare_tensors("adapter", adapter, here)
        or _compare_tensors("optimizer", kept, _expected_tensors(model, optimizer, kept))
    )
    if differences:
        raise ResumeError(
            f"{folder.name} does not continue this run (saved there → here): "
            f"{shorten_differences(differences)}. Load the model and add the adapter as that run "
            "did, or start a new run in another output_dir"
        )

    if check is not None:
        check(state)
    with torch.no_grad():
        for name, tensor in adapter.items():
            here[name].copy_(tensor)
    _load_optimizer(model, optimizer, kept)
    return state


# --- what is saved ---------------------------------------------------------------------------


def _trainable(model: PeftModel) -> dict[str, Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _optimizer_tensors(model: PeftModel, optimizer: Optimizer) -> dict[str, Tensor]:
    """What the optimizer keeps, such as moments; parameters without a step yet have none."""
    return {
        f"{name}.{key}": value
        for name, parameter in _trainable(model).items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _expected_tensors(
    model: PeftModel, optimizer: Optimizer, saved: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Shapes of what it must hold: all of a parameter's state, or none before its first step."""
    begun = {name.rpartition(".")[0] for name in saved}
    return {
        f"{name}.{key}": value.to("meta")
        for name, parameter in _trainable(model).items()
        if name in begun
        for key, value in try_step(optimizer, parameter).items()
    }


def _load_optimizer(model: PeftModel, optimizer: Optimizer, saved: Mapping[str, Tensor]) -> None:
    numbers = {
        parameter: number
        for number, parameter in enumerate(
            p for group in optimizer.param_groups for p in group["params"]
        )
    }
    numbers_by_name = {name: numbers[parameter] for name, parameter in _trainable(model).items()}
    state: dict[int, dict[str, Tensor]] = {}
    for full_name, tensor in saved.items():
        name, _, key = full_name.rpartition(".")
        # A copy: load_file maps the file, and keeps its disk space once deleted.
        state.setdefault(numbers_by_name[name], {})[key] = tensor.clone()
    # The optimizer's own loader knows on which device each tensor belongs.
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"param_groups": groups, "state": state})


def _encode_state(state: TrainerState, model: PeftModel) -> str:
    config = {name: value for name, value in state.config.items() if name != "output_dir"}
    document = {
        "format": _FORMAT,
        **{name: getattr(state, name) for name in _STATE_NAMES},
        "config": config,
        "identity": describe_model(model),
        "versions": {
            package: metadata.version(package)
            for package in ("torch", "transformers", "peft", "safetensors")
        },
    }
    try:
        return json.dumps(document, indent=1, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"the state of step {state.step} cannot be written as JSON: {error}"
        ) from error


# --- reading back ----------------------------------------------------------------------------


def read_state(checkpoint: Path) -> TrainerState:
    """Read the state of a run from one of its checkpoints."""
    return _read_state(checkpoint)[0]


def _read_state(folder: Path) -> tuple[TrainerState, Any]:
    """A checkpoint's state, and the identity of the model that it is of."""
    path = folder / _STATE
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        found = document["format"]
        missing = {*_STATE_NAMES, "identity"} - document.keys()
    except (OSError, *MALFORMED) as error:
        raise _damaged(path, error) from None
    if found != _FORMAT:
        raise CheckpointError(
            f"{path.parent.name} has format {found!r}, this version of gemma_tuner reads "
            f"{_FORMAT}: resume with the version that wrote it"
        )
    if missing:
        raise _damaged(path, KeyError(*sorted(missing)))
    state = TrainerState(**{name: document[name] for name in _STATE_NAMES})
    return state, document["identity"]


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> CheckpointError:
    # An OSError's message holds the path.
    detail = "" if isinstance(error, OSError) else f": {error}"
    return CheckpointError(
        f"{path.name} is missing or damaged ({type(error).__name__}{detail}): delete the folder "
        f"{path.parent.name}; the next resume then uses the checkpoint before it"
    )


def _compare_tensors(
    kind: str, saved: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> list[str]:
    def describe(tensors: Mapping[str, Tensor]) -> dict[str, str]:
        return {f"{kind} {name}": f"{t.dtype} {list(t.shape)}" for name, t in tensors.items()}

    return list_differences(describe(saved), describe(expected))


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Whole checkpoints, oldest first; hidden folders are unfinished ones."""
    folder = Path(output_dir) / "checkpoints"
    if not folder.is_dir():
        return []
    steps = {
        path: int(match[1])
        for path in folder.iterdir()
        if (match := _FOLDER.fullmatch(path.name)) and path.is_dir()
    }
    return sorted(steps, key=steps.__getitem__)
