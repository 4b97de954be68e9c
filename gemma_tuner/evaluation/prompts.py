"""Prompts in every form that people write, to the rows that a model continues.

A prompt is rendered as training renders it, with an answer at its end, and cut where that answer
begins: what the model is asked is what it was trained to answer, by construction.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import torch

from gemma_tuner.batch import Row
from gemma_tuner.errors import ConfigError, DataError
from gemma_tuner.modalities import MediaKind, kind_of
from gemma_tuner.records import Audio, Example, Image, Text, Turn
from gemma_tuner.sources.messages import read_media, read_turns
from gemma_tuner.sources.places import Places, place_media
from gemma_tuner.sources.tools import pair_responses

if TYPE_CHECKING:
    from gemma_tuner.collators.text import TextCollator

Messages = Sequence[Mapping[str, Any]]
"""A conversation as OpenAI's and transformers' messages, or ShareGPT's."""

Prompt = str | Messages | Example
"""A question, a conversation that waits for an answer, or an example without its answer."""

# Any text that a template neither trims nor takes for anything else.
_PLACEHOLDER = Turn("assistant", (Text("x"),))


@dataclass(frozen=True, slots=True)
class PromptRow:
    """One example, cut where its last answer begins."""

    row: Row  # every token before the answer, with all media
    answer_ids: tuple[int, ...]  # with the token that ends it


def read_prompts(
    prompts: Prompt | Sequence[Prompt], *, image: Any = None, audio: Any = None
) -> tuple[list[Example], bool]:
    """Make examples, still without an answer, of one prompt or a list; say if it was one."""
    # Media without a place in a conversation come before the text of its first user turn.
    is_single = isinstance(prompts, str | Example) or _is_messages(prompts)
    entries: list[Any] = [prompts] if is_single else _list_prompts(prompts)
    columns = {"image": image, "audio": audio}
    for kind, given in columns.items():
        if is_single or given is None:
            columns[kind] = [given] * len(entries)
        elif not isinstance(given, list | tuple) or len(given) != len(entries):
            count = len(given) if isinstance(given, list | tuple) else type(given).__name__
            raise ConfigError(
                f"{kind} is {count} for {len(entries)} prompts; give a list with an entry for "
                "each prompt, None where one has none"
            )
    examples = [
        _read_prompt(entry, {"image": images, "audio": clips}, f"prompt {number}")
        for number, (entry, images, clips) in enumerate(
            zip(entries, *columns.values(), strict=True), 1
        )
    ]
    return examples, is_single


def encode_prompt(collator: TextCollator, example: Example) -> PromptRow:
    """Encode an example up to its last answer, exactly as training reads it."""
    row = collator.encode(example)
    end = int(row.targets.nonzero()[-1]) + 1
    start = end
    while row.targets[start - 1]:  # the first token is <bos>, never a target
        start -= 1
    return PromptRow(
        row=replace(
            row,
            input_ids=row.input_ids[:start],
            token_types=row.token_types[:start],
            targets=torch.zeros(start, dtype=torch.bool),
        ),
        answer_ids=tuple(row.input_ids[start:end].tolist()),
    )


def add_placeholder(example: Example) -> Example:
    """Give a prompt an answer, so that it can be rendered as training renders it."""
    return replace(example, turns=(*example.turns, _PLACEHOLDER))


def end_with_answer(example: Example) -> Example | None:
    """Drop the turns after the last answer to learn; None if there is none."""
    for index in range(len(example.turns), 0, -1):
        turn = example.turns[index - 1]
        if turn.role == "assistant" and turn.is_trained:
            return replace(example, turns=example.turns[:index])
    return None


def show_prompt(example: Example) -> str:
    """Write a conversation's turns but its last, which is the answer, for a person to read."""
    return "\n".join(
        f"{turn.role}: {''.join(map(_show_part, turn.parts))}" for turn in example.turns[:-1]
    )


def _show_part(part: Any) -> str:
    if isinstance(part, Text):
        return part.text
    return f"[{kind_of(part)}] "


def _is_messages(prompts: object) -> bool:
    return (
        isinstance(prompts, list | tuple)
        and bool(prompts)
        and all(isinstance(message, Mapping) for message in prompts)
    )


def _list_prompts(prompts: Any) -> list[Any]:
    if not isinstance(prompts, list | tuple):
        raise ConfigError(
            f"the prompt is a {type(prompts).__name__}; give text, messages such as "
            '[{"role": "user", "content": "Hello"}], or a list of these'
        )
    if not prompts:
        raise ConfigError("the list of prompts is empty; give at least one")
    for number, prompt in enumerate(prompts, 1):
        if not isinstance(prompt, str | Example) and not _is_messages(prompt):
            raise ConfigError(
                f"prompt {number} is a {type(prompt).__name__}; give text or messages such as "
                '[{"role": "user", "content": "Hello"}]'
            )
    return list(prompts)


def _read_prompt(prompt: Any, given: Mapping[MediaKind, Any], key: str) -> Example:
    media: dict[MediaKind, list[Image | Audio]] = {
        kind: [_read_medium(item, kind, key) for item in _as_list(value)]
        for kind, value in given.items()
    }
    if isinstance(prompt, Example):
        if prompt.document is not None:
            raise DataError("a document asks nothing; give a conversation", key=prompt.key)
        turns, unplaced, tools = prompt.turns, [*media["image"], *media["audio"]], prompt.tools
        key = prompt.key
    else:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        messages = [_wrap_objects(message, key) for message in messages]
        unused: Counter[str] = Counter()
        # Who gives no images asks about the letters of a tag.
        places = Places(media, key, letters=[kind for kind, parts in media.items() if not parts])
        turns = pair_responses(read_turns(messages, places, unused_fields=unused), key=key)
        unplaced, tools = places.list_unplaced(), ()
        if unused:
            raise DataError(
                f"its messages have fields that nothing reads: {', '.join(sorted(unused))}; take "
                "them out",
                key=key,
            )
    turns = place_media(turns, unplaced, key)
    if not any(part for turn in turns for part in turn.parts if part != Text("")):
        raise DataError("it is empty; give text, an image or a clip", key=key)
    if turns[-1].role == "assistant":
        raise DataError(
            "the conversation ends with an answer; leave that out to have it answered again, or "
            "add the next question",
            key=key,
        )
    return Example(key, turns, tools=tools)


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _read_medium(value: Any, kind: MediaKind, key: str) -> Image | Audio:
    part_type = Image if kind == "image" else Audio
    if isinstance(value, part_type):
        return value
    if kind == "image" and isinstance(value, PIL.Image.Image):
        return Image(value)
    if isinstance(value, np.ndarray):
        remedy = (
            "an array; give PIL.Image.fromarray(array)"
            if kind == "image"
            else "an array without its rate; give Audio(samples, sample_rate_hz)"
        )
        raise DataError(f"its {kind} is {remedy}", key=key)
    part = read_media(str(value) if hasattr(value, "__fspath__") else value, kind, key=key)
    if part is None:
        raise DataError(f"its {kind} is empty; give a path, bytes or the {kind} itself", key=key)
    return part


def _wrap_objects(message: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Give opened images and clips in a message the form that messages of data have."""

    def wrapped(part: Any) -> Any:
        kind = part.get("type") if isinstance(part, Mapping) else None
        value = part.get(kind) if kind else None
        if (kind == "image" or kind == "audio") and isinstance(
            value, PIL.Image.Image | Image | Audio
        ):
            return {**part, kind: _read_medium(value, kind, key)}
        return part

    content = message.get("content")
    return (
        {**message, "content": list(map(wrapped, content))}
        if isinstance(content, list)
        else message
    )
