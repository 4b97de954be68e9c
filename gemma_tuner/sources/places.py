"""Where the images and clips of a row belong: at tags in its texts, or at parts that name them.

A tag (``<image>``, ``<audio>``, ``<image 2>``, ``<|image_2|>``) is a place for the row's next
item, or for the one that it numbers from 1. A tag without an item is an error and never letters,
save in a stream that has no such media by the user's own word (``image=False``).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from gemma_tuner.checks import is_whole_number
from gemma_tuner.errors import DataError
from gemma_tuner.modalities import MediaKind
from gemma_tuner.records import Audio, Image, Part, Text, Turn

_TAG = re.compile(
    r"\n?<(?P<bar>\|?)(?:start_of_)?(?P<kind>image|audio|video)"
    r"(?:_placeholder|_pad|_token|_soft_token)?[ _-]?(?P<number>\d{0,4})(?P=bar)>\n?",
    re.IGNORECASE,
)


class Places:
    """The media of one row, and which of them have found their place.

    ``letters`` names the kinds whose tags are text like any other.
    """

    def __init__(
        self,
        media: Mapping[MediaKind, Sequence[Image | Audio]],
        key: str,
        letters: Collection[str] = (),
    ) -> None:
        self.key = key
        self._media = media
        self._letters = letters
        self._taken: dict[MediaKind, set[int]] = {"image": set(), "audio": set()}

    def take(self, kind: MediaKind, where: str, index: Any = None) -> Image | Audio:
        """Take the next item of a kind, or the one with an index from 0."""
        items, taken = self._media.get(kind, ()), self._taken[kind]
        if index is None and len(taken) == len(items):
            raise DataError(
                f"{where} has a place for one more {kind} than the row holds ({len(items)}); "
                f"fill the {kind} column, name it by {kind}=, or take the place out "
                f"({kind}=False leaves a tag as letters)",
                key=self.key,
            )
        if index is None:
            index = min(set(range(len(items))) - taken)
        elif not is_whole_number(index) or not 0 <= index < len(items):
            raise DataError(
                f"{where} names an item of {kind} that is none of the row's {len(items)}; an "
                "index counts from 0, the number in a tag from 1",
                key=self.key,
            )
        elif index in taken:
            raise DataError(
                f"{where} has a second place for item {index + 1} of {kind}; give each item one "
                "place, and speak of it in words elsewhere",
                key=self.key,
            )
        taken.add(index)
        return items[index]

    def split(self, text: str, where: str, *, holds_media: bool = False) -> Iterator[Part]:
        """Cut a text at its tags, and put the row's media there."""
        start = 0
        for tag in _TAG.finditer(text):
            kind: MediaKind = "audio" if tag["kind"].lower() == "audio" else "image"
            if kind in self._letters:
                continue
            is_video = tag["kind"].lower() == "video"
            if is_video or not holds_media:
                raise DataError(
                    f"{where} holds the tag <{tag['kind'].lower()}>, and "
                    f"{'videos are not read' if is_video else 'media stand in user turns'}; put "
                    f"images or clips there, take the tag out, or set {kind}=False where the tags "
                    "of the data are letters",
                    key=self.key,
                )
            if text[start : tag.start()]:
                yield Text(text[start : tag.start()])
            yield self.take(kind, where, int(tag["number"]) - 1 if tag["number"] else None)
            start = tag.end()
        if text[start:]:
            yield Text(text[start:])

    def list_unplaced(self) -> list[Image | Audio]:
        """Return the media that nothing asked for; all of a kind have a place, or none."""
        unplaced = []
        for kind, parts in self._media.items():
            num_placed = len(self._taken[kind])
            if 0 < num_placed < len(parts):
                raise DataError(
                    f"it has places for {num_placed} of its {len(parts)} {kind} items; add a "
                    "place for each, or none to put all of them before the first user turn's text",
                    key=self.key,
                )
            unplaced += parts[num_placed:]
        return unplaced


def place_media(
    turns: tuple[Turn, ...], media: Sequence[Image | Audio], key: str
) -> tuple[Turn, ...]:
    """Put media without a place before the text of the first user turn."""
    if not media:
        return turns
    for index, turn in enumerate(turns):
        if turn.role == "user":
            placed = replace(turn, parts=(*media, *turn.parts))
            return (*turns[:index], placed, *turns[index + 1 :])
    raise DataError("it holds media and no user turn to put them in; add one", key=key)
