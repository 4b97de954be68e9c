"""A stream's report in figures, and single examples to look at."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_tuner.display import (
    ACCENT,
    element,
    escape,
    make_bar,
    make_card,
    quote_line,
    show_bytes,
)
from gemma_tuner.errors import ConfigError
from gemma_tuner.records import Audio, Example, Part, PinnedFile, StoredObject, Text, write_html

if TYPE_CHECKING:
    from gemma_tuner.storage.fetch import FetchCounts
    from gemma_tuner.streaming.view import DatasetView

_SHOWN_CHARACTERS = 200


@dataclass(frozen=True, slots=True)
class DatasetReport:
    """What one data set of a stream is made of, what was chosen by itself, and what it cost.

    Args:
        rows: Rows of it in the stream.
        subset: Which of the data's rows they are.
        share: How much of the stream is taken from it, 1 but in a mix.
        files: Files, tables or data sets that were read.
        format: What they hold.
        layout: What the columns make.
        columns: Column by the part that it plays.
        unused_columns: Columns that play no part.
        rows_by_split: Rows met in all by the value of the column ``split``; empty without one.
        splits_left_out: Splits that lie beside these files and were not read; none was asked for.
        notes: What was defaulted, passed over or left out, with counts, and what reading cost.
        bad_rows: Rows that could not be read and are not among ``rows``.
        written: When the source was read, as ISO 8601 in UTC.
        objects: Stored objects that the data set's rows refer to, to be fetched each epoch.
        object_bytes: Their size, as far as it is known.
        cache_budget_bytes: How much of them is kept on disk at most.
        manifest: The local file that holds the rows.
        manifest_bytes: Its size.
        fingerprint: SHA-256 of the data's content, the same wherever it lies.
        seed: Decides the order, with the epoch.
        shuffle: Whether rows are shuffled.
        fetched: What fetching did so far.
    """

    rows: int
    subset: str
    share: float
    files: int
    format: str
    layout: str
    columns: Mapping[str, str]
    unused_columns: tuple[str, ...]
    rows_by_split: Mapping[str, int]
    splits_left_out: tuple[str, ...]
    notes: tuple[str, ...]
    bad_rows: int
    written: str
    objects: int
    object_bytes: int
    cache_budget_bytes: int
    manifest: Path
    manifest_bytes: int
    fingerprint: str
    seed: int
    shuffle: bool
    fetched: FetchCounts

    def __str__(self) -> str:
        share = f"{self.share:.1%} of the mix: " if self.share < 1 else ""
        lines = [
            f"{share}{self.rows:,} rows ({self.subset}) of {self.files:,} {self.format} "
            f"file{'s' if self.files != 1 else ''}, read as {self.layout}",
            f"columns: {', '.join(f'{part} = {name!r}' for part, name in self.columns.items())}",
        ]
        if self.unused_columns:
            lines.append(f"columns not used: {', '.join(map(repr, self.unused_columns))}")
        if len(self.rows_by_split) > 1:
            counts = ", ".join(f"{name} {count:,}" for name, count in self.rows_by_split.items())
            lines.append(f"rows of the data by split: {counts}")
        lines += self.notes
        if self.bad_rows:
            lines.append(f"rows that could not be read, in quarantine: {self.bad_rows:,}")
        if self.objects:
            lines.append(
                f"media in buckets: {self.objects:,} objects, {show_bytes(self.object_bytes)}; "
                "the first epoch downloads those of its rows, later ones what the cache "
                f"({show_bytes(self.cache_budget_bytes)} at most) does not hold"
            )
        order = f"shuffled with seed {self.seed}" if self.shuffle else "in file order"
        lines.append(
            f"{order}; manifest {self.manifest.name} of {self.written}, "
            f"{self.manifest_bytes:,} bytes, fingerprint {self.fingerprint[:12]}"
        )
        return "\n".join(map(quote_line, lines))


@dataclass(frozen=True, slots=True)
class StreamReport:
    """What a stream is made of and how far it is.

    Attributes of the only data set of a stream that is no mix can be asked for here as well.

    Args:
        parts: Its data sets; more than one in a mix.
        epoch: The epoch under way, from 0.
        position: Slots of it that were handed out.
        handed_out: Examples that this object handed out in all.
        passed_over: Examples that it passed over because they could not be used.
        wait_seconds: Time spent waiting for examples.
    """

    parts: tuple[DatasetReport, ...]
    epoch: int
    position: int
    handed_out: int
    passed_over: int
    wait_seconds: float

    @property
    def rows(self) -> int:
        """Rows of all data sets."""
        return sum(part.rows for part in self.parts)

    def __getattr__(self, name: str) -> Any:
        if len(self.parts) == 1 and not name.startswith("_"):
            return getattr(self.parts[0], name)
        raise AttributeError(f"the report of a mix has no {name!r}; ask each of its parts")

    @property
    def progress(self) -> str:
        """How far it is, and what was fetched and passed over on the way."""
        lines = [
            f"epoch {self.epoch}, {self.position:,} of {self.rows:,} handed out "
            f"({self.handed_out:,} in all), waited {self.wait_seconds:.1f} s"
        ]
        for number, part in enumerate(self.parts, 1):
            if part.fetched.requests or part.fetched.hits:
                which = f" of data set {number}" if len(self.parts) > 1 else ""
                lines.append(f"media{which}: {_show_fetched(part.fetched)}")
        if self.passed_over:
            lines.append(f"passed over, in quarantine: {self.passed_over:,}")
        return "\n".join(lines)

    def __str__(self) -> str:
        return "\n".join([*map(str, self.parts), self.progress])

    def to_html(self) -> str:
        """Write the report as notebooks show it, with a bar of how far the epoch is."""
        handed_out = (self.position / max(1, self.rows), ACCENT, "handed out")
        return make_card(
            f"mix of {len(self.parts)} data sets" if len(self.parts) > 1 else "data set",
            f"{self.rows:,} rows an epoch",
            *(_list_facts(str(part)) for part in self.parts),
            make_bar([handed_out], f"{self.position} of {self.rows} rows"),
            _list_facts(self.progress),
        )

    def _repr_html_(self) -> str:
        return self.to_html()


@dataclass(frozen=True, slots=True)
class StreamPreview:
    """Some rows of the data, to look at: ``print`` it, or let a notebook show it.

    Args:
        examples: With their media decoded.
    """

    examples: tuple[Example, ...]

    def __str__(self) -> str:
        return "\n\n".join(map(show_example, self.examples))

    def _repr_html_(self) -> str:
        return "".join(map(write_html, self.examples))


def report_view(view: DatasetView, *, share: float, cache_bytes: int) -> DatasetReport:
    """Say what one data set of a stream is made of."""
    manifest, summary = view.manifest, view.manifest.summary
    return DatasetReport(
        rows=len(view),
        subset=view.subset,
        share=share,
        files=summary["num_files"],
        format=summary["format"],
        layout=summary["layout"],
        columns=summary["columns"],
        unused_columns=tuple(summary["unused"]),
        rows_by_split=summary["splits"],
        splits_left_out=tuple(summary.get("left_out", ())),
        notes=tuple(summary["notes"]),
        bad_rows=summary["bad_rows"],
        written=summary["written"],
        objects=manifest.num_objects,
        object_bytes=manifest.object_bytes,
        cache_budget_bytes=cache_bytes,
        manifest=manifest.path,
        manifest_bytes=manifest.num_bytes,
        fingerprint=manifest.fingerprint,
        seed=view.seed,
        shuffle=view.shuffle,
        fetched=view.fetcher.counts,
    )


def explain_absence(
    parts: Sequence[DatasetReport], kinds: Collection[str], what: str
) -> ConfigError:
    """Make the error for data of which no row holds the media that something is for."""
    columns = ", ".join(
        f"{part} = {name!r}" for report in parts for part, name in report.columns.items()
    )
    return ConfigError(
        f"{what}, and the data is read without {' or '.join(kinds)}"
        f"{f': as {columns}' if columns else ''}; name the column with "
        f"{' or '.join(f'{kind}=' for kind in kinds)}, or train on text alone: modality='text', "
        "TextCollator, no targets in a tower"
    )


def _show_fetched(counts: FetchCounts) -> str:
    failures = ", ".join(
        f"{number:,} {kind}" for kind, number in counts.failures.items() if number
    )
    room = "; {:,} not kept: no room in the cache or on its disk (see FetchConfig)"
    lacking = room.format(counts.not_kept) if counts.not_kept else ""
    return (
        f"{show_bytes(counts.bytes_downloaded)} in {counts.requests:,} requests, "
        f"{counts.hits:,} from the cache; {counts.retries:,} retries, {counts.hedges:,} hedges "
        f"({counts.hedges_won:,} answered first), failures: {failures or 'none'}{lacking}"
    )


def _list_facts(text: str) -> str:
    """Lines of text as a list below the first of them."""
    first, *others = text.splitlines()
    items = "".join(element("li", escape(line)) for line in others)
    return element("div", escape(first)) + element("ul", items, "margin:0 0 6px 0")


def show_example(example: Example) -> str:
    """Show an example: its key, and each turn with text cut short and sizes of media."""
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
    if isinstance(part.source, str | bytes | StoredObject | PinnedFile):
        return f"[{type(part).__name__.lower()}, not decoded]"
    if isinstance(part, Audio):
        return f"[audio {len(part.source) / (part.sample_rate_hz or 1):.2f} s]"
    return f"[image {part.source.width}x{part.source.height}]"


def _shorten(text: str) -> str:
    line = " ".join(text[: 2 * _SHOWN_CHARACTERS].split())
    if len(line) <= _SHOWN_CHARACTERS and len(text) <= 2 * _SHOWN_CHARACTERS:
        return line
    return f"{line[:_SHOWN_CHARACTERS]}… ({len(text):,} characters)"
