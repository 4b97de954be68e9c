"""The media cache: bytes fetched once, kept on disk within a budget, checked at every reading.

::

    cache/media.lock             locked for changes; holds how many bytes all files have
    cache/incoming/7c...04.part  being written, of its final size from the first moment
    cache/3f/3f...e1.media       an entry: magic, length, crc32c, then the bytes

Every file counts, also one that is being written, and room is made before it is created: the
folder never holds more than its budget. The recorded total is only ever too large, because it
grows before files come and shrinks after they went; each scan of the folder makes it exact.
Reading takes no lock. Threads and processes may share a folder; a killed one leaves nothing
worse than a file in ``incoming``, which the next scan removes: its writer no longer locks it.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import secrets
import shutil
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import google_crc32c

from gemma_tuner.errors import SourceError
from gemma_tuner.records import StoredObject

_HEADER = struct.Struct("<8sQI")  # magic, bytes that follow, their crc32c
_MAGIC = b"gtmedia1"
_TOTAL = struct.Struct("<QI")  # bytes of all files, crc32c of the eight bytes before it
_TOUCH_SECONDS = 60.0  # An entry used again within this time is not marked again.
_SLACK = 16  # Eviction frees a 16th of the budget beyond need, so that scans stay rare.


@dataclass(frozen=True, slots=True)
class CacheCounts:
    """What a cache did since it was opened, in this process.

    Args:
        hits: Reads that were answered.
        misses: Reads that were not, the damaged among them.
        damaged: Entries whose bytes were not what was written; they are deleted.
        evicted: Entries deleted to make room.
        not_stored: Writes that were passed over: no pinned version, larger than the budget, or
            no space on the disk.
    """

    hits: int
    misses: int
    damaged: int
    evicted: int
    not_stored: int


@dataclass(frozen=True, slots=True)
class CacheCheck:
    """What reading a whole cache found.

    Args:
        entries: Entries that are whole.
        num_bytes: Bytes of media in them.
        damaged: Entries that are not.
    """

    entries: int
    num_bytes: int
    damaged: int


class _Entry(NamedTuple):
    used_ns: int
    path: str
    num_bytes: int


class MediaCache:
    """Media on disk, least recently used out first.

    Args:
        folder: Where; it is created, for the user alone, if need be.
        max_bytes: What all files in the folder may have together; 0, as any number too small for
            an entry, keeps nothing and touches no disk. A folder that holds more is brought down
            to it at once.
        min_free_bytes: What is left free on the disk.
        clock: The time in seconds since 1970.

    Raises:
        SourceError: The folder cannot be used.
    """

    def __init__(
        self,
        folder: Path,
        *,
        max_bytes: int,
        min_free_bytes: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._folder = folder
        self._incoming = folder / "incoming"
        self._max_bytes = max_bytes if max_bytes > _TOTAL.size + _HEADER.size else 0
        self._min_free_bytes = min_free_bytes
        self._clock = clock
        self._counts: Counter[str] = Counter()
        self._counting = threading.Lock()
        if self._max_bytes:
            try:
                with self._locked() as lock:
                    self._evict(lock, 0)
            except OSError as error:
                raise SourceError(
                    f"the cache folder {folder.name!r} cannot be used ({error.strerror}); choose "
                    "another by cache_dir=, or keep nothing with cache_bytes=0"
                ) from None

    def read(self, stored: StoredObject) -> bytes | None:
        """Return what was written for an object, checked against its checksum.

        Args:
            stored: The object, or the part of one.

        Returns:
            The bytes as they are stored; None where they are not here.
        """
        if not self._max_bytes:
            return None
        content = None
        path = self._locate(stored)
        if path is not None:
            try:
                with path.open("rb", buffering=0) as file:
                    content = _read_entry(file, stored)
                    if content is None:
                        self._drop(path, file.fileno())
                    else:
                        self._touch(file.fileno())
            except OSError:  # Most often there is no such file.
                pass
        self._count("misses" if content is None else "hits")
        return content

    def write(self, stored: StoredObject, content: bytes) -> bool:
        """Keep the bytes of an object.

        An object with neither a generation nor a checksum is not kept: nothing would tell when
        it has changed. One of them is enough, because both are part of an entry's name.

        Args:
            stored: The object, or the part of one.
            content: All its bytes, as they are stored.

        Returns:
            Whether they are kept now; whatever prevents it is counted and no error.
        """
        if not self._max_bytes:
            return False
        path = self._locate(stored)
        try:
            is_stored = path is not None and self._store(path, content)
        except OSError:
            is_stored = False
        if not is_stored:
            self._count("not_stored")
        return is_stored

    @property
    def counts(self) -> CacheCounts:
        """What this object did so far."""
        with self._counting:
            counts = self._counts.copy()
        return CacheCounts(
            hits=counts["hits"],
            misses=counts["misses"],
            damaged=counts["damaged"],
            evicted=counts["evicted"],
            not_stored=counts["not_stored"],
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of all files in the folder, those of other processes included.

        Raises:
            SourceError: The folder cannot be read any more.
        """
        if not self._max_bytes:
            return 0
        try:
            with self._locked() as lock:
                return self._read_total(lock)
        except OSError as error:
            raise SourceError(
                f"the cache folder {self._folder.name!r} cannot be read ({error.strerror})"
            ) from None

    def verify(self) -> CacheCheck:
        """Read every entry and compare it with its checksum; nothing is changed.

        Returns:
            What was found.
        """
        entries = num_bytes = damaged = 0
        for entry in self._list_entries():
            try:
                with Path(entry.path).open("rb", buffering=0) as file:
                    content = _read_entry(file)
            except FileNotFoundError:
                continue  # Evicted since it was listed.
            except OSError:
                content = None
            entries += content is not None
            damaged += content is None
            num_bytes += len(content or b"")
        return CacheCheck(entries, num_bytes, damaged)

    def _count(self, name: str, number: int = 1) -> None:
        with self._counting:
            self._counts[name] += number

    def _locate(self, stored: StoredObject) -> Path | None:
        if stored.generation is None and stored.crc32c is None:
            return None
        version = (stored.generation, stored.crc32c)
        identity = json.dumps([stored.uri, *version, stored.start, stored.num_bytes])
        name = hashlib.blake2b(identity.encode(), digest_size=20).hexdigest()
        return self._folder / name[:2] / f"{name}.media"

    def _touch(self, descriptor: int) -> None:
        """Mark an entry as used, seldom enough that reading does not become writing."""
        now = self._clock()
        if abs(now - os.fstat(descriptor).st_mtime) >= _TOUCH_SECONDS:
            with suppress(OSError):  # A disk that is read only still serves hits.
                os.utime(descriptor, ns=(int(now * 1e9), int(now * 1e9)))

    def _drop(self, path: Path, descriptor: int) -> None:
        """Delete a damaged entry, unless another process has put a whole one in its place."""
        self._count("damaged")
        with self._locked() as lock:
            damaged = os.fstat(descriptor)
            if damaged.st_nlink and os.path.samestat(damaged, path.stat()):
                total = self._read_total(lock)
                path.unlink()
                _write_total(lock, total - damaged.st_size)

    def _store(self, path: Path, content: bytes) -> bool:
        """Write an entry: room first, then the bytes, then the name."""
        num_bytes = _HEADER.size + len(content)
        with self._locked() as lock:
            if path.exists():
                return True
            if not self._make_room(lock, num_bytes):
                return False
            _write_total(lock, self._read_total(lock) + num_bytes)
            temporary, descriptor = self._begin(num_bytes)
        is_kept = False
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(_HEADER.pack(_MAGIC, len(content), google_crc32c.value(content)))
                file.write(content)
                file.flush()
                now_ns = int(self._clock() * 1e9)
                # Not synced to the disk: an entry that a power cut tears is found out when read.
                os.utime(file.fileno(), ns=(now_ns, now_ns))
                with self._locked():
                    # Another writer of the same object may have been faster.
                    if not path.exists():
                        path.parent.mkdir(mode=0o700, exist_ok=True)
                        temporary.rename(path)
                        is_kept = True
        finally:
            if not is_kept:
                with self._locked() as lock:
                    if temporary.exists():  # A scan may have removed and uncounted it.
                        temporary.unlink()
                        _write_total(lock, self._read_total(lock) - num_bytes)
        return True

    def _begin(self, num_bytes: int) -> tuple[Path, int]:
        """Create a file of its final size, locked as long as its writer lives."""
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
    def _locked(self) -> Iterator[int]:
        """Hold the folder's lock, against other processes and threads alike.

        Each holder opens the file for itself: a lock belongs to one opening of it.

        Yields:
            The descriptor of the lock file.
        """
        path, flags = self._folder / "media.lock", os.O_RDWR | os.O_CREAT
        try:
            descriptor = os.open(path, flags, 0o600)
        except FileNotFoundError:  # A first use, or somebody emptied the cache by hand.
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(path, flags, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # A forked child may hold a copy open.
            os.close(descriptor)

    def _read_total(self, lock: int) -> int:
        """Return the bytes of all files; from a scan where no number is recorded."""
        record = os.pread(lock, _TOTAL.size, 0)
        if len(record) == _TOTAL.size:
            total, checksum = _TOTAL.unpack(record)
            if checksum == google_crc32c.value(record[:8]):
                return total
        total, _ = self._scan()
        _write_total(lock, total)
        return total

    def _make_room(self, lock: int, num_bytes: int) -> bool:
        """See that a file of ``num_bytes`` fits the disk and the budget, evicting if need be."""
        if _TOTAL.size + num_bytes > self._max_bytes:
            return False
        if shutil.disk_usage(self._folder).free - num_bytes < self._min_free_bytes:
            return False
        fits = self._read_total(lock) + num_bytes <= self._max_bytes
        return fits or self._evict(lock, num_bytes)

    def _evict(self, lock: int, num_bytes: int) -> bool:
        """Delete what was not used for longest, until a file of ``num_bytes`` fits the budget."""
        total, entries = self._scan()
        excess = total + num_bytes - self._max_bytes
        # Files being written may be in the way; then evicting all the others would be for nothing.
        is_possible = excess <= sum(entry.num_bytes for entry in entries)
        if excess > 0 and is_possible:
            goal = self._max_bytes - num_bytes - self._max_bytes // _SLACK
            for entry in sorted(entries):
                if total <= goal:
                    break
                Path(entry.path).unlink(missing_ok=True)
                total -= entry.num_bytes
                self._count("evicted")
        _write_total(lock, total)
        return is_possible

    def _scan(self) -> tuple[int, list[_Entry]]:
        """Measure all files, after removing what killed writers left; needs the lock."""
        total = _TOTAL.size + sum(map(_measure_unfinished, self._incoming.glob("*.part")))
        entries = list(self._list_entries())
        return total + sum(entry.num_bytes for entry in entries), entries

    def _list_entries(self) -> Iterator[_Entry]:
        for number in range(256):
            try:
                with os.scandir(self._folder / f"{number:02x}") as found:
                    for file in found:
                        if file.name.endswith(".media"):
                            with suppress(FileNotFoundError):  # Without the lock they may go.
                                status = file.stat()
                                yield _Entry(status.st_mtime_ns, file.path, status.st_size)
            except FileNotFoundError:
                continue


def _read_entry(file: io.FileIO, stored: StoredObject | None = None) -> bytes | None:
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


def _write_total(lock: int, total: int) -> None:
    number = max(0, total).to_bytes(8, "little")  # Files may be changed behind our back.
    os.pwrite(lock, number + google_crc32c.value(number).to_bytes(4, "little"), 0)
