"""An example as the text that the model reads, and which of its tokens are trained on.

The text comes from the checkpoint's own chat template; what is trained on is found in the token
ids by the family's turn markers. Axis: ``T`` tokens of one row.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jinja2

from gemma_tuner.collators.refusals import (
    check_conversation,
    check_document,
    check_own_template,
    check_rendered,
    check_spelling,
    reasoning_of,
)
from gemma_tuner.collators.settings import TrainOn
from gemma_tuner.errors import CheckpointError, DataError
from gemma_tuner.modalities import kind_of
from gemma_tuner.models.families import tokenizer_of
from gemma_tuner.records import Example, Text, Turn
from gemma_tuner.sources.tools import pair_responses, read_declarations

if TYPE_CHECKING:
    from transformers import ProcessorMixin

    from gemma_tuner.models.families import Family


_TEMPLATE_SECONDS = 5  # it takes milliseconds


def render_prompt(
    processor: ProcessorMixin,
    family: Family,
    example: Example,
    *,
    enable_thinking: bool = False,
    text_is_rendered: bool = False,
) -> str:
    """Render an example to text, one placeholder for each image or clip."""
    # The last answer follows exactly the prefix that inference will use. Some templates end the
    # generation prompt with a stub (an empty thought) which they leave out of finished answers;
    # then the stub is put where inference puts it, so that training and inference agree.
    tokenizer = tokenizer_of(processor)
    control_tokens = family.control_tokens(tokenizer)
    if example.document is not None and text_is_rendered:
        check_own_template(example, example.document, family, control_tokens)
        return tokenizer.bos_token + example.document.removeprefix(tokenizer.bos_token)
    if example.document is not None:
        check_document(example, example.document, control_tokens)
        return f"{tokenizer.bos_token}{example.document}{tokenizer.eos_token}"
    check_conversation(example, family, control_tokens)
    turns, tools = example.turns, example.tools
    if any(turn.role == "tool" or "tool_calls" in turn.fields for turn in turns):
        turns = pair_responses(turns, key=example.key)
    if tools:
        tools = read_declarations(tools, "its declarations", key=example.key)
    options: dict[str, Any] = {"enable_thinking": enable_thinking} if family.has_thinking else {}

    def apply_template(
        messages: list[Any], tools: Sequence[Any] = tools, *, for_generation: bool = False
    ) -> str:
        try:
            return processor.apply_chat_template(
                messages,
                tools=list(tools) or None,
                tokenize=False,
                add_generation_prompt=for_generation,
                **options,
            )
        except Exception as error:
            what = error if isinstance(error, jinja2.TemplateError) else type(error).__name__
            roles = ", ".join(turn.role for turn in example.turns)
            raise DataError(
                f"the chat template refuses this conversation (roles: {roles}): {what}; "
                "bring the turns into the order and form that this model's template knows",
                key=example.key,
            ) from error

    messages = [_message(turn) for turn in turns]
    text = apply_template(messages)
    check_spelling(text, [messages, tools], apply_template, control_tokens, key=example.key)
    answer = _final_answer_index(example)
    check_rendered(text, example, answer, family)
    if answer > 0:
        prefix = apply_template(messages[:answer], for_generation=True)
        text = _follow_prefix(text, prefix, example, family)
    if enable_thinking:
        for index in reversed(range(answer + 1, len(turns))):
            if turns[index].role == "assistant" and turns[index - 1].role == "tool":
                prefix = apply_template(messages[:index], for_generation=True)
                text = _open_thought(text, prefix, example)
    return text


def check_template(processor: ProcessorMixin, family: Family) -> None:
    """Refuse a chat template that takes seconds to write a few words, and may never end."""
    turns = Turn("user", (Text("a"),)), Turn("assistant", (Text("b"),))
    ends = time.monotonic() + _TEMPLATE_SECONDS

    def watch(*_: object) -> Any:  # each line of Python, which templates are compiled to
        if time.monotonic() > ends:
            raise TimeoutError
        return watch

    before = sys.gettrace()
    sys.settrace(watch)
    try:
        render_prompt(processor, family, Example("a trial", turns))
    except DataError as error:  # another reason a row will tell
        if isinstance(error.__cause__, TimeoutError):
            raise CheckpointError(
                f"the chat template writes no prompt within {_TEMPLATE_SECONDS} seconds; use the "
                "template of the checkpoint's own release"
            ) from None
    finally:
        sys.settrace(before)


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
    if reasoning_of(example.turns[_final_answer_index(example)]):
        raise DataError(
            "its last answer holds reasoning, and without enable_thinking this checkpoint is "
            "asked behind an empty thought, where it would never think; set enable_thinking=True "
            "(--enable-thinking), or take the reasoning out",
            key=example.key,
        )
    return text[:header_end] + prefix[header_end:] + text[header_end:]


def _open_thought(text: str, prefix: str, example: Example) -> str:
    """Put an empty thought where inference opens one after a tool's response."""
    before, close, opened = prefix.rpartition("<tool_response|>")
    if not opened or text.startswith(prefix):
        return text
    if not text.startswith(before + close):
        raise DataError(
            "the chat template moves text that stands beside a tool call behind the response, "
            "where inference opens a thought; move that text into reasoning, or take it out",
            key=example.key,
        )
    return f"{prefix}<channel|>{text[len(before + close) :]}"


