"""Values as JSON has them: read from text, written to it, and named for errors."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from gemma_tuner.errors import DataError

_MAX_DEPTH = 64  # chat templates recurse; no schema that people write is half as deep

_MAX_TEXT_BYTES = 1 << 25
_MAX_VALUES = 1 << 20


def is_bounded(text: str, times: int = 1) -> bool:
    """Whether JSON text makes no more than 300 MB of values, so many times: before it is made."""
    num_values = sum(map(text.count, "[{,:"))  # in texts, too: a row of prose has few
    return sys.getsizeof(text) <= times * _MAX_TEXT_BYTES and num_values <= times * _MAX_VALUES


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


class DoubleNameError(ValueError):
    """An object of JSON that has one name twice."""


def make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of its pairs, for json.loads; of two with one name none is right."""
    made = dict(pairs)
    if len(made) < len(pairs):
        raise DoubleNameError
    return made


def parse_json(text: str, what: str, *, key: str) -> Any:
    """Parse JSON, with an error that tells nothing of the text."""
    if not is_bounded(text):
        raise DataError(
            f"{what} has {len(text):,} characters of more than {_MAX_TEXT_BYTES:,} bytes or "
            f"{_MAX_VALUES:,} values; write media to files of their own",
            key=key,
        )
    try:
        return json.loads(text, object_pairs_hook=make_object)
    except DoubleNameError:
        raise DataError(
            f"{what} has an object with one name twice; JSON keeps the last without a word: "
            "rename one",
            key=key,
        ) from None
    except (ValueError, RecursionError) as error:
        column = (
            f" at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else ""
        )
        raise DataError(f"{what} is not valid JSON{column}; write it again", key=key) from None


def write_json(value: Any, what: str, *, key: str) -> str:
    """Write a value as the JSON text that the model reads or learns."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        raise DataError(
            f"{what} holds a value that JSON has no form for (a date or bytes, say); make it text",
            key=key,
        ) from None


def refuse_depth(value: Any, what: str, *, key: str) -> None:
    """Refuse what is nested deeper than templates go, before one of them meets it."""
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [
            item
            for each in level
            if isinstance(each, Mapping | list)
            for item in (each.values() if isinstance(each, Mapping) else each)
        ]
        if not level:
            return
    raise DataError(
        f"{what} are nested deeper than {_MAX_DEPTH} levels; make them flatter, or their inner "
        "part JSON text",
        key=key,
    )


def drop_padding(value: Any) -> Any:
    """Take the null fields out of a columnar source's structs; make objects of Arrow's maps."""
    # A struct has the fields that any row has, and null says that this row has not: a template
    # would write it out. A list or a map has what its author put there, nulls too.
    if isinstance(value, dict):
        return {name: drop_padding(item) for name, item in value.items() if item is not None}
    if isinstance(value, list) and any(isinstance(item, dict | list | tuple) for item in value):
        if all(isinstance(item, tuple) for item in value):
            return {str(name): drop_padding(item) for name, item in value}
        return [drop_padding(item) for item in value]
    return value
