"""Corpora of speech as their publishers lay them out: a text file of lines, and clips elsewhere.

======================  ==========================================================================
``*.trans.txt``         LibriSpeech, MLS: ``id text``, the clip has the id's name
``prompts-original``    VoxForge: the same
``text``, ``wav.scp``   Kaldi: ``id text`` and ``id path``; ``segments`` cuts the recordings
======================  ==========================================================================
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from gemma_tuner.errors import DataError, SourceError
from gemma_tuner.sources.formats.lines import DataFile, name_last, read_lines

TRANSCRIPT_COLUMNS = ("id", "audio", "text")
SEGMENT_COLUMNS = ("start", "end")
KALDI_FILES = ("text", "wav.scp", "segments")

Numbered = Iterator[tuple[int, Mapping[str, Any] | DataError]]


def is_transcript(name: str) -> bool:
    """Whether a file of this name holds lines of an id and what is said."""
    last = name.rpartition("/")[2]
    return last.endswith(".trans.txt") or last == "prompts-original"


def read_transcripts(file: DataFile) -> Numbered:
    """Read the lines of a file, whose clips are named by their ids."""
    for number, name, text in _read_pairs(file):
        yield number, {"id": name, "audio": name, "text": text}


def read_kaldi(file: DataFile, beside: Mapping[str, DataFile]) -> Numbered:
    """Read ``text`` by the recordings and segments beside it."""
    recordings = {name: path for _, name, path in _read_pairs(beside["wav.scp"])}
    segments: dict[str, list[str]] = {}
    if "segments" in beside:
        segments = {name: rest.split() for _, name, rest in _read_pairs(beside["segments"])}
    for number, name, text in _read_pairs(file):
        try:
            row = _find_recording(name, recordings, segments, f"{file.name}:{number}")
        except DataError as error:
            yield number, error
        else:
            yield number, {"id": name, "text": text, **row}


def _find_recording(
    name: str, recordings: Mapping[str, str], segments: Mapping[str, list[str]], origin: str
) -> dict[str, Any]:
    row: dict[str, Any] = {}
    recording = name
    if segments:
        try:
            recording, start, end = segments[name][:3]
            row = {"start": float(start), "end": float(end)}
        except (KeyError, ValueError):
            raise DataError(
                "segments has no line of a recording, a start and an end for it; add one",
                key=origin,
            ) from None
    path = recordings.get(recording, "")
    if not path or path.endswith("|"):
        what = "a command, which is never run" if path else "not there"
        raise DataError(
            f"its recording in wav.scp is {what}; name the file of the clip there", key=origin
        )
    return {"audio": path, **row}


def _read_pairs(file: DataFile) -> Iterator[tuple[int, str, str]]:
    for number, line in read_lines(file):
        if line.strip():
            name, _, rest = line.strip().partition(" ")
            if "\t" in name:
                name, _, rest = line.strip().partition("\t")
            if not rest:
                raise SourceError(
                    f"{name_last(file)!r} has no more than one word in line {number}; an id and "
                    "what belongs to it are expected"
                )
            yield number, name, rest.strip()
