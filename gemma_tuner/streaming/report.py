"""What a stream says of itself: a report in figures, and single examples for the eye."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gemma_tuner.records import Audio, Example, Part, Text

_SHOWN_CHARACTERS = 200


@dataclass(frozen=True, slots=True)
class StreamReport:
    """What a stream is made of, what was chosen by itself, and how far it is.

    Args:
        rows: Rows of the stream.
        subset: Which of the data's rows they are.
        files: Files that were read.
        format: What the files hold.
        layout: What the columns make.
        columns: Column by the part that it plays.
        unused_columns: Columns that play no part.
        rows_by_split: Rows met in all by the value of the column ``split``; empty without one.
        notes: What was defaulted, passed over or left out, with counts.
        manifest: The local file that holds the rows.
        manifest_bytes: Its size.
        fingerprint: SHA-256 of the data's content, the same wherever it lies.
        seed: Decides the order, with the epoch.
        shuffle: Whether rows are shuffled.
        epoch: The epoch under way, from 0.
        position: Examples of it that were handed out.
        handed_out: Examples that this object handed out in all.
    """

    rows: int
    subset: str
    files: int
    format: str
    layout: str
    columns: Mapping[str, str]
    unused_columns: tuple[str, ...]
    rows_by_split: Mapping[str, int]
    notes: tuple[str, ...]
    manifest: Path
    manifest_bytes: int
    fingerprint: str
    seed: int
    shuffle: bool
    epoch: int
    position: int
    handed_out: int

    def __str__(self) -> str:
        lines = [
            f"{self.rows:,} rows ({self.subset}) of {self.files:,} {self.format} "
            f"file{'s' if self.files != 1 else ''}, read as {self.layout}",
            f"columns: {', '.join(f'{part} = {name!r}' for part, name in self.columns.items())}",
        ]
        if self.unused_columns:
            lines.append(f"columns not used: {', '.join(map(repr, self.unused_columns))}")
        if len(self.rows_by_split) > 1:
            counts = ", ".join(f"{name} {count:,}" for name, count in self.rows_by_split.items())
            lines.append(f"rows of the data by split: {counts}")
        lines += self.notes
        order = f"shuffled with seed {self.seed}" if self.shuffle else "in file order"
        lines.append(
            f"{order}; epoch {self.epoch}, {self.position:,} of {self.rows:,} handed out "
            f"({self.handed_out:,} in all)"
        )
        lines.append(
            f"manifest {self.manifest.name}, {self.manifest_bytes:,} bytes, fingerprint "
            f"{self.fingerprint[:12]}"
        )
        return "\n".join(lines)


def show_example(example: Example) -> str:
    """Show an example: its key, and each turn with text cut short and sizes of media.

    Args:
        example: With media encoded or decoded.

    Returns:
        Lines of text, which hold contents of the example.
    """
    lines = [example.key]
    if example.document is not None:
        lines.append(f"  document: {_shorten(example.document)}")
    for turn in example.turns:
        parts = " ".join(_show_part(part) for part in turn.parts)
        fields = "".join(f" [{name}]" for name in turn.fields)
        lines.append(f"  {turn.role}: {parts}{fields}")
    if example.tools:
        lines.append(f"  tools: {len(example.tools)}")
    return "\n".join(lines)


def _show_part(part: Part) -> str:
    if isinstance(part, Text):
        return _shorten(part.text)
    if isinstance(part.source, str | bytes):
        return f"[{type(part).__name__.lower()}, not decoded]"
    if isinstance(part, Audio):
        return f"[audio {len(part.source) / (part.sample_rate_hz or 1):.2f} s]"
    return f"[image {part.source.width}x{part.source.height}]"


def _shorten(text: str) -> str:
    line = " ".join(text[: 2 * _SHOWN_CHARACTERS].split())
    if len(line) <= _SHOWN_CHARACTERS and len(text) <= 2 * _SHOWN_CHARACTERS:
        return line
    return f"{line[:_SHOWN_CHARACTERS]}… ({len(text):,} characters)"
