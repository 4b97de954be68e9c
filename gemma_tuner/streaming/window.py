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
from typing import Protocol, Self

import numpy as np

from gemma_tuner.errors import DataError
from gemma_tuner.records import Example, Image, StoredObject, Text
from gemma_tuner.storage.config import FetchConfig
from gemma_tuner.streaming.quarantine import Stage
from gemma_tuner.threads import DaemonPool


class Loading(Protocol):
    """One example on its way: read from the manifest, its media fetched, then decoded."""

    def read(self) -> Example:
        """Read it from the manifest."""
        ...

    def fetch(self, example: Example) -> Example:
        """Replace the stored objects by their bytes."""
        ...

    def decode(self, example: Example) -> Example:
        """Replace encoded media by decoded."""
        ...


@dataclass(frozen=True, slots=True)
class Failure:
    """An example that could not be loaded.

    Args:
        stage: ``fetch`` or ``decode``.
        error: What is wrong with it.
        example: As the manifest has it.
    """

    stage: Stage
    error: DataError
    example: Example


class _Step(Enum):
    FETCHING = auto()
    FETCHED = auto()
    DECODING = auto()
    DONE = auto()


@dataclass(slots=True, eq=False)
class _Entry:
    loading: Loading
    example: Example
    num_bytes: int
    has_media: bool
    step: _Step = _Step.FETCHING
    outcome: Example | Failure | BaseException | None = None


class Window:
    """Iterate over examples in order while threads load the next ones.

    Args:
        loadings: The examples to load, in order; asked only as far as the window reaches.
        config: How many bytes, examples and threads.

    Attributes:
        wait_seconds: Time that the consumer spent waiting.
        peak_bytes: The most that the window has held.
    """

    def __init__(self, loadings: Iterator[Loading], config: FetchConfig) -> None:
        self._loadings = loadings
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
        self.wait_seconds = 0.0
        self.peak_bytes = 0

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Example | Failure:
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
            return head.outcome
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
            entry = self._next or self._read_next()
            self._next = entry
            if entry is None:
                return
            if self._entries and self._encoded_bytes + entry.num_bytes > self._half_bytes:
                return
            self._next = None
            self._entries.append(entry)
            self._encoded_bytes += entry.num_bytes
            self._note_peak()
            if any(isinstance(part.source, StoredObject) for part in entry.example.media):
                future = self._io.submit(entry.loading.fetch, entry.example)
                future.add_done_callback(partial(self._finish_fetching, entry))
            elif entry.has_media:
                entry.step = _Step.FETCHED
                self._num_fetched += 1
            else:  # It stays with what waits: nothing else bounds how many texts are read ahead.
                entry.outcome = entry.example
                entry.step = _Step.DONE

    def _read_next(self) -> _Entry | None:
        loading = next(self._loadings, None)
        if loading is None:
            return None
        example = loading.read()
        has_media = any(True for _ in example.media)
        return _Entry(loading, example, measure_bytes(example), has_media)

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
            future = self._decoders.submit(entry.loading.decode, fetched)
            future.add_done_callback(partial(self._finish_decoding, entry, reserved))

    def _finish_fetching(self, entry: _Entry, future: Future[Example]) -> None:
        with self._changed:
            if future.cancelled():
                return
            error = future.exception()
            if error is not None:
                self._finish(entry, _explain("fetch", error, entry.example))
            else:
                entry.outcome = future.result()
                entry.step = _Step.FETCHED
                self._num_fetched += 1
                self._begin_decoding()

    def _finish_decoding(self, entry: _Entry, reserved: int, future: Future[Example]) -> None:
        with self._changed:
            if future.cancelled():
                return
            self._num_decoding -= 1
            self._decoded_bytes -= reserved
            error = future.exception()
            if error is not None:
                self._finish(entry, _explain("decode", error, entry.example))
            else:
                self._finish(entry, future.result())
            self._begin_decoding()

    def _finish(self, entry: _Entry, outcome: Example | Failure | BaseException) -> None:
        self._encoded_bytes -= entry.num_bytes
        entry.num_bytes = measure_bytes(outcome) if isinstance(outcome, Example) else 0
        self._decoded_bytes += entry.num_bytes
        self._largest_decoded_bytes = max(self._largest_decoded_bytes, entry.num_bytes)
        self._note_peak()
        entry.outcome = outcome
        entry.step = _Step.DONE
        self._changed.notify_all()

    def _note_peak(self) -> None:
        self.peak_bytes = max(self.peak_bytes, self._encoded_bytes + self._decoded_bytes)


def measure_bytes(example: Example) -> int:
    """Return about how much memory an example takes, its stored objects as if they were here."""
    num_bytes = _measure_text(example.document or "")
    for turn in example.turns:
        for part in turn.parts:
            if isinstance(part, Text):
                num_bytes += _measure_text(part.text)
                continue
            source = part.source
            if isinstance(source, StoredObject):
                num_bytes += source.num_bytes or 0
            elif isinstance(source, np.ndarray):
                num_bytes += source.nbytes
            elif isinstance(source, str | bytes):
                num_bytes += len(source)
            elif isinstance(part, Image):
                num_bytes += 4 * source.width * source.height  # Pillow keeps RGB in four bytes
    return num_bytes


def _measure_text(text: str) -> int:
    """Python takes two or four bytes for each character of a text that holds a wide one."""
    return len(text) if text.isascii() else sys.getsizeof(text)


def _explain(stage: Stage, error: BaseException, example: Example) -> Failure | BaseException:
    return Failure(stage, error, example) if isinstance(error, DataError) else error
