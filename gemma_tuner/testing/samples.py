"""Where the bundled sample sets are."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from gemma_tuner.errors import ConfigError

Modality = Literal["text", "image", "audio"]


def sample_data(modality: Modality) -> Path:
    """Return the folder of a bundled sample set: ``manifest.jsonl`` and the media it names.

    Each line of the manifest is one example: ``id``, ``split`` (``train`` or ``test``),
    ``prompt``, ``response``, and for media ``image`` or ``audio``, a name within the folder.

    Args:
        modality: ``text`` (240 short questions), ``image`` (160 drawn shapes) or ``audio``
            (160 synthesised words).

    Returns:
        A folder within the installed package, to be read only.

    Raises:
        ConfigError: Another modality.
    """
    if modality not in get_args(Modality):
        raise ConfigError(
            f"there is no sample set for modality {modality!r}; it may be "
            f"{', '.join(get_args(Modality))}"
        )
    return Path(__file__).parent / "samples" / modality
