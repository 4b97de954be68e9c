"""Folders that are either whole or not there, and a disk's errors in words."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from gemma_tuner.errors import CheckpointError
from gemma_tuner.streaming.disk import sync

# File headers, JSON and the file system's own blocks, on top of the tensors.
_MARGIN_BYTES = 16 * 2**20


@contextmanager
def new_folder(folder: Path) -> Iterator[None]:
    """Make an empty folder; if the block fails, remove it with all that is in it.

    Args:
        folder: Where; what an earlier attempt has left there is removed.
    """
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """Yield a hidden sibling that takes ``folder``'s place once the block has filled it.

    Args:
        folder: What is there stays until its successor is whole and on the disk.

    Yields:
        The sibling.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    with new_folder(temporary):
        yield temporary
        sync_folder(temporary)
        old = hide(folder) if folder.exists() else None
        temporary.rename(folder)
        sync(folder.parent)
    if old is not None:
        shutil.rmtree(old)


def hide(folder: Path) -> Path:
    """Rename a folder, so that a kill while it is deleted leaves no half of it."""
    return folder.rename(folder.with_name(f".{folder.name}.old"))


def sync_folder(folder: Path) -> None:
    """Force a folder and the files in it to the disk."""
    for path in folder.iterdir():
        sync(path)
    sync(folder)


def check_disk_space(folder: Path, tensors: list[Tensor]) -> None:
    """Fail now where tensors would fill the disk halfway.

    Args:
        folder: On the disk in question.
        tensors: What shall be written to it.

    Raises:
        OSError: There is no room.
    """
    needed = sum(tensor.nbytes for tensor in tensors) + _MARGIN_BYTES
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{needed} bytes are needed and {free} are free")


@contextmanager
def errors_explained(what: str, folder: Path) -> Iterator[None]:
    """Turn what can go wrong with a disk into a CheckpointError with a remedy.

    Args:
        what: What the block does, such as "save an adapter".
        folder: Where.

    Raises:
        CheckpointError: Instead of the block's OSError or SafetensorError.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        # An OSError's own message holds the path.
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise CheckpointError(
            f"cannot {what} in {folder.resolve().name!r}: {reason or type(error).__name__}. What "
            "was saved before is untouched. Free disk space there, or choose another folder, and "
            "resume"
        ) from None
