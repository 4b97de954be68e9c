"""One folder, one run: a lock on a run's folder that ends with its process, however that ends."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gemma_tuner.disk import disk_errors_explained
from gemma_tuner.errors import CheckpointError, ConfigError
from gemma_tuner.log import announce
from gemma_tuner.training.processes import Processes

FILE = ".lock"
"""Its name in a run's folder; it holds its owner's process id."""

# What file systems answer that have no locks.
_WITHOUT_LOCKS = (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK)


@contextmanager
def folder_locked(output_dir: str | Path, processes: Processes) -> Iterator[None]:
    """Hold a run's folder; where a process trains in it, refuse before anything is written."""
    descriptor = _acquire(Path(output_dir)) if processes.is_main else None
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def refuse_running(output_dir: str | Path) -> None:
    """Refuse a folder in which a process trains; the processes of one run may ask at once."""
    if (Path(output_dir) / FILE).is_file():
        os.close(_acquire(Path(output_dir), is_asking=True))


def _acquire(folder: Path, *, is_asking: bool = False) -> int:
    with disk_errors_explained(
        lambda reason: CheckpointError(
            f"a run cannot be written in {folder.name!r} ({reason}). Free disk space there, or "
            "choose another output_dir"
        )
    ):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / FILE, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_NB | (fcntl.LOCK_SH if is_asking else fcntl.LOCK_EX))
        if not is_asking:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
    except BlockingIOError:
        owner = os.pread(descriptor, 20, 0).decode("ascii", "replace")
        os.close(descriptor)
        raise ConfigError(
            f"a run is under way in output_dir {folder.name!r} (process {owner or 'unknown'}); "
            "give this one another output_dir, or end that process first"
        ) from None
    except OSError as error:
        if error.errno not in _WITHOUT_LOCKS:
            os.close(descriptor)
            raise CheckpointError(
                f"the folder {folder.name!r} cannot be locked for one run ({error.strerror}); "
                "free disk space there, or choose another output_dir"
            ) from None
        announce(
            f"the file system of {folder.name!r} has no locks: nothing keeps a second run out of "
            "this folder"
        )
    return descriptor
