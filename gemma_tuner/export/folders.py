"""Output folders and files that are either whole or not there."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from gemma_tuner.errors import CheckpointError
from gemma_tuner.streaming.disk import sync

# Configurations, tokenizer, headers and the file system's own blocks, on top of the tensors.
_MARGIN_BYTES = 64 * 2**20


@contextmanager
def new_folder(path: str | Path, num_bytes: int) -> Iterator[Path]:
    """Yield a hidden sibling that takes the place of ``path`` once the block has filled it.

    If the block fails, the sibling is removed; what a killed export left there is removed by the
    next one.

    Args:
        path: The folder that shall be there afterwards.
        num_bytes: How large the tensors in it will be.

    Raises:
        CheckpointError: Something is there already, the disk has no room, or it fails while it is
            written.
    """
    with _new_output(Path(path), num_bytes) as temporary:
        temporary.mkdir()
        yield temporary
        for file in temporary.iterdir():
            sync(file)


@contextmanager
def new_file(path: str | Path, num_bytes: int) -> Iterator[Path]:
    """Yield the path of a hidden sibling that takes the place of ``path``, as :func:`new_folder`.

    Args:
        path: The file that shall be there afterwards.
        num_bytes: How large the tensors in it will be.

    Raises:
        CheckpointError: Something is there already, the disk has no room, or it fails while it is
            written.
    """
    with _new_output(Path(path), num_bytes) as temporary:
        yield temporary


@contextmanager
def _new_output(path: Path, num_bytes: int) -> Iterator[Path]:
    if path.exists():
        raise CheckpointError(
            f"{path.resolve().name!r} exists already; delete it, or choose another name"
        )
    temporary = path.with_name(f".{path.name}.tmp")
    with disk_errors_explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(temporary)
        _check_room(path.parent, num_bytes)
        try:
            yield temporary
            sync(temporary)
            temporary.rename(path)
        except BaseException:
            _remove(temporary)
            raise
        sync(path.parent)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def disk_errors_explained(folder: Path) -> Iterator[None]:
    """Turn what can go wrong with a disk into a CheckpointError with a remedy."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        # An OSError's own message holds the path.
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise CheckpointError(
            f"cannot write {folder.resolve().name!r}: {reason or type(error).__name__}. Nothing "
            "half-written is left; free disk space there, or choose another folder"
        ) from None


def _check_room(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < num_bytes + _MARGIN_BYTES:
        raise OSError(
            errno.ENOSPC,
            f"the disk has {free / 1e9:.2f} GB free and {num_bytes / 1e9:.2f} GB are needed",
        )
