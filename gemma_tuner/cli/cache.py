"""``gemma-tuner cache``."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from gemma_tuner.cli.commands import command
from gemma_tuner.cli.opening import say
from gemma_tuner.cli.runs import print_table
from gemma_tuner.display import show_bytes
from gemma_tuner.errors import ConfigError
from gemma_tuner.streaming.options import StreamOptions

app = typer.Typer(
    no_args_is_help=True, help="Say what is kept for later runs, or remove what was not used."
)

# Folder in the cache -> what an entry is, and what it costs to be without.
_KINDS = {
    "manifests": ("*.arrow", "rows of data; read again"),
    "media": ("??/*.media", "of buckets; downloaded again"),
    "parts": ("*/", "rows of BigQuery; read and billed again"),
    "packed": ("*/", "bases in few bits; packed again"),
    "quarantine": ("*.jsonl", "what of the rows could not be used"),
    "locks": ("*.lock", "of manifests"),
}
_OF_MANIFESTS = ("quarantine", "locks")  # and removed after them
_DAY_SECONDS = 24 * 60 * 60

Place = Annotated[
    Path | None, typer.Option(help="The cache, where it is not ~/.cache/gemma_tuner.")
]


class _Entry(NamedTuple):
    path: Path
    num_bytes: int
    used_seconds: float  # since 1970


@app.command("list")
@command
def list_cache(*, cache_dir: Place = None) -> None:
    """Say how much of what is kept, and when any of it was last used."""
    rows = []
    for kind, (_, meaning) in _KINDS.items():
        entries = list(_list_entries(_find_cache(cache_dir), kind))
        if entries:
            newest = (time.time() - max(each.used_seconds for each in entries)) / _DAY_SECONDS
            rows.append(
                {
                    "kind": kind,
                    "entries": f"{len(entries):,}",
                    "size": show_bytes(sum(each.num_bytes for each in entries)),
                    "last used": f"{max(0, newest):.0f} days ago" if newest >= 1 else "today",
                    "what": meaning,
                }
            )
    print_table(rows)
    if not rows:
        say("nothing is kept")


@app.command()
@command
def prune(
    *,
    unused_days: Annotated[
        float, typer.Option(min=1, help="Keep what was used in so many days.")
    ] = 30.0,
    kind: Annotated[
        str | None, typer.Option(help=f"Only one of: {', '.join(_KINDS)}.", show_default=False)
    ] = None,
    cache_dir: Place = None,
) -> None:
    """Remove what was not used for some time; runs that need it make it anew."""
    if kind is not None and kind not in _KINDS:
        raise ConfigError(f"kind is {kind!r}; it may be {', '.join(_KINDS)}")
    since = time.time() - unused_days * _DAY_SECONDS
    cache = _find_cache(cache_dir)
    num_removed = num_bytes = 0
    for each in [kind] if kind else _KINDS:
        for entry in _list_entries(cache, each):
            manifest = cache / f"manifests/{entry.path.stem.partition('-')[0]}.arrow"
            is_needed = each in _OF_MANIFESTS and manifest.exists()
            if entry.used_seconds < since and not is_needed:
                if entry.path.is_dir():
                    shutil.rmtree(entry.path)
                else:
                    entry.path.unlink(missing_ok=True)
                num_removed, num_bytes = num_removed + 1, num_bytes + entry.num_bytes
    say(f"removed: {num_removed:,} entries, {show_bytes(num_bytes)}")


def _find_cache(cache_dir: Path | None) -> Path:
    return StreamOptions(cache_dir=cache_dir).folder


def _list_entries(cache: Path, kind: str) -> Iterator[_Entry]:
    pattern, _ = _KINDS[kind]
    for path in sorted((cache / kind).glob(pattern)):
        if path.is_symlink() or path.name.startswith("."):  # being written
            continue
        files = list(filter(Path.is_file, path.rglob("*"))) if path.is_dir() else [path]
        # Of files alone: listing a folder changes when it was read.
        if found := [file.stat() for file in files]:
            used = max(max(about.st_mtime, about.st_atime) for about in found)
            num_bytes = sum(about.st_size for about in found)
            yield _Entry(path, num_bytes, used)
