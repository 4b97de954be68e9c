"""Texts and sizes as people read them: on a terminal, and as HTML in a notebook.

On a terminal, what would command it is quoted. In HTML, every text from data is escaped, and
nothing holds a script, a link or an address of another place: images and clips are inside, as data
URIs. Colours are translucent, for light and dark pages.
"""

from __future__ import annotations

import base64
import html
import io
import math
import re
import wave
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy
    import PIL.Image

ACCENT = "#009e73"
"""The colour of what is trained and what is done."""

QUIET = "opacity:0.65"
"""The style of what matters less."""

MAX_CHARACTERS = 2000
"""Of one text; those beyond are counted."""

MAX_SECONDS = 30.0
"""Of one clip: 1.3 MB of a page at 16 kHz."""

GIB = 2**30
"""Bytes of a GiB, in which devices and ``memory_gib`` count."""

# What moves the cursor, writes to the clipboard, rings, or turns the reading direction of what
# follows; halves of characters, which cannot be printed, too. Lines and tabs remain.
_COMMANDS = re.compile(
    r"[\0-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
# White space, fillers and what has no width: Unicode's default ignorables, the empty Braille cell.
_INVISIBLE = re.compile(
    r"[\s\0-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f"
    r"\u202a-\u202e\u2060-\u206f\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb"
    r"\U0001d173-\U0001d17a\U000e0000-\U000e0fff]*"
)
_THUMBNAIL_PIXELS = 256
# A drawing of 50 pixels is easier to see at twice that.
_SEEN = "min-height:96px;object-fit:contain"
_FIGURE = "display:inline-block;margin:2px 12px 2px 0"
_CAPTION = f"{QUIET};font-size:85%"
_CELL = "text-align:left;vertical-align:top;padding:2px 16px 2px 0;white-space:pre-line"


def quote_text(text: str) -> str:
    """Quote what would command a terminal, as Python writes it; lines and tabs stay."""
    return _COMMANDS.sub(lambda found: repr(found[0])[1:-1], text)


def quote_line(text: str) -> str:
    """Quote what would command a terminal or end a line."""
    return quote_text(text).replace("\n", r"\n").replace("\t", r"\t")


def is_blank(text: str) -> bool:
    """Whether nothing of a text can be seen, as of an empty one."""
    return _INVISIBLE.fullmatch(text) is not None


def escape(text: str) -> str:
    """Escape a text; one that is too long for a page is cut, and says so."""
    if len(text) <= MAX_CHARACTERS:
        return html.escape(text)
    return f"{html.escape(text[:MAX_CHARACTERS])}… ({len(text):,} characters)"


def element(tag: str, content: str, style: str = "") -> str:
    """Put HTML into an element with a CSS style."""
    attribute = f' style="{html.escape(style)}"' if style else ""
    return f"<{tag}{attribute}>{content}</{tag}>"


def make_card(title: str, note: str, *content: str) -> str:
    """Frame an object: a title and a note, which are text, above HTML."""
    heading = element("b", escape(title)) + element("span", f"&ensp;{escape(note)}", QUIET)
    frame = "border-left:3px solid #8886;padding:2px 0 2px 12px;margin:6px 0;line-height:1.5"
    return element("div", element("div", heading) + "".join(content), frame)


def make_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Make a table; its head is text, its cells are HTML."""
    lines = [_make_row("th", map(escape, head))] if head else []
    lines += [_make_row("td", row) for row in rows]
    return element("table", "".join(lines), "border-collapse:collapse;margin:4px 0")


def _make_row(tag: str, cells: Iterable[str]) -> str:
    return element("tr", "".join(element(tag, cell, _CELL) for cell in cells))


def make_details(summary: str, content: str) -> str:
    """Fold HTML away below a summary, which is text."""
    return element("details", element("summary", escape(summary), QUIET) + content)


def make_bar(parts: Iterable[tuple[float, str, str]], title: str) -> str:
    """Draw a bar of parts: of each its share, 0 to 1, its CSS background and its name."""
    pieces = "".join(
        f'<div title="{html.escape(name)}" style="width:{100 * share:.3f}%;background:{color}">'
        "</div>"
        for share, color, name in parts
    )
    style = "display:flex;height:22px;max-width:720px;margin:6px 0;background:#8883"
    return f'<div role="img" aria-label="{html.escape(title)}" style="{style}">{pieces}</div>'


def make_thumbnail(image: PIL.Image.Image) -> str:
    """Show an image, small, with its size below."""
    small = image.copy()
    small.thumbnail((_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS))
    buffer = io.BytesIO()
    small.save(buffer, "PNG")
    address = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
    size = f"{image.width} × {image.height}"
    shown = f'<img src="{address}" alt="image, {size}" style="{_SEEN}">'
    caption = element("figcaption", f"{size} pixels", _CAPTION)
    return element("figure", shown + caption, _FIGURE)


def make_player(samples: numpy.ndarray, rate_hz: int) -> str:
    """Make a clip ``[frames]`` or ``[frames, channels]`` playable, with its length below."""
    # Full scale is at 1.
    heard = samples[: int(MAX_SECONDS * rate_hz)]
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1 if heard.ndim == 1 else heard.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate_hz)
        file.writeframes((heard.clip(-1, 1) * 32767).astype("<i2").tobytes())
    address = "data:audio/wav;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
    seconds = f"{len(samples) / rate_hz:.2f} s"
    if len(heard) < len(samples):
        seconds = f"the first {MAX_SECONDS:.0f} s of {seconds}"
    player = f'<audio controls preload="metadata" src="{address}"></audio>'
    caption = element("figcaption", seconds, _CAPTION)
    return element("figure", player + caption, _FIGURE)


def show_bytes(num_bytes: float, *, binary: bool = False) -> str:
    """A size with its unit: three figures of kB to TB, or four of KiB to TiB."""
    step, digits = (1024, 4) if binary else (1000, 3)
    units = ["bytes", *(("KiB", "MiB", "GiB", "TiB") if binary else ("kB", "MB", "GB", "TB"))]
    while num_bytes >= step and len(units) > 1:
        num_bytes /= step
        units.pop(0)
    return f"{num_bytes:.{digits}g} {units[0]}"


def show_memory(num_bytes: float) -> str:
    """Memory of a device as MiB or GiB, as budgets are given; "–" where it is not known."""
    if not math.isfinite(num_bytes):
        return "–"
    if num_bytes < GIB / 10:
        return f"{num_bytes / 2**20:.1f} MiB"
    return f"{num_bytes / GIB:.2f} GiB"
