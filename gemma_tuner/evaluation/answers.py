"""A model's answers: encoded prompts to tokens, tokens to an answer and the thoughts before it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from gemma_tuner.collators.prompt import TurnMarkers
from gemma_tuner.errors import ConfigError
from gemma_tuner.evaluation.decoding import Decoding, build_config, check_length, complete
from gemma_tuner.evaluation.prompts import PromptRow, encode_prompt
from gemma_tuner.modalities import kind_of
from gemma_tuner.models.families import family_of, loaded_modalities
from gemma_tuner.models.lora import unwrap_peft
from gemma_tuner.records import Example

if TYPE_CHECKING:
    from transformers import GenerationConfig

    from gemma_tuner.collators.text import TextCollator
    from gemma_tuner.models.families import Family

_THOUGHT = "thought\n"  # the channel's name, which is no part of the thought
_CALL_TOKENS = ("<|tool_call>", "<tool_call|>", '<|"|>')  # a call is written in these
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass(frozen=True, slots=True)
class Generation:
    """One answer.

    Args:
        text: The answer without thoughts and control tokens; a tool call keeps its own.
        thinking: What stands in the thinking channel, or None.
        token_ids: Everything that the model wrote, thoughts and stop token included.
        finished_by: ``stop``: a stop token, the last of ``token_ids``; ``length``:
            ``max_new_tokens``.
        num_prompt_tokens: How many tokens it read.
    """

    text: str
    thinking: str | None
    token_ids: tuple[int, ...]
    finished_by: Literal["stop", "length"]
    num_prompt_tokens: int

    def __str__(self) -> str:
        return self.text


class Generator:
    """Answers prompts: a model, a collator with ``train_on="last"``, a way of choosing tokens."""

    def __init__(self, model: Any, collator: TextCollator, decoding: Decoding) -> None:
        gemma = unwrap_peft(model)
        family = family_of(gemma.config)
        if collator.family.model_type != family.model_type:
            raise ConfigError(
                f"the model is {family.name}, but the processor is of {collator.family.name}; "
                "give the processor that load_model returned together with the model"
            )
        self.model = model
        self.collator = collator
        self.reader = AnswerReader(collator.tokenizer, family)
        self.config: GenerationConfig = build_config(gemma, decoding, self.reader.stop_ids)
        self._seed = decoding.seed

    def encode(self, example: Example) -> PromptRow:
        """Encode an example that ends with an answer, or a placeholder for one."""
        prompt = encode_prompt(self.collator, example)
        check_length(unwrap_peft(self.model), prompt.row, self.config)
        return prompt

    def answer(self, prompts: Sequence[PromptRow], **options: Any) -> list[Generation]:
        """Answer prompts in one batch; ``generate`` in transformers gets the options."""
        rows = [prompt.row for prompt in prompts]
        written = complete(
            self.model, self.collator, rows, self.config, seed=self._seed, **options
        )
        return [self._describe(p, ids) for p, ids in zip(prompts, written, strict=True)]

    def _describe(self, prompt: PromptRow, ids: Sequence[int]) -> Generation:
        opening = self.reader.find_opening(prompt.row.input_ids.tolist())
        text, thinking = self.reader.read(ids, opening)
        stops: Any = self.config.eos_token_id
        return Generation(
            text=text,
            thinking=thinking,
            token_ids=tuple(ids),
            finished_by="stop" if ids and ids[-1] in stops else "length",
            num_prompt_tokens=len(prompt.row.input_ids),
        )


class AnswerReader:
    """Reads answers that are written in the tokens of one family."""

    def __init__(self, tokenizer: Any, family: Family) -> None:
        self._tokenizer = tokenizer
        self._markers = TurnMarkers.of(tokenizer, family)
        to_ids = tokenizer.convert_tokens_to_ids
        self._channel: tuple[int, ...] = (
            tuple(to_ids(["<|channel>", "<channel|>"])) if family.has_thinking else ()
        )
        calls = to_ids(list(_CALL_TOKENS)) if family.has_tools else ()
        self._dropped = self._markers.special.difference(calls)
        ends = (tokenizer.eos_token_id, self._markers.close, self._markers.tool_response_open)
        # The last opens a tool's response, which is not for the model to write.
        self.stop_ids = frozenset(token for token in ends if token is not None)

    def find_opening(self, prompt_ids: Sequence[int]) -> tuple[int, ...]:
        """Find what a prompt has of the model's turn: an empty thought, or an opened one."""
        header = self._markers.header
        for start in range(len(prompt_ids) - len(header), -1, -1):
            if tuple(prompt_ids[start : start + len(header)]) == header:
                return tuple(prompt_ids[start + len(header) :])
        return ()

    def read(self, ids: Sequence[int], opening: Sequence[int] = ()) -> tuple[str, str | None]:
        """Separate an answer, or the part that is there yet, from the thoughts before it."""
        spoken: list[int] = []
        thought: list[int] = []
        inside = False
        for position, token in enumerate([*opening, *ids]):
            if self._channel and token == self._channel[0]:
                inside = True
            elif self._channel and token == self._channel[1]:
                inside = False
            elif inside:
                thought.append(token)
            elif position >= len(opening):
                spoken.append(token)
        thinking = self._decode(thought).removeprefix(_THOUGHT).strip("\n")
        return self._decode(spoken), thinking or None

    def ends_within_character(self, ids: Sequence[int]) -> bool:
        """Whether the last token is a byte, which the next one may complete to a character."""
        return bool(ids) and bool(
            _BYTE.fullmatch(self._tokenizer.convert_ids_to_tokens(int(ids[-1])))
        )

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(
            [token for token in ids if token not in self._dropped],
            skip_special_tokens=False,
            clean_up_tokenization_spaces=False,
        )


def check_modalities(model: Any, examples: Sequence[Example]) -> None:
    """Refuse media whose tower was not loaded; they need not be decoded yet."""
    loaded = loaded_modalities(unwrap_peft(model))
    for example in examples:
        for part in example.media:
            modality = kind_of(part)
            if modality not in loaded:
                raise ConfigError(
                    f"{example.key} holds {modality}, but the model has no part for that (it has "
                    f"{', '.join(loaded)}); load it with load_model(..., modalities=('text', "
                    f"'{modality}')) if its checkpoint offers it"
                )
