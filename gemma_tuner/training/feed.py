"""Examples to optimizer steps, collated ahead of the device in a thread.

A step is a fixed number of the stream's slots, over all processes; a slot whose example cannot be
used is empty. So every process knows where every step begins, whatever the others meet. Each step
travels with the stream state that resumes after it, so reading ahead never moves the point at
which a stopped run continues.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import chain, count, islice
from typing import TYPE_CHECKING, Any, Generic, Protocol, Self, TypeVar, cast

from gemma_tuner.batch import Batch
from gemma_tuner.errors import ConfigError, DataError
from gemma_tuner.models.embeddings import find_mapped_embedding
from gemma_tuner.models.families import loaded_modalities
from gemma_tuner.models.lora import unwrap_peft
from gemma_tuner.records import Example
from gemma_tuner.streaming.quarantine import BadExample
from gemma_tuner.threads import DaemonPool
from gemma_tuner.training.checks import check_media

if TYPE_CHECKING:
    from peft import PeftModel

T = TypeVar("T")
_END = object()


class Stream(Protocol):
    """What a trainer and ``evaluate`` need of examples; ``ExampleStream`` has it.

    A class of one's own that inherits from this one writes five methods: ``__len__``,
    ``__getitem__``, ``read_slots``, ``state_dict`` and ``load_state_dict``. It then trains in one
    process, and an example that cannot be used ends the run.
    """

    @abstractmethod
    def __len__(self) -> int:
        """Slots of an epoch, and rows of the data."""
        ...

    @abstractmethod
    def __getitem__(self, index: int) -> Example:
        """One row of the data, its media decoded; moves nothing."""
        ...

    @abstractmethod
    def read_slots(self) -> Iterator[Example | None]:
        """Hand out the rest of the epoch where a state was loaded, and else the next one.

        Yields:
            What is in each slot; None where an example was passed over.
        """
        ...

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What resumes the stream after the slots handed out so far, as JSON."""
        ...

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the state was taken."""
        ...

    def read_rows(self, indices: Iterable[int]) -> Iterator[Example | None]:
        """Read rows of the data, None for one that was passed over; moves nothing."""
        return map(self.__getitem__, indices)

    def pass_over(self, error: DataError) -> None:
        """Note that an example that was handed out cannot be used, or raise the error."""
        raise error

    @property
    def num_passed_over(self) -> int:
        """Examples passed over so far."""
        return 0

    def inspect_quarantine(self) -> Sequence[BadExample]:
        """What could not be used, of this run and those before it."""
        return ()

    def shard(self, index: int, count: int) -> Self:
        """Every ``count``-th slot, from slot ``index`` on."""
        raise ConfigError(
            f"{type(self).__name__} has no shard() and follow(), by which {count} processes share "
            "a stream; write them, or train in one process"
        )

    def follow(self, shard: Self, num_slots: int) -> None:
        """Go on as if this stream had handed out the slots that its shards did."""
        self.shard(0, num_slots)  # which refuses


STREAM_MEMBERS = tuple(
    name for name in vars(Stream) if not name.startswith("_") or name in ("__len__", "__getitem__")
)


def check_stream(argument: str, given: object, needed: Sequence[str] = STREAM_MEMBERS) -> None:
    """Refuse what is no stream, naming all that it lacks, or is an empty one."""
    if isinstance(given, Sized) and len(given) == 0:
        raise ConfigError(f"{argument} has no examples; check what it reads")
    missing = [name for name in needed if not hasattr(given, name)]
    if missing:
        raise ConfigError(
            f"{argument} is a {type(given).__name__}, which has no {', '.join(missing)}; "
            "stream_local(paths) reads files, stream_rows(rows) takes what is in memory, and a "
            "class of your own that inherits from gemma_tuner.Stream is told what it lacks"
        )


@dataclass(frozen=True, slots=True)
class StepInput:
    """What one optimizer step consumes.

    Args:
        micro_batches: In order; this process's share.
        examples: What they were made of, to make others of another size.
        num_slots: Slots of the step over all processes.
        num_passed_over: Those of this process's share whose examples could not be used.
        stream_state: What resumes the stream after this step.
    """

    micro_batches: tuple[Batch, ...]
    examples: tuple[Example, ...]
    num_slots: int
    num_passed_over: int
    stream_state: dict[str, Any]


class ModelCollator:
    """Collates examples for one model, without those that cannot be used."""

    def __init__(self, collate: Callable[[Sequence[Example]], Batch], model: PeftModel) -> None:
        self._collate = collate
        self._modalities = loaded_modalities(unwrap_peft(model))
        self._mapped_embedding = find_mapped_embedding(model)

    def __call__(self, stream: Stream, examples: Sequence[Example]) -> Batch | None:
        """Collate what can be, and have its rows of a table on disk read ahead."""
        while examples:
            try:
                batch = self._collate(examples)
            except DataError as error:
                good = [example for example in examples if example.key != error.key]
                if len(good) == len(examples):
                    raise
                stream.pass_over(error)
                examples = good
                continue
            check_media(batch, self._modalities)
            if self._mapped_embedding is not None:
                self._mapped_embedding.warm(batch.inputs["input_ids"])
            return batch
        return None


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
    slots = chain.from_iterable(shard.read_slots() for _ in count())
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


class Prefetch(Generic[T]):
    """Iterate over something in a thread, ``depth`` values ahead.

    An error is raised where its value would have come, after every value before it. Use as a
    context manager: entering it begins to read, and leaving it waits for what is being read.

    Args:
        note_wait: Takes the seconds that the reader has waited, after each wait.
    """

    def __init__(
        self, values: Iterable[T], note_wait: Callable[[float], None], depth: int = 2
    ) -> None:
        self._values = iter(values)
        self._note_wait = note_wait
        self._depth = depth
        self._pool = DaemonPool("gemma-tuner-feed", num_threads=1)
        self._ahead: deque[Future[object]] = deque()

    def __enter__(self) -> Self:
        self._ahead.extend(self._pool.submit(next, self._values, _END) for _ in range(self._depth))
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.close()
        for future in self._ahead:
            if not future.cancelled():
                future.exception()  # waits

    def __iter__(self) -> Iterator[T]:
        while True:
            started = time.perf_counter()
            value = self._ahead.popleft().result()
            self._note_wait(time.perf_counter() - started)
            if value is _END:
                return
            self._ahead.append(self._pool.submit(next, self._values, _END))
            yield cast(T, value)
