"""The media cache: bytes fetched once, kept on disk within a budget, checked at every reading.

Every file counts, also one that is being written, and room is made before it is created: the
folder never holds more than its budget. Reading takes no lock. Threads and processes may share a
folder; a killed one leaves nothing worse than a file in ``incoming``, which the next scan removes:
its writer no longer locks it.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gemma_tuner.display import show_bytes
from gemma_tuner.errors import SourceError
from gemma_tuner.log import logger
from gemma_tuner.records import StoredObject
from gemma_tuner.storage.cache_folder import (
    HEADER_BYTES,
    LOCK_BYTES,
    CacheFolder,
    read_entry,
    write_entry,
)

_TOUCH_SECONDS = 60.0  # An entry used again within this time is not marked again.
_SLACK = 16  # Eviction frees a 16th of the budget beyond need, so that scans stay rare.


@dataclass(frozen=True, slots=True)
class CacheCounts:
    """What a cache did since it was opened, in this process."""

    hits: int
    misses: int  # the damaged among them
    damaged: int  # not what was written; deleted
    evicted: int  # deleted to make room
    not_stored: int  # no pinned version, larger than the budget, or no space on the disk


class MediaCache:
    """Media on disk, least recently used out first."""

    def __init__(
        self,
        folder: Path,
        *,
        max_bytes: int,  # of all files in the folder; 0 keeps nothing and touches no disk
        min_free_bytes: int,  # on its disk
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._files = CacheFolder(folder)
        self._max_bytes = max_bytes if max_bytes > LOCK_BYTES + HEADER_BYTES else 0
        self._min_free_bytes = min_free_bytes
        self._clock = clock
        self._counts: Counter[str] = Counter()
        self._counting = threading.Lock()
        self._has_warned = False
        if self._max_bytes:
            try:
                with self._files.locked() as lock:
                    self._evict(lock, 0)
            except OSError as error:
                raise SourceError(
                    f"the cache folder {folder.name!r} cannot be used ({error.strerror}); choose "
                    "another by cache_dir=, or keep nothing with cache_bytes=0"
                ) from None

    def read(self, stored: StoredObject) -> bytes | None:
        """Return what was written for an object, checked against its checksum."""
        if not self._max_bytes:
            return None
        content = None
        path = self._files.locate(stored)
        if path is not None:
            try:
                with path.open("rb", buffering=0) as file:
                    content = read_entry(file, stored)
                    if content is None:
                        self._drop(path, file.fileno())
                    else:
                        self._touch(file.fileno())
            except OSError:  # Most often there is no such file.
                pass
        self._count("misses" if content is None else "hits")
        return content

    def write(self, stored: StoredObject, content: bytes) -> bool:
        """Keep the bytes of an object; whatever prevents it is counted, and no error."""
        # An object with neither a generation nor a checksum is not kept: nothing would tell when
        # it has changed. One of them is enough, because both are part of an entry's name.
        if not self._max_bytes:
            return False
        path = self._files.locate(stored)
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
        """Bytes of all files in the folder, those of other processes included."""
        if not self._max_bytes:
            return 0
        try:
            with self._files.locked() as lock:
                return self._files.read_total(lock)
        except OSError as error:
            raise SourceError(
                f"the cache folder {self._files.path.name!r} cannot be read ({error.strerror})"
            ) from None

    def _count(self, name: str, number: int = 1) -> None:
        with self._counting:
            self._counts[name] += number

    def _touch(self, descriptor: int) -> None:
        """Mark an entry as used, seldom enough that reading does not become writing."""
        now = self._clock()
        if abs(now - os.fstat(descriptor).st_mtime) >= _TOUCH_SECONDS:
            with suppress(OSError):  # A disk that is read only still serves hits.
                os.utime(descriptor, ns=(int(now * 1e9), int(now * 1e9)))

    def _drop(self, path: Path, descriptor: int) -> None:
        """Delete a damaged entry, unless another process has put a whole one in its place."""
        self._count("damaged")
        with self._files.locked() as lock:
            damaged = os.fstat(descriptor)
            if damaged.st_nlink and os.path.samestat(damaged, path.stat()):
                total = self._files.read_total(lock)
                path.unlink()
                self._files.write_total(lock, total - damaged.st_size)

    def _store(self, path: Path, content: bytes) -> bool:
        """Write an entry: room first, then the bytes, then the name."""
        num_bytes = HEADER_BYTES + len(content)
        with self._files.locked() as lock:
            if path.exists():
                return True
            if not self._make_room(lock, num_bytes):
                return False
            self._files.write_total(lock, self._files.read_total(lock) + num_bytes)
            temporary, descriptor = self._files.begin(num_bytes)
        is_kept = False
        try:
            with os.fdopen(descriptor, "wb") as file:
                write_entry(file, content)
                file.flush()
                now_ns = int(self._clock() * 1e9)
                # Not synced to the disk: an entry that a power cut tears is found out when read.
                os.utime(file.fileno(), ns=(now_ns, now_ns))
                with self._files.locked():
                    # Another writer of the same object may have been faster.
                    if not path.exists():
                        path.parent.mkdir(mode=0o700, exist_ok=True)
                        temporary.rename(path)
                        is_kept = True
        finally:
            if not is_kept:
                with self._files.locked() as lock:
                    if temporary.exists():  # A scan may have removed and uncounted it.
                        temporary.unlink()
                        self._files.write_total(lock, self._files.read_total(lock) - num_bytes)
        return True

    def _make_room(self, lock: int, num_bytes: int) -> bool:
        """See that a file of ``num_bytes`` fits the disk and the budget, evicting if need be."""
        if LOCK_BYTES + num_bytes > self._max_bytes:
            return False
        if shutil.disk_usage(self._files.path).free - num_bytes < self._min_free_bytes:
            self._warn_of_full_disk()
            return False
        fits = self._files.read_total(lock) + num_bytes <= self._max_bytes
        return fits or self._evict(lock, num_bytes)

    def _warn_of_full_disk(self) -> None:
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                "the disk of the media cache has no more than %s free: nothing new is kept, "
                "but downloaded again each epoch; free some space, choose another disk by "
                "cache_dir=, or set FetchConfig(min_free_disk_bytes=...)",
                show_bytes(self._min_free_bytes),
            )

    def _evict(self, lock: int, num_bytes: int) -> bool:
        """Delete what was not used for longest, until a file of ``num_bytes`` fits the budget."""
        total, entries = self._files.scan()
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
        self._files.write_total(lock, total)
        return is_possible