@dataclass(frozen=True, slots=True)
class TurnMarkers:
    r"""The token ids that delimit what the model says.

    Args:
        header: What opens a model turn: ``<|turn>``, ``model``, newline.
        close: What ends a turn (``<turn|>``), which is also the stop token.
        empty_thought: ``<|channel>thought\n<channel|>``, the stub that some templates put before
            an answer; empty where the family knows none.
        tool_call_close, tool_response_open, tool_response_close: None without tools.
        special: Every control token.
        untrained: ``<bos>``, ``<pad>`` and what stands for media: never a target.
    """

    header: tuple[int, ...]
    close: int
    empty_thought: tuple[int, ...]
    tool_call_close: int | None
    tool_response_open: int | None
    tool_response_close: int | None
    special: frozenset[int]
    untrained: frozenset[int]

    @classmethod
    def of(cls, tokenizer: Any, family: Family) -> TurnMarkers:
        """Read the markers' ids from a tokenizer."""

        def ids(text: str) -> tuple[int, ...]:
            return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

        def one(token: str) -> int | None:
            return tokenizer.convert_tokens_to_ids(token) if family.has_tools else None

        return cls(
            header=ids(f"{family.turn_open}model\n"),
            close=tokenizer.convert_tokens_to_ids(family.turn_close),
            empty_thought=ids("<|channel>thought\n<channel|>") if family.has_thinking else (),
            tool_call_close=one("<tool_call|>"),
            tool_response_open=one("<|tool_response>"),
            tool_response_close=one("<tool_response|>"),
            special=frozenset(tokenizer.convert_tokens_to_ids(family.control_tokens(tokenizer))),
            untrained=frozenset(
                tokenizer.convert_tokens_to_ids(
                    [tokenizer.bos_token, tokenizer.pad_token, *family.media_tokens]
                )
            ),
        )


def mark_targets(
    ids: Sequence[int],
    markers: TurnMarkers,
    train_on: TrainOn,
    example: Example | None = None,
) -> list[bool]:
    """Mark the tokens of a rendered conversation that carry loss."""
    # ::
    #     <bos> <|turn> user \n 2 + 2 ? <turn|> \\n <|turn> model \n 4 <turn|> \n
    #       .      .     .   .  . . . .    .    .     .      .   .  x    x     .
    # ids: Token ids ``[T]``, media placeholders already expanded.
    # example: What they were rendered from, where its turns may be marked as not trained.
    # Returns: ``[T]`` booleans. A tool's response is not the model's, save the
    # ``<|tool_response>`` right after a call: there generation stops (it is among the checkpoint's
    # eos ids).
    spans = list(_model_turns(ids, markers))
    marks: list[list[bool]] = []
    if example and any(not turn.is_trained or turn.fields for turn in example.turns):
        marks = _list_marks(example, len(spans))
    targets = [train_on == "all" and token not in markers.untrained for token in ids]
    for index, (start, end) in enumerate(spans):
        if train_on == "last" and index < len(spans) - 1:
            continue
        pieces = marks[index] if index < len(marks) else [True]
        for position, piece in _spoken_positions(ids, start, end, markers):
            targets[position] = pieces[min(piece, len(pieces) - 1)]
    return targets


