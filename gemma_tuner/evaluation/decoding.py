"""Settings of decoding, and encoded prompts to the tokens that follow them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypedDict

from torch import Tensor

from gemma_tuner.batch import Row, pad_rows
from gemma_tuner.checks import SEED, bounds, check_fields, name_nearest
from gemma_tuner.device import seeded
from gemma_tuner.errors import ConfigError, DataError
from gemma_tuner.models.lora import unwrap_peft

if TYPE_CHECKING:
    from transformers import GenerationConfig

    from gemma_tuner.collators.text import TextCollator

DEFAULT_NEW_TOKENS = 256


class DecodingOptions(TypedDict, total=False):
    """The keywords of :class:`Decoding`, for functions that hand them over."""

    max_new_tokens: int | None
    do_sample: bool | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    seed: int | None


@name_nearest
@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """How tokens are chosen, under transformers' names; None is the checkpoint's own setting.

    Args:
        max_new_tokens: The most tokens that an answer may have; where the checkpoint does not
            say, 256.
        do_sample: Draw tokens by their probability, or always take the likeliest.
        temperature, top_p, top_k: As in transformers; any of them turns sampling on.
        seed: Makes drawing repeatable; None draws on from torch's own random state.

    Raises:
        ConfigError: A value out of its range, or settings of sampling where it is turned off.
    """

    max_new_tokens: int | None = field(default=None, metadata=bounds(at_least=1))
    do_sample: bool | None = None
    temperature: float | None = field(default=None, metadata=bounds(above=0))
    top_p: float | None = field(default=None, metadata=bounds(above=0, at_most=1))
    top_k: int | None = field(default=None, metadata=bounds(at_least=1))
    seed: int | None = field(default=None, metadata=SEED)

    def __post_init__(self) -> None:
        if self.sampling and self.do_sample is False:
            raise ConfigError(
                f"{', '.join(self.sampling)} is given with do_sample=False, which would ignore "
                "it; leave one of the two out"
            )
        if self.temperature == 0:
            raise ConfigError("temperature is 0; for the likeliest token, set do_sample=False")
        check_fields(self)

    @property
    def sampling(self) -> dict[str, float]:
        """The settings of sampling that are given."""
        given = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return {name: value for name, value in given.items() if value is not None}


def build_config(gemma: Any, decoding: Decoding, stop_ids: frozenset[int]) -> GenerationConfig:
    """Put the wanted settings over a copy of the checkpoint's own."""
    config = copy.deepcopy(gemma.generation_config)
    own = config.eos_token_id
    own_ids = own if isinstance(own, list) else [] if own is None else [own]
    config.eos_token_id = sorted({*own_ids, *stop_ids})
    config.max_length = None
    config.max_new_tokens = decoding.max_new_tokens or config.max_new_tokens or DEFAULT_NEW_TOKENS
    if decoding.do_sample is not None or decoding.sampling:
        config.do_sample = decoding.do_sample is not False
    if config.do_sample:
        for name, value in decoding.sampling.items():
            setattr(config, name, value)
    else:  # transformers warns of settings that greedy decoding does not read
        config.temperature = config.top_p = config.top_k = None
    return config


def check_length(gemma: Any, row: Row, config: GenerationConfig) -> None:
    """Refuse a prompt that leaves no room for its answer."""
    context = gemma.config.get_text_config().max_position_embeddings
    new_tokens = int(config.max_new_tokens or 0)
    if len(row.input_ids) + new_tokens > context:
        raise DataError(
            f"its prompt of {len(row.input_ids):,} tokens and an answer of up to {new_tokens:,} "
            f"(max_new_tokens) are longer than the model's context of {context:,}; shorten the "
            "prompt, or lower max_new_tokens",
            key=row.key,
        )


def complete(
    model: Any,
    collator: TextCollator,
    rows: Sequence[Row],
    config: GenerationConfig,
    *,
    seed: int | None = None,
    **options: Any,
) -> list[tuple[int, ...]]:
    """Continue prompts: the new tokens of each row, up to its stop token and with it."""
    gemma = unwrap_peft(model)
    inputs = {name: tensor.to(gemma.device) for name, tensor in pad_left(collator, rows).items()}
    with ExitStack() as stack:
        stack.enter_context(in_eval_mode(model))
        if seed is not None:
            stack.enter_context(seeded(gemma.device, seed))
        output = gemma.generate(**inputs, generation_config=config, **options)
    new_ids = output[:, inputs["input_ids"].shape[1] :].tolist()
    return [_cut_after_stop(ids, config.eos_token_id) for ids in new_ids]


def pad_left(collator: TextCollator, rows: Sequence[Row]) -> dict[str, Tensor]:
    """Pad prompts on the left, so that every answer begins at the same place."""
    lengths = [len(row.input_ids) for row in rows]
    batch = pad_rows(
        rows,
        max_tokens=max(lengths),
        pad_token_id=collator.tokenizer.pad_token_id,
        token_type_name=collator.family.token_type_name,
    )
    inputs = dict(batch.inputs)
    names = {"input_ids", "attention_mask", collator.family.token_type_name}
    for name in names & inputs.keys():
        padded = inputs[name].clone()
        for index, length in enumerate(lengths):
            padded[index] = padded[index].roll(max(lengths) - length)
        inputs[name] = padded
    return inputs


@contextmanager
def in_eval_mode(model: Any) -> Iterator[None]:
    """Switch off dropout and checkpointing, which a training run has on in some modules only."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _cut_after_stop(ids: list[int], stop_ids: Any) -> tuple[int, ...]:
    for position, token in enumerate(ids):
        if token in stop_ids:
            return tuple(ids[: position + 1])
    return tuple(ids)
