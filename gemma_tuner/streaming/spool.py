"""Reading a source once into its manifest, or finding the manifest that was written before."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from gemma_tuner.errors import DataError, SourceError
from gemma_tuner.log import logger
from gemma_tuner.sources.examples import Outcome, Source
from gemma_tuner.sources.pins import pin_files, pin_media
from gemma_tuner.storage.stores import Stores
from gemma_tuner.streaming.manifest import FORMAT_VERSION, Manifest, write_manifest
from gemma_tuner.streaming.quarantine import (
    BadExample,
    Budget,
    Quarantine,
    count_reasons,
    read_reason,
)


def open_manifest(
    source: Source,
    stores: Stores,
    *,
    folder: Path,
    budget: Budget,
    refresh: bool = False,
    discard: Callable[[], None] = lambda: None,
) -> tuple[Manifest, Quarantine]:
    """Open the manifest of a source, after writing it where there is none that can be used."""
    # Of several processes that need it at the same time one writes it, and the others wait.
    name = name_source(source)
    path = folder / "manifests" / f"{name}.arrow"
    outdated = _stamp(path) if refresh else None
    manifest = _find(path, budget, outdated)
    if manifest is None:
        with _locked(folder, name):
            manifest = _find(path, budget, outdated)
            if manifest is None:
                _sweep(folder)
                if refresh:
                    discard()
                _write(path, source, stores, folder / "quarantine", budget)
                discard()
                manifest = Manifest(path)
    # Manifests of earlier versions do not name theirs.
    kept = folder / "quarantine" / manifest.summary.get("quarantine", f"{name}.jsonl")
    return manifest, Quarantine(kept, budget)


def name_source(source: Source) -> str:
    """Return a name for what is kept of a source, which differs whenever its examples may."""
    identity = json.dumps([FORMAT_VERSION, source.read_identity()], sort_keys=True)
    return hashlib.sha256(identity.encode()).hexdigest()[:32]


def _stamp(path: Path) -> tuple[int, int] | None:
    """Return what tells a file from the one that takes its place: no clock is trusted for that."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def _sweep(folder: Path) -> None:
    """Remove what killed writers left half written: whoever writes still holds the lock."""
    for path in (folder / "manifests").glob(".*.arrow.tmp"):
        name = path.name.removeprefix(".").removesuffix(".arrow.tmp")
        with suppress(OSError, Timeout), _lock(folder, name).acquire(blocking=False):
            path.unlink(missing_ok=True)


def _find(path: Path, budget: Budget, outdated: tuple[int, int] | None) -> Manifest | None:
    stamp = _stamp(path)
    if stamp is None or stamp == outdated:
        return None
    try:
        manifest = Manifest(path)
    except SourceError as error:
        logger.warning("%s; it is written anew", error)
        return None
    with suppress(OSError):  # `gemma-tuner cache` asks when it was last used
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
    # A manifest that was written with a larger budget lacks rows which this one asks about.
    bad_rows = manifest.summary["bad_rows"]
    return manifest if bad_rows <= budget.count_allowed(len(manifest) + bad_rows) else None


def _write(
    path: Path,
    source: Source,
    stores: Stores,
    quarantines: Path,
    budget: Budget,
) -> None:
    tally = _Tally(budget)
    name = ""

    def read_summary() -> dict[str, Any]:
        nonlocal name
        tally.check_all()
        # Its rows that cannot be used are named for what they are, and written before the manifest
        # that names them takes its place: a kill leaves the old ones with the old, or both new.
        name = f"{path.stem}-{hashlib.sha256(repr(tally.records).encode()).hexdigest()[:16]}.jsonl"
        Quarantine(quarantines / name, budget).replace(tally.records)
        return {
            **source.read_summary(),
            "bad_rows": len(tally.records),
            "quarantine": name,
            "written": datetime.now(UTC).isoformat(timespec="seconds"),
        }

    write_manifest(
        path,
        tally.count(pin_media(pin_files(source), stores)),
        root=source.root,
        read_summary=read_summary,
        pass_over=tally.pass_over,
    )
    for other in quarantines.glob(f"{path.stem}*"):
        if other.name != name:
            other.unlink(missing_ok=True)


class _Tally:
    """Counts rows as they are written, and those that cannot be used against their budget."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._num_rows = 0
        self._num_consecutive = 0
        self._latest: tuple[int, DataError] | None = None
        self.records: list[BadExample] = []

    def count(self, outcomes: Iterator[tuple[str, Outcome]]) -> Iterator[tuple[str, Outcome]]:
        for outcome in outcomes:
            self._num_rows += 1
            yield outcome
        if self._num_rows and len(self.records) == self._num_rows:
            raise SourceError(
                f"none of the {self._num_rows:,} rows can be used: {count_reasons(self.records)}. "
                "Mend the data, or name the columns to use by keyword"
            )

    def pass_over(self, origin: str, error: DataError) -> None:
        """Note a row that cannot be used, and raise where the first or a row of them is one."""
        budget = self._budget
        if not budget.max_bad_fraction:
            raise DataError(
                f"{read_reason(error)} ({self._num_rows - 1:,} rows were fine)", key=error.key
            ) from error.__cause__
        is_next = self._latest is not None and self._latest[0] == self._num_rows - 1
        self._num_consecutive = self._num_consecutive + 1 if is_next else 1
        self._latest = (self._num_rows, error)
        self.records.append(BadExample.explain(error, origin, "row"))
        if self._num_consecutive > budget.max_consecutive_bad:
            self.check_all()

    def check_all(self) -> None:
        """Raise if the rows read so far hold more bad ones than the budget allows."""
        if self._latest is not None:
            self._budget.check(
                self._latest[1],
                bad=len(self.records),
                consecutive=self._num_consecutive,
                rows=self._num_rows,
                read_records=lambda: self.records,
            )


def _lock(folder: Path, name: str) -> FileLock:
    # Preserved: no soft lock takes its place, which would outlive a killed process.
    return FileLock(folder / "locks" / f"{name}.lock", mode=0o600, preserve_lock_file=True)


@contextmanager
def _locked(folder: Path, name: str) -> Iterator[None]:
    """Hold the lock of a manifest; it is released when its holder ends, however that is."""
    try:
        for path in (folder, folder / "locks"):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = _lock(folder, name)
        lock.acquire()
    except OSError as error:
        raise SourceError(
            f"the manifest cannot be written to the folder {folder.name!r} ({error.strerror}); "
            "free some space there, or choose another by cache_dir="
        ) from None
    try:
        yield
    finally:
        lock.release()
