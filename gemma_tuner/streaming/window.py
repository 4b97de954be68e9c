"""Examples ahead of the consumer: fetched and decoded by threads, handed out in order.

Texts, and media that wait to be decoded, take at most half of the window's bytes, decoded media
the other half; the example that is handed out next always goes on, so that one larger than the
window passes, alone. Only where an example is decoded depends on timing, never which comes next.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from enum import Enum, auto
from functools import partial
from typing import Self

import numpy as np

from gemma_tuner.errors import DataError
from gemma_tuner.records import Example, Image, PinnedFile, StoredObject, Text
from gemma_tuner.storage.config import FetchConfig
from gemma_tuner.streaming.quarantine import Stage
from gemma_tuner.streaming.view import Slot
from gemma_tuner.threads import DaemonPool


@dataclass(frozen=True, slots=True)
class Failure:
    """Why the example of a slot could not be fetched or decoded."""

    stage: Stage
    error: DataError


class _Step(Enum):
    FETCHING = auto()
    FETCHED = auto()
    DECODING = auto()
    DONE = auto()


@dataclass(slots=True, eq=False)
class _Entry:
    slot: Slot
    example: Example
    num_bytes: int
    has_media: bool
    step: _Step = _Step.FETCHING
    outcome: Example | Failure | BaseException | None = None


class Window:
    """Iterate over slots and their examples in order while threads load the next ones."""

    def __init__(self, slots: Iterator[Slot], config: FetchConfig) -> None:
        self._slots = slots  # asked only as far as the window reaches
        self._config = config
        self._half_bytes = config.window_bytes // 2
        self._entries: deque[_Entry] = deque()
        self._next: _Entry | None = None  # read, and too large to be admitted yet
        self._changed = threading.Condition()
        self._encoded_bytes = 0
        self._decoded_bytes = 0  # of decodings under way, what the largest so far took
        self._largest_decoded_bytes = 0
        self._num_fetched = 0  # and not being decoded yet
        self._num_decoding = 0
        self._is_closed = False
        self._io = DaemonPool("gemma-tuner-io", config.io_threads)
        self._decoders = DaemonPool("gemma-tuner-decode", config.decode_threads)
        self.wait_seconds = 0.0  # that the consumer spent waiting
        self.peak_bytes = 0  # the most that the window has held

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> tuple[Slot, Example | Failure]:
        with self._changed:
            self._admit()
            if not self._entries:
                self.close()
                raise StopIteration
            head = self._entries[0]
            self._begin_decoding()
            started = time.perf_counter()
            while head.step is not _Step.DONE:
                self._changed.wait()
            self.wait_seconds += time.perf_counter() - started
            self._entries.popleft()
            if head.has_media:
                self._decoded_bytes -= head.num_bytes
            else:
                self._encoded_bytes -= head.num_bytes
            self._begin_decoding()
        if isinstance(head.outcome, Example | Failure):
            return head.slot, head.outcome
        self.close()
        if head.outcome is None:
            raise RuntimeError("an example was handed out before it was loaded")
        raise head.outcome

    def close(self) -> None:
        """Stop what is under way; nothing waits for threads that are still reading."""
        with self._changed:
            self._is_closed = True
        self._io.close()
        self._decoders.close()

    def _admit(self) -> None:
        """Take in examples as far as the window reaches, and begin to fetch them."""
        while len(self._entries) < self._config.window_examples:
            entry = self._next
            if entry is None:
                slot = next(self._slots, None)
                if slot is None:
                    return
                example = slot.view.manifest.read_example(slot.row)
                has_media = any(True for _ in example.media)
                entry = self._next = _Entry(slot, example, _measure_bytes(example), has_media)
            if self._entries and self._encoded_bytes + entry.num_bytes > self._half_bytes:
                return
            self._next = None
            self._entries.append(entry)
            self._encoded_bytes += entry.num_bytes
            self._note_peak()
            if any(isinstance(part.source, StoredObject) for part in entry.example.media):
                future = self._io.submit(entry.slot.view.fetch, entry.example)
                future.add_done_callback(partial(self._finish_fetching, entry))
            elif entry.has_media:
                entry.step = _Step.FETCHED
                self._num_fetched += 1
            else:  # It stays with what waits: nothing else bounds how many texts are read ahead.
                entry.outcome = entry.example
                entry.step = _Step.DONE

    def _begin_decoding(self) -> None:
        """Decode, in order, what fits; what comes next always fits."""
        if self._is_closed:  # and what was being decoded has ended since
            return
        for entry in self._entries:
            if not self._num_fetched:
                return  # Most often: looking at all entries for each one costs as much as reading.
            is_head = entry is self._entries[0]
            if entry.step is not _Step.FETCHED:
                continue
            reserved = self._largest_decoded_bytes
            is_full = (
                self._num_decoding >= self._config.decode_threads
                or self._decoded_bytes + reserved > self._half_bytes
            )
            if is_full and not is_head:
                return
            fetched = entry.outcome if isinstance(entry.outcome, Example) else entry.example
            entry.outcome = None
            entry.step = _Step.DECODING
            self._num_fetched -= 1
            self._num_decoding += 1
            self._decoded_bytes += reserved
            future = self._decoders.submit(entry.slot.view.decode, fetched)
            future.add_done_callback(partial(self._finish, entry, "decode", reserved))

    def _finish_fetching(self, entry: _Entry, future: Future[Example]) -> None:
        with self._changed:
            if future.cancelled():
                return
            if future.exception() is not None:
                self._finish(entry, "fetch", 0, future)
                return
            entry.outcome = future.result()
            entry.step = _Step.FETCHED
            self._num_fetched += 1
            self._begin_decoding()

    def _finish(self, entry: _Entry, stage: Stage, reserved: int, future: Future[Example]) -> None:
        """Take in what decoding made of an entry, or why fetching failed."""
        with self._changed:
            if future.cancelled():
                return
            self._num_decoding -= stage == "decode"
            self._decoded_bytes -= reserved
            self._encoded_bytes -= entry.num_bytes
            error = future.exception()
            if error is None:
                entry.outcome = future.result()
                entry.num_bytes = _measure_bytes(entry.outcome)
            else:
                entry.outcome = Failure(stage, error) if isinstance(error, DataError) else error
                entry.num_bytes = 0
            self._decoded_bytes += entry.num_bytes
            self._largest_decoded_bytes = max(self._largest_decoded_bytes, entry.num_bytes)
            self._note_peak()
            entry.step = _Step.DONE
            self._changed.notify_all()
            self._begin_decoding()

    def _note_peak(self) -> None:
        self.peak_bytes = max(self.peak_bytes, self._encoded_bytes + self._decoded_bytes)


def _measure_bytes(example: Example) -> int:
    """Return about how much memory an example takes, its stored objects as if they were here."""

    def measure_text(text: str) -> int:
        # Python takes two or four bytes for each character of a text that holds a wide one.
        return len(text) if text.isascii() else sys.getsizeof(text)

    num_bytes = measure_text(example.document or "")
    for turn in example.turns:
        for part in turn.parts:
            if isinstance(part, Text):
                num_bytes += measure_text(part.text)
                continue
            source = part.source
            if isinstance(source, StoredObject):
                num_bytes += source.num_bytes or 0
            elif isinstance(source, np.ndarray):
                num_bytes += source.nbytes
            elif isinstance(source, str | bytes):
                num_bytes += len(source)
            elif isinstance(part, Image) and not isinstance(source, PinnedFile):
                num_bytes += 4 * source.width * source.height  # Pillow keeps RGB in four bytes
    return num_bytes
