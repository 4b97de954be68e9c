"""Answers to the same few questions at intervals of a training run, to watch what it learns."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_tuner.errors import CheckpointError, ConfigError, DataError
from gemma_tuner.evaluation.decoding import Decoding
from gemma_tuner.evaluation.generator import Generator, check_modalities
from gemma_tuner.evaluation.prompts import end_with_answer, show_prompt
from gemma_tuner.models.settings import is_whole_number
from gemma_tuner.records import Example

if TYPE_CHECKING:
    from gemma_tuner.collators.text import TextCollator


@dataclass(frozen=True, slots=True)
class SampleRecord:
    """One answer after so many optimizer steps.

    Args:
        step: Optimizer steps done.
        key: The example's.
        prompt: What was asked.
        reference: The right answer.
        prediction: What the model answered.
    """

    step: int
    key: str
    prompt: str
    reference: str
    prediction: str


class SampleGenerations:
    """Answers examples every so many steps; the model is left as it was found.

    Call it after each step, and give what it returns to :func:`append_samples`.

    Args:
        collator: What the model is trained with.
        examples: A few conversations with their answers, from held-out data.
        every_steps: How often; step 0 counts as due, so that the beginning is seen.
        batch_size: Examples at a time.
        max_new_tokens: The most tokens of an answer.

    Raises:
        ConfigError: No examples, or a number below 1.
        DataError: An example without an answer.
    """

    def __init__(
        self,
        collator: TextCollator,
        examples: Sequence[Example],
        every_steps: int,
        *,
        batch_size: int = 8,
        max_new_tokens: int = 64,
    ) -> None:
        for name, value in (("every_steps", every_steps), ("batch_size", batch_size)):
            if not is_whole_number(value) or value < 1:
                raise ConfigError(f"{name} is {value!r}; it must be a whole number from 1 up")
        if not examples:
            raise ConfigError("there are no examples to answer; give at least one")
        self.every_steps = every_steps
        self._batch_size = batch_size
        self._collator = replace(collator, train_on="last")
        self._decoding = Decoding(max_new_tokens=max_new_tokens, do_sample=False)
        self._examples = [_require_answer(example) for example in examples]

    def is_due(self, step: int) -> bool:
        """Whether answers are wanted after so many steps."""
        return step % self.every_steps == 0

    def __call__(self, model: Any, step: int) -> list[SampleRecord]:
        """Answer the examples if that is due.

        Args:
            model: A Gemma model, as loaded or wrapped by PEFT; its mode and checkpointing are
                as before afterwards.
            step: Optimizer steps done.

        Returns:
            A record for each example, or an empty list.

        Raises:
            ConfigError: Media for which the model has no tower.
            DataError: An example that cannot be used.
        """
        if not self.is_due(step):
            return []
        check_modalities(model, self._examples)
        generator = Generator(model, self._collator, self._decoding)
        records = []
        for start in range(0, len(self._examples), self._batch_size):
            chunk = self._examples[start : start + self._batch_size]
            prompts = [generator.encode(example) for example in chunk]
            for example, prompt, answer in zip(
                chunk, prompts, generator.answer(prompts), strict=True
            ):
                reference, _ = generator.reader.read(prompt.answer_ids)
                records.append(
                    SampleRecord(step, example.key, show_prompt(example), reference, answer.text)
                )
        return records


def append_samples(path: str | Path, records: Sequence[SampleRecord]) -> None:
    """Append records to a file of JSON lines, such as ``samples.jsonl`` in a run's folder.

    Args:
        path: The file; made if it is missing, in a folder that is there.
        records: From :class:`SampleGenerations`.

    Raises:
        CheckpointError: No room or no permission.
    """
    lines = [json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in records]
    try:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write("".join(lines))
    except OSError as error:
        raise CheckpointError(
            f"{Path(path).name} cannot be written ({error.strerror or type(error).__name__}); "
            "free disk space, or choose another folder"
        ) from None  # whose message holds the path


def _require_answer(example: Example) -> Example:
    answered = end_with_answer(example)
    if answered is None:
        raise DataError("it has no answer, so it asks nothing; give another", key=example.key)
    return answered
