"""Columns of the data, recognised by the parts that they play in an example.

**A column whose name stands in the table below is used or refused; it is never passed over.**

Each part is played by the column that the user's keyword names, by none where the keyword is
False, and else by the column whose name says so. Capitals and separators do not matter
(``imagePath`` is ``image_path``). The conversation is the first of these that the columns allow:

1. chat: ``messages``, or a list of messages under another name; a prompt beside them repeats
   what the first user turn asks, and a ``score`` grades the whole, or the row is refused
2. a pair: a prompt (``prompt question instruction query``, else ``input``; else, beside an answer
   of its own, ``text article document dialogue``) and a response; what it is about (``context``,
   ``input``, ``passage``) below the prompt, and a ``history`` as the turns before
3. media with text: an image with ``caption`` or ``text``, a clip with ``transcript``,
   ``transcription``, ``text`` or ``sentence``; a prompt column where there is one, else a stated
   default prompt
4. a document: ``text`` alone

Two columns for one part are an error that names both and the keyword to set. A keyword for a part,
or keywords for the whole layout (``messages=``, ``text=``, ``prompt=`` and ``response=``), decide
that; columns of media, segments, preferences and weights are then still used, switched off
(``audio=False``), or left out by name (``ignore=``).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from gemma_tuner.checks import suggest
from gemma_tuner.errors import ConfigError, SourceError, quote_name

_TURN = re.compile(
    r"content|value|"
    r"(conversation|conv|dialog|dialogue|chat|thread|session|message_?tree|parent)_?id"
    r"|turn(_?(id|idx|index|number))?"
)

MAX_COLUMNS = 1024
"""Each is looked at again where a later row has a further one."""

Layout = Literal["chat", "prompt and response", "caption", "document"]
Keywords = Mapping[str, "str | Sequence[str] | Literal[False] | None"]
"""The user's column by part, and under ``ignore`` the columns to leave out."""

KEYWORDS = (
    *("messages", "prompt", "response", "text", "context", "history", "system", "tools"),
    *("image", "audio", "id"),
)

_TABLE: Mapping[str, str] = {
    "messages": "messages conversations conversation dialog dialogs chat chats turns",
    "messages prompt": "dialogue dialogues",
    "prompt": "prompt question instruction query",
    "prompt context": "input inputs article document",
    "context": "context contexts ctx passage passages background paragraph documents evidence "
    "knowledge story schema source_text",
    "text prompt response context": "text",
    "response": "response completion answer answers output outputs target targets summary "
    "highlights translation reply caption captions transcript transcripts transcription sentence "
    "labels target_text output_text expected_output",
    "response preference": "label",
    "class response": "class category sentiment intent emotion class_label class_name label_name "
    "label_text label_str headline tldr ground_truth",
    "history": "history chat_history conversation_history dialogue_history previous_turns "
    "past_turns previous_messages",
    "system": "system system_prompt system_message sys",
    "tools": "tools functions",
    "image": "image images img imgs image_path image_paths img_path img_paths image_file "
    "image_files image_file_name image_file_names image_filename image_filenames image_url "
    "image_urls image_uri image_uris image_bytes image_data image_base64 image_b64 picture "
    "pictures photo photos jpg jpeg png webp",
    "audio": "audio audios audio_path audio_paths audio_file audio_files audio_filepath "
    "audio_filepaths audio_file_path audio_filename audio_file_name audio_url audio_urls "
    "audio_uri audio_uris audio_bytes audio_data audio_base64 wav wavs wav_path wav_file "
    "wav_filename speech sound sounds recording recordings flac mp3",
    "file": "file_name file_names filename filenames file files file_path file_paths filepath "
    "filepaths path paths media media_path",
    "video": "video videos video_path video_paths video_file video_url video_urls mp4",
    "start": "offset onset tmin start start_time begin begin_time segment_start audio_start "
    "start_offset",
    "end": "end tmax end_time stop stop_time segment_end audio_end end_offset",
    "duration": "duration dur audio_duration segment_duration",
    "segments": "segments chunks timestamps start_frame end_frame start_sample end_sample",
    "preference": "chosen rejected chosen_response rejected_response preference score scores "
    "rating ratings reward rewards score_chosen score_rejected preferred is_preferred is_chosen "
    "is_good is_bad is_correct bad_response bad_answer wrong_answer incorrect_answer "
    "rejected_answer negative",
    "weight": "weight weights sample_weight loss_weight example_weight loss_mask loss train "
    "trainable trained is_trained is_trainable do_train train_on train_on_turn "
    "use_for_training should_train compute_loss calculate_loss no_loss skip_loss ignore_loss "
    "masked skip ignore learn is_test is_train is_validation is_val is_eval",
    "call": "function_call tool_calls tool_call",
    "reasoning": "reasoning reasoning_content thinking thought thoughts cot co_t complex_cot "
    "complex_co_t chain_of_thought rationale",
    "choices": "choices options",
    "split": "split partition set",
    "id": "id",
}

