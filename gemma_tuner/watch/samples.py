"""The model's answers at intervals, and the media that belong to them.

``samples.jsonl`` in a run's folder has the fields of
:class:`gemma_tuner.evaluation.samples.SampleRecord`, and may have two more::

    {"step": 40, "key": "tickets:17", "prompt": "...", "reference": "...", "prediction": "...",
     "media": ["17.png"],                         files in the run's folder samples/
     "tokens": [["The", 0.91], [" cat", 0.12]]}   the reference's tokens, and the probability that
                                                  the model gave to each after those before it
"""

from __future__ import annotations

import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_tuner.watch.history import number, whole

FOLDER = "samples"
"""The folder of a run that holds the media of its samples."""

MEDIA_TYPES = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".webp": "image/webp",
    ".wav": "audio/wav",
    ".flac": "audio/flac",
    ".mp3": "audio/mpeg",
    ".ogg": "audio/ogg",
}
"""The types that are served, by the end of a file's name; none can hold a script."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer after so many steps."""

    step: int
    key: str
    prompt: str
    reference: str
    prediction: str
    media: tuple[str, ...] = ()
    tokens: tuple[tuple[str, float], ...] = ()

    @property
    def confidence(self) -> float | None:
        """The mean probability of the reference's tokens; None where there are none."""
        if not self.tokens:
            return None
        return sum(probability for _, probability in self.tokens) / len(self.tokens)


def read_sample(record: Mapping[str, Any]) -> Sample:
    """Make a sample of a line; what is missing or of another kind is empty."""
    lists = {name: found for name, found in record.items() if isinstance(found, list)}
    return Sample(
        step=whole(record.get("step")),
        key=_text(record.get("key")),
        prompt=_text(record.get("prompt")),
        reference=_text(record.get("reference")),
        prediction=_text(record.get("prediction")),
        media=tuple(name for name in lists.get("media", ()) if isinstance(name, str)),
        tokens=tuple(
            (_text(token[0]), probability)
            for token in lists.get("tokens", ())
            if isinstance(token, list)
            and len(token) == 2
            and 0 <= (probability := number(token[1])) <= 1
        ),
    )


def find_media(run_folder: Path, name: str) -> Path | None:
    """A plain file of a known type that lies directly in the folder of samples, or None."""
    if "/" in name or "\\" in name or "\0" in name or name.startswith("."):
        return None
    path = run_folder / FOLDER / name
    if path.suffix.lower() not in MEDIA_TYPES:
        return None
    try:
        # A link, of the file or of the folder, would lead elsewhere.
        is_plain = stat.S_ISREG(path.lstat().st_mode) and not path.parent.is_symlink()
    except OSError:
        return None
    return path if is_plain else None


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""
