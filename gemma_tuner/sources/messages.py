"""Chat messages and media values, in the forms people keep them, to turns and media parts.

Understood are OpenAI's and transformers' messages (``role``, ``content`` as text or as a list of
typed parts) and ShareGPT's (``from``, ``value``); media as a path, bytes, a ``data:`` URI, or the
dictionaries of Hugging Face datasets.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gemma_tuner.checks import is_whole_number
from gemma_tuner.errors import DataError
from gemma_tuner.modalities import MediaKind
from gemma_tuner.records import Audio, Image, Part, Role, StoredObject, Text, Turn
from gemma_tuner.storage.stores import is_stored, list_schemes

ROLE_NAMES: Mapping[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "tool": "tool",
}
"""From the names of roles in data to the names here."""

PASSED_FIELDS = (
    "name",
    "reasoning",
    "reasoning_content",
    "tool_call_id",
    "tool_calls",
    "tool_responses",
)
"""Fields of a message that chat templates read; they go into ``Turn.fields``."""

_CONTENT_FIELDS = ("role", "from", "content", "value")
_PART_KINDS: Mapping[str, MediaKind] = {
    "image": "image",
    "image_url": "image",
    "input_image": "image",
    "audio": "audio",
    "audio_url": "audio",
    "input_audio": "audio",
}
_PART_VALUES = ("path", "url", "bytes", "data")
_BASE64 = ("bytes", "data")  # JSON has no bytes: text under these names is base64
_DESCRIPTIONS = frozenset(("detail", "format", "sampling_rate"))  # of a value, and none themselves
_TAG = re.compile(r"\n?<(image|audio)>\n?")


def describe_type(value: object) -> str:
    """Name a value's type as users of JSON know it, and nothing of the value."""
    for kinds, name in (
        (type(None), "null"),
        (bool, "true or false"),
        (int | float, "a number"),
        (str, "text"),
        (bytes, "bytes"),
        (Mapping, "an object"),
        (Sequence, "a list"),
    ):
        if isinstance(value, kinds):
            return name
    return type(value).__name__


def read_media(value: Any, kind: MediaKind, *, key: str) -> Image | Audio | None:
    """Make a media part of one value, still encoded; None where it holds nothing."""
    part = Image if kind == "image" else Audio
    if isinstance(value, Mapping):
        if kind == "audio" and value.get("array") is not None:
            return _read_samples(value, key)
        encoded = next((value[name] for name in _BASE64 if isinstance(value.get(name), str)), "")
        if encoded:
            return part(_decode_base64(encoded, kind, key))
        if value.get("uri") and "version" in value:
            return part(_read_object_ref(value, kind, key))
        found = (value.get(name) for name in ("bytes", "path", "url"))
        item = next((item for item in found if item), None)
        if item is None and any(value[name] for name in value.keys() - _DESCRIPTIONS):
            raise DataError(_describe_forms(kind), key=key)
        value = item
    if isinstance(value, StoredObject):
        return part(value)
    if value is None or value == "" or value == b"":
        return None
    if isinstance(value, bytes):
        return part(value)
    if not isinstance(value, str):
        raise DataError(
            f"its {kind} is {describe_type(value)}; give a path, encoded bytes, or a dictionary "
            'with "bytes" or "path"',
            key=key,
        )
    if value[:5].lower() == "data:":
        return part(_decode_base64(value.partition(",")[2], kind, key))
    return part(value)


def read_media_list(value: Any, kind: MediaKind, *, key: str) -> list[Image | Audio]:
    """Make media parts of one value or a list of them."""
    if not isinstance(value, list):
        part = read_media(value, kind, key=key)
        return [] if part is None else [part]
    parts = [read_media(item, kind, key=key) for item in value]
    whole = [part for part in parts if part is not None]
    if len(whole) < len(parts):
        raise DataError(
            f"{len(parts) - len(whole)} of the {len(parts)} items in its list of {kind} are "
            "empty; fill them or take them out",
            key=key,
        )
    return whole


