"""An example as the text that the model reads, through the checkpoint's own chat template."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jinja2

from gemma_tuner.errors import DataError
from gemma_tuner.modalities import kind_of
from gemma_tuner.models.families import tokenizer_of
from gemma_tuner.records import Audio, Example, Image, Text, Turn

if TYPE_CHECKING:
    from transformers import ProcessorMixin

    from gemma_tuner.models.families import Family


def render_prompt(
    processor: ProcessorMixin, family: Family, example: Example, *, enable_thinking: bool = False
) -> str:
    """Render an example to text, one placeholder for each image or clip."""
    # The last answer follows exactly the prefix that inference will use. Some templates end the
    # generation prompt with a stub (an empty thought) which they leave out of finished answers;
    # then the stub is put where inference puts it, so that training and inference agree.
    tokenizer = tokenizer_of(processor)
    control_tokens = family.control_tokens(tokenizer)
    if example.document is not None:
        _refuse_control_tokens(example, control_tokens, example.document, "the document")
        if not example.document.strip():
            raise DataError("the document is empty; remove the row", key=example.key)
        return f"{tokenizer.bos_token}{example.document}{tokenizer.eos_token}"

    _refuse_control_tokens(example, control_tokens, example.tools, "a tool's declaration")
    for index, turn in enumerate(example.turns):
        _check_turn(example, index, turn, control_tokens)
    _check_tools(example, family)
    if not any(turn.role == "assistant" for turn in example.turns):
        raise DataError(
            "the conversation has no assistant turn, so there is nothing to learn; add the answer",
            key=example.key,
        )
    messages = [_message(turn) for turn in example.turns]

    options: dict[str, Any] = {"enable_thinking": enable_thinking} if family.has_thinking else {}

    def apply_template(messages: list[dict[str, Any]], *, for_generation: bool = False) -> str:
        try:
            return processor.apply_chat_template(
                messages,
                tools=[dict(tool) for tool in example.tools] or None,
                tokenize=False,
                add_generation_prompt=for_generation,
                **options,
            )
        except (jinja2.TemplateError, TypeError, KeyError) as error:
            roles = ", ".join(turn.role for turn in example.turns)
            raise DataError(
                f"the chat template refuses this conversation (roles: {roles}): {error}; "
                "bring the turns into the order and form that this model's template knows",
                key=example.key,
            ) from error

    text = apply_template(messages)
    answer = _final_answer_index(example)
    if answer > 0:
        prefix = apply_template(messages[:answer], for_generation=True)
        text = _follow_prefix(text, prefix, example, family)
    _refuse_dropped_reasoning(text, example, answer, family)
    _refuse_text_between_turns(text, example, family)
    return text


def _message(turn: Turn) -> dict[str, Any]:
    """One turn in the form that chat templates take."""
    if all(isinstance(part, Text) for part in turn.parts):
        # Some templates write a system turn's list of parts as Python shows it, brackets and all.
        content: str | list[dict[str, str]] = turn.text
    else:
        content = []
        for part in turn.parts:
            if isinstance(part, Text):
                content.append({"type": "text", "text": part.text})
            else:
                content.append({"type": kind_of(part)})
    return {**turn.fields, "role": turn.role, "content": content}


def _final_answer_index(example: Example) -> int:
    """Index of the turn that begins the last model turn (tool turns are folded into it)."""
    index = len(example.turns)
    while index > 0 and example.turns[index - 1].role in {"assistant", "tool"}:
        index -= 1
    return index


def _follow_prefix(text: str, prefix: str, example: Example, family: Family) -> str:
    # What the generation prompt has after the last turn header, and the text lacks, is put in:
    #
    #     prefix  …<turn|>\n<|turn>model\n<|channel>thought\n<channel|>
    #     text    …<turn|>\n<|turn>model\nANSWER<turn|>\n
    #     result  …<turn|>\n<|turn>model\n<|channel>thought\n<channel|>ANSWER<turn|>\n
    if text.startswith(prefix):
        return text
    header = f"{family.turn_open}model\n"
    header_end = prefix.rfind(header) + len(header)
    if not text.startswith(prefix[:header_end]):
        raise DataError(
            "the chat template renders this conversation differently for training and for "
            "generation before the last answer begins; end the conversation with one assistant "
            "turn that follows a user turn",
            key=example.key,
        )
    if _reasoning(example.turns[_final_answer_index(example)]):
        return text
    return text[:header_end] + prefix[header_end:] + text[header_end:]


def _reasoning(turn: Turn) -> str:
    return turn.fields.get("reasoning") or turn.fields.get("reasoning_content") or ""


def _refuse_dropped_reasoning(text: str, example: Example, answer: int, family: Family) -> None:
    """The last answer's reasoning must be a thought; a family without them takes no reasoning."""
    opened = text.split("<|channel>thought\n")[1:] if family.has_thinking else []
    thoughts = [part.partition("<channel|>")[0].strip() for part in opened]
    for turn in example.turns[answer if family.has_thinking else 0 :]:
        reasoning = _reasoning(turn).strip()
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
    if not isinstance(_reasoning(turn), str):
        raise DataError(
            f"{where} has {type(_reasoning(turn)).__name__} as reasoning; give text",
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
