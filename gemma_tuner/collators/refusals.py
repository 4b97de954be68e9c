"""Conversations that a chat template would garble or drop: refused, with the remedy."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gemma_tuner.display import is_blank
from gemma_tuner.errors import DataError
from gemma_tuner.records import Audio, Example, Image, Turn

if TYPE_CHECKING:
    from gemma_tuner.models.families import Family

# What chat templates write that no text has by itself, by the models that have them.
_OTHER_TEMPLATES = {
    "Gemma 2, 3 or 3n": r"<(?:start|end)_of_(?:turn|image|audio)>"
    r"|<(?:image|audio)_soft_token>",
    "Gemma 4": r"<\|(?:turn|channel|tool|tool_call|tool_response|image|audio)>"
    r"|<(?:turn|channel|tool|tool_call|tool_response|image|audio)\|>",
    "ChatML, as Qwen's": r"<\|im_(?:start|end|sep)\|>|<\|endoftext\|>"
    r"|<\|(?:vision|image|audio|video)_(?:start|end|pad|bos|eos)\|>",
    "Llama 2 or Mistral": r"\[/?INST\]|<</?SYS>>|\[/?SYSTEM_PROMPT\]"
    r"|\[/?(?:AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS)\]|\A[^<]*</s>\s*\Z",
    "Llama 3 or 4": r"<\|(?:start|end)_header_id\|>|<\|header_(?:start|end)\|>"
    r"|<\|eo[tm](?:_id)?\|>|<\|(?:begin|end)_of_text\|>",
    "Phi, Zephyr or GLM": r"<\|(?:user|assistant|system|observation|end)\|>",
    "gpt-oss": r"<\|(?:start|message|channel|return|call)\|>",
    "DeepSeek": r"<[｜|](?:User|Assistant)[｜|]>|<｜(?:begin|end)▁of▁sentence｜>",
    "Cohere": r"<\|(?:START|END)_OF_TURN_TOKEN\|>|<\|(?:CHATBOT|USER|SYSTEM)_TOKEN\|>",
    "OpenChat or Granite": r"<\|end_of_turn\|>|GPT4 Correct (?:User|Assistant):"
    r"|<\|(?:start|end)_of_role\|>",
}
# Words alone, which in a question may be what is asked about. The first is looked for once.
_PLAIN_TEMPLATES = {
    "Alpaca": r"(?s)\A(?>.*?### Instruction:).*### Response:",
    "Guanaco": r"(?s)\A(?>.*?### (?:Human|User):).*### (?:Assistant|Response):",
    "Vicuna": r"(?s)\A(?>.*?\bUSER: ).*\bASSISTANT:",
    "Anthropic's": r"(?s)\A\s*(?:<s>)?(?:Human|<human>|\[\|Human\|\]):? .*?"
    r"(?:Assistant|<bot>|\[\|AI\|\]):? ",
    "Baichuan or Nemotron": r"\A(?:<reserved_10[26]>|<extra_id_[01]>)",
}


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
    """Refuse a document without text, or with control tokens, or in a chat template."""
    remedy = (
        "; or set text_is_rendered=True if it went through this checkpoint's own chat template"
    )
    _refuse_control_tokens(example, control_tokens, document, "the document", remedy)
    _refuse_other_template(
        example, document, "the document", {**_OTHER_TEMPLATES, **_PLAIN_TEMPLATES}
    )
    if is_blank(document):
        raise DataError("the document is empty; remove the row", key=example.key)


def check_own_template(
    example: Example, document: str, family: Family, control_tokens: Sequence[str]
) -> None:
    """Refuse a document that is said to be rendered and has no answer of this family's form."""
    header, _, answer = document.rpartition(f"{family.turn_open}model\n")
    if not header or family.turn_close not in answer:
        raise DataError(
            f"text_is_rendered is set, and the document does not end with a turn of {family.name} "
            f"({family.turn_open}model … {family.turn_close}); give the conversation as messages",
            key=example.key,
        )
    _refuse_other_template(example, document, "the document", _OTHER_TEMPLATES, control_tokens)