def read_turns(
    messages: Any,
    *,
    key: str,
    media: Mapping[MediaKind, Sequence[Image | Audio]],
    unused_fields: Counter[str],
) -> tuple[tuple[Turn, ...], list[Image | Audio]]:
    """Make turns of a row's messages; return them, and the media that have no place in them."""
    # A part without content (``{"type": "image"}``), or the tag ``<image>`` or ``<audio>`` within
    # the text of a row that has such media, takes the next of the row's own media.
    if isinstance(messages, str):
        messages = parse_json(messages, "its messages", key=key)
    if not isinstance(messages, list) or not messages:
        what = "an empty list" if messages == [] else describe_type(messages)
        raise DataError(f"its messages are {what}; a list of messages is expected", key=key)
    waiting: dict[MediaKind, deque[Image | Audio]] = {
        kind: deque(parts) for kind, parts in media.items()
    }
    turns = tuple(
        _read_turn(message, f"message {number}", key, waiting, unused_fields)
        for number, message in enumerate(messages, 1)
    )
    for kind, parts in media.items():
        if 0 < len(waiting[kind]) < len(parts):
            raise DataError(
                f"its messages have places for {len(parts) - len(waiting[kind])} of its "
                f"{len(parts)} {kind} items; add a place for each, or none to put all of them "
                "before the first user turn's text",
                key=key,
            )
    return turns, [part for parts in waiting.values() for part in parts]


def parse_json(text: str, what: str, *, key: str) -> Any:
    """Parse JSON, with an error that tells nothing of the text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        column = (
            f" at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else ""
        )
        raise DataError(f"{what} is not valid JSON{column}; write it again", key=key) from None


def _read_turn(
    message: Any,
    where: str,
    key: str,
    waiting: Mapping[MediaKind, deque[Image | Audio]],
    unused_fields: Counter[str],
) -> Turn:
    if not isinstance(message, Mapping):
        raise DataError(f"{where} is {describe_type(message)} and not an object", key=key)
    name = message.get("role", message.get("from"))
    role = ROLE_NAMES.get(name) if isinstance(name, str) else None
    if role is None:
        shown = _show_word(name)
        raise DataError(
            f"{where} has the unknown role {shown}; known are {', '.join(ROLE_NAMES)}", key=key
        )
    content = message.get("content", message.get("value"))
    fields = {}
    for field, value in message.items():
        if field in _CONTENT_FIELDS or value is None:
            continue
        if field in PASSED_FIELDS:
            fields[field] = _read_tool_calls(value, key) if field == "tool_calls" else value
        else:
            unused_fields[field] += 1
    return Turn(role, tuple(_read_content(content, where, key, waiting)), fields)


def _read_content(
    content: Any, where: str, key: str, waiting: Mapping[MediaKind, deque[Image | Audio]]
) -> Iterator[Part]:
    if content is None:
        return
    if isinstance(content, str):
        yield from _split_tags(content, where, key, waiting)
        return
    if not isinstance(content, list):
        raise DataError(
            f"{where} has {describe_type(content)} as content; it is text or a list of parts",
            key=key,
        )
    for part in content:
        if isinstance(part, str):
            yield Text(part)
            continue
        fields: Mapping[str, Any] = part if isinstance(part, Mapping) else {}
        kind = fields.get("type")
        if kind == "text" and isinstance(fields.get("text"), str):
            yield Text(fields["text"])
        elif isinstance(kind, str) and kind in _PART_KINDS:
            media_kind = _PART_KINDS[kind]
            names = (kind, media_kind, *_PART_VALUES)
            value = next((fields[name] for name in names if fields.get(name) is not None), None)
            if isinstance(value, str) and value in (fields.get(name) for name in _BASE64):
                value = {"data": value}
            yield read_media(value, media_kind, key=key) or _take(media_kind, where, key, waiting)
        else:
            shown = _show_word(kind)
            raise DataError(
                f"{where} has a part of type {shown} that cannot be read; known are text (with "
                f"its text), {', '.join(_PART_KINDS)}",
                key=key,
            )


def _split_tags(
    text: str, where: str, key: str, waiting: Mapping[MediaKind, deque[Image | Audio]]
) -> Iterator[Part]:
    start = 0
    for tag in _TAG.finditer(text):
        kind: MediaKind = "image" if tag[1] == "image" else "audio"
        if kind not in waiting:
            continue  # a row without such media: the tag is text like any other
        if text[start : tag.start()]:
            yield Text(text[start : tag.start()])
        yield _take(kind, where, key, waiting)
        start = tag.end()
    if text[start:]:
        yield Text(text[start:])


def _take(
    kind: MediaKind, where: str, key: str, waiting: Mapping[MediaKind, deque[Image | Audio]]
) -> Image | Audio:
    if not waiting.get(kind):
        raise DataError(
            f"{where} has a place for one more {kind} than the row holds; fill the {kind} column "
            "or take the place out",
            key=key,
        )
    return waiting[kind].popleft()


def _read_tool_calls(calls: Any, key: str) -> Any:
    """Parse arguments that are kept as JSON text, as OpenAI's API gives them."""
    if not isinstance(calls, list):
        raise DataError(f"its tool_calls are {describe_type(calls)} and not a list", key=key)
    parsed = []
    for call in calls:
        function = call.get("function") if isinstance(call, Mapping) else None
        if isinstance(function, Mapping) and isinstance(function.get("arguments"), str):
            arguments = parse_json(function["arguments"], "a tool call's arguments", key=key)
            call = {**call, "function": {**function, "arguments": arguments}}  # noqa: PLW2901
        parsed.append(call)
    return parsed


