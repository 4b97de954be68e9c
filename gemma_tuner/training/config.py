"""TrainConfig: every setting of a training run, checked when it is made."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from gemma_tuner.checks import is_number, is_whole_number, name_nearest
from gemma_tuner.errors import ConfigError

Schedule = Literal["constant", "cosine", "linear"]
SCHEDULES: tuple[Schedule, ...] = ("constant", "cosine", "linear")

# Source: LoggerType of accelerate 1.15.
TRACKERS = (
    *("aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio"),
    "wandb",
)

# What a resumed run may change: its length (which moves the rest of a decaying schedule), what it
# reports, and what costs memory but changes no gradient.
_FREE_ON_RESUME = (
    "max_steps",
    "epochs",
    "gradient_checkpointing",
    "loss_chunk_tokens",
    "memory_gib",
    "feature_cache_gib",
    "log_every_steps",
    "eval_every_steps",
    "save_every_steps",
    "keep_checkpoints",
    "max_nonfinite_steps",
    "output_dir",
    "progress",
    "trackers",
    "watch",
)

# The smallest value of each whole-numbered setting.
_SMALLEST = {
    "max_steps": 1,
    "epochs": 1,
    "batch_size": 1,
    "gradient_accumulation": 1,
    "warmup_steps": 0,
    "seed": 0,
    "loss_chunk_tokens": 1,
    "log_every_steps": 1,
    "eval_every_steps": 1,
    "save_every_steps": 1,
    "keep_checkpoints": 1,
    "max_nonfinite_steps": 1,
}
_MAY_BE_NONE = (
    "max_steps",
    "epochs",
    "eval_every_steps",
    "save_every_steps",
    "gradient_checkpointing",
    "loss_chunk_tokens",
    "memory_gib",
)
_POSITIVE = ("learning_rate", "epsilon", "max_grad_norm", "memory_gib")
_FROM_ZERO = ("weight_decay", "feature_cache_gib")
_SWITCHES = ("gradient_checkpointing", "progress", "watch")
# The largest seed that torch.Generator.manual_seed takes on every device.
_LARGEST_SEED = 2**63 - 1


@name_nearest
@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class TrainConfig:
    """The settings of a training run. Values are checked, never converted.

    ``print`` shows those that are not the defaults, :meth:`to_dict` has all.

    Args:
        max_steps: Optimizer steps to train for. Give either this or ``epochs``.
        epochs: Passes over the training stream. Give either this or ``max_steps``.
        batch_size: Examples in a micro-batch, what is on the device at one time.
        gradient_accumulation: Micro-batches in an optimizer step. ``batch_size *
            gradient_accumulation`` examples make one step; how they are cut does not change it.
        learning_rate: The peak, reached at the end of the warm-up.
        schedule: How the rate goes on after the warm-up: "cosine" or "linear" down to 0, or
            "constant".
        warmup_steps: Optimizer steps over which the rate rises linearly to its peak.
        weight_decay: AdamW's decoupled decay, as a fraction of the learning rate.
        betas: AdamW's decay rates of the first and second moment.
        epsilon: AdamW's term in the denominator.
        max_grad_norm: Gradients longer than this (L2, all parameters together) are scaled
            down to it.
        seed: Seeds dropout and the order of nothing else: streams carry their own seed.
        gradient_checkpointing: Whether each layer keeps only its input and computes the rest
            again in the backward pass: much less memory, about a third more time. None chooses
            for each micro-batch what fits, see ``Trainer.plan``.
        loss_chunk_tokens: Target tokens whose logits exist at one time; None lets the plan
            choose.
        memory_gib: What the run may hold on its device, in GiB; None asks the device.
        feature_cache_gib: What frozen towers make of pictures and sounds is kept in the machine's
            memory up to so many GiB and used again in later epochs. A resumed run computes it
            anew, and is then equal within float rounding, not bit for bit.
        log_every_steps: Optimizer steps between two log records; each costs one device sync. The
            first step and the last are logged in any case.
        eval_every_steps: Optimizer steps between two measurements of the held-out loss. It is
            measured before the first step and after the last in any case; None measures it then
            only.
        save_every_steps: Optimizer steps between two checkpoints. The last step, one that a
            signal ended, and the last before an error are saved in any case; None saves those
            only.
        keep_checkpoints: The newest so many checkpoints are kept.
        max_nonfinite_steps: Consecutive steps with an infinite or undefined gradient, each of
            which is skipped, before the run stops.
        output_dir: Folder of this run's checkpoints and log; one run, one folder.
        progress: Whether to show progress on stderr.
        trackers: Experiment trackers that get the run's numbers, such as ``("tensorboard",)``
            (files in ``output_dir``) or ``("wandb",)``; each has to be installed.
        watch: Whether to open a page that shows the run, on this machine alone, until the process
            ends; ``gemma-tuner watch RUN`` opens it again.

    Raises:
        ConfigError: An unknown setting, or a value out of its range or of another type.
    """

    max_steps: int | None = None
    epochs: int | None = None
    batch_size: int = 1
    gradient_accumulation: int = 8
    learning_rate: float = 2e-4
    schedule: Schedule = "cosine"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    seed: int = 0
    gradient_checkpointing: bool | None = None
    loss_chunk_tokens: int | None = None
    memory_gib: float | None = None
    feature_cache_gib: float = 0.0
    log_every_steps: int = 10
    eval_every_steps: int | None = None
    save_every_steps: int | None = 100
    keep_checkpoints: int = 2
    max_nonfinite_steps: int = 5
    output_dir: str | Path = "runs/default"
    progress: bool = True
    trackers: Sequence[str] = ()
    watch: bool = False

    def __post_init__(self) -> None:
        for name, smallest in _SMALLEST.items():
            _check_whole_number(name, getattr(self, name), smallest)
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is None and name in _MAY_BE_NONE:
                continue
            if not (is_number(value) and 0 < value < math.inf):
                raise _out_of_range(name, value, "a finite number above 0")
        for name in _FROM_ZERO:
            value = getattr(self, name)
            if not (is_number(value) and 0 <= value < math.inf):
                raise _out_of_range(name, value, "a finite number from 0 up")
        for name in _SWITCHES:
            value = getattr(self, name)
            if not (isinstance(value, bool) or (value is None and name in _MAY_BE_NONE)):
                none = " or None" if name in _MAY_BE_NONE else ""
                raise _out_of_range(name, value, f"True or False{none}")
        _check_betas(self.betas)
        if self.schedule not in SCHEDULES:
            raise _out_of_range("schedule", self.schedule, f"one of {', '.join(SCHEDULES)}")
        if self.seed > _LARGEST_SEED:
            raise _out_of_range("seed", self.seed, f"a whole number from 0 to {_LARGEST_SEED}")
        if not isinstance(self.output_dir, str | Path) or not str(self.output_dir):
            raise _out_of_range("output_dir", self.output_dir, "a folder's path, str or Path")
        _check_trackers(self.trackers)
        self._check_length()

    def __repr__(self) -> str:
        """The settings that are not the defaults."""
        named = ((field, getattr(self, field.name)) for field in dataclasses.fields(self))
        given = (
            f"{field.name}={str(value) if isinstance(value, Path) else value!r}"
            for field, value in named
            if value != field.default
        )
        return f"TrainConfig({', '.join(given)})"

    def _check_length(self) -> None:
        if (self.max_steps is None) == (self.epochs is None):
            raise ConfigError(
                "a run needs an end: give either max_steps=... (optimizer steps) or epochs=... "
                f"(passes over the data); got max_steps={self.max_steps}, epochs={self.epochs}"
            )
        if self.max_steps is not None and self.warmup_steps >= self.max_steps:
            raise _out_of_range(
                "warmup_steps", self.warmup_steps, f"below max_steps={self.max_steps}"
            )

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Self:
        """Make a config from plain settings, such as a parsed JSON or TOML file.

        Args:
            settings: Field names to values; tuples may be lists.

        Returns:
            The config; fields that are not given keep their defaults.

        Raises:
            ConfigError: An unknown name, or a value that the field cannot have.
        """
        values = dict(settings)
        for name in ("betas", "trackers"):
            if isinstance(values.get(name), list):
                values[name] = tuple(values[name])
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON has them; ``from_dict`` takes them back.

        Returns:
            Field names to values: tuples are lists, ``output_dir`` a string.
        """
        settings = dataclasses.asdict(self)
        lists = {"betas": list(self.betas), "trackers": list(self.trackers)}
        return settings | lists | {"output_dir": str(self.output_dir)}

    def fixed_settings(self) -> dict[str, Any]:
        """The settings that a resumed run must share with the run that it continues.

        Returns:
            Those of ``to_dict`` that decide what is computed.
        """
        return {k: v for k, v in self.to_dict().items() if k not in _FREE_ON_RESUME}


def _check_whole_number(name: str, value: object, smallest: int) -> None:
    if value is None and name in _MAY_BE_NONE:
        return
    if not is_whole_number(value) or value < smallest:
        none = " or None" if name in _MAY_BE_NONE else ""
        raise _out_of_range(name, value, f"a whole number from {smallest} up{none}")


def _check_trackers(trackers: object) -> None:
    if not (
        isinstance(trackers, Sequence)
        and not isinstance(trackers, str)
        and all(name in TRACKERS for name in trackers)
    ):
        raise _out_of_range("trackers", trackers, f"a tuple of {', '.join(TRACKERS)}")


def _check_betas(betas: object) -> None:
    if not (
        isinstance(betas, tuple)
        and len(betas) == 2
        and all(is_number(beta) and 0 <= beta < 1 for beta in betas)
    ):
        raise _out_of_range("betas", betas, "a tuple of two numbers from 0 up and below 1")


def _out_of_range(name: str, value: object, allowed: str) -> ConfigError:
    return ConfigError(f"{name} must be {allowed}; got {value!r} ({type(value).__name__})")