def check_spelling(
    text: str,
    data: Sequence[Any],
    render: Callable[..., str],
    control_tokens: Sequence[str],
    *,
    key: str,
) -> None:
    """Refuse a rendered prompt whose control tokens are not all the template's own."""
    # Templates trim and join: what is no control token in any one text may be one in the prompt.
    # So the same is rendered with no text that can begin or end one, and both must have the same.
    ends = {end for token in control_tokens for end in (token[0], token[-1])}
    if not any(end in each for each in _texts(data) for end in ends):
        return
    pattern = re.compile("|".join(map(re.escape, sorted(control_tokens, key=len, reverse=True))))
    harmless = render(*_replace_texts(data, str.maketrans(dict.fromkeys(ends, "("))))
    if pattern.findall(text) != pattern.findall(harmless):
        raise DataError(
            "its texts spell a control token once the chat template has joined them, which would "
            "change the structure of the prompt; write them differently",
            key=key,
        )


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
    if not family.has_tools and (
        example.tools or any(turn.fields.get("tool_calls") for turn in example.turns)
    ):
        raise DataError(
            f"it declares or calls tools, which {family.name}'s chat template leaves out; write "
            "them into the text, or use a model that has tools",
            key=example.key,
        )


def _check_turn(example: Example, index: int, turn: Turn, control_tokens: Sequence[str]) -> None:
    where = f"turn {index + 1} ({turn.role})"
    if not isinstance(reasoning_of(turn), str):
        raise DataError(
            f"{where} has {type(reasoning_of(turn)).__name__} as reasoning; give text",
            key=example.key,
        )
    _refuse_control_tokens(example, control_tokens, [turn.text, turn.fields], where)
    _refuse_other_template(example, turn.text, where, _OTHER_TEMPLATES)
    if turn.role == "assistant":
        before = example.turns[index - 1] if index else None
        ends = before and before.role == "assistant" and not before.fields.get("tool_calls")
        if before and ends and not before.fields.get("tool_responses"):
            raise DataError(
                f"{where} follows another of the assistant's, and templates join the two without "
                "the end of the first; join consecutive assistant turns into one, or put the "
                "user's turn between them",
                key=example.key,
            )
        if is_blank(turn.text) and not turn.fields.get("tool_calls"):
            raise DataError(
                f"{where} is an empty answer; fill it or remove the row", key=example.key
            )
        if any(isinstance(part, Image | Audio) for part in turn.parts):
            raise DataError(
                f"{where} holds media, which this model cannot write; move it to a user turn",
                key=example.key,
            )


def _refuse_control_tokens(
    example: Example, control_tokens: Sequence[str], value: Any, where: str, remedy: str = ""
) -> None:
    """Text that spells a control token would open turns or claim media that are not there."""
    for text in _texts(value):
        for token in control_tokens:
            if token in text:
                raise DataError(
                    f"{where} contains the control token {token!r}, which would change the "
                    f"structure of the prompt; remove it or write it differently{remedy}",
                    key=example.key,
                )


def _refuse_other_template(
    example: Example,
    text: str,
    where: str,
    templates: Mapping[str, str],
    own: Sequence[str] = (),
) -> None:
    """What another chat template wrote would be learned letter by letter, prompts and all."""
    for name, pattern in templates.items():
        found = re.search(pattern, text)
        if found and found[0] not in own:
            raise DataError(
                f"{where} went through the chat template of another model ({name}); give the "
                "conversation itself, as messages or as prompt and response, and this "
                "checkpoint's template writes it",
                key=example.key,
            )


def _texts(value: Any) -> Iterator[str]:
    """Every piece of text in a tree of mappings and lists, names included."""
    waiting = [value]
    while waiting:  # and no recursion: data may be nested deeper than Python's stack
        item = waiting.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, Mapping):
            waiting += [*item.values(), *item.keys()]
        elif isinstance(item, Sequence) and not isinstance(item, bytes):
            waiting += item


def _replace_texts(value: Any, table: Mapping[int, str]) -> Any:
    """The same tree with the characters of its texts replaced."""
    if isinstance(value, str):
        return value.translate(table)
    if isinstance(value, Mapping):
        return {_replace_texts(n, table): _replace_texts(v, table) for n, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [_replace_texts(item, table) for item in value]
    return value
