"""``gemma-tuner runs``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemma_tuner.cli.commands import command
from gemma_tuner.cli.opening import say
from gemma_tuner.display import quote_line
from gemma_tuner.errors import ConfigError

if TYPE_CHECKING:
    from gemma_tuner.watch.run import Run

app = typer.Typer(no_args_is_help=True, help="List runs, show one, or compare several.")

_MOST_RECORDS = 12
_MOST_EVENTS = 10


@app.command("list")
@command
def list_runs(
    *,
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Where to look, subfolders included.")
    ] = Path("runs"),
) -> None:
    """List the runs in a folder, the latest last."""
    from gemma_tuner.training.reporting.metrics import LOG_FILE

    logs = sorted(
        filter(Path.is_file, folder.rglob(LOG_FILE)), key=lambda log: log.stat().st_mtime
    )
    if not logs:
        raise ConfigError(
            f"there is no run in {folder.name!r}; give another folder, or begin one with "
            "`gemma-tuner train`"
        )
    runs = [(run, log.parent) for log in logs for run in _open([log.parent])]
    print_table(_summarise(run, path) for run, path in runs)
    for run, path in runs:
        if run.history.failure:
            say(quote_line(f"{path} failed at step {run.history.step}: {run.history.failure}"))


@app.command()
@command
def show(
    *,
    run: Annotated[Path, typer.Argument(help="The run's folder.", show_default=False)],
) -> None:
    """Show a run: its settings, its losses, what happened."""
    from gemma_tuner.display import show_memory
    from gemma_tuner.watch.units import show_count, show_loss

    (opened,) = _open([run])
    print_table([_summarise(opened, run)])
    settings = opened.saved_settings or opened.settings
    width = max(map(len, settings), default=0)
    for name, value in settings.items():
        say(quote_line(f"  {name:<{width}}  {value}"))
    history = opened.history
    columns = {
        name: history.column(name) for name in ("loss", "tokens_per_second", "memory_bytes")
    }
    places = {int(step): place for place, step in enumerate(history.steps)}
    held_out = {record.step: record.loss for record in history.held_out}
    # So many of a long run, evenly spread; the last one always.
    kept = [*places][-1 :: -max(1, len(places) // _MOST_RECORDS)]
    rows = []
    for step in sorted({*kept, *held_out}):
        record = {name: column[places[step]] for name, column in columns.items() if step in places}
        rows.append(
            {
                "step": str(step),
                "loss": show_loss(record["loss"]) if record else "",
                "held out": show_loss(held_out[step]) if step in held_out else "",
                "tokens/s": show_count(record["tokens_per_second"]) if record else "",
                "memory": show_memory(record["memory_bytes"]) if record else "",
            }
        )
    print_table(rows)
    for event in history.events[-_MOST_EVENTS:]:
        say(quote_line(f"  step {event.step}: {event.message or event.name}"))


@app.command()
@command
def compare(
    *,
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Their folders.", show_default=False)
    ],
) -> None:
    """Compare runs: their figures, and the settings in which they differ."""
    from gemma_tuner.watch.run import list_setting_differences

    if len(runs) < 2:
        raise ConfigError("there is one run, and nothing to compare it with; give two or more")
    opened = _open(runs)
    print_table(_summarise(run, path) for run, path in zip(opened, runs, strict=True))
    differences = list_setting_differences(opened)
    if not differences:
        say("their settings are the same")
    print_table(
        {"setting": name, **dict(zip(map(str, runs), values, strict=True))}
        for name, values in differences
    )


def _open(folders: list[Path]) -> list[Run]:
    from gemma_tuner.watch.run import open_runs

    runs = open_runs(folders)
    for run in runs:
        run.refresh()
        for problem in run.problems.values():
            say(f"{run.name}: {problem}")
    return runs


def _summarise(run: Run, path: Path) -> dict[str, str]:
    """A run in one line of a table."""
    import numpy as np

    from gemma_tuner.watch.units import show_loss, show_seconds

    history = run.history
    held_out = [record.loss for record in history.held_out]
    steps = str(history.step)
    seconds = np.nansum(history.interval_seconds())
    return {
        "run": str(path),
        "phase": run.find_phase().name,
        "steps": f"{steps} of {history.max_steps}" if history.max_steps else steps,
        "loss": show_loss(history.column("loss")[-1]) if len(history) else "–",
        "held out": "→".join(map(show_loss, dict.fromkeys([*held_out[:1], *held_out[-1:]]))),
        "best": show_loss(best.loss) if (best := history.best_held_out) else "–",
        "time": show_seconds(seconds),
    }


def print_table(rows: Iterable[Mapping[str, str]]) -> None:
    """Print rows of cells by their columns' names."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    listed = list(rows)
    if not listed:
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in listed[0]:
        table.add_column(Text(quote_line(name)), overflow="fold")
    for row in listed:
        table.add_row(*(Text(quote_line(cell)) for cell in row.values()))
    Console(highlight=False).print(table)
