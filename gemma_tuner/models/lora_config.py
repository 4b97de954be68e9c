"""LoraConfig: where adapters go and how large they are. It needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Literal

from gemma_tuner.checks import SEED, bounds, check_fields, is_whole_number, name_nearest, refuse
from gemma_tuner.errors import ConfigError

Variant = Literal["lora", "dora", "rslora", "qalora", "full"]
TARGETS = ("language", "vision", "audio", "projectors", "experts")


@name_nearest
@dataclass(frozen=True)
class LoraConfig:
    """Where adapters go and how large they are.

    Args:
        rank: Rank of each adapter.
        alpha: Its scale is ``alpha / rank`` (``alpha / sqrt(rank)`` for rslora).
        dropout: Probability of dropping an adapter's input.
        targets: Among ``language`` (attention and MLP of the decoder), ``vision``, ``audio`` (the
            towers' attention and feed-forward), ``projectors`` (from the towers into the decoder)
            and ``experts`` (26B-A4B); any other entry is a regular expression that must match the
            full names of linear modules.
        layers: Decoder layers that ``language`` and ``experts`` mean: the last N, or
            ``(first, last)``, both included and counted from 0; None, on the command line -1,
            means all.
        variant: ``lora``, ``dora``, ``rslora``, ``qalora`` or ``full``. ``qalora`` (QA-LoRA, arXiv
            2309.14717) is for a base packed on an affine grid: adapters see the sum of each
            group's inputs, so that a merge changes the grid's biases alone and what was learned
            stays in a file of 4 bits; stock PEFT does not open such adapters. ``full`` has no
            adapters, but a float32 copy of each targeted layer trains, beside the frozen original
            (PEFT's ``modules_to_save``). Weight, copy and moments take 14 bytes a parameter above
            a bfloat16 weight's 2; rank and alpha mean nothing then.
        seed: Decides the adapters' first weights.

    Raises:
        ConfigError: An unknown setting, or a value out of its range or of another type.
    """

    _: KW_ONLY
    rank: int = field(default=16, metadata=bounds(at_least=1))
    alpha: float = field(default=32, metadata=bounds(above=0))
    dropout: float = field(default=0.0, metadata=bounds(at_least=0, below=1))
    targets: Sequence[str] = ("language",)
    layers: int | tuple[int, int] | None = None
    variant: Variant = "lora"
    seed: int = field(default=0, metadata=SEED)

    def __post_init__(self) -> None:
        check_fields(self)
        self._check_layers()
        self._check_targets()
        if self.variant == "full" and (self.dropout or "experts" in self.targets):
            raise ConfigError(
                "variant 'full' trains linear layers themselves: it knows neither dropout nor "
                "'experts'; leave these out, or use variant 'lora'"
            )
        if "experts" in self.targets and (self.variant in ("dora", "qalora") or self.dropout):
            raise ConfigError(
                "adapters on experts know neither dora, qalora nor dropout; use variant 'lora' or "
                "'rslora' with dropout 0, or leave 'experts' out"
            )

    def _check_targets(self) -> None:
        targets = self.targets
        if isinstance(targets, str):
            raise ConfigError(f"targets is the string {targets!r}; write ({targets!r},)")
        if not isinstance(targets, Sequence) or not all(isinstance(name, str) for name in targets):
            raise refuse("targets", targets, "a tuple of strings")
        if not targets:
            raise ConfigError(f"targets is empty; it may hold {', '.join(TARGETS)} or a regex")

    def _check_layers(self) -> None:
        match self.layers:
            case None:
                return
            case int(last) if last >= 1 and is_whole_number(last):
                return
            case (int(first), int(last)) if 0 <= first <= last:
                return
        raise ConfigError(
            f"layers is {self.layers!r}; it may be how many of the last layers (at least 1), or "
            "(first, last), both included and counted from 0"
        )
