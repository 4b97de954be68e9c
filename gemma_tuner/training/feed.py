"""Examples to optimizer steps, collated one step ahead of the device in a thread.

Each step travels with the stream state that resumes after it, so reading ahead never moves the
point at which a stopped run continues.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar

from gemma_tuner.collators.batch import Batch
from gemma_tuner.records import Example

T = TypeVar("T")
Collate = Callable[[Sequence[Example]], Batch]


class Stream(Protocol):
    """What the trainer needs of a stream of examples; ``ExampleStream`` is one."""

    def __iter__(self) -> Iterator[Example]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Example: ...
    def state_dict(self) -> dict[str, Any]:
        """What resumes the stream after the examples handed out so far."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the state was taken."""
        ...


@dataclass(frozen=True, slots=True)
class StepInput:
    """What one optimizer step consumes.

    Args:
        micro_batches: In order; this process's share.
        num_examples: Examples of the step over all processes.
        stream_state: What resumes the stream after this step.
    """

    micro_batches: tuple[Batch, ...]
    num_examples: int
    stream_state: dict[str, Any]


def read_steps(
    stream: Stream,
    collate: Collate,
    *,
    batch_size: int,
    num_micro_batches: int,
    num_examples: int | None = None,
    process_index: int = 0,
    num_processes: int = 1,
) -> Iterator[StepInput]:
    """Group a stream's examples into optimizer steps, epoch after epoch.

    Every process reads the whole stream and collates its own share, so that the stream's state
    is the same number everywhere and any number of processes can resume it.

    Args:
        stream: Where examples come from; iterated again at the end of each epoch.
        collate: The collator.
        batch_size: Examples in a micro-batch.
        num_micro_batches: Micro-batches of a step in each process.
        num_examples: Examples to read in all; None reads without end.
        process_index: This process.
        num_processes: How many there are.

    Yields:
        Steps of ``batch_size * num_micro_batches * num_processes`` examples; the last may be
        smaller when ``num_examples`` says so.
    """
    step_size = batch_size * num_micro_batches * num_processes
    examples = islice(_repeat(stream), num_examples)
    while group := list(islice(examples, step_size)):
        share = group[process_index::num_processes]
        yield StepInput(
            micro_batches=tuple(
                collate(share[start : start + batch_size])
                for start in range(0, len(share), batch_size)
            ),
            num_examples=len(group),
            stream_state=stream.state_dict(),
        )


def _repeat(stream: Stream) -> Iterator[Example]:
    while True:
        yield from stream


class Prefetch(Generic[T]):
    """Iterate over something in a thread, ``depth`` values ahead.

    An error is raised where its value would have come, after every value before it. Use as a
    context manager: leaving it stops the thread.

    Args:
        values: What to iterate over.
        depth: How many values may wait.
    """

    def __init__(self, values: Iterable[T], depth: int = 1) -> None:
        self._values = values
        self._queue: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gemma-tuner-feed", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stopped.set()
        self._thread.join()

    def __iter__(self) -> Iterator[T]:
        while True:
            value, error = self._queue.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield value  # pyright: ignore[reportReturnType]

    def _run(self) -> None:
        try:
            for value in self._values:
                if not self._put((value, None)):
                    return
        except BaseException as error:  # noqa: BLE001 - raised again in the reading thread
            self._put((None, error))
        else:
            self._put((None, StopIteration()))

    def _put(self, item: tuple[T | None, BaseException | None]) -> bool:
        """Wait for room; False once the reader has gone."""
        while not self._stopped.is_set():
            try:
                self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False
