"""What ends a run early: SIGINT and SIGTERM ask it to finish its step, save and return."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)

EARLY_STOPPING = "early_stopping"
"""What ``FitResult.stopped_by`` says of a run that ended for want of a better held-out loss."""


class StopRequest:
    """Catch the first SIGINT or SIGTERM while the context is open; the second acts as usual.

    Outside the main thread, where Python cannot install handlers, it catches nothing.

    Attributes:
        reason: The signal's name once one has come, else None.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._previous = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.reason = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
