"""Chat messages and media values, in the forms people keep them, to turns and media parts.

Understood are OpenAI's and transformers' messages (``role``, ``content`` as text or as a list of
typed parts) and ShareGPT's (``from``, ``value``); media as a path, bytes, a ``data:`` URI, or the
dictionaries of Hugging Face datasets.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from gemma_tuner.checks import is_whole_number
from gemma_tuner.errors import DataError
from gemma_tuner.media.encoded import read_base64_media
from gemma_tuner.modalities import MediaKind, kind_of_suffix
from gemma_tuner.records import Audio, Image, Part, Role, StoredObject, Turn
from gemma_tuner.sources.columns import name_parts
from gemma_tuner.sources.json_text import describe_type, parse_json, write_json
from gemma_tuner.sources.places import Places
from gemma_tuner.storage.stores import is_stored, list_schemes

ROLE_NAMES: Mapping[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "ipython": "tool",
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

_CONTENT_FIELDS = ("role", "from", "content", "value", "function_call")
_CALL_IDS = ("call_id", "toolCallId", "tool_use_id")  # which call a tool's turn responds to
_CALL_ROLES = ("function_call", "tool_call")  # ShareGPT's: the content is the call
_MARKS = ("weight", "loss_weight", "trainable", "train", "training", "loss", "mask")
"""Fields of a message that say whether it is trained on."""
# What a message's field would say by its name, where nothing here can follow it.
_REFUSALS: Mapping[str, str] = {
    **dict.fromkeys(
        ("image", "audio", "file", "video"),
        'holds media; put them into its content, as {"type": "image", "image": …} or the like',
    ),
    "weight": 'says whether it is trained on in a form that is not read; write "train": true or '
    "false",
    "preference": "marks a bad answer; take it out, or set train to false",
    "call": "holds calls in a form that is not read; name it tool_calls",
    "tools": "declares tools; put them into a column tools of the row",
}
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
_TEXT_KINDS = ("text", "input_text", "output_text")
_CUTS = ("bbox", "box", "crop", "crop_box", "region", "roi")
_NAMED_BESIDE = frozenset(("type", "text", "detail", "cache_control"))  # and say nothing of which
_DESCRIPTIONS = frozenset(("detail", "format", "sampling_rate"))  # of a value, and none themselves
_LONGEST_PATH = 4096  # Source: PATH_MAX of Linux; macOS has 1,024


def read_media(value: Any, kind: MediaKind, *, key: str) -> Image | Audio | None:
    """Make a media part of one value, still encoded; None where it holds nothing."""
    part = Image if kind == "image" else Audio
    if isinstance(value, Mapping):
        _refuse_cut(value, f"its {kind}", key)
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
    content = read_base64_media(value)
    if content is None and len(value) > _LONGEST_PATH:
        raise DataError(
            f"its {kind} is text of {len(value):,} characters, which is neither a path nor base64 "
            f'of a known format; give a path, {{"bytes": base64}}, or a data:{kind}/...;base64, '
            "URI",
            key=key,
        )
    return part(value if content is None else content)


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


def is_messages(value: Any) -> bool:
    """Tell messages from other lists: objects of which each has a role."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, Mapping) and {"role", "from"} & item.keys() for item in value)
    )


def read_turns(messages: Any, places: Places, *, unused_fields: Counter[str]) -> tuple[Turn, ...]:
    """Make turns of a row's messages, with the row's media in their places."""
    if isinstance(messages, str):
        messages = parse_json(messages, "its messages", key=places.key)
    if not isinstance(messages, list) or not messages:
        what = "an empty list" if messages == [] else describe_type(messages)
        raise DataError(f"its messages are {what}; a list of messages is expected", key=places.key)
    return tuple(
        _read_turn(message, f"message {number}", places, unused_fields)
        for number, message in enumerate(messages, 1)
    )


def _read_turn(message: Any, where: str, places: Places, unused_fields: Counter[str]) -> Turn:
    key = places.key
    if not isinstance(message, Mapping):
        raise DataError(f"{where} is {describe_type(message)} and not an object", key=key)
    name = message.get("role") or message.get("from")
    role = ROLE_NAMES.get(name) if isinstance(name, str) else None
    if role is None:
        shown = _show_word(name)
        raise DataError(
            f"{where} has the unknown role {shown}; known are {', '.join(ROLE_NAMES)}", key=key
        )
    where = f"{where} ({role})"
    content = message.get("content")
    if content is None:
        content = message.get("value")
    is_trained = _read_marks(message, role, where, key, unused_fields)
    fields: dict[str, Any] = {}
    for field, value in message.items():
        if field in _CONTENT_FIELDS or field in _MARKS or value is None:
            continue
        meaning = (*name_parts(field), "")[0]
        if field in PASSED_FIELDS:
            fields[field] = value
        elif field in _CALL_IDS:
            fields.setdefault("tool_call_id", value)
        elif meaning == "reasoning":
            fields.setdefault("reasoning", value)
        else:
            _refuse_meaning(field, value, where, key)
            unused_fields[field] += 1
    calls = content if name in _CALL_ROLES else message.get("function_call")
    if calls is not None:
        if fields.get("tool_calls"):
            raise DataError(f"{where} has tool_calls and another call; keep one form", key=key)
        fields["tool_calls"] = calls
        content = None if calls is content else content
    if not fields.get("tool_calls", True):
        del fields["tool_calls"]
    return Turn(role, tuple(_read_content(content, role, where, places)), fields, is_trained)


