"""What a model wrote, from token ids: its answer, its thoughts, and whether it was done."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from gemma_tuner.collators.labels import TurnMarkers

if TYPE_CHECKING:
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


class AnswerReader:
    """Reads answers that are written in the tokens of one family.

    Args:
        tokenizer: The processor's.
        family: The model family.

    Attributes:
        stop_ids: What ends an answer: the end of the sequence, the end of a turn, and what opens
            a tool's response, which is not for the model to write.
    """

    def __init__(self, tokenizer: Any, family: Family) -> None:
        self._tokenizer = tokenizer
        self._markers = TurnMarkers.of(tokenizer, family)
        to_ids = tokenizer.convert_tokens_to_ids
        self._channel: tuple[int, ...] = (
            tuple(to_ids(["<|channel>", "<channel|>"])) if family.has_thinking else ()
        )
        calls = to_ids(list(_CALL_TOKENS)) if family.has_tools else ()
        self._dropped = self._markers.special.difference(calls)
        ends = (
            tokenizer.eos_token_id,
            self._markers.close,
            self._markers.tool_response_open,
        )
        self.stop_ids = frozenset(token for token in ends if token is not None)

    def find_opening(self, prompt_ids: Sequence[int]) -> tuple[int, ...]:
        """Find what a prompt has of the model's turn: an empty thought, or an opened one."""
        # prompt_ids: ``[T]``.
        header = self._markers.header
        for start in range(len(prompt_ids) - len(header), -1, -1):
            if tuple(prompt_ids[start : start + len(header)]) == header:
                return tuple(prompt_ids[start + len(header) :])
        return ()

    def read(self, ids: Sequence[int], opening: Sequence[int] = ()) -> tuple[str, str | None]:
        """Separate an answer from the thoughts before it."""
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
