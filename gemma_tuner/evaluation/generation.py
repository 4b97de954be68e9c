"""Ask a model: text, images and clips in, text out, whole or as it is written."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Self, Unpack, overload

import torch
from torch import Tensor
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from gemma_tuner.checks import check_value
from gemma_tuner.collators.multimodal import MultimodalCollator
from gemma_tuner.collators.settings import LongAudio
from gemma_tuner.errors import ConfigError
from gemma_tuner.evaluation.answers import Generation, Generator, check_modalities
from gemma_tuner.evaluation.decoding import Decoding, DecodingOptions
from gemma_tuner.evaluation.prompts import (
    Messages,
    Prompt,
    PromptRow,
    add_placeholder,
    read_prompts,
)
from gemma_tuner.models.adapter_files import trained_with
from gemma_tuner.models.lora import check_model
from gemma_tuner.records import Example
from gemma_tuner.training.adapters import compare_collator, follow_training

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, ProcessorMixin

    Model = PreTrainedModel | PeftModel

_NO_LIMIT = 2**31 - 1  # the context is checked together with the room for the answer


@overload
def generate(
    model: Model,
    processor: ProcessorMixin,
    prompts: str | Messages | Example,
    *,
    image: Any = ...,
    audio: Any = ...,
    enable_thinking: bool | None = ...,
    image_tokens: int | None = ...,
    max_seconds: float | None = ...,
    long_audio: LongAudio | None = ...,
    batch_size: int = ...,
    **decoding: Unpack[DecodingOptions],
) -> Generation: ...


@overload
def generate(
    model: Model,
    processor: ProcessorMixin,
    prompts: Sequence[Prompt],
    *,
    image: Any = ...,
    audio: Any = ...,
    enable_thinking: bool | None = ...,
    image_tokens: int | None = ...,
    max_seconds: float | None = ...,
    long_audio: LongAudio | None = ...,
    batch_size: int = ...,
    **decoding: Unpack[DecodingOptions],
) -> list[Generation]: ...


def generate(
    model: Model,
    processor: ProcessorMixin,
    prompts: Prompt | Sequence[Prompt],
    *,
    image: Any = None,
    audio: Any = None,
    enable_thinking: bool | None = None,
    image_tokens: int | None = None,
    max_seconds: float | None = None,
    long_audio: LongAudio | None = None,
    batch_size: int = 8,
    **decoding: Unpack[DecodingOptions],
) -> Generation | list[Generation]:
    """Answer one prompt or a list of them.

    Adapters are used as they are set. The model is left in the mode that it was found in, so this
    may be called between two steps of training.

    Args:
        model: From ``load_model`` or ``add_lora``.
        processor: From ``load_model``.
        prompts: Text, messages (``[{"role": "user", "content": "Hello"}]``) or an ``Example``
            without its answer; or a list of these, which is answered in batches.
        image: Images of a prompt, one or a list; for a list of prompts, such an entry (or None)
            for each. An image is a path, bytes, a ``PIL.Image`` or an ``Image``.
        audio: Clips in the same form; a clip is a path, bytes, or
            ``Audio(samples, sample_rate_hz)``.
        enable_thinking: Lets the model think before it answers, where its family can. This and
            the three below are by default what the adapter was trained with, where it says so.
        image_tokens: The most tokens of an image, as in ``ImageCollator``.
        max_seconds: The longest clip, as in ``AudioCollator``.
        long_audio: What happens to a longer clip, ``error`` or ``split``.
        batch_size: Prompts at a time; in float32 it does not change the answers.
        **decoding: ``max_new_tokens do_sample temperature top_p top_k`` of transformers, by
            default as the checkpoint says; ``seed`` makes sampling repeatable
            (:class:`~gemma_tuner.evaluation.decoding.Decoding`).

    Returns:
        An answer, or a list of answers for a list of prompts; ``print`` shows its text.

    Raises:
        ConfigError: A setting out of its range, a processor of another family, or media for which
            the model was loaded without a tower.
        DataError: A prompt that cannot be rendered, media that cannot be read or are too long, or
            a prompt that is longer than the model's context.
    """
    check_value("batch_size", batch_size, int, at_least=1)
    generator = _make_generator(
        model,
        processor,
        Decoding(**decoding),
        enable_thinking=enable_thinking,
        image_tokens=image_tokens,
        max_seconds=max_seconds,
        long_audio=long_audio,
    )
    examples, is_single = read_prompts(prompts, image=image, audio=audio)
    answers: list[Generation] = []
    check_modalities(model, examples)
    for start in range(0, len(examples), batch_size):
        chunk = examples[start : start + batch_size]
        rows = [generator.encode(add_placeholder(example)) for example in chunk]
        answers += generator.answer(rows)
    return answers[0] if is_single else answers


def generate_stream(
    model: Model,
    processor: ProcessorMixin,
    prompt: Prompt,
    *,
    image: Any = None,
    audio: Any = None,
    enable_thinking: bool | None = None,
    image_tokens: int | None = None,
    max_seconds: float | None = None,
    long_audio: LongAudio | None = None,
    **decoding: Unpack[DecodingOptions],
) -> TextStream:
    """Answer one prompt piece by piece, as it is written.

    Args:
        model: From ``load_model`` or ``add_lora``.
        processor: From ``load_model``.
        prompt: One prompt.
        image: Its images, in the forms that :func:`generate` takes.
        audio: Its clips, in the forms that :func:`generate` takes.
        enable_thinking: This and the next three are those of :func:`generate`.
        image_tokens: The most tokens of an image.
        max_seconds: The longest clip.
        long_audio: What happens to a longer clip.
        **decoding: The settings of :func:`generate`.

    Returns:
        An iterator of the answer's text; its ``result`` has the thoughts as well. Do not use the
        model for anything else until it ends or is closed.

    Raises:
        ConfigError: Those of :func:`generate`, or a list of prompts.
        DataError: Those of :func:`generate`.
    """
    generator = _make_generator(
        model,
        processor,
        Decoding(**decoding),
        enable_thinking=enable_thinking,
        image_tokens=image_tokens,
        max_seconds=max_seconds,
        long_audio=long_audio,
    )
    examples, is_single = read_prompts(prompt, image=image, audio=audio)
    if not is_single:
        raise ConfigError("a stream answers one prompt; call generate() for a list of them")
    check_modalities(model, examples)
    return TextStream(generator, generator.encode(add_placeholder(examples[0])))


def _make_generator(model: Any, processor: Any, decoding: Decoding, **given: Any) -> Generator:
    """What answers prompts as they were written in training, save where it is told otherwise."""
    check_model(model)
    known = trained_with(model)
    trained = {name: known.collator.get(name) for name in given} if known else {}
    chosen = {n: trained.get(n) if value is None else value for n, value in given.items()}
    collator = MultimodalCollator(
        follow_training(model, processor),
        max_tokens=_NO_LIMIT,
        train_on="last",
        **{name: value for name, value in chosen.items() if value is not None},
    )
    compare_collator(model, collator, "it is asked")
    return Generator(model, collator, decoding)


class TextStream:
    """An answer as it is written: an iterator of pieces of text, which joined are the answer.

    The model writes in a thread, which ends with the iterator: when the answer is complete, when
    :meth:`close` is called, when a ``with`` block is left, or when nobody holds it any more.

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
        """Take the end from ``generate``; the thread's own end says so too."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        """Tell ``generate`` after each token whether each row is done."""
        return torch.full((len(input_ids),), self._stopped.is_set(), device=input_ids.device)

    def _write(self) -> None:
        try:
            (self.answer,) = self._run(streamer=self, stopping_criteria=[self])
        except BaseException as error:  # noqa: BLE001 - raised again in the reading thread
            self._queue.put(error)
        else:
            self._queue.put(None)
