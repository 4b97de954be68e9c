"""Evaluate a model on held-out examples: its loss, its answers, and how its base does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, cast

from peft import PeftModel
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from gemma_tuner.batch import Batch
from gemma_tuner.checks import check_value
from gemma_tuner.device import read_launch
from gemma_tuner.display import is_blank
from gemma_tuner.errors import ConfigError, DataError
from gemma_tuner.evaluation.answers import Generation, Generator, check_modalities
from gemma_tuner.evaluation.decoding import Decoding, in_eval_mode
from gemma_tuner.evaluation.prompts import PromptRow, end_with_answer, show_prompt
from gemma_tuner.evaluation.report import Answered, Report
from gemma_tuner.evaluation.report_files import check_output, write_report
from gemma_tuner.evaluation.scores import Score, UserScore, compare, find_scores
from gemma_tuner.evaluation.subset import Subset
from gemma_tuner.models.families import family_of
from gemma_tuner.models.identity import portable_name
from gemma_tuner.models.lora import check_model, unwrap_peft
from gemma_tuner.models.loss import target_loss_sum
from gemma_tuner.records import Example
from gemma_tuner.training.adapters import compare_collator
from gemma_tuner.training.checks import check_collator
from gemma_tuner.training.feed import ModelCollator, Stream
from gemma_tuner.training.held_out import measure_held_out
from gemma_tuner.training.processes import Processes
from gemma_tuner.training.reporting.metrics import EvalRecord

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from gemma_tuner.collators.text import TextCollator

_CHUNK_TOKENS = 256  # target tokens whose logits exist at one time; it changes no result
_NUM_WORST = 20

ReferencesOf = Callable[[Example], Sequence[str]]
Systems = Mapping[str, Callable[[], AbstractContextManager[object]]]
"""What is measured, by name, each with what switches the model to it."""


def evaluate(
    model: PreTrainedModel | PeftModel,
    stream: Stream,
    collator: TextCollator,
    *,
    scores: Sequence[str | Score | UserScore] = ("exact_match",),
    language: str | None = None,
    references: ReferencesOf | None = None,
    compare_base: bool = True,
    max_examples: int | None = None,
    batch_size: int = 8,
    max_new_tokens: int = 256,
    output: str | Path | None = None,
    progress: bool = True,
) -> Report:
    """Measure loss and answers on held-out examples, for the adapter and for its base.

    Each example's prompt is everything before its last answer, encoded as in training; the
    answers are the likeliest tokens, so that evaluating twice gives the same. The model is left in
    the mode that it was found in.

    Args:
        model: From ``add_lora``, or a bare model, which is evaluated by itself.
        stream: Held-out examples; its position is not touched.
        collator: What the model was trained with, or will be.
        scores: What the answers are scored by: ``exact_match``, ``wer``, ``cer``, ``anls``,
            ``vqa_accuracy``, ``Score`` objects, and functions ``(prediction, references) ->
            float``. The first decides which answers are worst. None at all measures the loss only.
        language: Of the texts, such as ``en``: the normaliser of ``wer`` and ``cer``; None is
            the one for any language.
        references: Gives an example's right answers, where there are several; by default its last
            answer.
        compare_base: Measure the base as well, with the adapter switched off.
        max_examples: Read at most so many rows, spread evenly over the stream.
        batch_size: Examples in a forward pass; in float32 it does not change the results.
        max_new_tokens: The most tokens of an answer; what did not end by itself is counted.
        output: A folder for ``report.json``, ``report.md`` and the media of the worst examples.
        progress: Whether a terminal shows how far it is.

    Returns:
        The report.

    Raises:
        ConfigError: An unknown score, an empty stream or one without a usable example, a setting
            out of its range, or media for which the model was loaded without a tower.
        DataError: An example that cannot be used, beyond what the stream passes over.
        CheckpointError: ``output`` cannot be written.
    """
    check_model(model)
    check_collator(model, collator)  # pyright: ignore[reportArgumentType] - it unwraps
    compare_collator(model, collator, "it is evaluated")
    found = find_scores(scores, language)
    check_value("batch_size", batch_size, int, at_least=1)
    decoding = Decoding(max_new_tokens=max_new_tokens, do_sample=False)
    subset = Subset(stream, max_examples)
    if output is not None:
        check_output(output)
    is_adapted = isinstance(model, PeftModel)
    systems: Systems = {"adapter" if is_adapted else "model": nullcontext}
    if is_adapted and compare_base:
        systems = {**systems, "base": partial(_without_adapter, model)}
    evaluation = _Evaluation(
        systems=systems,
        generator=Generator(model, replace(collator, train_on="last"), decoding),
        collator=collator,
        subset=subset,
        scores=found,
        references=references,
        batch_size=batch_size,
    )
    console = Console(stderr=True)
    is_shown = progress and console.is_terminal
    with in_eval_mode(model), Progress(console=console, disable=not is_shown) as bar:
        held_out = evaluation.measure_losses(bar)
        examples = tuple(evaluation.answer(bar)) if found else ()
    report = evaluation.make_report(held_out, examples, language)
    if output is None:
        return report
    return write_report(report, output, evaluation.read_again(report.find_worst(_NUM_WORST)))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Evaluation:
    """The parts of one evaluation."""

    systems: Systems
    generator: Generator
    collator: TextCollator
    subset: Subset
    scores: tuple[Score, ...]
    references: ReferencesOf | None
    batch_size: int
    counts: Counter[str] = field(default_factory=Counter)

    def measure_losses(self, bar: Progress) -> dict[str, EvalRecord]:
        """Measure the loss of each system on the rows that can be used."""
        model = self.generator.model
        device = unwrap_peft(model).device
        if (count := read_launch().count) > 1:
            raise ConfigError(
                f"evaluate() runs in one process, and this is one of {count}; call it in a script "
                "that is started with plain python"
            )

        def sum_losses(batch: Batch) -> Tensor:
            return target_loss_sum(model, batch.to(device), chunk_tokens=_CHUNK_TOKENS)

        collate = ModelCollator(self.collator, model)
        records = {}
        for system, switched in self.systems.items():
            task = bar.add_task(f"loss, {system}", total=len(self.subset))
            with switched():
                records[system] = measure_held_out(
                    model,
                    cast(Stream, self.subset),
                    partial(self._collate, collate, partial(bar.advance, task)),
                    sum_losses,
                    step=0,
                    batch_size=self.batch_size,
                    processes=Processes(device),
                )
        return records

    def _collate(
        self,
        collate: ModelCollator,
        advance: Callable[[float], None],
        stream: Stream,
        examples: Sequence[Example],
    ) -> Batch | None:
        advance(self.batch_size)
        check_modalities(self.generator.model, examples)
        return collate(stream, examples)

    def answer(self, bar: Progress) -> Iterator[Answered]:
        """Let each system answer the prompts, and tally the answers."""
        task = bar.add_task("answers", total=len(self.subset))
        examples = self.subset.read_rows(range(len(self.subset)))
        num_answered = 0
        while read := list(islice(examples, self.batch_size)):
            prompts = [pair for example in read if example and (pair := self._encode(example))]
            answers = {}
            for system, switched in self.systems.items():
                with switched():
                    rows = [prompt for _, prompt in prompts]
                    answers[system] = self.generator.answer(rows) if rows else []
            for index, (example, prompt) in enumerate(prompts):
                num_answered += 1
                yield self._tally(example, prompt, {s: a[index] for s, a in answers.items()})
            bar.advance(task, len(read))
        if not num_answered:
            raise ConfigError(
                "no example of the stream holds an answer to compare with; give conversations, "
                "or scores=() to measure the loss alone"
            )

    def _encode(self, example: Example) -> tuple[Example, PromptRow] | None:
        answered = end_with_answer(example)
        if answered is None:
            self.counts["without_prompt"] += 1
            return None
        try:
            return answered, self.generator.encode(answered)
        except DataError as error:
            self.subset.pass_over(error)
            return None

    def _tally(
        self, example: Example, prompt: PromptRow, answers: Mapping[str, Generation]
    ) -> Answered:
        references = self._read_references(example, prompt)
        self.counts["empty_references"] += all(map(is_blank, references))
        for system, answer in answers.items():
            self.counts[f"unfinished_{system}"] += answer.finished_by == "length"
        return Answered(
            key=example.key,
            prompt=show_prompt(example),
            references=references,
            answers=answers,
            tallies={
                score.name: {
                    system: score.tally(answer.text, references)
                    for system, answer in answers.items()
                }
                for score in self.scores
            },
        )

    def _read_references(self, example: Example, prompt: PromptRow) -> tuple[str, ...]:
        if self.references is None:
            # Read as the model's own answers are, so that what repeats it is equal to it.
            return (self.generator.reader.read(prompt.answer_ids)[0],)
        given = self.references(example)
        if isinstance(given, str) or not given or not all(isinstance(x, str) for x in given):
            raise DataError(
                f"references returned {type(given).__name__}; it must return a list of at least "
                "one text",
                key=example.key,
            )
        return tuple(given)

    def make_report(
        self,
        held_out: Mapping[str, EvalRecord],
        examples: tuple[Answered, ...],
        language: str | None,
    ) -> Report:
        """Put together what was measured."""
        gemma = unwrap_peft(self.generator.model)
        first = next(iter(held_out.values()))
        counts = {
            "rows_of_the_stream": self.subset.num_rows_of_stream,
            "rows_read": len(self.subset),
            "examples_with_loss": first.examples,
            "target_tokens": first.target_tokens,
            "answered": len(examples),
            "passed_over": self.subset.num_bad,
            **{name: count for name, count in first.counts.items() if name != "passed_over"},
            **{name: count for name, count in self.counts.items() if count},
        }
        return Report(
            model=portable_name(gemma.config.name_or_path)
            or f"a {family_of(gemma.config).name} made in memory",
            systems=tuple(self.systems),
            held_out=held_out,
            scores=tuple(
                compare(
                    score,
                    {
                        system: [example.tallies[score.name][system] for example in examples]
                        for system in self.systems
                    },
                )
                for score in self.scores
            ),
            examples=examples,
            counts=counts,
            settings={
                "language": language or "any",
                "max_new_tokens": self.generator.config.max_new_tokens,
                "decoding": "greedy",
                "dtype": str(gemma.dtype).removeprefix("torch."),
                **{
                    f"{name} version": metadata.version(name)
                    for name in ("gemma_tuner", "torch", "transformers", "peft", "jiwer")
                },
            },
        )

    def read_again(self, examples: Sequence[Answered]) -> dict[str, Example]:
        """Read examples once more, with their media, which were not kept."""
        positions = [self.subset.find_position(example.key) for example in examples]
        read = self.subset.read_rows(positions)
        return {example.key: example for example in read if example is not None}


@contextmanager
def _without_adapter(model: PeftModel) -> Iterator[None]:
    """Switch the adapter off; PEFT, switching it on again, would make it trainable."""
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    try:
        with model.disable_adapter():
            yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trainable[name])
