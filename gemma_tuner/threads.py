"""Threads that never hold the interpreter: a pool whose threads are daemons.

The standard pool joins its threads when Python exits, so that one read on a stalled socket would
keep Ctrl-C waiting until the socket gives up.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

_IDLE_SECONDS = 10.0  # A pool that was dropped without close() keeps no threads for longer.

Result = TypeVar("Result")


class DaemonPool:
    """Runs functions on daemon threads, which are made when needed and end when long idle."""

    def __init__(self, name: str, num_threads: int) -> None:
        self._name = name
        self._max_threads = num_threads
        self._changed = threading.Condition()
        self._tasks: deque[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]] = deque()
        self._num_threads = 0
        self._num_idle = 0
        self._closed = False

    def submit(self, function: Callable[..., Result], *arguments: object) -> Future[Result]:
        """Begin ``function(*arguments)`` as soon as a thread is free."""
        future: Future[Result] = Future()
        with self._changed:
            if self._closed:
                raise RuntimeError(f"the pool {self._name!r} is closed")
            if len(self._tasks) >= self._num_idle and self._num_threads < self._max_threads:
                threading.Thread(target=self._work, name=self._name, daemon=True).start()
                self._num_threads += 1
            self._tasks.append((future, function, arguments))
            self._changed.notify()
        return future

    def close(self) -> None:
        """Cancel what has not begun; what runs goes on, and nobody waits for it."""
        with self._changed:
            self._closed = True
            cancelled = [future for future, _, _ in self._tasks]
            self._tasks.clear()
            self._changed.notify_all()
        for future in cancelled:  # Outside the lock: this runs the futures' callbacks.
            future.cancel()

    def _work(self) -> None:
        while self._run_next():
            pass

    def _run_next(self) -> bool:
        """Run one task, and keep no reference to it: results are large."""
        with self._changed:
            self._num_idle += 1
            self._changed.wait_for(lambda: self._tasks or self._closed, timeout=_IDLE_SECONDS)
            self._num_idle -= 1
            if not self._tasks:
                self._num_threads -= 1
                return False
            future, function, arguments = self._tasks.popleft()
        if future.set_running_or_notify_cancel():
            try:
                result = function(*arguments)
            except BaseException as error:  # noqa: BLE001 - the future carries it
                future.set_exception(error)
            else:
                future.set_result(result)
        return True