def _refuse_meaning(field: str, value: Any, where: str, key: str) -> None:
    """Refuse a field of a message, or of a part, that means something and would be passed over."""
    parts = name_parts(field)
    said = next((_REFUSALS[part] for part in parts if part in _REFUSALS), "")
    if "preference" in parts:  # of what is good, none can say how good
        said = _REFUSALS["preference"] if value in (False, "false", "rejected") else ""
    elif said and "weight" not in parts and not value:
        said = ""
    if not said and _names_media(value):
        said = _REFUSALS["image"]
    if said:
        raise DataError(f"{where} has a field {field[:40]!r} that {said}", key=key)


def _names_media(value: Any) -> bool:
    if isinstance(value, Mapping | list):
        items = value.values() if isinstance(value, Mapping) else value
        return any(isinstance(item, str | Mapping) and _names_media(item) for item in items)
    return (
        isinstance(value, str)
        and len(value) <= _LONGEST_PATH
        and "\n" not in value
        and kind_of_suffix(f".{value.rpartition('.')[2].lower()}") is not None
    )


def _read_marks(
    message: Mapping[str, Any], role: Role, where: str, key: str, unused_fields: Counter[str]
) -> bool:
    """Tell whether a message is trained on, as its own marks say."""
    marks = {name: message[name] for name in _MARKS if message.get(name) is not None}
    if "mask" in marks:
        raise DataError(
            f"{where} has a mask, which some data set for what is trained on and some for what is "
            'not; write "train": true or false instead',
            key=key,
        )
    for name, value in marks.items():
        if value not in (0, 1):  # and so False and True
            raise DataError(
                f"{where} has a {name} that is neither 0 nor 1, nor true or false; an answer is "
                "trained on or not",
                key=key,
            )
    if len({bool(value) for value in marks.values()}) > 1:
        raise DataError(f"{where} has {' and '.join(marks)} that differ; keep one", key=key)
    if role != "assistant":  # never trained on: a mark that says so says nothing new
        unused_fields.update(name for name, value in marks.items() if value)
    return role != "assistant" or all(marks.values())


def _read_content(content: Any, role: Role, where: str, places: Places) -> Iterator[Part]:
    holds_media = role in {"user", "tool"}
    if content is None:
        return
    if isinstance(content, Mapping):
        is_part = content.get("type") in (*_TEXT_KINDS, *_PART_KINDS)
        content = [content] if is_part else write_json(content, where, key=places.key)
    is_parts = isinstance(content, list) and all(map(_is_part, content))
    if role == "tool" and not (is_parts or isinstance(content, str)):
        content = write_json(content, where, key=places.key)  # what the tool returned
    if isinstance(content, str):
        yield from places.split(content, where, holds_media=holds_media)
        return
    if not isinstance(content, list):
        raise DataError(
            f"{where} has {describe_type(content)} as content; it is text or a list of parts",
            key=places.key,
        )
    for part in content:
        fields: Mapping[str, Any] = part if isinstance(part, Mapping) else {}
        text = part if isinstance(part, str) else fields.get("text")
        kind = "text" if isinstance(part, str) else fields.get("type")
        if kind in _TEXT_KINDS and isinstance(text, str):
            for field in fields.keys() - {"type", "text"}:  # a mark is of a whole message
                if fields[field] is not None:
                    _refuse_meaning(field, fields[field], f"a part of {where}", places.key)
            yield from places.split(text, where, holds_media=holds_media)
        elif isinstance(kind, str) and kind in _PART_KINDS:
            yield _read_part(fields, kind, where, places)
        else:
            shown = _show_word(kind)
            raise DataError(
                f"{where} has a part of type {shown} that cannot be read; known are text (with "
                f"its text), {', '.join(_PART_KINDS)}",
                key=places.key,
            )


def _is_part(part: Any) -> bool:
    return isinstance(part, str) or (
        isinstance(part, Mapping) and isinstance(part.get("type"), str)
    )


def _read_part(fields: Mapping[str, Any], kind: str, where: str, places: Places) -> Image | Audio:
    """Read a part with media of its own, or with the place of the row's next item or of one."""
    medium = _PART_KINDS[kind]
    _refuse_cut(fields, f"a part of {where}", places.key)
    known = (kind, medium, f"{medium}_url", f"input_{medium}", *_PART_VALUES)
    value = next((fields[name] for name in known if fields.get(name) is not None), None)
    if isinstance(value, str) and value in (fields.get(name) for name in _BASE64):
        value = {"data": value}
    names = ("index", f"{medium}_index", f"{medium}_idx", "idx")
    given = [fields[name] for name in names if fields.get(name) is not None]
    if value is None and not given and any(fields[n] for n in fields.keys() - _NAMED_BESIDE):
        raise DataError(f"{where}: {_describe_forms(medium)}", key=places.key)
    if is_whole_number(value):  # {"type": "image", "image": 1}
        given, value = [*given, value], None
    is_made = isinstance(value, Image | Audio)  # by whoever had it opened
    part = value if is_made else read_media(value, medium, key=places.key)
    if given and (part is not None or len(given) > 1):
        raise DataError(
            f"{where} has a part with an index and another {medium} or index beside it; keep one",
            key=places.key,
        )
    return part or places.take(medium, where, *given)


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


def _refuse_cut(fields: Mapping[str, Any], what: str, key: str) -> None:
    """Refuse an image or a clip that says which part of it is meant: all of it would be used."""
    for field, value in fields.items():
        is_cut = field in _CUTS or {"start", "end", "segments"} & set(name_parts(field))
        if is_cut and value is not None:
            raise DataError(
                f"{what} has a field {field[:40]!r} that says which part of it is meant; give "
                "a clip's as columns of the row (start and end), or cut the file",
                key=key,
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
        return base64.b64decode("".join(text.split()), validate=True)  # MIME has lines of 76
    except (binascii.Error, ValueError):
        raise DataError(f"its {kind} is not valid base64; encode it again", key=key) from None
