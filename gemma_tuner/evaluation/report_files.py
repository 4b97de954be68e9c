"""A report in a folder: JSON, Markdown, media of the worst examples; whole or not at all."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import soundfile

from gemma_tuner.disk import disk_errors_explained, replaced, temporary_sibling
from gemma_tuner.errors import CheckpointError, ConfigError
from gemma_tuner.evaluation.report import Report
from gemma_tuner.media.audio import SAMPLE_RATE_HZ
from gemma_tuner.records import Example, Image

_JSON, _MARKDOWN, _MEDIA = "report.json", "report.md", "media"


def check_output(output: str | Path) -> None:
    """Refuse a folder that cannot take a report, before anything is measured."""
    folder = Path(output)
    with _errors_explained(folder):
        if folder.exists() and any(folder.iterdir()) and not (folder / _JSON).is_file():
            raise ConfigError(
                f"output is the folder {folder.resolve().name!r}, which holds something other "
                "than a report; give a new folder"
            )
        folder.parent.mkdir(parents=True, exist_ok=True)
        with temporary_sibling(folder) as temporary:
            temporary.mkdir()


def write_report(report: Report, output: str | Path, worst: Mapping[str, Example]) -> Report:
    """Write a report; an earlier one in that folder is replaced once the new one is whole."""
    # worst: By key, media decoded. Returns: The report with the names of its media files.
    folder = Path(output)
    with _errors_explained(folder), replaced(folder) as temporary:
        temporary.mkdir()
        media = {
            key: tuple(f"{_MEDIA}/{n}" for n in write_media(example, temporary / _MEDIA, number))
            for number, (key, example) in enumerate(worst.items(), 1)
        }
        report = replace(report, media=media)
        (temporary / _JSON).write_text(report.to_json(), encoding="utf-8")
        (temporary / _MARKDOWN).write_text(report.to_markdown(len(worst)), encoding="utf-8")
    return report


def write_media(example: Example, folder: Path, number: int) -> Iterator[str]:
    """Write an example's images and clips; yield their names, which begin with its number."""
    for index, part in enumerate(example.media, 1):
        source: Any = part.source
        name = f"{number:03d}-{index}{'.png' if isinstance(part, Image) else '.wav'}"
        path = folder / name
        folder.mkdir(exist_ok=True)
        try:
            with replaced(path) as temporary:
                if isinstance(part, Image):
                    source.save(temporary, "PNG")
                else:
                    rate_hz = part.sample_rate_hz or SAMPLE_RATE_HZ
                    soundfile.write(temporary, source, rate_hz, subtype="FLOAT", format="WAV")
        except soundfile.LibsndfileError as error:
            raise OSError(errno.EIO, error.error_string) from None
        yield name


def _errors_explained(folder: Path) -> AbstractContextManager[None]:
    """Turn a disk's errors into a CheckpointError with a remedy."""
    return disk_errors_explained(
        lambda reason: CheckpointError(
            f"the report cannot be written to {folder.resolve().name!r} ({reason}); what was "
            "there is untouched. Free disk space, or give another folder as output"
        )
    )
