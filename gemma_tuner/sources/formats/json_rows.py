"""Rows of JSON: one on each line, or a whole document that holds them.

A document is an array, objects one after the other over several lines, an object of columns (as
pandas writes it), or an object with one list of rows among what else it says; COCO's captions and
SQuAD's paragraphs are known by their form.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import chain, islice
from typing import Any

from gemma_tuner.errors import DataError, SourceError
from gemma_tuner.sources.formats.lines import (
    PACKED,
    DataFile,
    join_text,
    name_last,
    read_lines,
    read_text,
)
from gemma_tuner.sources.json_text import (
    DoubleNameError,
    describe_type,
    is_bounded,
    make_object,
    parse_json,
)

_LISTS = frozenset(
    {"annotations", "data", "dataset", "examples", "instances", "items", "questions", "records"}
    | {"rows", "samples", "train", "training", "test", "valid", "validation", "dev"}
)
"""Names under which an object keeps its rows."""

_MAX_DOCUMENT_BYTES = 1 << 27  # of one object: COCO's captions have 92 MB and 7 million values
_DOCUMENT_TIMES = 8
_LARGE_CHARACTERS = 1 << 22
_SPACE: Any = re.compile(r"\s*")
_DECODER = json.JSONDecoder(object_pairs_hook=make_object)


def read_json(file: DataFile) -> Iterator[tuple[int, dict[str, Any] | DataError]]:
    """Read the rows of a file, numbered from 1, in JSON lines by their lines."""
    name = file.name.lower()
    for ending in PACKED:
        name = name.removesuffix(ending)
    rows = _open_document(file) if name.endswith(".json") else None
    numbered = ((number, line) for number, line in read_lines(file) if line.strip())
    head = [] if rows is not None else list(islice(numbered, 1))
    if head and (mark := head[0][1].strip()) in ("[", "{"):
        rows = _read_items(file) if mark == "[" else _read_document(file)
    if rows is not None:
        for number, row in enumerate(rows, 1):
            yield number, _check_object(row, file, number)
        return
    for number, line in chain(head, numbered):
        try:
            row = parse_json(line, "the line", key=f"{file.name}:{number}")
        except DataError as error:
            yield number, error
        else:
            yield number, _check_object(row, file, number)


def _open_document(file: DataFile) -> Iterable[Any] | None:
    """Open a file that is named as one document; None where its first line is a row."""
    with closing(read_lines(file, in_parts=True)) as parts:
        first = next(filter(str.strip, (part for _, part in parts)), "").lstrip()
        if not first.startswith("{"):
            return _read_items(file) if first.startswith("[") else None
        line = join_text(_take_line(chain([(1, first)], parts)), file, _MAX_DOCUMENT_BYTES)
        try:
            row = json.loads(_check_bounds(line, file), object_pairs_hook=make_object)
        except DoubleNameError:
            return None
        except (ValueError, RecursionError):
            return _read_document(file)
        return None if any(part.strip() for _, part in parts) else _unfold(row, file)


def _take_line(parts: Iterable[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    for number, part in parts:
        yield number, part
        if part.endswith("\n"):
            return


def _check_bounds(text: str, file: DataFile, times: int = _DOCUMENT_TIMES) -> str:
    if not is_bounded(text, times):
        raise SourceError(
            f"{name_last(file)!r} has too much in one document or row of it; write JSON lines, "
            "which are read one by one"
        )
    return text


def _read_items(file: DataFile) -> Iterator[Any]:
    """Read the items of an array one by one: of all, memory may hold no more than a few MiB."""
    text, marks, takes_value = "", "[", False
    num_past = num_wanted = 0
    parts = (part for _, part in read_lines(file, in_parts=True))
    for part in chain(parts, [None]):
        text += part or ""
        if part is not None and len(text) < num_wanted:
            continue
        if len(text) > _LARGE_CHARACTERS:
            _check_bounds(text, file, times=2)  # what follows a large item is in it, too
        place = 0
        while (place := _SPACE.match(text, place).end()) < len(text):
            if text[place] in marks:
                takes_value = text[place] != "]"
                marks = "]" if text[place] == "[" else ""
                place += 1
                continue
            if not takes_value:
                raise _refuse_syntax(file, num_past + place)
            try:
                value, end = _decode(text, place, file, num_past)
            except SourceError:
                if part is None:
                    raise
                break
            if end == len(text) and part is not None:
                break  # of a number, more may follow
            yield value
            marks, takes_value, place = ",]", False, end
        num_wanted = 2 * (len(text) - place)
        num_past, text = num_past + place, text[place:]
    if marks or takes_value:
        raise _refuse_syntax(file, num_past)


def _decode(text: str, place: int, file: DataFile, num_past: int = 0) -> tuple[Any, int]:
    """Decode the value that begins at a place; return it and where it ends."""
    try:
        return _DECODER.raw_decode(text, place)
    except DoubleNameError:
        raise SourceError(
            f"{name_last(file)!r} has an object with one name twice; JSON keeps the last "
            "without a word: rename one"
        ) from None
    except (ValueError, RecursionError) as error:
        place = error.pos if isinstance(error, json.JSONDecodeError) else place
        raise _refuse_syntax(file, num_past + place) from None


def _refuse_syntax(file: DataFile, place: int) -> SourceError:
    return SourceError(
        f"{name_last(file)!r} begins like JSON over several lines and is not valid JSON "
        f"at character {place + 1:,}; write it again"
    )


def _check_object(value: Any, file: DataFile, number: int) -> dict[str, Any] | DataError:
    if isinstance(value, dict):
        return value
    return DataError(
        f"the row is {describe_type(value)} and not an object of columns",
        key=f"{file.name}:{number}",
    )


def _read_document(file: DataFile) -> Sequence[Any]:
    text = _check_bounds(read_text(file, _MAX_DOCUMENT_BYTES), file)
    values: list[Any] = []
    place = 0
    while (place := _SPACE.match(text, place).end()) < len(text):
        value, place = _decode(text, place, file)
        values.append(value)
    if len(values) != 1:
        return values
    rows = _unfold(values[0], file) if isinstance(values[0], dict) else None
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
