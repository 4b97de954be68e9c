"""The command line of the watch page; the page's packages are loaded when it runs."""

from __future__ import annotations

import sys
import webbrowser
from pathlib import Path
from typing import Annotated

import typer


def watch(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN", help="A run's folder; several are compared."),
    ],
    port: Annotated[
        int,
        typer.Option(
            metavar="PORT", min=0, max=65535, show_default="any free one", help="Where to listen."
        ),
    ] = 0,
    open_browser: Annotated[  # noqa: FBT002 - Typer reads it
        bool, typer.Option("--open", metavar="", help="Open the page in the browser.")
    ] = False,
    parent_pid: Annotated[
        int | None,
        typer.Option(hidden=True, help="End with this process; RUN may have no log yet."),
    ] = None,
) -> None:
    """Show a run as a live page in the browser, or a finished one, or several side by side.

    The page is for this machine alone. It reads the run's files; training does nothing for it.
    """
    from gemma_tuner.training.reporting.page import require_page  # noqa: PLC0415 - so that help is quick
    from gemma_tuner.watch.run import open_runs  # noqa: PLC0415

    opened = open_runs(runs, may_be_empty=parent_pid is not None)
    require_page()
    from gemma_tuner.watch.server import serve  # noqa: PLC0415 - loads what serves the page

    def announce(url: str) -> None:
        typer.echo(url)
        if open_browser:
            webbrowser.open(url)

    token = "" if parent_pid is None else sys.stdin.read()  # see open_page
    serve(opened, port=port, parent_pid=parent_pid, token=token, announce=announce)
