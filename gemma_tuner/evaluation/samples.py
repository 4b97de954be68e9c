"""Answers to the same few questions at intervals of a training run, to watch what it learns.

::

    output_dir/samples.jsonl     a line for each answer, see SampleRecord
    output_dir/samples/001-1.png the images and clips of the questions
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gemma_tuner.checks import check_value
from gemma_tuner.collators.text import TextCollator
from gemma_tuner.disk import disk_errors_explained, replaced
from gemma_tuner.errors import CheckpointError, ConfigError, DataError
from gemma_tuner.evaluation.answers import Generator, check_modalities
from gemma_tuner.evaluation.decoding import Decoding, in_eval_mode
from gemma_tuner.evaluation.prompts import end_with_answer, show_prompt
from gemma_tuner.evaluation.report_files import write_media
from gemma_tuner.log import announce
from gemma_tuner.media.load import load_media
from gemma_tuner.models.lora import unwrap_peft
from gemma_tuner.models.loss import score
from gemma_tuner.models.target_only import target_only_of
from gemma_tuner.records import Example

if TYPE_CHECKING:
    from gemma_tuner.batch import Batch

FILE, FOLDER = "samples.jsonl", "samples"
_HEAD_ROWS = 64  # of the vocabulary's head at a time


@dataclass(frozen=True, slots=True)
class SampleRecord:
    """One answer after so many optimizer steps.

    Args:
        step: Optimizer steps done.
        key: The example's.
        prompt: What was asked.
        reference: The right answer.
        prediction: What the model answered.
        media: Files of the question's images and clips, in the run's folder ``samples``.
        tokens: The tokens of the right answer, each with the probability that the model gives it
            after those before it.
    """

    step: int
    key: str
    prompt: str
    reference: str
    prediction: str
    media: tuple[str, ...] = ()
    tokens: tuple[tuple[str, float], ...] = ()


class SampleGenerations:
    """Answers examples every so many steps; the model is left as it was found.

    Give it to ``Trainer(..., samples=...)``: it then also answers before the first step and after
    the last, and writes questions, answers and media into the run's folder, on this machine.

    Args:
        collator: What the model is trained with.
        examples: A few conversations with their answers, from held-out data.
        every_steps: How often.
        batch_size: Examples at a time.
        max_new_tokens: The most tokens of an answer.

    Raises:
        ConfigError: No examples, or a number below 1.
        DataError: An example without an answer, or one whose media cannot be read.
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
            check_value(name, value, int, at_least=1)
        if not isinstance(collator, TextCollator):
            raise ConfigError(f"collator is a {type(collator).__name__}; give the trainer's")
        is_list = isinstance(examples, Sequence) and not isinstance(examples, str | bytes)
        if not is_list or not all(isinstance(example, Example) for example in examples):
            raise ConfigError(f"examples is a {type(examples).__name__}; give a list of Example")
        if not examples:
            raise ConfigError("there are no examples to answer; give at least one")
        self.every_steps = every_steps
        self._batch_size = batch_size
        self._collator = replace(collator, train_on="last")
        self._decoding = Decoding(max_new_tokens=max_new_tokens, do_sample=False)
        self._examples = [load_media(_require_answer(example)) for example in examples]
        self._media: list[tuple[str, ...]] = [()] * len(examples)
        self._path: Path | None = None
        self._last_step = -1

    def begin(self, folder: str | Path, step: int) -> None:
        """Write the media into a run's folder, and drop answers beyond the step it begins at.

        Args:
            folder: The run's.
            step: Optimizer steps done before; 0 drops all answers.

        Raises:
            CheckpointError: No room or no permission.
        """
        self._path = Path(folder) / FILE
        with _errors_explained():
            (self._path.parent / FOLDER).mkdir(parents=True, exist_ok=True)
            self._media = [
                tuple(write_media(example, self._path.parent / FOLDER, number))
                for number, example in enumerate(self._examples, 1)
            ]
            kept: list[tuple[str, int]] = []
            if step and self._path.exists():
                # Not splitlines(): JSON leaves line separators of Unicode as they are. What stands
                # after the last newline is nothing, or a line that a killed run left unfinished.
                content = self._path.read_text(encoding="utf-8", errors="replace")
                whole = [(line, _read_step(line)) for line in content.split("\n")[:-1]]
                kept = [(line, at) for line, at in whole if at is not None and at <= step]
                if num_damaged := sum(at is None for _, at in whole):
                    announce(f"{num_damaged} damaged lines of {FILE} are left out")
            self._last_step = kept[-1][1] if kept else -1
            with replaced(self._path) as temporary:
                temporary.write_text("".join(f"{line}\n" for line, _ in kept), encoding="utf-8")

    def is_due(self, step: int, total_steps: int) -> bool:
        """Whether answers are wanted: before the first step, after the last, and as configured."""
        return step != self._last_step and (
            step % self.every_steps == 0 or step in (0, total_steps)
        )

    def write(self, model: Any, step: int) -> list[SampleRecord]:
        """Answer the examples, and add the answers to the run's file.

        Args:
            model: As in :meth:`answer`.
            step: Optimizer steps done.

        Returns:
            A record for each example.

        Raises:
            ConfigError: :meth:`begin` was not called, or as in :meth:`answer`.
            CheckpointError: No room or no permission.
            DataError: As in :meth:`answer`.
        """
        if self._path is None:
            raise ConfigError("there is no folder to write to; call begin(folder, step) first")
        self._last_step = step
        records = self.answer(model, step)
        lines = [json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in records]
        with _errors_explained(), self._path.open("a", encoding="utf-8") as file:
            file.write("".join(lines))
        return records

    def answer(self, model: Any, step: int) -> list[SampleRecord]:
        """Answer the examples, with the model's probability of each token of the right answer.

        Args:
            model: A Gemma model, as loaded or wrapped by PEFT; its mode and checkpointing are
                as before afterwards.
            step: Optimizer steps done.

        Returns:
            A record for each example.

        Raises:
            ConfigError: Media for which the model has no tower.
            DataError: An example that cannot be used.
        """
        check_modalities(model, self._examples)
        generator = Generator(model, self._collator, self._decoding)
        records = []
        for start in range(0, len(self._examples), self._batch_size):
            chunk = self._examples[start : start + self._batch_size]
            prompts = [generator.encode(example) for example in chunk]
            answers = generator.answer(prompts)
            for number, (example, prompt, answer) in enumerate(
                zip(chunk, prompts, answers, strict=True), start
            ):
                reference, _ = generator.reader.read(prompt.answer_ids)
                records.append(
                    SampleRecord(
                        step,
                        example.key,
                        show_prompt(example),
                        reference,
                        answer.text,
                        self._media[number],
                        self._rate_tokens(model, self._collator([example])),
                    )
                )
        return records

    def _rate_tokens(self, model: Any, batch: Batch) -> tuple[tuple[str, float], ...]:
        """Give each target token of one row with its probability."""
        with torch.no_grad(), in_eval_mode(model):
            probabilities = target_probabilities(model, batch)
        tokenizer = self._collator.tokenizer
        target_ids = batch.target_ids[: batch.num_target_tokens].tolist()
        texts = [tokenizer.decode([token]) for token in target_ids]
        return tuple(zip(texts, probabilities, strict=True))


