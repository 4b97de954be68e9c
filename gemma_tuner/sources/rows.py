"""A row of any source to an Example, by the parts that its columns play.

Media come before the text of the user's turn, images first, then clips, unless the messages
say where they belong.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from gemma_tuner.errors import DataError
from gemma_tuner.modalities import MediaKind, kind_of, kind_of_suffix
from gemma_tuner.records import Audio, Example, Image, Part, Role, Text, Turn
from gemma_tuner.sources.columns import Columns, list_media_columns, read_unit_seconds
from gemma_tuner.sources.messages import (
    describe_type,
    parse_json,
    read_media_list,
    read_turns,
)

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
            return Example(key, document=self._read_text(row, "text", key, may_be_empty=False))
        media = self._read_media(row, key)
        if self.columns.layout == "chat":
            turns, unplaced = read_turns(
                self._read_field(row, "messages", key),
                key=key,
                media=_group_by_kind(media),
                unused_fields=self._unused_fields,
            )
            if not any(map(_list_media, turns)):
                self._check_media(key, has_media=bool(unplaced))
            turns = _place_media(turns, unplaced, key)
        else:
            self._check_media(key, has_media=bool(media))
            prompt, response = self._read_prompt(row, media, key), self._read_response(row, key)
            turns = (*self._read_history(row, media, key), prompt, response)
        system = self._read_text(row, "system", key) if "system" in self.columns.names else ""
        if system:
            if turns[0].role == "system":
                raise DataError(
                    f"its messages begin with a system turn and its column "
                    f"{self.columns.names['system']!r} holds another; set system=False to keep "
                    "the one in the messages",
                    key=key,
                )
            turns = (Turn("system", (Text(system),)), *turns)
        _check_turns(turns, key)
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
        notes = dict(self.counts)
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
        if isinstance(value, Mapping) and value.keys() == {"text", "answer_start"}:  # SQuAD's
            value = next(iter(value["text"] or ()), "")
        if value is not None and not isinstance(value, str):
            raise DataError(
                f"its column {self.columns.names[part]!r} is {describe_type(value)}, and the "
                f"{part} is text; convert it",
                key=key,
            )
        if not value or not value.strip():
            if not may_be_empty:
                what = {"response": "empty answer", "text": "empty document"}[part]
                raise DataError(
                    f"{what} (column {self.columns.names[part]!r}); fill it or remove the row",
                    key=key,
                )
            return ""
        return value

    def _read_response(self, row: Mapping[str, Any], key: str) -> Turn:
        return Turn(
            "assistant", (Text(self._read_text(row, "response", key, may_be_empty=False)),)
        )

    def _read_prompt(self, row: Mapping[str, Any], media: list[Image | Audio], key: str) -> Turn:
        if "prompt" in self.columns.names:
            prompt = self._read_text(row, "prompt", key)
        else:
            prompt = self._choose_prompt(media, key)
        if "context" in self.columns.names and self.columns.names["context"] in row:
            context = self._read_text(row, "context", key)
            prompt = "\n\n".join(text for text in (prompt, context) if text)
        return Turn("user", (*media, Text(prompt)) if prompt else tuple(media))

    def _read_history(
        self, row: Mapping[str, Any], media: list[Image | Audio], key: str
    ) -> tuple[Turn, ...]:
        """Read the turns before the prompt: pairs of a question and its answer, or messages."""
        column = self.columns.names.get("history")
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
        turns, _ = read_turns(history, key=key, media={}, unused_fields=self._unused_fields)
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
        try:
            seconds = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            seconds = math.nan
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
        if isinstance(tools, str) and tools:
            tools = parse_json(tools, f"its column {column!r}", key=key)
        if not tools:
            return ()
        if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
            raise DataError(
                f"its column {column!r} is {describe_type(tools)}; a list of tool declarations "
                "is expected",
                key=key,
            )
        return tuple(tools)


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


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(v, str) for v in value)


def _list_file_names(value: Any) -> set[str]:
    """List the names of the files that a column of media holds, where it tells them."""
    items = value if isinstance(value, list) else [value]
    places = (item.get("path") if isinstance(item, Mapping) else item for item in items)
    return {_last(place) for place in places if isinstance(place, str) and place}


def _last(path: str) -> str:
    return re.split(r"[/\\]", path)[-1]


def _group_by_kind(media: list[Image | Audio]) -> dict[MediaKind, list[Image | Audio]]:
    groups: dict[MediaKind, list[Image | Audio]] = {}
    for part in media:
        groups.setdefault(kind_of(part), []).append(part)
    return groups


def _list_media(turn: Turn) -> list[Part]:
    return [part for part in turn.parts if isinstance(part, Image | Audio)]


def _place_media(
    turns: tuple[Turn, ...], media: list[Image | Audio], key: str
) -> tuple[Turn, ...]:
    """Put media before the text of the first user turn."""
    if not media:
        return turns
    for index, turn in enumerate(turns):
        if turn.role == "user":
            placed = Turn("user", (*media, *turn.parts), turn.fields)
            return (*turns[:index], placed, *turns[index + 1 :])
    raise DataError("it holds media and no user turn to put them in; add one", key=key)


def _check_turns(turns: tuple[Turn, ...], key: str) -> None:
    roles: set[Role] = {turn.role for turn in turns}
    if "assistant" not in roles:
        raise DataError("no turn is the assistant's: nothing to train on; add the answer", key=key)
    if turns[-1].role != "assistant":
        raise DataError(
            f"the conversation ends with the {turns[-1].role}'s turn; end it with the assistant's",
            key=key,
        )
    for number, turn in enumerate(turns, 1):
        is_empty = not turn.text.strip() and not _list_media(turn)
        if is_empty and turn.role == "assistant" and not turn.fields.get("tool_calls"):
            raise DataError(f"empty answer (turn {number}); fill it or remove the row", key=key)
        if is_empty and turn.role == "user":
            raise DataError(
                f"empty prompt (turn {number}) without media; fill it or remove the row", key=key
            )
