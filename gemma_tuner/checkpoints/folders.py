"""New folders and files that are either whole or not there, and a bar while they are written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError

from gemma_tuner.checks import check_path
from gemma_tuner.disk import check_room, disk_errors_explained, replaced
from gemma_tuner.errors import CheckpointError

# The tokenizer and configurations, which go along with the tensors.
_SETTINGS_BYTES = 48 * 2**20


@contextmanager
def new_folder(path: str | Path, num_bytes: int) -> Iterator[Path]:
    """Yield a hidden sibling that becomes the folder ``path`` once the block has filled it."""
    with new_file(path, num_bytes) as temporary:
        temporary.mkdir()
        yield temporary


@contextmanager
def new_file(path: str | Path, num_bytes: int) -> Iterator[Path]:
    """Yield a hidden path that becomes the file ``path`` once the block has written it."""
    check_path("path", path)
    path = Path(path)
    _refuse_existing(path)
    with disk_errors_explained(
        lambda reason: CheckpointError(
            f"cannot write {path.resolve().name!r}: {reason}. Nothing half-written is left; free "
            "disk space there, or choose another folder"
        ),
        SafetensorError,
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        check_room(path.parent, num_bytes + _SETTINGS_BYTES)
        with replaced(path) as temporary:
            yield temporary
            _refuse_existing(path)  # an export takes minutes


@contextmanager
def progress_shown(what: str, num_bytes: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on stderr."""
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn()
    console = Console(stderr=True)
    # Without widgets, notebooks cannot show it.
    with Progress(
        *columns, TimeRemainingColumn(), console=console, disable=console.is_jupyter
    ) as progress:
        task = progress.add_task(what, total=num_bytes)
        yield partial(progress.advance, task)


def _refuse_existing(path: Path) -> None:
    if path.exists():
        raise CheckpointError(
            f"{path.resolve().name!r} exists already; delete it, or choose another name"
        )
