"""Rows of JSON: one on each line, or a whole document that holds them.

A document is an array, objects one after the other over several lines, an object of columns (as
pandas writes it), or an object with one list of rows among what else it says; COCO's captions and
SQuAD's paragraphs are known by their form.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any

from gemma_tuner.errors import DataError, SourceError
from gemma_tuner.sources.formats.lines import PACKED, DataFile, name_last, read_lines, read_text
from gemma_tuner.sources.json_text import (
    DoubleNameError,
    describe_type,
    make_object,
    parse_json,
)

_LISTS = frozenset(
    {"annotations", "data", "dataset", "examples", "instances", "items", "questions", "records"}
    | {"rows", "samples", "train", "training", "test", "valid", "validation", "dev"}
)
"""Names under which an object keeps its rows."""


def read_json(file: DataFile) -> Iterator[tuple[int, dict[str, Any] | DataError]]:
    """Read the rows of a file, numbered from 1, in JSON lines by their lines."""
    numbered = ((number, line) for number, line in read_lines(file) if line.strip())
    head = list(islice(numbered, 2))
    if head and _is_document(file, head[0][1].strip(), is_whole=len(head) == 1):
        for number, row in enumerate(_read_document(file), 1):
            yield number, _check_object(row, file, number)
        return
    for number, line in chain(head, numbered):
        try:
            row = parse_json(line, "the line", key=f"{file.name}:{number}")
        except DataError as error:
            yield number, error
        else:
            yield number, _check_object(row, file, number)


def _is_document(file: DataFile, line: str, *, is_whole: bool) -> bool:
    """Whether a file of this name and first line, which may be all of it, is one document."""
    name = file.name.lower()
    for ending in PACKED:
        name = name.removesuffix(ending)
    if not name.endswith(".json"):
        return line in ("[", "{")
    if not line.startswith("{"):
        return line.startswith("[")
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return True
    return is_whole and _unfold(row, file) is not None


def _check_object(value: Any, file: DataFile, number: int) -> dict[str, Any] | DataError:
    if isinstance(value, dict):
        return value
    return DataError(
        f"the row is {describe_type(value)} and not an object of columns",
        key=f"{file.name}:{number}",
    )


def _read_document(file: DataFile) -> Sequence[Any]:
    text = read_text(file)
    decoder = json.JSONDecoder(object_pairs_hook=make_object)
    values: list[Any] = []
    place = 0
    while place < len(text):
        if text[place].isspace():
            place += 1
            continue
        try:
            value, place = decoder.raw_decode(text, place)
        except DoubleNameError:
            raise SourceError(
                f"{name_last(file)!r} has an object with one name twice; JSON keeps the last "
                "without a word: rename one"
            ) from None
        except (ValueError, RecursionError) as error:
            place = error.pos if isinstance(error, json.JSONDecodeError) else place
            raise SourceError(
                f"{name_last(file)!r} begins like JSON over several lines and is not valid JSON "
                f"at character {place + 1:,}; write it again"
            ) from None
        values.append(value)
    if len(values) != 1:
        return values
    (value,) = values
    if isinstance(value, list):
        return value
    rows = _unfold(value, file) if isinstance(value, dict) else None
    return values if rows is None else rows


def _unfold(value: Mapping[str, Any], file: DataFile) -> Sequence[Any] | None:
    """Return the rows that an object holds; None where it is a row itself."""
    try:
        return _find_rows(value, file)
    except (AttributeError, TypeError):  # of what stands inside
        raise SourceError(
            f"{name_last(file)!r} is laid out as COCO's captions or SQuAD's questions in part "
            "alone; write one row on each line"
        ) from None


def _find_rows(value: Mapping[str, Any], file: DataFile) -> Sequence[Any] | None:
    if _is_list_of(value.get("images"), dict) and isinstance(value.get("annotations"), list):
        return _join_captions(value, file)
    lists = [name for name in value if name in _LISTS and _is_list_of(value[name], dict)]
    if len(lists) > 1:
        raise SourceError(
            f"{name_last(file)!r} holds several lists of rows ({', '.join(sorted(lists))}); write "
            "each to a file of its own"
        )
    if lists:
        rows = value[lists[0]]
        if lists[0] in ("test", "valid", "validation", "dev"):
            return [{"split": lists[0], **row} for row in rows]  # trained by no mistake
        return _list_questions(rows) if "paragraphs" in rows[0] else rows
    inner = list(value.values())
    if all(isinstance(each, dict) for each in inner) and inner:
        keys = list(inner[0])
        if all(key.isdecimal() for key in value):  # pandas: orient="index"
            return inner
        if keys and all(key.isdecimal() for key in keys) and all(list(i) == keys for i in inner):
            return [{name: column[key] for name, column in value.items()} for key in keys]
    is_table = len(inner) > 1 and all(_is_list_of(i, str | int | float | None) for i in inner)
    if is_table and len({len(each) for each in inner}) == 1:
        return [dict(zip(value, row, strict=True)) for row in zip(*inner, strict=True)]
    return None


def _is_list_of(value: Any, kinds: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(i, kinds) for i in value)


def _join_captions(value: Mapping[str, Any], file: DataFile) -> list[dict[str, Any]]:
    """Join COCO's captions with the files of their images, one row a caption."""
    files = {image.get("id"): image.get("file_name") for image in value["images"]}
    captions = [note for note in value["annotations"] if isinstance(note, dict)]
    if not all("caption" in note for note in captions):
        raise SourceError(
            f"{name_last(file)!r} is a COCO file whose annotations hold no caption; give "
            "captions_*.json, or write rows that say what to learn"
        )
    return [
        {
            "id": note.get("id"),
            "image": files.get(note.get("image_id")),
            "caption": note["caption"],
        }
        for note in captions
    ]


def _list_questions(articles: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """List SQuAD's questions with their paragraph and answers, or that there is none."""
    return [
        {
            "id": item.get("id"),
            "instruction": item.get("question"),
            "context": paragraph.get("context"),
            "answers": item.get("answers") or ["unanswerable"],
        }
        for article in articles
        for paragraph in article.get("paragraphs", ())
        for item in paragraph.get("qas", ())
    ]
