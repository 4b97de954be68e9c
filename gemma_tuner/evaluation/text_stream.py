"""An answer as it is written, token by token, by a model in a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from gemma_tuner.evaluation.answers import Generation

if TYPE_CHECKING:
    from gemma_tuner.evaluation.generator import Generator
    from gemma_tuner.evaluation.prompts import PromptRow


class TextStream:
    """An answer as it is written: an iterator of pieces of text, which joined are the answer.

    The model writes in a thread, which ends with the iterator: when the answer is complete, when
    :meth:`close` is called, when a ``with`` block is left, or when nobody holds it any more.

    Args:
        generator: What writes.
        prompt: What it answers.

    Attributes:
        result: The whole answer, once it is complete; None before, and where it was closed.
    """

    def __init__(self, generator: Generator, prompt: PromptRow) -> None:
        self.result: Generation | None = None
        self._pieces = self._read(generator, prompt)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Stop writing, and wait until the model is free."""
        self._pieces.close()

    def _read(self, generator: Generator, prompt: PromptRow) -> Any:
        reader = generator.reader
        opening = reader.find_opening(prompt.row.input_ids.tolist())
        ids: list[int] = []
        shown = ""
        with _Writer(lambda **options: generator.answer([prompt], **options)) as writer:
            for token in writer:
                ids.append(token)
                if reader.ends_within_character(ids):
                    continue
                text, _ = reader.read(ids, opening)
                if len(text) > len(shown):
                    yield text[len(shown) :]
                    shown = text
        self.result = writer.answer
        if self.result and len(self.result.text) > len(shown):
            yield self.result.text[len(shown) :]


class _Writer(BaseStreamer, StoppingCriteria):
    """Runs ``generate`` in a thread and hands out its tokens; stops it when it is left."""

    def __init__(self, run: Callable[..., list[Generation]]) -> None:
        self.answer: Generation | None = None
        self._run = run
        self._queue: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()
        self._stopped = threading.Event()
        self._has_prompt = False
        self._thread = threading.Thread(target=self._write, name="gemma-tuner-writer", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped.set()
        self._thread.join()

    def __iter__(self) -> Iterator[int]:
        while True:
            item = self._queue.get()
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item

    def put(self, value: Tensor) -> None:
        """Take new tokens from ``generate``, which hands over the prompt first."""
        if self._has_prompt:
            self._queue.put(int(value.flatten()[-1]))
        self._has_prompt = True

    def end(self) -> None:
        """Told by ``generate`` that it is done; the thread's own end says so too."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        """Ask each row whether it is done, as ``generate`` does after each token."""
        return torch.full((len(input_ids),), self._stopped.is_set(), device=input_ids.device)

    def _write(self) -> None:
        try:
            (self.answer,) = self._run(streamer=self, stopping_criteria=[self])
        except BaseException as error:  # noqa: BLE001 - raised again in the reading thread
            self._queue.put(error)
        else:
            self._queue.put(None)
