"""An example as the text that the model reads, through the checkpoint's own chat template."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jinja2

from gemma_tuner.errors import DataError
from gemma_tuner.records import Audio, Example, Image, Text, Turn

if TYPE_CHECKING:
    from transformers import ProcessorMixin

    from gemma_tuner.models.families import Family


def render_prompt(
    processor: ProcessorMixin, family: Family, example: Example, *, enable_thinking: bool = False
) -> str:
    """Render an example to text, one placeholder for each picture or sound.

    The last answer follows exactly the prefix that inference will use. Some templates end the
    generation prompt with a stub (an empty thought) which they leave out of finished answers;
    then the stub is put where inference puts it, so that training and inference agree.

    Args:
        processor: The checkpoint's processor; its chat template is used.
        family: The model family, for its turn markers.
        example: A conversation or a document.
        enable_thinking: Passed to the chat template.

    Returns:
        The text, with exactly one ``<bos>`` at its start.

    Raises:
        DataError: Text that holds a control token, an empty answer, roles in an order that the
            template refuses, or content that the template would drop.
    """
    tokenizer = processor.tokenizer
    if example.document is not None:
        _refuse_control_tokens(example, tokenizer, example.document, "the document")
        if not example.document.strip():
            raise DataError("the document is empty; remove the row", key=example.key)
        return f"{tokenizer.bos_token}{example.document}{tokenizer.eos_token}"

    for index, turn in enumerate(example.turns):
        _check_turn(example, index, turn, tokenizer)
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
    _refuse_dropped_reasoning(text, example, answer)
    return text


def _message(turn: Turn) -> dict[str, Any]:
    """One turn in the form that chat templates take."""
    if len(turn.parts) == 1 and isinstance(turn.parts[0], Text):
        content: str | list[dict[str, str]] = turn.parts[0].text
    else:
        content = []
        for part in turn.parts:
            match part:
                case Text(text):
                    content.append({"type": "text", "text": text})
                case Image():
                    content.append({"type": "image"})
                case Audio():
                    content.append({"type": "audio"})
    return {"role": turn.role, "content": content, **turn.fields}


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


def _refuse_dropped_reasoning(text: str, example: Example, answer: int) -> None:
    """The last answer's reasoning must reach the model; earlier turns' is history's to drop."""
    for turn in example.turns[answer:]:
        if _reasoning(turn) and _reasoning(turn).strip() not in text:
            raise DataError(
                "this checkpoint's chat template leaves the answer's reasoning out of the prompt; "
                "use a newer revision of the template, or move the reasoning into the answer",
                key=example.key,
            )


def _check_turn(example: Example, index: int, turn: Turn, tokenizer: Any) -> None:
    where = f"turn {index + 1} ({turn.role})"
    for text in (turn.text, _reasoning(turn)):
        _refuse_control_tokens(example, tokenizer, text, where)
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


def _refuse_control_tokens(example: Example, tokenizer: Any, text: str, where: str) -> None:
    """Text that spells a control token would open turns or claim media that are not there."""
    if "<" not in text:
        return
    for token in tokenizer.all_special_tokens:
        if token in text:
            raise DataError(
                f"{where} contains the control token {token!r}, which would change the structure "
                "of the prompt; remove it or write it differently",
                key=example.key,
            )
