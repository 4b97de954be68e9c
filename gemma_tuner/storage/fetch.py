"""Reads of remote objects that survive a bad network: repeated, hedged, checked and counted.

A store makes one attempt; a :class:`Fetcher` makes a read of it, from any number of threads::

    read ─┬─ attempt ── 503 ── wait (jitter, or what Retry-After says) ─┬─ attempt ╌╌ abandoned
          │                                                             └─── hedge ─── bytes
          └─ until total_timeout_seconds
"""

from __future__ import annotations

import gzip
import io
import random
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import google_crc32c

from gemma_tuner.errors import DataError, SourceError
from gemma_tuner.records import Audio, Example, Image, StoredObject
from gemma_tuner.storage.cache import MediaCache
from gemma_tuner.storage.config import FetchConfig
from gemma_tuner.storage.hedge import Racer
from gemma_tuner.storage.objects import (
    CorruptReadError,
    ObjectChangedError,
    ObjectStore,
    TransientReadError,
)
from gemma_tuner.storage.stores import Stores

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_FIRST_BACKOFF_SECONDS = 0.5
_LONGEST_BACKOFF_SECONDS = 32.0
_READ_AHEAD_BYTES = 4 << 20
_MAX_UNZIPPED_BYTES = 1 << 30
_GZIP_MAGIC = b"\x1f\x8b"


@dataclass(frozen=True, slots=True)
class FetchCounts:
    """What a fetcher did so far.

    Args:
        requests: Attempts that were begun, hedges among them.
        bytes_downloaded: Bytes that arrived, those of damaged and abandoned attempts included.
        hits: Objects that came from the cache.
        not_kept: Objects that the cache had no room for.
        retries: Attempts after a failed one.
        hedges: Second attempts begun because the first took long.
        hedges_won: Those that answered first.
        failures: Attempts that failed, by kind: ``transient timeout corrupt changed denied``.
        seconds_waited: Time between attempts, all readers together.
    """

    requests: int
    bytes_downloaded: int
    hits: int
    not_kept: int
    retries: int
    hedges: int
    hedges_won: int
    failures: Mapping[str, int]
    seconds_waited: float


@dataclass(frozen=True, slots=True)
class _Piece:
    """Bytes to ask a store for, and what is known of them."""

    stored: StoredObject
    start: int
    asked_bytes: int | None  # None is to the end of the object, with the store's own checks.
    num_bytes: int | None
    crc32c: int | None

    @property
    def name(self) -> str:
        return _name(self.stored)

    def check(self, content: bytes) -> None:
        if self.num_bytes not in (None, len(content)):
            raise CorruptReadError(
                f"{self.name} came as {len(content):,} bytes instead of "
                f"{self.num_bytes:,}; if this persists, upload it again"
            )
        if self.crc32c not in (None, google_crc32c.value(content)):
            raise CorruptReadError(
                f"{self.name} came with another checksum than it was found "
                "with; if this persists, upload it again"
            )