MEANINGS: Mapping[str, tuple[str, ...]] = {
    name: tuple(parts.split()) for parts, names in _TABLE.items() for name in names.split()
}
"""The parts that a column may play by its name: the one table of names that mean something."""

# What such a name would say, where nothing here can follow it.
_REFUSALS: Mapping[str, str] = {
    "video": "holds videos, which nothing here learns from; name stills by image= or the sound by "
    "audio=",
    "segments": "divides a clip in a form that is not read; write a row for each part, with start "
    "and end",
    "preference": "tells good answers from bad ones, and each is learnt as it stands; name "
    "the good ones alone by response=, or keep the good rows alone",
    "weight": "weighs rows or leaves them out, and every row weighs the same; keep the rows to "
    "learn, or mark single messages",
    "call": "holds calls of functions, which belong into an assistant's message; write messages "
    "with tool_calls",
    "reasoning": "holds thoughts, which belong into an assistant's message; write messages with "
    "the field reasoning",
    "choices": "holds what may be chosen from, which belongs into the question; write it there",
}
_SEGMENT = ("start", "end", "duration")
_MEDIA = ("image", "audio", "file")
# Parts that no keyword for the layout decides about: what they say holds in any layout.
_STRICT = {*_MEDIA, *_SEGMENT, *_REFUSALS}

_INSTRUCTIONS = ("prompt", "question", "instruction", "query")
_INPUTS = ("input", "inputs")
_SOURCES = ("text", "article", "document", "dialogue", "dialogues")
_CHATS = ("messages", "conversations")
_LATER_CHATS = [name for name, parts in MEANINGS.items() if parts[0] == "messages"]
_CAPTIONS: Mapping[str, tuple[str, ...]] = {
    "image": ("caption", "captions", "text"),
    "audio": ("transcript", "transcripts", "transcription", "text", "sentence"),
}
_LATER_RESPONSES = {*_CAPTIONS["image"], *_CAPTIONS["audio"]}
# What a class is learnt from is rarely plain: these are responses where response= says so.
_BY_KEYWORD_ALONE = {"label", "labels"}
# Whose list holds answers each of which is right alone, and is no answer as a whole.
_ALTERNATIVES = {"answers", "caption", "captions", "transcripts"}
_RESPONSES = tuple(
    name
    for name, parts in MEANINGS.items()
    if parts[0] == "response" and name not in _LATER_RESPONSES | _BY_KEYWORD_ALONE
)
_UNIT = re.compile(r"_(s|secs?|seconds|ms|msecs?|milliseconds)$")
_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


@dataclass(frozen=True, slots=True)
class Columns:
    """Which column plays which part; None where none does."""

    layout: Layout
    # By part: messages prompt context history response text system tools image audio file start
    # end duration id split score.
    names: Mapping[str, str]
    by_keyword: frozenset[str] = frozenset()
    unused: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()  # which the user leaves out
    switched_off: frozenset[str] = frozenset()  # parts whose keyword is False


@lru_cache(4096)
def name_parts(column: str) -> tuple[str, ...]:
    """Return the parts that a column may play by its name; none where it means nothing here."""
    name = _plain(column)
    base = _UNIT.sub("", name)
    if base != name and MEANINGS.get(base, ("",))[0] in _SEGMENT:
        return MEANINGS[base]
    if name == "id" != column:
        return ()  # keys are not found by chance: an ID may be of something else
    return MEANINGS.get(name, ())


