"""Decode the media of a whole example."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from gemma_tuner.media.audio import SAMPLE_RATE_HZ, decode_audio
from gemma_tuner.media.encoded import read_uri_scheme
from gemma_tuner.media.image import decode_image
from gemma_tuner.records import Audio, Example, Image, Part, Turn

Source = TypeVar("Source")


def load_media(example: Example, *, root: Path | None = None) -> Example:
    """Replace every picture and sound of an example by its decoded form.

    Args:
        example: Turns with media as local paths, encoded bytes, or decoded already.
        root: The folder that relative paths start from; None is the working directory.

    Returns:
        The example with upright RGB pictures and 16 kHz mono float32 samples in place; the same
        object where there is nothing to decode, so calling it twice costs nothing.

    Raises:
        DataError: A part that cannot be decoded, or a URI: nothing is fetched here.
    """
    turns = tuple(_load_turn(turn, example.key, root) for turn in example.turns)
    if all(new is old for new, old in zip(turns, example.turns, strict=True)):
        return example
    return replace(example, turns=turns)


def _load_turn(turn: Turn, key: str, root: Path | None) -> Turn:
    parts = tuple(_load_part(part, key, root) for part in turn.parts)
    if all(new is old for new, old in zip(parts, turn.parts, strict=True)):
        return turn
    return replace(turn, parts=parts)


def _load_part(part: Part, key: str, root: Path | None) -> Part:
    if isinstance(part, Image):
        picture = decode_image(_resolve(part.source, root), key=key)
        return part if picture is part.source else Image(picture)
    if isinstance(part, Audio):
        samples = decode_audio(
            _resolve(part.source, root), key=key, sample_rate_hz=part.sample_rate_hz
        )
        return part if samples is part.source else Audio(samples, SAMPLE_RATE_HZ)
    return part


def _resolve(source: Source, root: Path | None) -> Source | Path:
    """Place a relative path under ``root``; leave URIs and everything else as they are."""
    if root is None or not isinstance(source, str) or read_uri_scheme(source) is not None:
        return source
    return root / source
