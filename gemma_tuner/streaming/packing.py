"""An example as the manifest keeps it: JSON, and the bytes of media that it refers to.

The module :mod:`gemma_tuner.streaming.manifest` shows the form.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import astuple
from typing import Any

import numpy as np

from gemma_tuner.errors import DataError
from gemma_tuner.records import Audio, Example, Image, Part, StoredObject, Text, Turn


def pack(example: Example) -> tuple[str, list[bytes]]:
    """Write an example as JSON, and list the bytes that it refers to."""
    media: list[bytes] = []
    document: dict[str, Any] = {}
    if example.document is not None:
        document["document"] = example.document
    if example.turns:
        document["turns"] = [_pack_turn(turn, media) for turn in example.turns]
    if example.tools:
        document["tools"] = list(example.tools)
    try:
        payload = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
        (example.key + payload).encode()
    except UnicodeEncodeError:
        raise DataError(
            "its text or id holds half of a character (an unpaired surrogate); write it as UTF-8",
            key=example.key,
        ) from None
    except (TypeError, ValueError, RecursionError):
        raise DataError(
            "its messages or tools hold a value that JSON has no form for (a date or bytes, say); "
            "make it text",
            key=example.key,
        ) from None
    return payload, media


def _pack_turn(turn: Turn, media: list[bytes]) -> dict[str, Any]:
    packed: dict[str, Any] = {
        "role": turn.role,
        "parts": [_pack_part(part, media) for part in turn.parts],
    }
    return {**packed, "fields": dict(turn.fields)} if turn.fields else packed


def _pack_part(part: Part, media: list[bytes]) -> list[Any]:
    if isinstance(part, Text):
        return ["text", part.text]
    kind = "image" if isinstance(part, Image) else "audio"
    if isinstance(part.source, str):
        return [kind, part.source]
    if isinstance(part.source, StoredObject):
        return [kind, {"stored": list(astuple(part.source))}]
    place: dict[str, Any] = {"inline": len(media)}
    if isinstance(part.source, bytes):
        media.append(part.source)
    elif isinstance(part, Audio) and isinstance(part.source, np.ndarray):
        place["sample_rate_hz"] = part.sample_rate_hz
        media.append(part.source.astype("<f4").tobytes())
    else:
        raise TypeError(f"a source gives media encoded, and gave a {type(part.source).__name__}")
    return [kind, place]


def unpack(key: str, document: Mapping[str, Any], media: list[bytes]) -> Example:
    """Read an example back."""
    turns = tuple(
        Turn(
            turn["role"],
            tuple(_unpack_part(kind, value, media) for kind, value in turn["parts"]),
            turn.get("fields", {}),
        )
        for turn in document.get("turns", ())
    )
    return Example(key, turns, document.get("document"), tuple(document.get("tools", ())))


def _unpack_part(kind: str, value: Any, media: list[bytes]) -> Part:
    if kind == "text":
        return Text(value)
    if isinstance(value, str):
        source = value
    elif "stored" in value:
        source = StoredObject(*value["stored"])
    else:
        source = media[value["inline"]]
    if kind == "image":
        return Image(source)
    if isinstance(value, dict) and "sample_rate_hz" in value and isinstance(source, bytes):
        return Audio(np.frombuffer(source, dtype="<f4").copy(), value["sample_rate_hz"])
    return Audio(source)
