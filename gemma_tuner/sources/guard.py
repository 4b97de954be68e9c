"""Media in columns that play no part: under whatever name, they are refused."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from gemma_tuner.errors import SourceError
from gemma_tuner.media.encoded import read_base64_media, read_uri_scheme, sniff_media
from gemma_tuner.modalities import kind_of_suffix
from gemma_tuner.records import StoredObject
from gemma_tuner.sources.columns import Columns, list_media_columns

LOOKED_AT = 20
"""So many values of a column that are not empty tell what it holds; of large ones, fewer."""

_LARGE_BYTES = 64 << 10

_TEXTS = ("prompt", "response", "text", "context", "system")
_FIELDS = ("bytes", "data", "path", "url", "uri")
_LONGEST_NAME = 1024
OTHER_SUFFIXES = {
    **dict.fromkeys((".m4a", ".aac", ".wma", ".amr"), "audio"),
    **dict.fromkeys((".mp4", ".mov", ".avi", ".mkv", ".webm"), "video"),
}


def weigh(value: Any) -> int:
    """What a look at a value takes of ``LOOKED_AT``: large ones are few, as buckets send them."""
    return 1 + _count_bytes(value) // _LARGE_BYTES


def _count_bytes(value: Any) -> int:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        return sum(map(_count_bytes, value))
    return len(value) if isinstance(value, bytes | str) else 0


class MediaGuard:
    """Looks at the first values of columns that are no media by name, text columns among them."""

    def __init__(self, columns: Columns, available: Collection[str]) -> None:
        self.start: Path | None = None  # of relative paths; None: the folder of their row
        self.waiting: dict[str, int] = {}  # column to the values that are yet to be looked at
        self.add(columns, available)

    def add(self, columns: Columns, names: Collection[str]) -> None:
        """Look at further columns."""
        self._columns = columns
        self._texts = {columns.names[part] for part in _TEXTS if part in columns.names}
        in_use = {*columns.names.values(), *columns.ignored} - self._texts
        self.waiting |= dict.fromkeys((name for name in names if name not in in_use), LOOKED_AT)

    def list_unread(self) -> dict[str, int]:
        """Return the columns that play no part, each with the values that are to be looked at."""
        return {name: n for name, n in self.waiting.items() if name not in self._texts}

    def look(self, values: Mapping[str, Any], folder: str | Path) -> None:
        """Refuse the data where a column of this row holds media."""
        for column in list(self.waiting):
            value = values.get(column)
            if value is not None and not (isinstance(value, str | list) and not value):
                self.look_at(column, value, folder)

    def look_at(self, column: str, value: Any, folder: str | Path) -> None:
        """Refuse the data where this value of a column is media, or a list of them."""
        items = value[:3] if isinstance(value, list) else [value]
        kinds = {self._find_kind(item, folder, is_text=column in self._texts) for item in items}
        for kind in kinds - self._columns.switched_off - {None}:
            names = f"{kind}=" if kind in ("image", "audio") else "image= or audio="
            fate = "read as text" if column in self._texts else "passed over"
            raise SourceError(
                f"the column {column!r} holds {kind} files, and would be {fate}; name it by "
                f"{names} (several of one row as a list), or leave it out by ignore=({column!r},)"
            )
        left = self.waiting.pop(column, 0) - weigh(value)
        if left > 0:
            self.waiting[column] = left

    def _find_kind(self, value: Any, folder: str | Path, *, is_text: bool) -> str | None:
        if isinstance(value, Mapping):
            if "array" in value and "sampling_rate" in value:
                return "audio"
            found = (
                # What stands deeper under names of any kind is media where it is there.
                self._find_kind(item, folder, is_text=is_text or name not in _FIELDS)
                for name, item in value.items()
            )
            return next(filter(None, found), None)
        if isinstance(value, list):
            return next(
                filter(None, (self._find_kind(i, folder, is_text=is_text) for i in value[:3])),
                None,
            )
        if isinstance(value, StoredObject):  # a tar's, under a name of its own
            return "media"
        if isinstance(value, bytes):
            return sniff_media(value)
        if not isinstance(value, str):  # Pillow is not imported to learn that this is none of it
            return "image" if type(value).__module__.startswith("PIL.") else None
        if value[:5].lower() == "data:":
            kind = value[5:16].partition("/")[0].lower()
            return kind if kind in ("image", "audio", "video") else None
        if content := read_base64_media(value):
            return sniff_media(content)
        return self._find_kind_of_file(value, folder, is_text=is_text)

    def _find_kind_of_file(self, name: str, folder: str | Path, *, is_text: bool) -> str | None:
        suffix = f".{name.partition('?')[0].rpartition('.')[2].lower()}"
        kind = kind_of_suffix(suffix) or OTHER_SUFFIXES.get(suffix)
        if kind is None or len(name) > _LONGEST_NAME or "\n" in name:
            return None
        folder = self.start or folder
        is_local = isinstance(folder, Path) or Path(name).is_absolute()
        if is_local and read_uri_scheme(name) is None:
            try:
                if Path(folder, name).is_file():
                    return kind
            except (OSError, ValueError):  # a name that is none
                return None
        # What is not there, or cannot be asked for, is the name of what the row is about, unless
        # the row has media already.
        is_lone = not is_text and not list_media_columns(self._columns.names)
        return kind if is_lone else None