class Fetcher:
    """Reads objects of any store, from any number of threads."""

    def __init__(
        self,
        stores: Stores,
        cache_folder: Path,  # not touched before the first read
        config: FetchConfig,
        *,
        rng: random.Random | None = None,  # draws the jitter of waits
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] | None = None,  # by itself, until close() at most
    ) -> None:
        self.stores = stores
        self._cache_folder = cache_folder
        self._cache: MediaCache | None = None
        self._opening = threading.Lock()
        self._config = config
        self._rng = rng or random.Random()
        self._clock = clock
        self._racer = Racer(config, clock)
        self._sleep = sleep or self._racer.wait_for_close
        self._state = threading.Lock()  # Guards what follows.
        self._counts: Counter[str] = Counter()
        self._seconds_waited = 0.0

    def fetch_media(self, example: Example, *, root: Path) -> Example:
        """Replace each stored object of an example, or part of a file below root, by its bytes."""

        def read(part: Image | Audio) -> Image | Audio:
            stored = part.source
            if not isinstance(stored, StoredObject):
                return part
            if "://" in stored.uri:
                return replace(part, source=self.fetch(stored))
            return replace(part, source=_read_part(root / stored.uri, stored))

        try:
            return example.replace_media(read)
        except (CorruptReadError, ObjectChangedError, TransientReadError) as error:
            raise DataError(str(error), key=example.key) from error
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise DataError(
                f"a file that holds its media cannot be read ({reason}); put it back",
                key=example.key,
            ) from None  # whose message holds the path

    def fetch(self, stored: StoredObject) -> bytes:
        """Return an object, or the part of one, from the cache or the store; gzip is undone."""
        # Raises TransientReadError where the store answers and this object cannot be read, and a
        # plain SourceError where nothing can be read within total_timeout_seconds.
        cache = self._get_cache()
        content = cache.read(stored)
        if content is not None:
            self._count("hits")
        else:
            is_whole = stored.start is None
            piece = _Piece(
                stored,
                start=stored.start or 0,
                asked_bytes=None if is_whole else stored.num_bytes,
                num_bytes=stored.num_bytes,
                crc32c=stored.crc32c if is_whole else None,
            )
            content = self._read(piece)
            cache.write(stored, content)
        return _unzip(content, stored) if content.startswith(_GZIP_MAGIC) else content

    def read_range(self, stored: StoredObject, start: int, num_bytes: int) -> bytes:
        """Return bytes of an object as they are stored, past the cache; no checksum is known."""
        end = start + num_bytes
        if start < 0 or num_bytes < 0 or (stored.num_bytes is not None and end > stored.num_bytes):
            raise ValueError(f"bytes {start} to {end} of an object of {stored.num_bytes}")
        if num_bytes == 0:
            return b""
        first = (stored.start or 0) + start
        return self._read(_Piece(stored, first, num_bytes, num_bytes, crc32c=None))

    def open(self, stored: StoredObject) -> BinaryIO:
        """Open an object as a file: seekable, and read some MiB ahead."""
        if stored.num_bytes is None:
            raise SourceError(
                f"{_name(stored)} cannot be opened: its size is not known; find it by "
                "listing its folder"
            )
        return io.BufferedReader(_RangeReader(self, stored, stored.num_bytes), _READ_AHEAD_BYTES)

    @property
    def counts(self) -> FetchCounts:
        """What was done so far."""
        cache = self._cache
        with self._state:
            return FetchCounts(
                requests=self._counts["requests"],
                bytes_downloaded=self._counts["bytes_downloaded"],
                hits=self._counts["hits"],
                not_kept=cache.counts.not_stored if cache else 0,
                retries=self._counts["retries"],
                hedges=self._racer.hedges,
                hedges_won=self._racer.hedges_won,
                failures=self._racer.failures,
                seconds_waited=self._seconds_waited,
            )

    def close(self) -> None:
        """End all reads under way with a RuntimeError; attempts end when their sockets do."""
        self._racer.close()

    def _count(self, name: str, number: int = 1) -> None:
        with self._state:
            self._counts[name] += number

    def _get_cache(self) -> MediaCache:
        with self._opening:
            if self._cache is None:
                self._cache = MediaCache(
                    self._cache_folder,
                    max_bytes=self._config.cache_bytes,
                    min_free_bytes=self._config.min_free_disk_bytes,
                )
            return self._cache

    def _read(self, piece: _Piece) -> bytes:
        """Attempt until it succeeds or there is nothing more to try."""
        store = self.stores.find(piece.stored.uri)
        began = self._clock()
        deadline = began + self._config.total_timeout_seconds
        num_transient = num_corrupt = 0
        attempt = partial(self._attempt, store, piece)
        self._racer.grant_hedges()
        while True:
            try:
                return self._racer.race(attempt, what=piece.name, deadline=deadline)
            except CorruptReadError:
                num_corrupt += 1
                if num_corrupt > 1:
                    raise
            except TransientReadError as error:
                num_transient += 1
                seconds = self._draw_backoff(num_transient, error.retry_after_seconds)
                if self._clock() + seconds >= deadline:
                    seconds = self._clock() - began
                    raise _give_up(store, piece, seconds, num_transient, error) from error
                with self._state:
                    self._seconds_waited += seconds
                self._sleep(seconds)
            self._count("retries")

    def _attempt(self, store: ObjectStore, piece: _Piece, timeout_seconds: float) -> bytes:
        self._count("requests")
        began = self._clock()
        content = store.read_object(
            piece.stored, piece.start, piece.asked_bytes, timeout_seconds=timeout_seconds
        )
        self._count("bytes_downloaded", len(content))
        piece.check(content)
        self._racer.note_seconds(self._clock() - began)
        return content

    def _draw_backoff(self, num_failures: int, retry_after_seconds: float | None) -> float:
        """Return how long to wait: at random up to a doubling bound, or what the store asks."""
        most = min(_LONGEST_BACKOFF_SECONDS, _FIRST_BACKOFF_SECONDS * 2.0 ** (num_failures - 1))
        return max(self._rng.uniform(0.0, most), retry_after_seconds or 0.0)


