"""A row of any source to an Example, by the parts that its columns play.

Media come before the text of the user's turn, images first, then clips, unless the messages
say where they belong.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from gemma_tuner.display import is_blank
from gemma_tuner.errors import DataError
from gemma_tuner.modalities import MediaKind, kind_of, kind_of_suffix
from gemma_tuner.records import Audio, Example, Image, Part, Role, Turn
from gemma_tuner.sources.columns import (
    Columns,
    holds_alternatives,
    list_media_columns,
    read_unit_seconds,
)
from gemma_tuner.sources.json_text import describe_type, parse_json, write_json
from gemma_tuner.sources.messages import is_messages, read_media_list, read_turns
from gemma_tuner.sources.places import Places, place_media
from gemma_tuner.sources.tools import pair_responses, read_declarations

IMAGE_PROMPT = "Describe this image."
"""The prompt of rows that hold an image, a text, and no prompt."""
AUDIO_PROMPT = "Transcribe this audio."
"""The prompt of rows that hold a clip, a text, and no prompt."""

_SEGMENT = ("start", "end", "duration")
_ROUNDING_SECONDS = 0.1  # that numbers of one row may differ by


@dataclass(slots=True)
class RowReader:
    """Makes examples of rows, and counts what it chose for them."""

    columns: Columns
    counts: Counter[str] = field(default_factory=Counter)
    _unused_fields: Counter[str] = field(default_factory=Counter)
    _first_without_media: str | None = None
    _num_with_media: int = 0

    def read_key(self, row: Mapping[str, Any], origin: str) -> str:
        """Return the value of the id column as text, or the origin where there is none."""
        column = self.columns.names.get("id")
        if column is None:
            return origin
        value = row.get(column)
        if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
            what = "empty" if value == "" else describe_type(value)
            raise DataError(
                f"its column {column!r} is {what}; an id is text or a whole number (or set "
                "id=False to number the rows)",
                key=origin,
            )
        return str(value)

    def read_example(self, row: Mapping[str, Any], key: str) -> Example:
        """Make an example of one row."""
        if self.columns.layout == "document":
            document = self._read_text(row, "text", key, may_be_empty=False)
            for _ in self._find_places((), key).split(document, "the document"):
                pass  # a tag without its image is refused
            return Example(key, document=document)
        media = self._read_media(row, key)
        places = self._find_places(media, key)
        if self.columns.layout == "chat":
            messages = self._read_field(row, "messages", key)
            turns = read_turns(messages, places, unused_fields=self._unused_fields)
            self._check_beside_messages(row, turns, key)
            if not any(map(_list_media, turns)):
                self._check_media(key, has_media=bool(media))
        else:
            self._check_media(key, has_media=bool(media))
            turns = (
                *self._read_history(row, media, places),
                *self._read_prompt(row, media, places),
                *self._read_response(row, places),
            )
        turns = place_media(turns, places.list_unplaced(), key)
        system = self._read_text(row, "system", key) if "system" in self.columns.names else ""
        if system:
            if turns[0].role == "system":
                raise DataError(
                    f"its messages begin with a system turn and its column "
                    f"{self.columns.names['system']!r} holds another; set system=False to keep "
                    "the one in the messages",
                    key=key,
                )
            turns = (Turn("system", tuple(places.split(system, "the system"))), *turns)
        turns = pair_responses(turns, key=key)
        _check_turns(turns, key)
        self.counts["answers read and not trained on"] += sum(not t.is_trained for t in turns)
        self.counts["earlier answers with a thought, which templates leave out: read only"] += (
            _count_earlier_thoughts(turns)
        )
        example = Example(key, turns, tools=self._read_tools(row, key))
        for part in example.media:
            self.counts["pictures" if isinstance(part, Image) else "sounds"] += 1
        if list_media_columns(self.columns.names) and not any(map(_list_media, turns)):
            self._first_without_media = self._first_without_media or key
        return example

    def refuse_rows_before(self) -> None:
        """Refuse the set where rows held no media until one did: they were read as text alone."""
        if self._num_with_media and self._first_without_media is not None:
            raise self._explain_lack(self._first_without_media)

    def read_notes(self) -> dict[str, int]:
        """Return what the rows read so far held, defaulted or left unused, with its count."""
        notes = {what: count for what, count in self.counts.items() if count}
        for name, count in sorted(self._unused_fields.items()):
            notes[f"message field {name!r} not used"] = count
        return notes

    def _read_field(self, row: Mapping[str, Any], part: str, key: str) -> Any:
        column = self.columns.names[part]
        if column not in row:
            raise DataError(
                f"it has no column {column!r}, which is the {part} of the rows before; give every "
                "row the same columns, or read the two kinds of row as two streams",
                key=key,
            )
        return row[column]

    def _read_text(
        self, row: Mapping[str, Any], part: str, key: str, *, may_be_empty: bool = True
    ) -> str:
        if part == "system" and self.columns.names[part] not in row:
            return ""
        value = self._read_field(row, part, key)
        if part == "response":
            value = self._choose_answer(value)
        if part == "response" and value and isinstance(value, Mapping | list):
            self.counts["answers written as JSON"] += 1
            value = write_json(value, f"its column {self.columns.names[part]!r}", key=key)
        if value is not None and not isinstance(value, str):
            raise DataError(
                f"its column {self.columns.names[part]!r} is {describe_type(value)}, and the "
                f"{part} is text; convert it",
                key=key,
            )
        if not value or is_blank(value):
            if not may_be_empty:
                what = {"response": "empty answer", "text": "empty document"}[part]
                raise DataError(
                    f"{what} (column {self.columns.names[part]!r}); fill it or remove the row",
                    key=key,
                )
            return ""
        return value

    def _choose_answer(self, value: Any) -> Any:
        """Of answers each of which is right, choose what most people gave; the first of these."""
        found = None
        if isinstance(value, Mapping) and value.keys() == {"text", "answer_start"}:  # SQuAD's
            found = value["text"] or []
        elif isinstance(value, list) and holds_alternatives(self.columns.names["response"]):
            found = [  # VQAv2 has objects
                item.get("answer", item.get("text")) if isinstance(item, Mapping) else item
                for item in value
            ]
        if found is None or not all(isinstance(answer, str) for answer in found):
            return value
        self.counts["answers chosen of several: the most frequent, else the first"] += (
            len(found) > 1
        )
        return Counter(found).most_common(1)[0][0] if found else ""

    def _check_beside_messages(
        self, row: Mapping[str, Any], turns: tuple[Turn, ...], key: str
    ) -> None:
        """Refuse a prompt that the messages do not hold, and a mark that says the row is bad."""
        if (column := self.columns.names.get("prompt")) and (value := row.get(column)):
            asked = next((turn.text for turn in turns if turn.role == "user"), "")
            if not isinstance(value, str) or value.strip() != asked.strip():
                raise DataError(
                    f"its column {column!r} is not what the first user turn of its messages asks; "
                    f"write it there, or leave it out by ignore=({column!r},)",
                    key=key,
                )
        column = self.columns.names.get("score")
        if column and (value := row.get(column)) not in (None, ""):
            if not _to_number(value) > 0:
                raise DataError(
                    f"its column {column!r} is no number above 0, so that its answers may be bad "
                    f"ones; take such rows out, or leave it out by ignore=({column!r},)",
                    key=key,
                )
            self.counts[f"rows with a score ({column!r}), each learned like any other"] += 1

    def _find_places(self, media: Sequence[Image | Audio], key: str) -> Places:
        return Places(_group_by_kind(media), key, self.columns.switched_off)

    def _read_response(self, row: Mapping[str, Any], places: Places) -> tuple[Turn, ...]:
        """Read an answer: messages, or text; an object or a list is learned as its JSON."""
        value = row.get(self.columns.names["response"])
        messages = [value] if isinstance(value, Mapping) else value
        if is_messages(messages):
            return read_turns(messages, places, unused_fields=self._unused_fields)
        text = self._read_text(row, "response", places.key, may_be_empty=False)
        return (Turn("assistant", tuple(places.split(text, "the answer"))),)

    def _read_prompt(
        self, row: Mapping[str, Any], media: list[Image | Audio], places: Places
    ) -> tuple[Turn, ...]:
        key = places.key
        if "prompt" not in self.columns.names:
            prompt = self._choose_prompt(media, key)
        elif is_messages(asked := row.get(self.columns.names["prompt"])):
            turns = read_turns(asked, places, unused_fields=self._unused_fields)
            if row.get(self.columns.names.get("context", "")):
                raise DataError(
                    f"its prompt is messages, beside which {self.columns.names['context']!r} has "
                    "no place; write it into a message",
                    key=key,
                )
            # The answer to learn is the other column; those in the prompt are read.
            return tuple(replace(t, is_trained=t.role != "assistant") for t in turns)
        else:
            prompt = self._read_text(row, "prompt", key)
        if "context" in self.columns.names and self.columns.names["context"] in row:
            context = self._read_text(row, "context", key)
            prompt = "\n\n".join(text for text in (prompt, context) if text)
        return (Turn("user", tuple(places.split(prompt, "the prompt", holds_media=True))),)

    def _read_history(
        self, row: Mapping[str, Any], media: list[Image | Audio], places: Places
    ) -> tuple[Turn, ...]:
        """Read the turns before the prompt: pairs of a question and its answer, or messages."""
        column, key = self.columns.names.get("history"), places.key
        history = row.get(column) if column else None
        if isinstance(history, str):
            history = parse_json(history.strip() or "[]", f"its column {column!r}", key=key)
        if not history:
            return ()
        if isinstance(history, list) and all(map(_is_pair, history)):
            roles = ("user", "assistant")
            history = [
                {"role": role, "content": text}
                for pair in history
                for role, text in zip(roles, pair, strict=True)
            ]
        turns = read_turns(history, places, unused_fields=self._unused_fields)
        if media or turns[-1].role != "assistant":
            what = "belongs to a row with media" if media else "does not end with an answer"
            raise DataError(
                f"its column {column!r} {what}: what comes after what is not told; write messages",
                key=key,
            )
        return turns

    def _choose_prompt(self, media: list[Image | Audio], key: str) -> str:
        kinds = {type(part) for part in media}
        if len(kinds) > 1:
            raise DataError(
                f"it holds an image and a clip ({self._name_media()}), for which there is no "
                "default prompt; name a column by prompt=",
                key=key,
            )
        prompt = IMAGE_PROMPT if Image in kinds else AUDIO_PROMPT
        if kinds:
            self.counts[f"default prompt {prompt!r}"] += 1
        return prompt if kinds else ""

    def _read_media(self, row: Mapping[str, Any], key: str) -> list[Image | Audio]:
        parts: list[Image | Audio] = []
        kinds: tuple[MediaKind, ...] = ("image", "audio")
        for kind in kinds:
            column = self.columns.names.get(kind)
            if column is None:
                continue
            found = read_media_list(row.get(column), kind, key=key)
            if not found and kind in self.columns.by_keyword and self.columns.layout != "chat":
                raise DataError(
                    f"its column {column!r} is empty, and {kind}= says that each row has one; "
                    "fill it or remove the row",
                    key=key,
                )
            parts += found
        column = self.columns.names.get("file")
        if column is not None:
            value = row.get(column)
            names = [name for name in (value if isinstance(value, list) else [value]) if name]
            if any(kind in self.columns.names for kind in kinds):
                self._check_names(row, names, key)
                names = []
            for kind in kinds:
                of_kind = [name for name in names if _guess_kind(name, column, key) == kind]
                if kind not in self.columns.switched_off:
                    parts += read_media_list(of_kind, kind, key=key)
        return self._cut(parts, row, key)

    def _check_names(self, row: Mapping[str, Any], names: list[Any], key: str) -> None:
        """Refuse a file beside a column of media that is not in it: it would be passed over."""
        column = self.columns.names["file"]
        held: set[str] = set()
        kinds: set[MediaKind] = set()
        for kind, other in self.columns.names.items():
            if kind in ("image", "audio"):
                found = _list_file_names(row.get(other))
                held |= found
                kinds |= set() if found else {kind}  # bytes alone: of which file, none can say
        for name in names:
            is_held = isinstance(name, str) and _last(name) in held
            if not (is_held or _guess_kind(name, column, key) in kinds):
                raise DataError(
                    f"its column {column!r} names another file than is among its media "
                    f"({self._name_media()}); put all into one list, or leave it out by "
                    f"ignore=({column!r},)",
                    key=key,
                )

    def _cut(
        self, parts: list[Image | Audio], row: Mapping[str, Any], key: str
    ) -> list[Image | Audio]:
        """Give the clip of a row the segment that its columns name."""
        start, end, duration = (self._read_seconds(row, part, key) for part in _SEGMENT)
        if start is None and end is None and duration is None:
            return parts
        if start is not None and end is not None:
            if duration is not None and abs(end - start - duration) > _ROUNDING_SECONDS:
                raise DataError(
                    f"its clip is {end - start:,.2f} seconds long by start and end, and "
                    f"{duration:,.2f} by {self.columns.names['duration']!r}; correct it, or leave "
                    "it out by ignore=",
                    key=key,
                )
            duration = end - start
        if duration is None or (start is None and end is not None):
            raise DataError(
                "it says where the part of a clip begins or where it ends; fill in the other",
                key=key,
            )
        if (start or 0.0) < 0 or duration <= 0:
            raise DataError(
                f"its part of a clip begins at {start or 0.0:,.2f} and lasts {duration:,.2f} "
                "seconds; correct that, or remove the row",
                key=key,
            )
        clips = [part for part in parts if isinstance(part, Audio)]
        if len(clips) != 1:
            raise DataError(
                f"it names a part of a clip, and holds {len(clips)} clips; give it one, or leave "
                "the part empty",
                key=key,
            )
        cut = replace(clips[0], start_seconds=start, duration_seconds=duration)
        return [cut if part is clips[0] else part for part in parts]

    def _read_seconds(self, row: Mapping[str, Any], part: str, key: str) -> float | None:
        column = self.columns.names.get(part)
        value = row.get(column) if column else None
        if column is None or value in (None, ""):
            return None
        seconds = _to_number(value)
        if not math.isfinite(seconds):
            raise DataError(
                f"its column {column!r} is {describe_type(value)}, and the {part} of a clip is a "
                "number; correct it",
                key=key,
            )
        return seconds * read_unit_seconds(column)

    def _check_media(self, key: str, *, has_media: bool) -> None:
        """Refuse a set whose rows hold media here and none there: one of them is a mistake."""
        if not list_media_columns(self.columns.names):
            return
        if has_media:
            self._num_with_media += 1
        elif self._num_with_media:
            raise self._explain_lack(key)

    def _explain_lack(self, key: str) -> DataError:
        return DataError(
            f"it has nothing in {self._name_media()}, and other rows have; fill it, read rows "
            'without media as a stream of their own, or use messages with {"type": "image"} or '
            '{"type": "audio"} where media belong',
            key=key,
        )

    def _name_media(self) -> str:
        return " and ".join(map(repr, list_media_columns(self.columns.names)))

    def _read_tools(self, row: Mapping[str, Any], key: str) -> tuple[Mapping[str, Any], ...]:
        column = self.columns.names.get("tools")
        tools = row.get(column) if column else None
        return read_declarations(tools, f"its column {column!r}", key=key) if tools else ()


def _guess_kind(name: Any, column: str, key: str) -> MediaKind:
    suffix = f".{name.rpartition('.')[2].lower()}" if isinstance(name, str) else ""
    if kind := kind_of_suffix(suffix):
        return kind
    raise DataError(
        f"its {column} is {describe_type(name)} ending in {suffix[:12]!r}, which is no known "
        f"image or clip; name the column by image= or audio=, or leave it out by "
        f"ignore=({column!r},)",
        key=key,
    )


def _to_number(value: Any) -> float:
    """Return a number, or the one that a text of CSV means; NaN where it is none."""
    try:
        return math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return math.nan


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(v, str) for v in value)


def _list_file_names(value: Any) -> set[str]:
    """List the names of the files that a column of media holds, where it tells them."""
    items = value if isinstance(value, list) else [value]
    places = (item.get("path") if isinstance(item, Mapping) else item for item in items)
    return {_last(place) for place in places if isinstance(place, str) and place}


def _last(path: str) -> str:
    return re.split(r"[/\\]", path)[-1]


def _group_by_kind(media: Sequence[Image | Audio]) -> dict[MediaKind, list[Image | Audio]]:
    groups: dict[MediaKind, list[Image | Audio]] = {}
    for part in media:
        groups.setdefault(kind_of(part), []).append(part)
    return groups


def _list_media(turn: Turn) -> list[Part]:
    return [part for part in turn.parts if isinstance(part, Image | Audio)]


def _count_earlier_thoughts(turns: tuple[Turn, ...]) -> int:
    last = max((i for i, turn in enumerate(turns) if turn.role == "user"), default=0)
    return sum(bool({"reasoning", "reasoning_content"} & t.fields.keys()) for t in turns[:last])


def _check_turns(turns: tuple[Turn, ...], key: str) -> None:
    roles: set[Role] = {turn.role for turn in turns}
    if "assistant" not in roles:
        raise DataError("no turn is the assistant's: nothing to train on; add the answer", key=key)
    if not any(turn.role == "assistant" and turn.is_trained for turn in turns):
        raise DataError(
            "each of its answers is marked as not trained (weight, train or loss): nothing to "
            "learn; remove the row, or the mark of one",
            key=key,
        )
    if turns[-1].role != "assistant":
        raise DataError(
            f"the conversation ends with the {turns[-1].role}'s turn; end it with the assistant's",
            key=key,
        )
    for number, turn in enumerate(turns, 1):
        is_empty = is_blank(turn.text) and not _list_media(turn)
        if is_empty and turn.role == "assistant" and not turn.fields.get("tool_calls"):
            raise DataError(f"empty answer (turn {number}); fill it or remove the row", key=key)
        if is_empty and turn.role == "user":
            raise DataError(
                f"empty prompt (turn {number}) without media; fill it or remove the row", key=key
            )
