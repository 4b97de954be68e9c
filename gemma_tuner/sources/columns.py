"""Columns of the data, recognised by the parts that they play in an example.

Each part (``messages prompt response text system image audio id``) is played by the column that
the user's keyword names, by none where the keyword is False, and else by the conventional column
of the table below. The conversation is the first of these that the columns allow:

1. chat: ``messages`` or ``conversations``
2. a pair: ``prompt`` with ``completion`` or ``response``; ``question`` with ``answer``;
   ``instruction`` (and ``input`` below it) with ``output``; ``instruction`` (and ``context``) with
   ``response``; ``input`` with ``output``
3. media with text: ``image`` with ``caption`` or ``text``; ``audio`` with ``transcript``,
   ``transcription``, ``text`` or ``sentence``; a prompt column where there is one, else a stated
   default prompt
4. a document: ``text``

Two columns for one part at the same rank are an error that names both and the keyword to set.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from gemma_tuner.checks import suggest
from gemma_tuner.errors import ConfigError, SourceError, quote_name

Layout = Literal["chat", "prompt and response", "caption", "document"]
Keywords = Mapping[str, "str | Literal[False] | None"]

KEYWORDS = ("messages", "prompt", "response", "text", "system", "image", "audio", "id")
_CHAT = ("messages", "conversations")
_PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("input", "output"),
)
_PROMPTS = ("prompt", "question", "instruction")
_CONTEXTS = ("input", "context")  # what an instruction is about
_RESPONSES = ("response", "completion", "answer", "output")
_CAPTIONS: Mapping[str, tuple[str, ...]] = {
    "image": ("caption", "text"),
    "audio": ("transcript", "transcription", "text", "sentence"),
    "file": ("caption", "transcript", "transcription", "text", "sentence"),
}
_CONVENTIONS: Mapping[str, tuple[str, ...]] = {
    "system": ("system", "system_prompt"),
    "image": ("image", "images"),
    "audio": ("audio", "audios"),
    "file": ("file_name",),
    "id": ("id",),
    "tools": ("tools",),
    "split": ("split",),
}


@dataclass(frozen=True, slots=True)
class Columns:
    """Which column plays which part; None where none does."""

    layout: Layout
    # By part: messages prompt context response text system image audio file tools id split.
    names: Mapping[str, str]
    by_keyword: frozenset[str] = frozenset()
    unused: tuple[str, ...] = ()


def recognise_columns(available: Collection[str], keywords: Keywords) -> Columns:
    """Decide which column plays which part."""
    chosen = {part: column for part, column in keywords.items() if isinstance(column, str)}
    for part, column in chosen.items():
        if column not in available:
            raise SourceError(
                f"{part}= names the column {column!r}, which is not there; "
                f"{_list_columns(available)}: give one of them{suggest(column, available)}"
            )
    _check_keywords(chosen)
    recogniser = _Recogniser(available, keywords, dict(chosen))
    layout = recogniser.find_layout()
    if layout == "document":  # with or without text=
        _check_keywords({**chosen, "text": recogniser.names["text"]})
    unused = tuple(sorted(set(available) - set(recogniser.names.values())))
    return Columns(layout, recogniser.names, frozenset(chosen), unused)


def _check_keywords(chosen: Mapping[str, str]) -> None:
    forms = [
        ", ".join(f"{part}=" for part in parts if part in chosen)
        for parts in (("messages",), ("prompt", "response"), ("text",))
        if any(part in chosen for part in parts)
    ]
    if len(forms) > 1:
        raise ConfigError(
            f"{' and '.join(forms)} exclude each other: messages= names conversations, "
            "prompt= and response= questions and their answers, text= plain documents"
        )
    beside = [f"{part}=" for part in ("system", "image", "audio") if part in chosen]
    if "text" in chosen and beside:
        raise ConfigError(
            f"the column {chosen['text']!r} makes plain documents (text=), which have no place "
            f"for {' and '.join(beside)}; leave that out, or name the text to learn by response="
        )


@dataclass(slots=True)
class _Recogniser:
    """Fills in by convention what the keywords leave open."""

    available: Collection[str]
    keywords: Keywords
    names: dict[str, str]

    def find_layout(self) -> Layout:
        self._find("image")
        self._find("audio")
        is_chosen = any(self.keywords.get(part) is not None for part in ("image", "audio"))
        if not is_chosen and not list_media_columns(self.names):
            self._find("file")
        layout = self._find_conversation()
        for part in (
            ("id", "split") if layout == "document" else ("system", "tools", "id", "split")
        ):
            self._find(part)
        return layout

    def _is_open(self, part: str) -> bool:
        return part not in self.names and self.keywords.get(part) is not False

    def _find(self, part: str, candidates: tuple[str, ...] = ()) -> None:
        """Let a conventional column that plays no part yet play this one."""
        if not self._is_open(part):
            return
        candidates = candidates or _CONVENTIONS[part]
        taken = self.names.values()
        found = [name for name in candidates if name in self.available and name not in taken]
        if len(found) > 1:
            raise SourceError(_describe_choice(found, f"the {part}", f"{part}="))
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
        if not {"prompt", "response"} & names.keys():
            self._find("messages", _CHAT)
            if "messages" in names:
                return "chat"
            self._find_pair()
        if "response" not in names:
            kinds = [kind for kind in ("image", "audio", "file") if kind in names]
            captions = dict.fromkeys(name for kind in kinds for name in _CAPTIONS[kind])
            self._find("response", _RESPONSES if "prompt" in names else tuple(captions) or ("",))
        if "response" in names:
            self._find("prompt", _PROMPTS)
            self._find("prompt", ("input",))
            self._find_context()
            if "prompt" in names:
                return "prompt and response"
            if media:
                return "caption"
        elif not media and "prompt" not in names:
            self._find("text", ("text",))
            if "text" in names:
                return "document"
        missing = "prompt" if "response" in names else "response"
        raise SourceError(
            f"no {missing} was recognised: {_list_columns(self.available)}; say which one it is "
            f"by {missing}=, or name messages= for conversations, text= for documents"
        )

    def _find_pair(self) -> None:
        if not (self._is_open("prompt") and self._is_open("response")):
            return
        taken = self.names.values()
        free = {name for name in self.available if name not in taken}
        pairs = [pair for pair in _PAIRS if free.issuperset(pair)]
        if ("instruction", "output") in pairs and ("input", "output") in pairs:
            pairs.remove(("input", "output"))  # Alpaca's input belongs to the instruction
        if len(pairs) > 1:
            columns = list(dict.fromkeys(name for pair in pairs for name in pair))
            raise SourceError(
                _describe_choice(columns, "the prompt or the response", "prompt= and response=")
            )
        if pairs:
            self.names["prompt"], self.names["response"] = pairs[0]

    def _find_context(self) -> None:
        if self.names.get("prompt") == "instruction" and self.keywords.get("prompt") is None:
            free = [name for name in _CONTEXTS if name not in self.names.values()]
            found = [name for name in free if name in self.available]
            if found:
                self.names["context"] = found[0]


def list_media_columns(names: Mapping[str, str]) -> list[str]:
    """Return the columns that hold media, images first."""
    return [names[part] for part in ("image", "audio", "file") if part in names]


def _list_columns(available: Collection[str]) -> str:
    return f"the columns are {', '.join(map(quote_name, sorted(set(available))))}"


def _describe_choice(found: list[str], what: str, keyword: str) -> str:
    columns = ", ".join(map(repr, found))
    return f"the columns {columns} could each be {what}; choose with {keyword}"
