"""Text with images to batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from gemma_tuner.checks import name_nearest
from gemma_tuner.collators.settings import CollatorSettings
from gemma_tuner.collators.text import TextCollator
from gemma_tuner.errors import ConfigError
from gemma_tuner.records import Image


@name_nearest
@dataclass
class ImageCollator(TextCollator):
    """Make batches of examples with images (rows without one are welcome).

    Args:
        processor, max_tokens, too_long, train_on, enable_thinking: As in ``TextCollator``.
        image_tokens: The most soft tokens that an image may take; Gemma 4 offers 70, 140, 280,
            560 and 1120, Gemma 3n always takes its fixed number. Fewer cost less memory and see
            less detail. None: the checkpoint's own setting.

    Raises:
        ConfigError: A budget that the family does not offer.
    """

    image_tokens: int | None = CollatorSettings.image_tokens
    media_types: ClassVar[tuple[type, ...]] = (Image,)

    def __post_init__(self) -> None:
        super().__post_init__()
        offered = self.family.image_budgets(self.processor)
        if self.image_tokens is not None and self.image_tokens not in offered:
            raise ConfigError(
                f"image_tokens is {self.image_tokens}; {self.family.name} offers "
                f"{', '.join(map(str, offered))}"
            )

    def list_settings(self) -> dict[str, Any]:
        """What was chosen; of images the budget that the processor has by default, too."""
        own = getattr(self.processor, "image_processor", None)
        default = getattr(own, self.family.image_budget_option or "", None)
        is_offered = default in self.family.image_budgets(self.processor)
        budget = self.image_tokens or (default if is_offered else None)
        return {**super().list_settings(), "image_tokens": budget}

    def processor_options(self) -> dict[str, Any]:
        """The processor's keyword arguments for media: the images' budget."""
        options = super().processor_options()
        if self.image_tokens is not None and self.family.image_budget_option:
            options["images_kwargs"] = {self.family.image_budget_option: self.image_tokens}
        return options
