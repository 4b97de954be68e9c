"""The files of a media cache: their form, the lock on them, and how many bytes they have.

::

    cache/media.lock             locked for changes; holds how many bytes all files have
    cache/incoming/7c...04.part  being written, of its final size from the first moment
    cache/3f/3f...e1.media       an entry: magic, length, crc32c, then the bytes

The recorded total is only ever too large, because it grows before files come and shrinks after
they went; each scan of the folder makes it exact.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import secrets
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

import google_crc32c

from gemma_tuner.records import StoredObject

_HEADER = struct.Struct("<8sQI")  # magic, bytes that follow, their crc32c
_MAGIC = b"gtmedia1"
_TOTAL = struct.Struct("<QI")  # bytes of all files, crc32c of the eight bytes before it
HEADER_BYTES = _HEADER.size
"""Bytes of an entry beside its media."""
LOCK_BYTES = _TOTAL.size
"""Bytes of an empty cache."""


class Entry(NamedTuple):
    """A file of media, and when it was used last."""

    used_ns: int
    path: str
    num_bytes: int


class CacheFolder:
    """The folder of a cache."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._incoming = path / "incoming"

    def locate(self, stored: StoredObject) -> Path | None:
        """Say where an object's entry is; nowhere, if nothing would tell when it has changed."""
        if stored.generation is None and stored.crc32c is None:
            return None
        version = (stored.generation, stored.crc32c)
        identity = json.dumps([stored.uri, *version, stored.start, stored.num_bytes])
        name = hashlib.blake2b(identity.encode(), digest_size=20).hexdigest()
        return self.path / name[:2] / f"{name}.media"

    def begin(self, num_bytes: int) -> tuple[Path, int]:
        """Create a file of its final size, locked as long as its descriptor is open."""
        self._incoming.mkdir(mode=0o700, exist_ok=True)
        path = self._incoming / f"{secrets.token_hex(16)}.part"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            os.ftruncate(descriptor, num_bytes)
        except OSError:
            os.close(descriptor)  # The next scan removes the file.
            raise
        return path, descriptor

    @contextmanager
    def locked(self) -> Iterator[int]:
        """Hold the folder's lock, against other processes and threads alike."""
        # Each holder opens the file for itself: a lock belongs to one opening of it.
        path, flags = self.path / "media.lock", os.O_RDWR | os.O_CREAT
        try:
            descriptor = os.open(path, flags, 0o600)
        except FileNotFoundError:  # A first use, or somebody emptied the cache by hand.
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(path, flags, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # A forked child may hold a copy open.
            os.close(descriptor)

    def read_total(self, lock: int) -> int:
        """Return the bytes of all files, from a scan where none are recorded; needs the lock."""
        record = os.pread(lock, _TOTAL.size, 0)
        if len(record) == _TOTAL.size:
            total, checksum = _TOTAL.unpack(record)
            if checksum == google_crc32c.value(record[:8]):
                return total
        total, _ = self.scan()
        self.write_total(lock, total)
        return total

    def write_total(self, lock: int, total: int) -> None:
        """Record the bytes of all files; needs the lock."""
        number = max(0, total).to_bytes(8, "little")  # Files may be changed behind our back.
        os.pwrite(lock, number + google_crc32c.value(number).to_bytes(4, "little"), 0)

    def scan(self) -> tuple[int, list[Entry]]:
        """Measure all files, after removing what killed writers left; needs the lock."""
        total = _TOTAL.size + sum(map(_measure_unfinished, self._incoming.glob("*.part")))
        entries = list(self.list_entries())
        return total + sum(entry.num_bytes for entry in entries), entries

    def list_entries(self) -> Iterator[Entry]:
        """List the entries, in no order."""
        for number in range(256):
            try:
                with os.scandir(self.path / f"{number:02x}") as found:
                    for file in found:
                        if file.name.endswith(".media"):
                            with suppress(FileNotFoundError):  # Without the lock they may go.
                                status = file.stat()
                                yield Entry(status.st_mtime_ns, file.path, status.st_size)
            except FileNotFoundError:
                continue


def write_entry(file: BinaryIO, content: bytes) -> None:
    """Write an entry to a file that is empty or of its final size."""
    file.write(_HEADER.pack(_MAGIC, len(content), google_crc32c.value(content)))
    file.write(content)


def read_entry(file: io.FileIO, stored: StoredObject | None = None) -> bytes | None:
    """Return an entry's bytes; None where they are damaged or not those that are pinned."""
    try:
        header = file.read(_HEADER.size)
        content = file.readall()
    except OSError:
        return None
    if len(header) < _HEADER.size:
        return None
    magic, num_bytes, checksum = _HEADER.unpack(header)
    if (magic, num_bytes, checksum) != (_MAGIC, len(content), google_crc32c.value(content)):
        return None
    if stored is not None and stored.start is None and stored.crc32c not in (None, checksum):
        return None
    return content


def _measure_unfinished(path: Path) -> int:
    """Return the size of a file that is being written; remove it if its writer is gone."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.fstat(descriptor).st_size
    else:
        path.unlink()
        return 0
    finally:
        os.close(descriptor)
