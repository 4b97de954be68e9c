"""Local media pinned to what they were when their rows were read: by size and checksum."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import google_crc32c

from gemma_tuner.errors import DataError
from gemma_tuner.media.encoded import name_reason
from gemma_tuner.records import PinnedFile, StoredObject

_CHUNK_BYTES = 1 << 20
_REMEMBERED_FILES = 4096


def pin_file(path: Path, name: str) -> PinnedFile:
    """Pin a local file; raises OSError where it cannot be read."""
    state = path.stat()
    stamp = (state.st_size, state.st_mtime_ns, state.st_ino)
    return PinnedFile(name, state.st_size, _read_checksum(path, stamp))


def pin_part(path: Path, stored: StoredObject) -> StoredObject:
    """Pin a part of a local file, such as a member of a tar; raises OSError."""
    with path.open("rb") as file:
        file.seek(stored.start or 0)
        return replace(stored, crc32c=google_crc32c.value(file.read(stored.num_bytes)))


def check_pinned(path: Path, pinned: PinnedFile, *, key: str) -> None:
    """Refuse a local file that is not what it was."""
    name = f"file {path.name[:100]!r}"
    try:
        is_same = pin_file(path, pinned.path) == pinned
    except OSError as error:
        raise DataError(
            f"{name} cannot be opened ({name_reason(error)}); put it back", key=key
        ) from None  # whose message holds the path
    if not is_same:
        raise DataError(
            f"{name} is not what it was when its row was read; put it back, or open the stream "
            "with refresh=True to train on what is there now",
            key=key,
        )


# Long recordings hold many clips: what was not touched since is not read again for each.
@lru_cache(_REMEMBERED_FILES)
def _read_checksum(path: Path, stamp: tuple[int, ...]) -> int:
    """Return the Castagnoli checksum of a file; another ``stamp`` is another question."""
    del stamp
    crc32c = 0
    with path.open("rb") as file:
        while content := file.read(_CHUNK_BYTES):
            crc32c = google_crc32c.extend(crc32c, content)
    return crc32c
