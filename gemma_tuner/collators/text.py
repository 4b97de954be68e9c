"""Conversations and documents to batches; the other collators add media to this one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from gemma_tuner.batch import Batch, Row, pad_rows
from gemma_tuner.checks import name_nearest
from gemma_tuner.collators.prompt import (
    TurnMarkers,
    check_template,
    mark_removable,
    mark_targets,
    render_prompt,
)
from gemma_tuner.collators.settings import CollatorSettings, TooLong, TrainOn
from gemma_tuner.errors import ConfigError, DataError
from gemma_tuner.media.load import load_media
from gemma_tuner.modalities import MEDIA, kind_of
from gemma_tuner.models.families import Family, family_of_processor, tokenizer_of
from gemma_tuner.records import Audio, Example, Image

if TYPE_CHECKING:
    from transformers import ProcessorMixin

# All of it is said here, since a tokenizer that was used and then saved brings what it was last
# called with. The template has written <bos>.
_TEXT_OPTIONS = {
    "add_special_tokens": False,
    "padding": False,
    "max_length": None,
    "truncation": False,
    "pad_to_multiple_of": None,
}


@name_nearest
@dataclass
class TextCollator:
    """Make batches of text examples.

    Args:
        processor: The checkpoint's processor, from ``load_model``.
        max_tokens: The longest row, media placeholders included.
        too_long: What happens to a longer one. ``error`` raises; ``cut`` takes the oldest plain
            text out of the prompt (the end of a document) and counts it in ``Batch.counts``. An
            answer is never cut: a row whose answer alone is too long always raises.
        train_on: ``assistant`` trains every assistant turn, ``last`` the last one, ``all`` every
            token. Documents are trained whole in any case.
        enable_thinking: Passed to the chat template. What is trained with it is asked with it:
            ``generate(enable_thinking=...)``, ``--enable-thinking`` of the commands.
        text_is_rendered: Documents are conversations that went through this checkpoint's own chat
            template, and are trained on as ``train_on`` says.

    Raises:
        ConfigError: A setting outside its range.
    """

    processor: ProcessorMixin = field(repr=False)  # printed, it fills pages
    _: KW_ONLY
    max_tokens: int = CollatorSettings.max_tokens
    too_long: TooLong = CollatorSettings.too_long
    train_on: TrainOn = CollatorSettings.train_on
    enable_thinking: bool = CollatorSettings.enable_thinking
    text_is_rendered: bool = CollatorSettings.text_is_rendered

    family: Family = field(init=False, repr=False)
    media_types: ClassVar[tuple[type, ...]] = ()

    def __post_init__(self) -> None:
        CollatorSettings(**TextCollator.list_settings(self))
        self.family = family_of_processor(self.processor)
        if self.enable_thinking and not self.family.has_thinking:
            raise ConfigError(f"enable_thinking is True, but {self.family.name} has no thinking")
        self._markers = TurnMarkers.of(self.tokenizer, self.family)
        check_template(self.processor, self.family)

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer."""
        return tokenizer_of(self.processor)

    def __call__(self, examples: Sequence[Example]) -> Batch:
        """Collate examples.

        Args:
            examples: At least one.

        Returns:
            A batch on the CPU, padded to a bucketed length.

        Raises:
            DataError: An example that cannot be used, with its key.
        """
        return pad_rows(
            [self.encode(example) for example in examples],
            max_tokens=self.max_tokens,
            pad_token_id=self.tokenizer.pad_token_id,
            token_type_name=self.family.token_type_name,
        )

    def encode(self, example: Example) -> Row:
        """Turn one example into token ids, targets and media tensors.

        Args:
            example: Its media decoded, or local.

        Returns:
            The row, at most ``max_tokens`` long, on the CPU.

        Raises:
            DataError: It cannot be used: too long, nothing to train on, media of another kind.
        """
        self._check_media_types(example)
        example, counts = self.prepare_media(load_media(example))
        text = render_prompt(
            self.processor,
            self.family,
            example,
            enable_thinking=self.enable_thinking,
            text_is_rendered=self.text_is_rendered,
        )
        features = self._process(example, text)
        ids = features["input_ids"][0]
        types = features.get(self.family.token_type_name or "")
        types = torch.zeros_like(ids) if types is None else types[0]
        names = (name for medium in MEDIA for name in medium.inputs)
        media = {name: features[name] for name in names if name in features}
        self._check_row(example, ids, media)

        is_whole = example.document is not None and not self.text_is_rendered
        train_on = "all" if is_whole else self.train_on
        targets = mark_targets(ids.tolist(), self._markers, train_on, example)
        if not any(targets):
            raise DataError("no token of this row would be trained on", key=example.key)
        keep = self._fit(example, ids.tolist(), targets)
        if not all(keep):
            counts = {**counts, "cut_tokens": keep.count(False), "cut_rows": 1}
        kept = torch.tensor(keep)
        return Row(
            key=example.key,
            input_ids=ids[kept],
            token_types=types[kept],
            targets=torch.tensor(targets)[kept],
            media=media,
            counts=counts,
        )

    def settings(self) -> dict[str, Any]:
        """What decides how an example becomes a row, as JSON has it; a resumed run compares it.

        What is only asked about rows that would otherwise be refused is left out, so that the
        remedy for such a row does not stand in the way of resuming.

        Returns:
            Names to values, with the class's name and a hash of the chat template.
        """
        left_out = {"processor", "max_tokens", "too_long", "max_seconds", "long_audio"}
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        if not self.text_is_rendered:  # so that runs from before it was one go on
            left_out.add("text_is_rendered")
        for name in left_out & own.keys():
            del own[name]
        template = self.processor.chat_template or ""
        return {
            "class": type(self).__name__,
            **own,
            "chat_template_sha256": hashlib.sha256(str(template).encode()).hexdigest(),
        }

    def list_settings(self) -> dict[str, Any]:
        """What was chosen, of the names of :class:`~gemma_tuner.collators.settings`.

        Returns:
            Names to values, as JSON has them; they lie beside an adapter that is trained so.
        """
        names = (f.name for f in fields(CollatorSettings))
        return {name: getattr(self, name) for name in names if hasattr(self, name)}

    def prepare_media(self, example: Example) -> tuple[Example, Mapping[str, int]]:
        """Check decoded media against what the model takes.

        Args:
            example: With its media decoded.

        Returns:
            The example, its clips split where that is configured, and what to count, by name.
        """
        return example, {}

    def processor_options(self) -> dict[str, Any]:
        """The processor's keyword arguments for media."""
        return {}

    def _check_media_types(self, example: Example) -> None:
        for part in example.media:
            kind = kind_of(part)
            if kind not in self.family.media:
                raise DataError(
                    f"it holds {kind}, which {self.family.name} does not read; use another model",
                    key=example.key,
                )
            if not isinstance(part, self.media_types):
                raise DataError(
                    f"it holds {kind}, which {type(self).__name__} does not take; use "
                    f"{kind.title()}Collator or MultimodalCollator, and load the model with that "
                    "modality",
                    key=example.key,
                )

    def _process(self, example: Example, text: str) -> Mapping[str, Tensor]:
        images = [part.source for part in example.media if isinstance(part, Image)]
        clips = [part.source for part in example.media if isinstance(part, Audio)]
        process: Any = self.processor  # its keyword arguments have no types
        try:
            text.encode()  # the tokenizer would only say that the type of the text is wrong
            if not (images or clips):
                return self.tokenizer([text], return_tensors="pt", **_TEXT_OPTIONS)
            return process(
                text=[text],
                images=[images] if images else None,
                audio=clips or None,
                text_kwargs=dict(_TEXT_OPTIONS),
                return_tensors="pt",
                **self.processor_options(),
            )
        except UnicodeEncodeError:
            raise DataError(
                "its text holds half of a character (an unpaired surrogate); write it as UTF-8",
                key=example.key,
            ) from None
        except ValueError as error:
            raise DataError(
                f"the checkpoint's processor refuses its media: {error}", key=example.key
            ) from error

    def _check_row(self, example: Example, ids: Tensor, media: Mapping[str, Tensor]) -> None:
        """One ``<bos>``, and as many placeholders as the towers will return features."""
        tokenizer = self.tokenizer
        num_bos = int((ids == tokenizer.bos_token_id).sum())
        if num_bos != 1 or ids[0] != tokenizer.bos_token_id:
            raise DataError(
                f"the row has {num_bos} <bos> tokens and must begin with exactly one; check the "
                "checkpoint's chat template",
                key=example.key,
            )
        for kind, form in self.family.media.items():
            returned = self.family.count_tokens(kind, media)
            placeholders = int((ids == tokenizer.convert_tokens_to_ids(form.token)).sum())
            if placeholders != sum(returned) or 0 in returned:
                raise DataError(
                    f"{placeholders} {kind} placeholders in the prompt, but the {kind} tower will "
                    f"return {returned} features; every item needs at least one and as many "
                    "placeholders as features",
                    key=example.key,
                )

    def _fit(self, example: Example, ids: Sequence[int], targets: Sequence[bool]) -> list[bool]:
        """Choose the tokens to keep so that the row has at most ``max_tokens``."""
        excess = len(ids) - self.max_tokens
        keep = [True] * len(ids)
        if excess <= 0:
            return keep
        if self.too_long == "error":
            raise DataError(
                f"{len(ids)} tokens, {excess} more than max_tokens={self.max_tokens}; raise "
                "max_tokens, shorten the example, or set too_long='cut'",
                key=example.key,
            )
        if example.document is not None:
            return [position < self.max_tokens for position in range(len(ids))]
        removable = mark_removable(ids, targets, self._markers)
        if sum(removable) < excess:
            raise DataError(
                f"{len(ids)} tokens, of which {sum(targets)} are the answer and "
                f"{sum(removable)} can be cut, do not fit max_tokens={self.max_tokens}; raise "
                "max_tokens or shorten the answer",
                key=example.key,
            )
        for position, can_go in enumerate(removable):
            if can_go and excess:
                keep[position] = False
                excess -= 1
        return keep