def read_unit_seconds(column: str) -> float:
    """Return how many seconds one of a segment column's numbers is: of ``start_ms`` 0.001."""
    unit = _UNIT.search(_plain(column))
    return 0.001 if unit and unit[1].startswith("m") else 1.0


def holds_alternatives(column: str) -> bool:
    """Whether a list in this column holds answers of which each is right alone."""
    return _plain(column) in _ALTERNATIVES


def read_ignored(keywords: Keywords) -> tuple[str, ...]:
    """Return the columns that the user leaves out."""
    ignored = keywords.get("ignore") or ()
    return (ignored,) if isinstance(ignored, str) else tuple(ignored)


def recognise_columns(available: Collection[str], keywords: Keywords) -> Columns:
    """Decide which column plays which part."""
    if len(available) > MAX_COLUMNS:
        raise SourceError(
            f"the rows have more than {MAX_COLUMNS:,} columns; a name in all rows is a column: "
            "make what differs from row to row values"
        )
    chosen = {part: column for part, column in keywords.items() if isinstance(column, str)}
    ignored = read_ignored(keywords)
    for part, column in chosen.items():
        if column not in available:
            raise SourceError(
                f"{part}= names the column {column!r}, which is not there; "
                f"{_list_columns(available)}: give one of them{suggest(column, available)}"
            )
        if column in ignored:
            raise ConfigError(
                f"the column {column!r} is named by {part}= and by ignore=; by which?"
            )
    _check_keywords(chosen)
    # In the order of the data, so that messages are the same each time.
    free = [name for name in dict.fromkeys(available) if name not in ignored]
    turn = {"role", "from", "speaker"} & set(free)
    has_one_turn = bool(turn) and any(_TURN.fullmatch(name.lower()) for name in free)
    if {"role", "text"} <= set(free):  # of a clip, a role says who speaks
        has_one_turn |= not any(set(name_parts(name)) & set(_MEDIA) for name in free)
    if has_one_turn and not chosen:
        raise SourceError(
            f"the column {min(turn)!r} says that each row is one turn; group the rows of a "
            "conversation into one with a column messages ([{'role': …, 'content': …}, …]), or "
            "name the columns to use by keyword"
        )
    recogniser = _Recogniser(free, keywords, dict(chosen))
    recogniser.refuse_what_cannot_be_used(before_layout=True)
    layout = recogniser.find_layout()
    recogniser.refuse_what_cannot_be_used()
    if layout == "document":  # with or without text=
        _check_keywords({**chosen, "text": recogniser.names["text"]})
    recogniser.refuse_what_is_left(layout)
    unused = tuple(sorted(set(free) - set(recogniser.names.values())))
    return Columns(
        layout,
        recogniser.names,
        frozenset(chosen),
        unused,
        tuple(sorted(set(ignored) & set(available))),
        frozenset(part for part, column in keywords.items() if column is False),
    )


def _check_keywords(chosen: Mapping[str, str]) -> None:
    forms = [
        ", ".join(f"{part}=" for part in parts if part in chosen)
        for parts in (("messages",), ("prompt", "response", "context", "history"), ("text",))
        if any(part in chosen for part in parts)
    ]
    if len(forms) > 1:
        raise ConfigError(
            f"{' and '.join(forms)} exclude each other: messages= names conversations, "
            "prompt= and response= questions and their answers, text= plain documents"
        )
    beside = [f"{part}=" for part in ("system", "tools", "image", "audio") if part in chosen]
    if "text" in chosen and beside:
        raise ConfigError(
            f"the column {chosen['text']!r} makes plain documents (text=), which have no place "
            f"for {' and '.join(beside)}; leave that out, or name the text to learn by response="
        )


