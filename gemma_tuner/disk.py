"""Files and folders that are either whole or not there, and a disk's errors in words."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

CACHE = Path(".cache", "gemma_tuner")
"""Below the user's home: where everything lies that can be made again."""

# File headers, JSON and the file system's own blocks, on top of what is counted.
_MARGIN_BYTES = 16 * 2**20
# Source: RENAME_EXCHANGE of linux/fs.h, RENAME_SWAP of macOS' sys/stdio.h.
_SWAP = 2
_PACKAGE = Path(__file__).resolve().parent


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yield a hidden sibling that takes a path's place once the block has made it."""
    with temporary_sibling(path) as temporary:
        yield temporary
        sync_all(temporary)
        if not (path.is_dir() and temporary.is_dir()):
            temporary.replace(path)
        elif not _swap(temporary, path):  # which leaves the old one to be removed
            _hide(path)
            temporary.replace(path)
        sync(path.parent)
    with suppress(OSError):  # the next one that is hidden under this name tries again
        _remove(_hidden(path))


@contextmanager
def temporary_sibling(path: Path) -> Iterator[Path]:
    """Yield a hidden path beside another, and remove afterwards what the block leaves there."""
    temporary = path.with_name(f".{path.name}.tmp")
    _remove(temporary)
    try:
        yield temporary
    finally:
        with suppress(OSError):  # which would hide the block's own error
            _remove(temporary)


def find_home(folder: Path) -> Path:
    """Where the files of a folder lie, links followed; of a snapshot in the Hub's cache, above."""
    home = folder.resolve()
    for each in (home, *home.parents):
        if each == _PACKAGE:  # its bundled samples share their media
            return each
        if each.parent.name == "snapshots" and (each.parent.parent / "blobs").is_dir():
            return each.parent.parent
    return home


def is_within(path: Path, homes: Iterable[Path]) -> bool:
    """Whether a path, its links followed, lies in one of the places that ``find_home`` names."""
    place = path.resolve()
    return any(place.is_relative_to(home) for home in homes)


@contextmanager
def file_locked(path: Path, say_waiting: Callable[[], object]) -> Iterator[None]:
    """Hold a file against other processes that do; it is made where it is not there."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say_waiting()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def remove_folder(folder: Path) -> None:
    """Delete a folder; a kill meanwhile leaves no half of it, but a hidden ``.name.old``."""
    _remove(_hide(folder))


def sync(path: Path) -> None:
    """Force a file to the disk, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_all(path: Path) -> None:
    """Force a file to the disk, or a folder with all that is in it."""
    for each in (*path.rglob("*"), path):
        sync(each)


def check_room(folder: Path, num_bytes: int) -> None:
    """Fail now where a disk would be full halfway."""
    needed, free = num_bytes + _MARGIN_BYTES, shutil.disk_usage(folder).free
    if free < needed:
        shown = f"{-(-needed // 10**6):,} MB are needed and {free // 10**6:,} MB are free"
        raise OSError(errno.ENOSPC, shown)


@contextmanager
def disk_errors_explained(
    explain: Callable[[str], Exception], *others: type[Exception]
) -> Iterator[None]:
    """Turn what can go wrong with a disk into an error with a remedy."""
    try:
        yield
    except (OSError, *others) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise explain(reason or type(error).__name__) from None


def _swap(one: Path, other: Path) -> bool:
    """Let two paths change places in one moment, where the system and its file system can."""
    libc = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(one), os.fsencode(other)
    if sys.platform == "darwin":
        return libc.renamex_np(*names, _SWAP) == 0
    here = -100  # AT_FDCWD
    return hasattr(libc, "renameat2") and (
        libc.renameat2(here, names[0], here, names[1], ctypes.c_uint(_SWAP)) == 0
    )


def _hide(path: Path) -> Path:
    _remove(_hidden(path))
    return path.rename(_hidden(path))


def _hidden(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
