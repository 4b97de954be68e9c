"""Ask a model: text, pictures and sounds in, text out, whole or as it is written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Unpack, overload

from gemma_tuner.checks import is_whole_number
from gemma_tuner.collators.multimodal import MultimodalCollator
from gemma_tuner.errors import ConfigError
from gemma_tuner.evaluation.answers import Generation
from gemma_tuner.evaluation.decoding import Decoding, DecodingOptions
from gemma_tuner.evaluation.generator import Generator, check_modalities
from gemma_tuner.evaluation.prompts import Messages, Prompt, add_placeholder, read_prompts
from gemma_tuner.evaluation.text_stream import TextStream
from gemma_tuner.records import Example

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
    enable_thinking: bool = ...,
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
    enable_thinking: bool = ...,
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
    enable_thinking: bool = False,
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
        image: Pictures for a prompt, one or a list; for a list of prompts, such an entry (or
            None) for each. A picture is a path, bytes, a ``PIL.Image`` or an ``Image``.
        audio: Sounds likewise; a sound is a path, bytes, or ``Audio(samples, sample_rate_hz)``.
        enable_thinking: Lets the model think before it answers, where its family can.
        batch_size: Prompts at a time; in float32 it does not change the answers.
        **decoding: ``max_new_tokens do_sample temperature top_p top_k``, as in transformers, by
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
    if not is_whole_number(batch_size) or batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size!r}; it must be a whole number from 1 up")
    generator = _make_generator(
        model, processor, Decoding(**decoding), enable_thinking=enable_thinking
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
    enable_thinking: bool = False,
    **decoding: Unpack[DecodingOptions],
) -> TextStream:
    """Answer one prompt piece by piece, as it is written.

    Args:
        model: From ``load_model`` or ``add_lora``.
        processor: From ``load_model``.
        prompt: One prompt.
        image: Its pictures, as in :func:`generate`.
        audio: Its sounds likewise.
        enable_thinking: Lets the model think before it answers, where its family can.
        **decoding: As in :func:`generate`.

    Returns:
        An iterator of the answer's text; its ``result`` has the thoughts as well. Do not use the
        model for anything else until it ends or is closed.

    Raises:
        ConfigError: As in :func:`generate`, or a list of prompts.
        DataError: As in :func:`generate`.
    """
    generator = _make_generator(
        model, processor, Decoding(**decoding), enable_thinking=enable_thinking
    )
    examples, is_single = read_prompts(prompt, image=image, audio=audio)
    if not is_single:
        raise ConfigError("a stream answers one prompt; call generate() for a list of them")
    check_modalities(model, examples)
    return TextStream(generator, generator.encode(add_placeholder(examples[0])))


def _make_generator(
    model: Any, processor: Any, decoding: Decoding, *, enable_thinking: bool
) -> Generator:
    collator = MultimodalCollator(
        processor, max_tokens=_NO_LIMIT, train_on="last", enable_thinking=enable_thinking
    )
    return Generator(model, collator, decoding)
