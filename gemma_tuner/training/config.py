"""TrainConfig: every setting of a training run, checked when it is made."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, get_args

from gemma_tuner.checks import (
    FREE_ON_RESUME,
    MUST_BE,
    SEED,
    bounds,
    check_fields,
    is_number,
    name_nearest,
    refuse,
)
from gemma_tuner.errors import ConfigError

Schedule = Literal["constant", "cosine", "linear"]
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)

# Source: LoggerType of accelerate 1.15.
TRACKERS = (
    *("aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio"),
    "wandb",
)

_COUNT = bounds(at_least=1)
# What a resumed run may change: its length (which moves the rest of a decaying schedule), what it
# reports, and what costs memory but changes no gradient.
_FREE_COUNT = _COUNT | FREE_ON_RESUME


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
        schedule: How the rate goes on after the warm-up: ``cosine`` or ``linear`` down to 0, or
            ``constant``.
        warmup_steps: Optimizer steps over which the rate rises linearly to its peak.
        weight_decay: AdamW's decoupled decay, as a fraction of the learning rate.
        betas: AdamW's decay rates of the first and second moment.
        epsilon: Rarely needed: AdamW's term in the denominator.
        max_grad_norm: Gradients longer than this (L2, all parameters together) are scaled
            down to it.
        seed: Seeds dropout and nothing else: streams have their own seed for the order.
        gradient_checkpointing: Whether each layer keeps only its input and computes the rest
            again in the backward pass: much less memory, about a third more time. By default
            what fits is chosen for each micro-batch, see ``Trainer.plan``.
        loss_chunk_tokens: Target tokens whose logits exist at one time; by default the plan
            chooses.
        memory_gib: What the run may hold on its device, in GiB; by default what the device has.
        feature_cache_gib: What frozen towers make of images and audio is kept in the machine's
            memory up to so many GiB and used again in later epochs. A resumed run computes it
            again, and is then equal within float rounding, not bit for bit.
        check_seconds: Before the first step, all rows are looked at for at most so long: their
            lengths, the headers of their media, what the collator refuses; 0 does not.
        log_every_steps: Optimizer steps between two log records; each costs one device sync. The
            first step and the last are logged in any case.
        eval_every_steps: Optimizer steps between two measurements of the held-out loss. It is
            measured before the first step and after the last in any case, and by default only
            then.
        save_every_steps: Optimizer steps between two checkpoints. The last step, one that a
            signal ended, and the last before an error are saved in any case; None saves those
            only.
        keep_checkpoints: The newest so many checkpoints are kept.
        keep_best: Whether the adapter with the lowest held-out loss is kept, in ``best`` of
            ``output_dir``; ``Trainer.save`` then writes that one.
        early_stopping_patience: So many evaluations in a row without a lower held-out loss end
            the run. By default none do.
        max_nonfinite_steps: Rarely needed: consecutive steps with an infinite or undefined
            gradient, each of which is skipped, before the run stops.
        output_dir: Folder of this run's checkpoints and log; one run, one folder.
        progress: Whether to show progress on stderr.
        trackers: Experiment trackers that get the run's numbers, such as tensorboard (files in
            ``output_dir``) or wandb. Each has to be installed.
        watch: Whether to open a page that shows the run, on this machine alone, until the process
            ends; ``gemma-tuner watch RUN`` opens it again.

    Raises:
        ConfigError: An unknown setting, or a value out of its range or of another type.
    """

    max_steps: int | None = field(default=None, metadata=_FREE_COUNT)
    epochs: int | None = field(default=None, metadata=_FREE_COUNT)
    batch_size: int = field(default=1, metadata=_COUNT)
    gradient_accumulation: int = field(default=8, metadata=_COUNT)
    learning_rate: float = field(default=2e-4, metadata=bounds(above=0))
    schedule: Schedule = "cosine"
    warmup_steps: int = field(default=0, metadata=bounds(at_least=0))
    weight_decay: float = field(default=0.0, metadata=bounds(at_least=0))
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = field(default=1e-8, metadata=bounds(above=0))
    max_grad_norm: float = field(default=1.0, metadata=bounds(above=0))
    seed: int = field(default=0, metadata=SEED)
    gradient_checkpointing: bool | None = field(default=None, metadata=FREE_ON_RESUME)
    loss_chunk_tokens: int | None = field(default=None, metadata=_FREE_COUNT)
    memory_gib: float | None = field(default=None, metadata=bounds(above=0) | FREE_ON_RESUME)
    feature_cache_gib: float = field(default=0.0, metadata=bounds(at_least=0) | FREE_ON_RESUME)
    check_seconds: float = field(default=20.0, metadata=bounds(at_least=0) | FREE_ON_RESUME)
    log_every_steps: int = field(default=10, metadata=_FREE_COUNT)
    eval_every_steps: int | None = field(default=None, metadata=_FREE_COUNT)
    save_every_steps: int | None = field(default=100, metadata=_FREE_COUNT)
    keep_checkpoints: int = field(default=2, metadata=_FREE_COUNT)
    keep_best: bool = field(default=True, metadata=FREE_ON_RESUME)
    early_stopping_patience: int | None = field(default=None, metadata=_FREE_COUNT)
    max_nonfinite_steps: int = field(default=5, metadata=_FREE_COUNT)
    output_dir: str | Path = field(default="runs/default", metadata=FREE_ON_RESUME)
    progress: bool = field(default=True, metadata=FREE_ON_RESUME)
    trackers: Sequence[str] = field(default=(), metadata=FREE_ON_RESUME)
    watch: bool = field(default=False, metadata=FREE_ON_RESUME)

    def __post_init__(self) -> None:
        check_fields(self, MUST_BE)
        if not (
            isinstance(self.betas, tuple)
            and len(self.betas) == 2
            and all(is_number(beta) and 0 <= beta < 1 for beta in self.betas)
        ):
            allowed = "a tuple of two numbers from 0 up and below 1"
            raise refuse("betas", self.betas, allowed, MUST_BE)
        if (
            isinstance(self.trackers, str)
            or not isinstance(self.trackers, Sequence)
            or any(name not in TRACKERS for name in self.trackers)
        ):
            allowed = f"a tuple of {', '.join(TRACKERS)}"
            raise refuse("trackers", self.trackers, allowed, MUST_BE)
        if (self.max_steps is None) == (self.epochs is None):
            raise ConfigError(
                "a run needs an end: give either max_steps=... (optimizer steps) or epochs=... "
                f"(passes over the data); got max_steps={self.max_steps}, epochs={self.epochs}"
            )
        if self.early_stopping_patience is not None and self.eval_every_steps is None:
            raise ConfigError(
                f"early_stopping_patience={self.early_stopping_patience} counts evaluations, and "
                "without eval_every_steps there is one before the first step and one after the "
                "last; give eval_every_steps, or leave early_stopping_patience out"
            )
        if self.max_steps is not None and self.warmup_steps >= self.max_steps:
            allowed = f"below max_steps={self.max_steps}"
            raise refuse("warmup_steps", self.warmup_steps, allowed, MUST_BE)

    def __repr__(self) -> str:
        """The settings that are not the defaults."""
        named = ((field, getattr(self, field.name)) for field in dataclasses.fields(self))
        given = (
            f"{field.name}={str(value) if isinstance(value, Path) else value!r}"
            for field, value in named
            if value != field.default
        )
        return f"TrainConfig({', '.join(given)})"

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
        free = {
            field.name
            for field in dataclasses.fields(self)
            if field.metadata.get("free_on_resume")
        }
        return {name: value for name, value in self.to_dict().items() if name not in free}
