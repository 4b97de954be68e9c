"""Decode the media of a whole example."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gemma_tuner.media.audio import SAMPLE_RATE_HZ, decode_audio
from gemma_tuner.media.encoded import read_uri_scheme
from gemma_tuner.media.image import decode_image
from gemma_tuner.media.pinned import check_pinned
from gemma_tuner.records import Audio, Example, Image, PinnedFile


def load_media(example: Example, *, root: Path | None = None, is_blank: bool = False) -> Example:
    """Replace every image and clip of an example by its decoded form, or by a blank as large."""
    # Returns: The example with upright RGB images and 16 kHz mono float32 samples in place; the
    # same object where there is nothing to decode, so calling it twice costs nothing.

    def load(part: Image | Audio) -> Image | Audio:
        source = _resolve(part.source, root, example.key)
        if isinstance(part, Image):
            image = decode_image(source, key=example.key, is_blank=is_blank)
            return part if image is part.source else Image(image)
        samples = decode_audio(
            source,
            key=example.key,
            sample_rate_hz=part.sample_rate_hz,
            start_seconds=part.start_seconds,
            duration_seconds=part.duration_seconds,
            is_blank=is_blank,
        )
        is_same = samples is part.source and part.duration_seconds is None
        return part if is_same else Audio(samples, SAMPLE_RATE_HZ)

    return example.replace_media(load)


def _resolve(source: Any, root: Path | None, key: str) -> Any:
    """Place a path under ``root``, where a pinned file is what it was."""
    if root is None:
        return source
    if isinstance(source, PinnedFile):
        path = root / source.path
        check_pinned(path, source, key=key)
        return path
    if not isinstance(source, str) or read_uri_scheme(source) is not None:
        return source
    return root / source