@dataclass(slots=True)
class _Recogniser:
    """Fills in by names what the keywords leave open."""

    available: Collection[str]
    keywords: Keywords
    names: dict[str, str]

    def find_layout(self) -> Layout:
        self._find("image")
        self._find("audio")
        if not all(self._is_off(part) for part in ("image", "audio")):
            self._find("file")
        layout = self._find_conversation()
        if layout != "document":
            self._find("system")
            self._find("tools")
        if layout == "chat":
            self._find_repeated_prompt()
            scores = [name for name in self.available if _plain(name) == "score"]
            self.names.update({"score": scores[0]} if len(scores) == 1 else {})
        self._find("id")
        self._find("split")
        self._find_segment()
        return layout

    def refuse_what_is_left(self, layout: Layout) -> None:
        """Refuse a column that means something and would be passed over."""
        keywords = {part for part, column in self.keywords.items() if isinstance(column, str)}
        is_decided = keywords & {"messages", "text"} or keywords >= {"prompt", "response"}
        for column in self.available:
            parts = name_parts(column)
            if not parts or column in self.names.values() or self._is_off(parts[0]):
                continue
            if not _STRICT & set(parts) and (is_decided or keywords & set(parts)):
                continue
            if parts[0] == "class" and layout != "document":
                continue  # what kind of question it is, as Dolly says: not what is to be learnt
            raise SourceError(self._describe_left(column, parts, layout))

    def refuse_what_cannot_be_used(self, *, before_layout: bool = False) -> None:
        """Refuse a column that says what nothing here can follow; of a score, the layout says."""
        for column in self.available:
            part = (*name_parts(column), "")[0]
            if before_layout and _plain(column) == "score":
                continue
            if part in _REFUSALS and column not in self.names.values() and not self._is_off(part):
                raise SourceError(
                    f"the column {column!r} {_REFUSALS[part]}; or leave it out by "
                    f"ignore=({column!r},)"
                )

    def _describe_left(self, column: str, parts: tuple[str, ...], layout: Layout) -> str:
        used = [f"{part}={name!r}" for part, name in self.names.items() if part in KEYWORDS]
        forms = ("messages", "prompt", "response", "text")
        alone = [f"{part}={self.names[part]!r}" for part in forms if part in self.names]
        choices = [f"{part}=" for part in parts if part in KEYWORDS] or ["image=", "audio="]
        choice = f"say what it is by {' or '.join(choices)}"
        if layout == "document" and "response" in parts:
            choice = f"to learn it from the text, give prompt={self.names['text']!r}, "
            choice += f"response={column!r}"
        elif layout == "document" and not _STRICT & set(parts):
            choice = "documents have no place for it: name messages=, or prompt= and response="
        if not _STRICT & set(parts):
            choice += f"; to learn the others alone, give {', '.join(alone)}"
        elif "preference" in parts:
            choice += "; where it marks bad answers, take those rows out"
        what = " or ".join(part for part in parts if part != "preference")
        return (
            f"the column {column!r} may be the {what}, and would be passed over beside "
            f"{', '.join(used)}; {choice}; or leave it out by ignore=({column!r},)"
        )

    def _is_off(self, part: str) -> bool:
        if part in (*_SEGMENT, "segments"):
            return self.keywords.get("audio") is False
        if part == "file":
            return all(self.keywords.get(kind) is False for kind in ("image", "audio"))
        return self.keywords.get(part) is False

    def _list_free(self, part: str, among: Iterable[str] | None = None) -> list[str]:
        """List the columns that may play a part by their name and play none yet."""
        wanted = None if among is None else set(among)
        return [
            column
            for column in self.available
            if part in name_parts(column)
            and column not in self.names.values()
            and (wanted is None or _plain(column) in wanted)
            and not (part == "prompt" and _plain(column) == "text" and self._is_off("text"))
        ]

    def _find(self, part: str, among: Iterable[str] | None = None) -> None:
        """Let a column that plays no part yet play this one, if its name says so."""
        if part in self.names or self._is_off(part):
            return
        found = self._list_free(part, among)
        if len(found) > 1:
            keyword = f"{part}=" if part in KEYWORDS else f"ignore=({found[1]!r},)"
            if part in _MEDIA and part in KEYWORDS:
                keyword += f", and leave out the others by ignore=, such as ignore=({found[1]!r},)"
            raise SourceError(_describe_choice(found, f"the {part}", keyword))
        if found:
            self.names[part] = found[0]

    def _find_conversation(self) -> Layout:
        names = self.names
        media = list_media_columns(names)
        if "text" in names:
            if media:
                raise SourceError(
                    f"text= makes plain documents, and the column {media[0]!r} holds media; name "
                    "the text by response= to train on both, or set image=False, audio=False"
                )
            return "document"
        if self._find_chat():
            return "chat"
        self._find("prompt", _INSTRUCTIONS)
        self._find_response(media)
        if "response" in names:
            self._find("prompt", _INPUTS)
            if not media:
                self._find("prompt", _SOURCES)
            if "prompt" in names:
                self._find_context()
                return "prompt and response"
            if media:
                return "caption"
        elif not media and "prompt" not in names:
            self._find("text")
            if "text" in names:
                return "document"
        missing = "prompt" if "response" in names else "response"
        raise SourceError(
            f"no {missing} was recognised: {_list_columns(self.available)}; say which one it is "
            f"by {missing}=, or name messages= for conversations, text= for documents"
        )

    def _find_chat(self) -> bool:
        if not {"prompt", "response", "context", "history"} & self.names.keys():
            self._find("messages", _CHATS)
            # What may be messages or a prompt is no conversation where it has an answer.
            prompts = self._list_free("prompt", (*_INSTRUCTIONS, *_INPUTS, *_SOURCES))
            if not (prompts and self._list_free("response", _RESPONSES)):
                self._find("messages", _LATER_CHATS)
        return "messages" in self.names

    def _find_repeated_prompt(self) -> None:
        """Find the one prompt beside messages; with an answer of its own it is another pair."""
        found = self._list_free("prompt", _INSTRUCTIONS)
        is_pair = self._list_free("response", _RESPONSES)
        decided = isinstance(self.keywords.get("messages"), str) or self._is_off("prompt")
        if len(found) == 1 and not is_pair and not decided:
            self.names["prompt"] = found[0]

    def _find_response(self, media: list[str]) -> None:
        names = self.names
        if not media or "prompt" in names or self._list_free("prompt", _INPUTS):
            self._find("response", _RESPONSES)
        if media:
            kinds = [kind for kind in _CAPTIONS if kind in names] or list(_CAPTIONS)
            self._find("response", [name for kind in kinds for name in _CAPTIONS[kind]])

    def _find_context(self) -> None:
        if all(isinstance(self.keywords.get(part), str) for part in ("prompt", "response")):
            return  # what stands beside them is the user's to name
        self._find("context", [name for name in MEANINGS if name != "text"])
        self._find("history")

    def _find_segment(self) -> None:
        """Find the columns that say which part of a clip is meant, all that are needed or none."""
        for part in _SEGMENT:
            self._find(part)
        found = [self.names[part] for part in _SEGMENT if part in self.names]
        if not found:
            return
        columns, ignore = " and ".join(map(repr, found)), f"ignore={tuple(found)!r}"
        if not {"audio", "file"} & self.names.keys():
            raise SourceError(
                f"the column{'s' * (len(found) > 1)} {columns} would say which part of a clip is "
                f"meant, and no column holds clips; name it by audio=, or leave out by {ignore}"
            )
        has_start, has_end = "start" in self.names, len(found) > ("start" in self.names)
        if has_start != has_end and (has_start or "end" in self.names):
            where, lacking = ("begins", "ends") if has_start else ("ends", "begins")
            raise SourceError(
                f"the column {columns} says where the part of a clip that is meant {where}, and "
                f"none where it {lacking}; name the other 'start', 'end' or 'duration' (in "
                f"seconds), or leave out by {ignore}"
            )


def list_media_columns(names: Mapping[str, str]) -> list[str]:
    """Return the columns that hold media, images first."""
    return [names[part] for part in _MEDIA if part in names]


def _plain(column: str) -> str:
    return re.sub(r"[\W_]+", "_", _HUMP.sub("_", column).lower()).strip("_")


def _list_columns(available: Collection[str]) -> str:
    return f"the columns are {', '.join(map(quote_name, sorted(set(available))))}"


def _describe_choice(found: list[str], what: str, keyword: str) -> str:
    columns = ", ".join(map(repr, found))
    return f"the columns {columns} could each be {what}; choose with {keyword}"
