"""Attempts that are given up in time, and a second one beside a first that takes long.

The reader waits in its own thread while attempts run in others: no server can hold a reader for
longer than a timeout, however slowly it trickles. An abandoned attempt ends with its socket.
"""

from __future__ import annotations

import math
import statistics
import threading
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any

from gemma_tuner.errors import SourceError
from gemma_tuner.storage.config import FetchConfig
from gemma_tuner.storage.objects import (
    AccessDeniedError,
    CorruptReadError,
    ObjectChangedError,
    TransientReadError,
)
from gemma_tuner.threads import DaemonPool

# Twice io_threads are under way at most, for each may be hedged; the others are for attempts that
# were abandoned and have not ended.
_THREADS_PER_READER = 8
_MEDIANS = 3.0
_SHORTEST_SECONDS = 0.05
_SMALLEST_SAMPLE = 20
_LARGEST_SAMPLE = 200

_KINDS: dict[type[SourceError], str] = {
    TransientReadError: "transient",
    CorruptReadError: "corrupt",
    ObjectChangedError: "changed",
    AccessDeniedError: "denied",
}

Attempt = Callable[[float], bytes]
"""Reads something, given how many seconds each wait for its server may take."""


class Racer:
    """Runs attempts at reads, for any number of threads."""

    def __init__(self, config: FetchConfig, clock: Callable[[], float]) -> None:
        self._config = config
        self._clock = clock
        self._pool = DaemonPool("gemma-tuner-fetch", _THREADS_PER_READER * config.io_threads)
        self._closing: Future[Any] = Future()
        self._state = threading.Lock()  # Guards what follows.
        self._counts: Counter[str] = Counter()
        self._failures: Counter[str] = Counter()
        self._attempt_seconds: deque[float] = deque(maxlen=_LARGEST_SAMPLE)
        self._tokens = 0.0

    def grant_hedges(self) -> None:
        """Count a read, which allows ``hedged_fraction`` of a hedge."""
        # What is saved up is bounded: a store that turns slow is not asked twice for everything.
        with self._state:
            most = float(self._config.io_threads)
            self._tokens = min(most, self._tokens + self._config.hedged_fraction)

    def note_seconds(self, seconds: float) -> None:
        """Learn how long an attempt that succeeded took."""
        with self._state:
            self._attempt_seconds.append(seconds)

    def race(self, attempt: Attempt, *, what: str, deadline: float) -> bytes:
        """Make one attempt, and a second beside it when it takes long; the first answer counts."""
        # Raises RuntimeError once close() was called.
        # A transient failure is no answer as long as the other attempt is under way.
        under_way: dict[Future[Any], float] = {}  # and when each is given up

        def begin() -> Future[bytes]:
            now = self._clock()
            # A sleep before this may have ended a little after the deadline.
            seconds = max(0.001, min(self._config.attempt_timeout_seconds, deadline - now))
            future = self._pool.submit(attempt, seconds)
            under_way[future] = now + seconds
            return future

        first = begin()
        hedge_at = self._clock() + self._choose_hedge_seconds()
        failure: TransientReadError | None = None
        try:
            while True:
                seconds = min(hedge_at, *under_way.values()) - self._clock()
                done, _ = wait([*under_way, self._closing], max(0.0, seconds), FIRST_COMPLETED)
                if self._closing in done:
                    raise RuntimeError("the fetcher is closed")
                for future in done:
                    del under_way[future]
                    self._count_failure(future)
                    try:
                        content = future.result()
                    except TransientReadError as error:
                        failure = error
                    else:
                        self._count("hedges_won", int(future is not first))
                        return content
                now = self._clock()
                for future in [one for one, until in under_way.items() if until <= now]:
                    del under_way[future]
                    failure = self._give_up(future, what)
                if failure is not None and not under_way:
                    raise failure
                if now >= hedge_at:
                    hedge_at = math.inf
                    if self._take_token():
                        begin()
        finally:
            for future in under_way:
                future.cancel()
                future.add_done_callback(self._count_failure)

    @property
    def hedges(self) -> int:
        """Second attempts begun."""
        return self._counts["hedges"]

    @property
    def hedges_won(self) -> int:
        """Second attempts that answered first."""
        return self._counts["hedges_won"]

    @property
    def failures(self) -> dict[str, int]:
        """Attempts that failed, by kind; one given up is a ``timeout``, however it ends."""
        with self._state:
            return dict(self._failures)

    def close(self) -> None:
        """End all races with a RuntimeError; attempts end when their sockets do."""
        with self._state:
            if not self._closing.done():
                self._closing.set_result(None)
        self._pool.close()

    def wait_for_close(self, seconds: float) -> None:
        """Sleep, but no longer than until :meth:`close`."""
        wait([self._closing], seconds)

    def _give_up(self, future: Future[Any], what: str) -> TransientReadError:
        future.cancel()  # It may still wait for a thread.
        with self._state:
            self._failures["timeout"] += 1
        return TransientReadError(
            f"{what} did not arrive within {self._config.attempt_timeout_seconds:g} s; on a slow "
            "connection raise attempt_timeout_seconds"
        )

    def _count(self, name: str, number: int = 1) -> None:
        with self._state:
            self._counts[name] += number

    def _count_failure(self, future: Future[Any]) -> None:
        error = None if future.cancelled() else future.exception()
        if isinstance(error, SourceError):
            with self._state:
                self._failures[_KINDS.get(type(error), type(error).__name__)] += 1

    def _choose_hedge_seconds(self) -> float:
        """Return how long an attempt lasts before another is begun."""
        with self._state:
            if len(self._attempt_seconds) < _SMALLEST_SAMPLE:
                return math.inf
            median = statistics.median(self._attempt_seconds)
        return max(_SHORTEST_SECONDS, _MEDIANS * median)

    def _take_token(self) -> bool:
        with self._state:
            if self._tokens < 1:
                return False
            self._tokens -= 1
            self._counts["hedges"] += 1
        return True
