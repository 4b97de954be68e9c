"""The page that shows a run while it trains, served by a second process from the run's files."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from gemma_tuner.errors import ConfigError

MODULE = "gemma_tuner.watch"


def require_page() -> None:
    """Refuse where what the page is built on is not installed."""
    if find_spec("nicegui") is None:
        raise ConfigError(
            "the watch page needs the package nicegui; install it with: "
            "pip install 'gemma_tuner[watch]'"
        )


def open_page(output_dir: str | Path) -> str:
    """Serve a run's page on this machine until this process ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [str(output_dir), "--port", str(port), "--parent-pid", str(os.getpid())]
    token = secrets.token_urlsafe()
    process = subprocess.Popen(
        [sys.executable, "-m", MODULE, *arguments],
        stdin=subprocess.PIPE,  # everyone on the machine may read a process's arguments
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for the run, whose last step the page shows
    )
    if process.stdin is not None:
        process.stdin.write(token.encode())
        process.stdin.close()
    return write_address(port, token)


def write_address(port: int, token: str) -> str:
    """The address by which a browser on this machine opens a page."""
    return f"http://127.0.0.1:{port}/?token={token}"
