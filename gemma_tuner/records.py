"""Example, Turn and media parts: one training example before any tensor.

An example is a conversation or a plain document. Media parts hold where the media is (a path or
URI), its encoded bytes, or its decoded form; :mod:`gemma_tuner.media` moves them from one to the
next, so a part keeps its place in the conversation whatever state it is in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

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
class Image:
    """A picture within a turn: a local path or URI, encoded bytes, or decoded RGB pixels."""

    source: str | bytes | PIL.Image.Image


@dataclass(frozen=True, slots=True)
class Audio:
    """A sound within a turn: a local path or URI, encoded bytes, or decoded samples.

    Args:
        source: A path, encoded bytes, or float samples ``[frames]`` or ``[frames, channels]``.
        sample_rate_hz: The rate of decoded samples; None while ``source`` is encoded.
    """

    source: str | bytes | numpy.ndarray
    sample_rate_hz: int | None = None


Part = Text | Image | Audio


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation.

    Args:
        role: ``system``, ``user``, ``assistant`` or ``tool``.
        parts: Text and media in reading order.
        fields: What a chat template may read beside the content, under the names that it uses
            (``reasoning``, ``tool_calls``, ``tool_call_id``, ``name``).
    """

    role: Role
    parts: tuple[Part, ...]
    fields: Mapping[str, Any] = field(default_factory=dict)

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

    @property
    def media(self) -> Iterator[Image | Audio]:
        """The media parts of all turns in reading order."""
        return (
            part for turn in self.turns for part in turn.parts if isinstance(part, Image | Audio)
        )