def _list_marks(example: Example, num_spans: int) -> list[list[bool]]:
    """Say of each rendered model turn, and of its pieces between responses, if it is trained."""
    # The template leaves out what was thought before an earlier answer: that answer would be
    # learned as one without a thought.
    last = _final_answer_index(example)
    groups: list[list[Turn]] = []
    marks: list[list[bool]] = []
    previous = None
    for index, turn in enumerate(example.turns):
        if turn.role == "assistant":
            if previous not in {"assistant", "tool"}:
                groups.append([])
                marks.append([])
            groups[-1].append(turn)
            marks[-1].append(turn.is_trained and not (index < last and reasoning_of(turn)))
        previous = turn.role
    are_apart = (
        len(marks) == num_spans
        and not any(
            turn.text.strip() or turn.fields.get("tool_responses")  # rendered behind the response
            for group, mark in zip(groups, marks, strict=True)
            if len(set(mark)) > 1
            for turn in group[:-1]
        )
    )
    if not are_apart and not all(map(all, marks)):
        raise DataError(
            "some of its answers are not trained on, and the chat template does not keep them "
            "apart from those that are; put a user's turn between them",
            key=example.key,
        )
    return marks


def mark_removable(
    ids: Sequence[int], targets: Sequence[bool], markers: TurnMarkers
) -> list[bool]:
    """Mark the prompt tokens that a cut may take."""
    # Plain text, never structure, media or targets.
    # ids: Token ids ``[T]``.
    # Returns: ``[T]`` booleans.
    removable = [
        not target and token not in markers.special
        for token, target in zip(ids, targets, strict=True)
    ]

    def protect(start: int, width: int) -> None:
        for position in range(start, min(start + width, len(ids))):
            removable[position] = False

    opener, stub = markers.header[0], markers.empty_thought
    for position, token in enumerate(ids):
        if token == opener:  # the role, the newline after it, and the stub after those
            body = position + len(markers.header)
            protect(position, len(markers.header))
            if stub and tuple(ids[body : body + len(stub)]) == stub:
                protect(body, len(stub))
        elif token == markers.close:  # the newline between turns
            protect(position + 1, 1)
    return removable


def _model_turns(ids: Sequence[int], markers: TurnMarkers) -> Iterator[tuple[int, int]]:
    """Yield ``(start, end)`` of each model turn: after its header, through its close if any."""
    header, width = list(markers.header), len(markers.header)
    position = 0
    while position < len(ids):
        if list(ids[position : position + width]) != header:
            position += 1
            continue
        start = position + width
        stub = len(markers.empty_thought)
        if stub and tuple(ids[start : start + stub]) == markers.empty_thought:
            start += stub
        end = start
        # After a tool's response a template may open the next turn without closing this one.
        while end < len(ids) and ids[end] not in (markers.header[0], markers.close):
            end += 1
        is_closed = end < len(ids) and ids[end] == markers.close
        yield start, end + is_closed
        position = end


def _spoken_positions(
    ids: Sequence[int], start: int, end: int, markers: TurnMarkers
) -> Iterator[tuple[int, int]]:
    """Yield the positions of a model turn that the model wrote, and how many responses precede."""
    inside_response = follows_response = False
    piece = 0
    for position in range(start, end):
        token = ids[position]
        if token == markers.tool_response_open:
            inside_response = True
            if ids[position - 1] == markers.tool_call_close:
                yield position, piece
        elif not inside_response:
            piece += follows_response
            follows_response = False
            if token not in markers.untrained:
                yield position, piece
        if token == markers.tool_response_close:
            inside_response, follows_response = False, True
