"""Building blocks of the page."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from nicegui import ui

SHOWN_CHARACTERS = 4000

T = TypeVar("T")


def block(classes: str = "") -> ui.element:
    """Make a plain box."""
    return ui.element("div").classes(classes)


def text(content: str, classes: str = "") -> ui.label:
    """Show text as it is, tags in it too; of one too long for a page the beginning."""
    if (num_more := len(content) - SHOWN_CHARACTERS) > 0:
        content = f"{content[:SHOWN_CHARACTERS]} … ({num_more:,} more characters)"
    # Half a pair of UTF-16, as JSON and YAML can spell one, cannot be sent.
    return ui.label(content.encode("utf-8", "replace").decode()).classes(classes)


def cell(content: str, *, tag: str = "td") -> ui.element:
    """Make a table's cell that holds text."""
    with ui.element(tag) as element:
        text(content)
    return element


def heading(title: str, note: str = "") -> ui.element:
    """Make the line above a card's content; more may be added to its end."""
    with block("card-head") as element:
        text(title, "card-title")
        text(note, "quiet")
    return element


class Section(Generic[T]):
    """A piece of the page that is rebuilt when the values it shows have changed."""

    def __init__(
        self, read: Callable[[], T], show: Callable[[T], None], classes: str = ""
    ) -> None:
        self._read = read
        self._show = show
        self._shown: T | None = None
        self._box = block(classes)
        self.follow()

    def follow(self) -> None:
        """Show what there is now."""
        content = self._read()
        if content == self._shown:
            return
        self._shown = content
        self._box.clear()
        with self._box:
            self._show(content)