def target_probabilities(model: Any, batch: Batch) -> list[float]:
    """Give the probability of each target token of a batch; the model is in eval mode."""
    gemma = unwrap_peft(model)
    placed = batch.to(gemma.device)
    hidden = target_only_of(gemma).hidden_states(
        placed.inputs, placed.target_rows, placed.target_slots
    )
    head = gemma.get_output_embeddings().weight
    softcap = gemma.config.get_text_config().final_logit_softcapping
    found = []
    for start in range(0, batch.num_target_tokens, _HEAD_ROWS):
        rows = slice(start, min(start + _HEAD_ROWS, batch.num_target_tokens))
        logits = score(hidden[rows], head, softcap)
        chosen = logits.gather(1, placed.target_ids[rows, None]).squeeze(1)
        found.append(torch.exp(chosen - torch.logsumexp(logits, dim=1)))
    return torch.cat(found).tolist()


def _read_step(line: str) -> int | None:
    """The step of an answer's line; None of one that is damaged."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, LookupError, TypeError):
        return None
    return step if isinstance(step, int) else None


def _errors_explained() -> AbstractContextManager[None]:
    """Turn a disk's errors into a CheckpointError with a remedy."""
    return disk_errors_explained(
        lambda reason: CheckpointError(
            f"sample answers cannot be written ({reason}); free disk space, or choose another "
            "output_dir"
        )
    )


def _require_answer(example: Example) -> Example:
    answered = end_with_answer(example)
    if answered is None:
        raise DataError("it has no answer, so it asks nothing; give another", key=example.key)
    return answered
