"""Where the bundled sample sets are."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from gemma_tuner.errors import ConfigError

Modality = Literal["text", "image", "audio"]
SampleSet = Literal["text", "image", "audio", "chat", "vqa", "translation", "multimodal"]


def sample_data(modality: SampleSet) -> Path:
    """Return the folder of a bundled sample set: ``manifest.jsonl`` and the media it names.

    Each line of the manifest is one example: ``id``, ``split`` (``train`` or ``test``),
    ``prompt``, ``response`` (``messages`` in ``chat``), and for media ``image`` or ``audio``, a
    path from the folder.

    Args:
        modality: ``text`` (240 short questions), ``image`` (160 drawn shapes) or ``audio``
            (160 synthesised words); ``chat`` (88 conversations of two questions, in two
            languages); ``vqa`` (160 questions about the shapes), ``translation`` (what the words
            mean in English) and ``multimodal`` (160 spoken questions about the shapes), which use
            the pictures and sounds of the first three.

    Returns:
        A folder within the installed package, to be read only.

    Raises:
        ConfigError: Another set.
    """
    if modality not in get_args(SampleSet):
        raise ConfigError(
            f"there is no sample set for modality {modality!r}; it may be "
            f"{', '.join(get_args(SampleSet))}"
        )
    return Path(__file__).parent / "samples" / modality
