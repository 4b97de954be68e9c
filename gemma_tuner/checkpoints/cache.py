"""Checkpoints packed once: the same source on the same grid is found again the next time."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from gemma_tuner.checkpoints.packing import pack
from gemma_tuner.checkpoints.writing import COPIED
from gemma_tuner.disk import CACHE, disk_errors_explained, file_locked
from gemma_tuner.errors import CheckpointError
from gemma_tuner.log import announce
from gemma_tuner.models.few_bits.grids import Grid
from gemma_tuner.models.identity import portable_name

# Of what packing writes: one more where the same source would give other numbers or files.
_VERSION = 1
# Of a file: of weights the header, which names and places them, and the first.
_BEGINNING_BYTES = 2**20


def pack_once(
    source: str, commit: str | None, grid: Grid | None, fetch: Callable[[], Path]
) -> Path:
    """Find the packed form of a checkpoint in the cache, or put it there."""
    # grid: None for one that is quantised already, and keeps its numbers.
    # commit: Of a model on the Hub, whose files need not be here any more.
    # fetch: Finds the checkpoint's folder.
    name, state = portable_name(source) or "", commit or _fingerprint(fetch())
    digest = hashlib.sha256(f"{_VERSION} {grid} {name} {state}".encode()).hexdigest()
    cache = Path.home() / CACHE / "packed"
    entry = cache / f"{name.replace('/', '--')}-{grid}-{digest[:16]}"
    if entry.is_dir():
        with suppress(OSError):  # `gemma-tuner cache` asks when it was last used
            os.utime(entry / "config.json")
        return entry
    with disk_errors_explained(
        lambda reason: CheckpointError(
            f"{name} cannot be packed in the cache: {reason}. Pack it elsewhere, with pack or "
            "`gemma-tuner convert`, and load that folder"
        )
    ):
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        # One at a time: it takes all cores, and what lies there half-written is nobody's.
        with file_locked(
            cache / ".lock", lambda: announce(f"{name}: waiting for a process that packs")
        ):
            if entry.is_dir():
                return entry
            for killed in cache.glob(".*.tmp"):
                shutil.rmtree(killed)
            announce(f"{name}: is packed once, and kept in the cache")
            if grid is None:
                return pack(fetch(), entry)
            return pack(fetch(), entry, bits=grid.bits, grid=grid.kind, group=grid.group)


def _fingerprint(folder: Path) -> str:
    """Tell a checkpoint from what it was before, without reading all of it."""
    # By size and time too: training goes on under the same names and shapes. What is copied
    # elsewhere is packed anew, which is slow and right.
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in (*COPIED, ".safetensors", ".gguf"):
            about = file.stat()
            digest.update(f"{file.name} {about.st_size} {about.st_mtime_ns}".encode())
            with file.open("rb") as content:
                digest.update(content.read(_BEGINNING_BYTES))
    return digest.hexdigest()