def _show_word(value: Any) -> str:
    """Show what may be a word of another format, and nothing else of the data."""
    is_word = isinstance(value, str) and re.fullmatch(r"[a-z_-]{1,20}", value)
    return repr(value) if is_word else describe_type(value)


def _describe_forms(kind: MediaKind) -> str:
    samples = ', {"array", "sampling_rate"}' if kind == "audio" else ""
    return (
        f'its {kind} is an object of another form; known are {{"bytes"}}, {{"data"}}, {{"path"}}, '
        f'{{"url"}}, BigQuery\'s ObjectRef ({{"uri", "version"}}){samples}; rename its '
        f"fields, or name another column by {kind}="
    )


def _read_samples(value: Mapping[str, Any], key: str) -> Audio:
    rate_hz = value.get("sampling_rate")
    if not is_whole_number(rate_hz) or rate_hz <= 0:
        raise DataError(
            "its audio has an array and no sampling_rate above 0; give samples a second", key=key
        )
    try:
        samples = np.asarray(value["array"])
    except ValueError:
        samples = np.empty((0, 0))
    if samples.ndim != 1 or samples.dtype.kind != "f" or samples.size == 0:
        raise DataError(
            f"its audio array has the shape {list(samples.shape)} and type {samples.dtype}; one "
            "channel of floats between -1 and 1 is expected",
            key=key,
        )
    return Audio(samples.astype(np.float32), rate_hz)


def _read_object_ref(value: Mapping[str, Any], kind: MediaKind, key: str) -> StoredObject:
    """Read ``STRUCT<uri, version, authorizer, details>``, whose version is the generation."""
    uri, version = value["uri"], value["version"]
    if not isinstance(uri, str) or not (version is None or str(version).isdecimal()):
        raise DataError(
            f"its {kind} is an ObjectRef whose uri is {describe_type(uri)} and whose version is "
            f"{describe_type(version)}; text and a generation are expected",
            key=key,
        )
    if not is_stored(uri):
        raise DataError(
            f"its {kind} is an ObjectRef with no {list_schemes()} URI; name an object in a bucket",
            key=key,
        )
    details = value.get("details")
    if isinstance(details, str):
        details = parse_json(details, f"the details of its {kind}", key=key)
    metadata = details.get("gcs_metadata") if isinstance(details, Mapping) else None
    size = str(metadata.get("size")) if isinstance(metadata, Mapping) else ""
    return StoredObject(
        uri,
        generation=None if version is None else int(version),
        num_bytes=int(size) if size.isdecimal() else None,
    )


def _decode_base64(text: str, kind: MediaKind, key: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise DataError(f"its {kind} is not valid base64; encode it again", key=key) from None