def _give_up(
    store: ObjectStore, piece: _Piece, seconds: float, num_failures: int, error: TransientReadError
) -> SourceError:
    """Tell an object that alone cannot be read from a store that cannot be asked anything."""
    if _can_be_asked(store, piece.stored.uri):
        return TransientReadError(
            f"{piece.name} could not be read: {num_failures} attempts failed in {seconds:.0f} s, "
            f"the last one with: {error}; its store answers: look at this object",
            retry_after_seconds=error.retry_after_seconds,
        )
    return SourceError(
        f"nothing could be read for {seconds:.0f} s: {num_failures} attempts at {piece.name} "
        f"failed, the last one with: {error}; check the network and go on later, or raise "
        "total_timeout_seconds"
    )


def _can_be_asked(store: ObjectStore, uri: str) -> bool:
    try:
        (answer,) = store.pin_objects([uri])
    except SourceError:
        return False
    return isinstance(answer, StoredObject | ObjectChangedError)


class _RangeReader(io.RawIOBase):
    """An object as an unbuffered file over range reads."""

    def __init__(self, fetcher: Fetcher, stored: StoredObject, num_bytes: int) -> None:
        self._fetcher = fetcher
        self._stored = stored
        self._num_bytes = num_bytes
        self._position = self._num_checked = self._checksum = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        beginnings = {
            io.SEEK_SET: 0,
            io.SEEK_CUR: self._position,
            io.SEEK_END: self._num_bytes,
        }
        position = beginnings[whence] + offset
        if position < 0:
            raise ValueError(f"place {position} of a file of {self._num_bytes} bytes")
        self._position = position
        return position

    def readinto(self, buffer: WriteableBuffer) -> int:
        """Read into a buffer, no more at once than one attempt should carry."""
        view = memoryview(buffer).cast("B")
        num_bytes = min(len(view), _READ_AHEAD_BYTES, self._num_bytes - self._position)
        if num_bytes <= 0:
            return 0
        content = self._fetcher.read_range(self._stored, self._position, num_bytes)
        if self._position == self._num_checked:  # what is read from its first byte to its last
            self._checksum = google_crc32c.extend(self._checksum, content)
            self._num_checked += num_bytes
            expected = None if self._stored.start is not None else self._stored.crc32c
            if self._num_checked == self._num_bytes and expected not in (None, self._checksum):
                raise CorruptReadError(
                    f"{_name(self._stored)} came with another checksum than it was found with; "
                    "start again, and if this persists, upload it again"
                )
        view[:num_bytes] = content
        self._position += num_bytes
        return num_bytes

    def readall(self) -> bytes:
        """Read to the end; what is inherited would ask for 8 KiB at a time."""
        return b"".join(iter(partial(self.read, _READ_AHEAD_BYTES), b""))


def _read_part(path: Path, stored: StoredObject) -> bytes:
    """Read a part of a local file, such as a member of a tar."""
    with path.open("rb") as file:
        file.seek(stored.start or 0)
        content = file.read(stored.num_bytes)
    if len(content) != (stored.num_bytes or len(content)):
        raise ObjectChangedError(f"the file {path.name!r} is shorter than it was; put it back")
    if stored.crc32c not in (None, google_crc32c.value(content)):
        raise ObjectChangedError(
            f"a part of the file {path.name!r} is not what it was when its rows were read; put "
            "the file back, or open the stream again"
        )
    return content


def _name(stored: StoredObject) -> str:
    """Name an object in a message: the last part of its path, without what may be a signature."""
    name = stored.uri.partition("?")[0].rstrip("/").rpartition("/")[2]
    return f"object {name!r}"


def _unzip(content: bytes, stored: StoredObject) -> bytes:
    """Unzip what was stored zipped, as a bucket does for ``Content-Encoding: gzip``."""
    try:
        with gzip.open(io.BytesIO(content)) as file:
            unzipped = file.read(_MAX_UNZIPPED_BYTES + 1)
    except (EOFError, OSError, zlib.error) as error:
        raise CorruptReadError(
            f"{_name(stored)} is stored zipped, and its gzip is damaged "
            f"({type(error).__name__}); upload it again"
        ) from None
    if len(unzipped) > _MAX_UNZIPPED_BYTES:
        raise CorruptReadError(
            f"{_name(stored)} of {len(content):,} bytes unzips to more than "
            f"{_MAX_UNZIPPED_BYTES:,}; media are never that large: drop it"
        )
    return unzipped
