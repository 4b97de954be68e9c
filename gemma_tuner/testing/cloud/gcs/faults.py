"""The faults between a client and ``GcsServer``.

A :class:`Fault` says what happens (one of the effects below), to which requests, and when: at the
nth request of an object, or at random. Random means a fixed function of the server's seed, the
fault's place in the script, the object, the range asked for and how many such requests came
before: in whatever order threads arrive, the same requests fail.
"""

from __future__ import annotations

import fnmatch
import hashlib
import threading
from collections import Counter
from dataclasses import dataclass
from typing import Literal

from gemma_tuner.errors import ConfigError

Operation = Literal["read", "stat", "list", "upload", "delete", "copy", "bucket", "other"]


@dataclass(frozen=True, slots=True)
class Refuse:
    """The request is answered with an HTTP status and a JSON body that gives the reason.

    Args:
        status: 401, 403, 429, 500, 503 or another error.
        retry_after_seconds: Sent as ``Retry-After``; None sends none.
    """

    status: int
    retry_after_seconds: int | None = None


@dataclass(frozen=True, slots=True)
class Stall:
    """Nothing is sent for a while.

    Args:
        seconds: How long.
        after_bytes: How much of the body is sent before; None stalls before the status line.
    """

    seconds: float
    after_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Truncate:
    """The body ends early: fewer bytes than ``Content-Length`` says, then the connection closes.

    Args:
        after_bytes: How much of the body is sent; None sends half.
    """

    after_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class FlipBit:
    """The lowest bit of one byte of the body is inverted, and nothing else tells of it.

    Args:
        at_byte: Which byte of the body; None takes the middle one.
    """

    at_byte: int | None = None


@dataclass(frozen=True, slots=True)
class Reset:
    """The connection is reset.

    Args:
        after_bytes: How much of the body is sent before; None resets before the status line.
    """

    after_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Overwrite:
    """The object is replaced just before it is served, so that its generation changes.

    Args:
        data: What is stored instead.
    """

    data: bytes = b"overwritten"


Effect = Refuse | Stall | Truncate | FlipBit | Reset | Overwrite


@dataclass(frozen=True, slots=True)
class Fault:
    """An effect, and the requests that it strikes.

    Args:
        effect: What happens.
        name: Objects whose name matches this glob (:mod:`fnmatch`: here ``*`` passes ``/`` too);
            for a listing, its prefix is the name.
        nth: Which requests of each such object, counted from 1 when the fault is added; None
            takes every one.
        probability: Of the requests that are left, how many are struck, from 0 to 1.
        operation: The kind of request; ``read`` is a download.

    Raises:
        ConfigError: A probability or a count that cannot be.
    """

    effect: Effect
    name: str = "*"
    nth: int | tuple[int, ...] | None = None
    probability: float = 1.0
    operation: Operation = "read"

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise ConfigError(f"probability is {self.probability}; it may be from 0 to 1")
        if self.nth is not None and min(self.turns, default=0) < 1:
            raise ConfigError(f"nth is {self.nth}; requests are counted from 1")

    @property
    def turns(self) -> tuple[int, ...]:
        """Which requests of an object are struck; empty for every one."""
        if self.nth is None:
            return ()
        return (self.nth,) if isinstance(self.nth, int) else self.nth


class FaultScript:
    """The faults of one server: decides for each request which effect strikes it, if any."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._lock = threading.Lock()
        self._faults: list[Fault] = []
        self._num_requests: Counter[tuple[object, ...]] = Counter()

    def add(self, fault: Fault) -> None:
        """Append a fault; where several strike one request, the one added first does."""
        with self._lock:
            self._faults.append(fault)

    def clear(self) -> None:
        """Forget all faults and counts."""
        with self._lock:
            self._faults.clear()
            self._num_requests.clear()

    def choose(
        self, operation: Operation, bucket: str, name: str, byte_range: str | None
    ) -> Effect | None:
        """Count a request, and return the effect that strikes it."""
        chosen = None
        with self._lock:
            for index, fault in enumerate(self._faults):
                if fault.operation != operation or not fnmatch.fnmatchcase(name, fault.name):
                    continue
                # Every fault counts, struck or not: else the first would shift the others. Draws
                # count by range, because ranges of one object are asked for at the same time.
                turn = self._count(index, bucket, name)
                draw = self._count(index, bucket, name, byte_range)
                if chosen is None and (not fault.turns or turn in fault.turns):
                    place = (self._seed, index, operation, bucket, name, byte_range, draw)
                    if _draw(place) < fault.probability:
                        chosen = fault.effect
        return chosen

    def _count(self, *what: object) -> int:
        self._num_requests[what] += 1
        return self._num_requests[what]


def _draw(place: tuple[object, ...]) -> float:
    """A number from 0 to 1 (never 1) that depends on the place alone."""
    digest = hashlib.blake2b(repr(place).encode(), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64
