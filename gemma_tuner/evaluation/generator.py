"""One model, one collator and one way of choosing tokens: what answers prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gemma_tuner.errors import ConfigError
from gemma_tuner.evaluation.answers import AnswerReader, Generation
from gemma_tuner.evaluation.decoding import Decoding, build_config, check_length, complete
from gemma_tuner.evaluation.prompts import PromptRow, encode_prompt
from gemma_tuner.models.families import family_of, loaded_modalities
from gemma_tuner.models.lora import unwrap_peft
from gemma_tuner.records import Example, Image

if TYPE_CHECKING:
    from transformers import GenerationConfig

    from gemma_tuner.collators.text import TextCollator


class Generator:
    """One model with one collator and one way of choosing tokens.

    Args:
        model: A Gemma model, as loaded or wrapped by PEFT.
        collator: Encodes prompts; ``train_on="last"``.
        decoding: How tokens are chosen.

    Raises:
        ConfigError: A processor of another family than the model's.
    """

    def __init__(self, model: Any, collator: TextCollator, decoding: Decoding) -> None:
        gemma = unwrap_peft(model)
        family = family_of(gemma.config)
        if collator.family.model_type != family.model_type:
            raise ConfigError(
                f"the model is {family.name}, but the processor is of {collator.family.name}; "
                "give the processor that load_model returned together with the model"
            )
        self.model = model
        self.collator = collator
        self.reader = AnswerReader(collator.processor.tokenizer, family)
        self.config: GenerationConfig = build_config(gemma, decoding, self.reader.stop_ids)
        self._seed = decoding.seed

    def encode(self, example: Example) -> PromptRow:
        """Encode an example that ends with an answer, or a placeholder for one."""
        prompt = encode_prompt(self.collator, example)
        check_length(unwrap_peft(self.model), prompt.row, self.config)
        return prompt

    def answer(self, prompts: Sequence[PromptRow], **options: Any) -> list[Generation]:
        """Answer prompts in one batch."""
        rows = [prompt.row for prompt in prompts]
        written = complete(
            self.model, self.collator, rows, self.config, seed=self._seed, **options
        )
        return [self.describe(p, ids) for p, ids in zip(prompts, written, strict=True)]

    def describe(self, prompt: PromptRow, ids: Sequence[int]) -> Generation:
        """Make an answer of the tokens that were written after a prompt."""
        opening = self.reader.find_opening(prompt.row.input_ids.tolist())
        text, thinking = self.reader.read(ids, opening)
        stops: Any = self.config.eos_token_id
        return Generation(
            text=text,
            thinking=thinking,
            token_ids=tuple(ids),
            finished_by="stop" if ids and ids[-1] in stops else "length",
            num_prompt_tokens=prompt.num_tokens,
        )


def check_modalities(model: Any, examples: Sequence[Example]) -> None:
    """Refuse media for which the model has no part."""
    loaded = loaded_modalities(unwrap_peft(model))
    for example in examples:
        for part in example.media:
            modality = "image" if isinstance(part, Image) else "audio"
            if modality not in loaded:
                raise ConfigError(
                    f"{example.key} holds {modality}, but the model has no part for that (it has "
                    f"{', '.join(loaded)}); load it with load_model(..., modalities=('text', "
                    f"'{modality}')) if its checkpoint offers it"
                )
