"""Example, Turn and media parts: one training example before any tensor.

An example is a conversation or a plain document. Media parts hold where the media is (a path, a
URI, or a stored object pinned to one version), its encoded bytes, or its decoded form;
:mod:`gemma_tuner.streaming` fetches and :mod:`gemma_tuner.media` decodes, so a part keeps its
place in the conversation whatever state it is in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from gemma_tuner.display import (
    QUIET,
    element,
    escape,
    make_card,
    make_details,
    make_player,
    make_table,
    make_thumbnail,
)
from gemma_tuner.errors import DataError

if TYPE_CHECKING:
    import numpy
    import PIL.Image

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of text within a turn."""

    text: str


@dataclass(frozen=True, slots=True)
class StoredObject:
    """Bytes that are kept elsewhere, pinned to what they were when they were found.

    Args:
        uri: ``gs://bucket/name``; for a part of a local file, its path.
        generation: The object's version in its bucket; None where none is known.
        num_bytes: How many bytes these are; None where it is not known.
        crc32c: Castagnoli checksum of the whole object as it is stored, or of a part of a local
            file; None where it is not known.
        start: Where in the object a part begins; None for the whole object.
    """

    uri: str
    generation: int | None = None
    num_bytes: int | None = None
    crc32c: int | None = None
    start: int | None = None


@dataclass(frozen=True, slots=True)
class PinnedFile:
    """A local file, and its size and Castagnoli checksum when its row was read."""

    path: str
    num_bytes: int
    crc32c: int


@dataclass(frozen=True, slots=True)
class Image:
    """An image within a turn: a local path or URI, encoded bytes, or decoded RGB pixels."""

    source: str | bytes | StoredObject | PinnedFile | PIL.Image.Image


@dataclass(frozen=True, slots=True)
class Audio:
    """A clip within a turn: a local path or URI, encoded bytes, or decoded samples.

    Of a recording that holds more, the part is given that is meant, and nothing else is decoded.

    Args:
        source: A path or URI, a stored object or pinned file, encoded bytes, or float samples
            ``[frames]`` or ``[frames, channels]``.
        sample_rate_hz: The rate of decoded samples; None while ``source`` is encoded.
        start_seconds: Where in the recording the clip begins; None where it is all of it.
        duration_seconds: How long the clip is; with no start, how long the recording has to be.
    """

    source: str | bytes | StoredObject | PinnedFile | numpy.ndarray
    sample_rate_hz: int | None = None
    start_seconds: float | None = None
    duration_seconds: float | None = None


Part = Text | Image | Audio


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation.

    Args:
        role: ``system``, ``user``, ``assistant`` or ``tool``.
        parts: Text and media in reading order.
        fields: What a chat template may read beside the content, under the names that it uses
            (``reasoning``, ``tool_calls``, ``tool_call_id``, ``name``).
        is_trained: Whether an assistant turn is an answer to learn; one that is not is read only.
    """

    role: Role
    parts: tuple[Part, ...]
    fields: Mapping[str, Any] = field(default_factory=dict)
    is_trained: bool = True

    @property
    def text(self) -> str:
        """The text parts, joined without a separator."""
        return "".join(part.text for part in self.parts if isinstance(part, Text))


@dataclass(frozen=True, slots=True)
class Example:
    """One training example: a conversation (``turns``) or a plain document (``document``).

    Args:
        key: Where it came from, unique within its stream and stable between runs.
        turns: The conversation, at least one turn from the assistant.
        document: Plain text, trained on as a whole, instead of a conversation.
        tools: Tool declarations, as the chat template takes them.

    Raises:
        DataError: Both or neither of ``turns`` and ``document`` are given.
    """

    key: str
    turns: tuple[Turn, ...] = ()
    document: str | None = None
    tools: Sequence[Mapping[str, Any]] = ()

    def __post_init__(self) -> None:
        if bool(self.turns) == (self.document is not None):
            raise DataError(
                "an example is either a conversation (turns) or a document, and not both; "
                f"got {len(self.turns)} turns and "
                f"{'a' if self.document is not None else 'no'} document",
                key=self.key,
            )

    def replace_media(self, replacement: Callable[[Image | Audio], Image | Audio]) -> Example:
        """Return the example with each media part replaced; the same object if nothing changed."""
        turns = tuple(_replace_media(turn, replacement) for turn in self.turns)
        is_same = all(new is old for new, old in zip(turns, self.turns, strict=True))
        return self if is_same else replace(self, turns=turns)

    @property
    def media(self) -> Iterator[Image | Audio]:
        """The media parts of all turns in reading order."""
        return (
            part for turn in self.turns for part in turn.parts if isinstance(part, Image | Audio)
        )

    def _repr_html_(self) -> str:
        return write_html(self)


def write_html(example: Example) -> str:
    """Write an example as notebooks show it, its images and clips inside."""
    rows = [(element("span", turn.role, QUIET), _turn_html(turn)) for turn in example.turns]
    if example.document is not None:
        rows.append((element("span", "document", QUIET), escape(example.document)))
    if example.tools:
        rows.append((element("span", "tools", QUIET), f"{len(example.tools)} declared"))
    return make_card(example.key, "", make_table((), rows))


def _turn_html(turn: Turn) -> str:
    html = "".join(_part_html(part) for part in turn.parts)
    fields = "".join(
        make_details(name, escape(str(content))) for name, content in turn.fields.items()
    )
    return html + fields


def _part_html(part: Part) -> str:
    if isinstance(part, Text):
        return escape(part.text)
    if isinstance(part.source, str | bytes | StoredObject | PinnedFile):
        return element("span", f"[{type(part).__name__.lower()}, not decoded] ", QUIET)
    if isinstance(part, Audio):
        return make_player(part.source, part.sample_rate_hz or 1)
    return make_thumbnail(part.source)


def _replace_media(turn: Turn, replacement: Callable[[Image | Audio], Image | Audio]) -> Turn:
    parts = tuple(
        replacement(part) if isinstance(part, Image | Audio) else part for part in turn.parts
    )
    is_same = all(new is old for new, old in zip(parts, turn.parts, strict=True))
    return turn if is_same else replace(turn, parts=parts)
