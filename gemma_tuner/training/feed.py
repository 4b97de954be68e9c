"""Examples to optimizer steps, collated one step ahead of the device in a thread.

A step is a fixed number of the stream's slots, over all processes; a slot whose example cannot be
used is empty. So every process knows where every step begins, whatever the others meet. Each step
travels with the stream state that resumes after it, so reading ahead never moves the point at
which a stopped run continues.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, Protocol, Self, TypeVar

from gemma_tuner.batch import Batch
from gemma_tuner.errors import DataError
from gemma_tuner.records import Example
from gemma_tuner.streaming.quarantine import BadExample

T = TypeVar("T")
Collate = Callable[[Sequence[Example]], Batch]


class Stream(Protocol):
    """What the trainer needs of a stream of examples; ``ExampleStream`` is one."""

    def __len__(self) -> int:
        """Slots of an epoch."""
        ...

    def __getitem__(self, index: int) -> Example:
        """One row of the data."""
        ...

    def read_slots(self) -> Iterator[Example | None]:
        """Begin an epoch and hand it out slot by slot, None where an example was passed over."""
        ...

    def read_rows(self, indices: Iterable[int]) -> Iterator[Example | None]:
        """Read rows of the data, None for one that was passed over; moves nothing."""
        ...

    def pass_over(self, error: DataError) -> None:
        """Note that an example that was handed out cannot be used, or raise the error."""
        ...

    @property
    def num_passed_over(self) -> int:
        """Examples passed over so far."""
        ...

    def inspect_quarantine(self) -> Sequence[BadExample]:
        """What could not be used, of this run and those before it."""
        ...

    def shard(self, index: int, count: int) -> Self:
        """Every ``count``-th slot, from slot ``index`` on."""
        ...

    def follow(self, shard: Self, num_slots: int) -> None:
        """Go on as if this stream had handed out the slots that its shards did."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What resumes the stream after the slots handed out so far."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the state was taken."""
        ...


@dataclass(frozen=True, slots=True)
class StepInput:
    """What one optimizer step consumes.

    Args:
        micro_batches: In order; this process's share.
        examples: What they were made of, to make them anew at another size.
        num_slots: Slots of the step over all processes.
        num_passed_over: Those of this process's share whose examples could not be used.
        stream_state: What resumes the stream after this step.
    """

    micro_batches: tuple[Batch, ...]
    examples: tuple[Example, ...]
    num_slots: int
    num_passed_over: int
    stream_state: dict[str, Any]


def read_steps(
    stream: Stream,
    collate: Callable[[Stream, Sequence[Example]], Batch | None],
    *,
    batch_size: int,
    num_micro_batches: int,
    num_slots: int,
    process_index: int = 0,
    num_processes: int = 1,
) -> Iterator[StepInput]:
    """Group a stream's slots into optimizer steps, epoch after epoch."""
    # Every process reads its own shard, and so only its own media.
    is_shared = num_processes > 1
    shard = stream.shard(process_index, num_processes) if is_shared else stream
    slots = _repeat(shard)
    step_slots = batch_size * num_micro_batches * num_processes
    for first in range(0, num_slots, step_slots):
        size = min(step_slots, num_slots - first)
        # Steps begin at multiples of the number of processes; what is left over comes last.
        num_own = len(range(process_index, size, num_processes))
        passed_over = shard.num_passed_over
        examples = [example for example in islice(slots, num_own) if example is not None]
        batches = [
            collate(shard, examples[start : start + batch_size])
            for start in range(0, len(examples), batch_size)
        ]
        if is_shared:
            stream.follow(shard, size)
        yield StepInput(
            micro_batches=tuple(batch for batch in batches if batch is not None),
            examples=tuple(examples),
            num_slots=size,
            num_passed_over=shard.num_passed_over - passed_over,
            stream_state=stream.state_dict(),
        )


def collate_good(collate: Collate, stream: Stream, examples: Sequence[Example]) -> Batch | None:
    """Collate examples, passing over those that the collator refuses."""
    while examples:
        try:
            return collate(examples)
        except DataError as error:
            good = [example for example in examples if example.key != error.key]
            if len(good) == len(examples):
                raise
            stream.pass_over(error)
            examples = good
    return None


def _repeat(stream: Stream) -> Iterator[Example | None]:
    while True:
        yield from stream.read_slots()


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

    def __exit__(self, *error: object) -> None:
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
