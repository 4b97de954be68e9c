"""Conversations that a chat template would garble or drop: refused, with the remedy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gemma_tuner.errors import DataError
from gemma_tuner.records import Audio, Example, Image, Turn

if TYPE_CHECKING:
    from gemma_tuner.models.families import Family


def check_conversation(example: Example, family: Family, control_tokens: Sequence[str]) -> None:
    """Refuse what no template renders as it is meant."""
    _refuse_control_tokens(example, control_tokens, example.tools, "a tool's declaration")
    for index, turn in enumerate(example.turns):
        _check_turn(example, index, turn, control_tokens)
    _check_tools(example, family)
    if not any(turn.role == "assistant" for turn in example.turns):
        raise DataError(
            "the conversation has no assistant turn, so there is nothing to learn; add the answer",
            key=example.key,
        )


def check_document(example: Example, document: str, control_tokens: Sequence[str]) -> None:
    """Refuse a document without text, or with control tokens."""
    _refuse_control_tokens(example, control_tokens, document, "the document")
    if not document.strip():
        raise DataError("the document is empty; remove the row", key=example.key)


def check_rendered(text: str, example: Example, answer: int, family: Family) -> None:
    """Refuse a rendered conversation that lacks reasoning or holds text between its turns."""
    _refuse_dropped_reasoning(text, example, answer, family)
    _refuse_text_between_turns(text, example, family)


def reasoning_of(turn: Turn) -> str:
    """What a model turn thought before it answered, by either of its two names."""
    return turn.fields.get("reasoning") or turn.fields.get("reasoning_content") or ""


def _refuse_dropped_reasoning(text: str, example: Example, answer: int, family: Family) -> None:
    """The last answer's reasoning must be a thought; a family without them takes no reasoning."""
    opened = text.split("<|channel>thought\n")[1:] if family.has_thinking else []
    thoughts = [part.partition("<channel|>")[0].strip() for part in opened]
    for turn in example.turns[answer if family.has_thinking else 0 :]:
        reasoning = reasoning_of(turn).strip()
        if reasoning and reasoning not in thoughts:
            raise DataError(
                "this checkpoint's chat template leaves the answer's reasoning out of the prompt; "
                "use a newer revision of the template, or move the reasoning into the answer",
                key=example.key,
            )


def _refuse_text_between_turns(text: str, example: Example, family: Family) -> None:
    """Some templates close a turn and go on writing: words that nothing would train."""
    turns = text.split(family.turn_open)[1:]
    if any(turn.partition(family.turn_close)[2].strip() for turn in turns):
        roles = ", ".join(turn.role for turn in example.turns)
        raise DataError(
            f"the chat template puts text of this conversation (roles: {roles}) between two "
            "turns, where it would not be trained; join consecutive assistant turns into one",
            key=example.key,
        )


def _check_tools(example: Example, family: Family) -> None:
    """Calls and responses in pairs; templates drop or garble what stands alone."""
    if not family.has_tools and (
        example.tools or any(turn.fields.get("tool_calls") for turn in example.turns)
    ):
        raise DataError(
            f"it declares or calls tools, which {family.name}'s chat template leaves out; write "
            "them into the text, or use a model that has tools",
            key=example.key,
        )
    may_respond = waits = False
    for number, turn in enumerate(example.turns, 1):
        if turn.role == "tool":
            if not may_respond:
                raise DataError(
                    f"turn {number} (tool) responds to no call; put it right after the assistant "
                    "turn with the tool_calls",
                    key=example.key,
                )
            waits = False
            continue
        if waits:
            raise DataError(
                f"turn {number} ({turn.role}) follows a tool call without a response; add the "
                "tool turn, or end the conversation with the call",
                key=example.key,
            )
        may_respond = bool(turn.fields.get("tool_calls"))
        waits = may_respond and not turn.fields.get("tool_responses")


def _check_turn(example: Example, index: int, turn: Turn, control_tokens: Sequence[str]) -> None:
    where = f"turn {index + 1} ({turn.role})"
    if not isinstance(reasoning_of(turn), str):
        raise DataError(
            f"{where} has {type(reasoning_of(turn)).__name__} as reasoning; give text",
            key=example.key,
        )
    _refuse_control_tokens(example, control_tokens, [turn.text, turn.fields], where)
    if turn.role == "assistant":
        if not turn.text.strip() and not turn.fields.get("tool_calls"):
            raise DataError(
                f"{where} is an empty answer; fill it or remove the row", key=example.key
            )
        if any(isinstance(part, Image | Audio) for part in turn.parts):
            raise DataError(
                f"{where} holds media, which this model cannot write; move it to a user turn",
                key=example.key,
            )


def _refuse_control_tokens(
    example: Example, control_tokens: Sequence[str], value: Any, where: str
) -> None:
    """Text that spells a control token would open turns or claim media that are not there."""
    for text in _texts(value):
        if "<" not in text:
            continue
        for token in control_tokens:
            if token in text:
                raise DataError(
                    f"{where} contains the control token {token!r}, which would change the "
                    "structure of the prompt; remove it or write it differently",
                    key=example.key,
                )


def _texts(value: Any) -> Iterator[str]:
    """Every piece of text in a tree of mappings and lists, names included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _texts(name)
            yield from _texts(item)
    elif isinstance(value, Sequence) and not isinstance(value, bytes):
        for item in value:
            yield from _texts(item)
