"""The command line of the doctor; torch is loaded when it runs, not when it is described."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

from gemma_tuner.doctor import Part
from gemma_tuner.errors import GemmaTunerError


def doctor(
    output: Annotated[
        Path, typer.Option(help="Where the JSON report goes; attach it to an issue.")
    ] = Path("gemma-tuner-doctor.json"),
    device: Annotated[
        str | None,
        typer.Option(help="mps, cuda, cuda:N or cpu.", show_default="as training chooses"),
    ] = None,
    only: Annotated[
        list[Part] | None,
        typer.Option(
            metavar="PART",
            help=f"Do this part: {', '.join(Part)}. May be given several times.",
            show_default="all",
        ),
    ] = None,
) -> None:
    """Check this machine: faults of kernels, steps against the CPU, speeds.

    Takes minutes and no network, and changes nothing.

    Exit status: 0 nothing is wrong, 1 something is, 2 it could not run.
    """
    from rich.console import Console  # noqa: PLC0415 - so that help is quick

    try:
        from gemma_tuner.doctor.examination import examine  # noqa: PLC0415 - loads torch
        from gemma_tuner.doctor.report import render_report  # noqa: PLC0415

        with Console(stderr=True).status("") as status:
            report = examine(output, device, only or list(Part), announce=status.update)
        rendered = render_report(report)
    except GemmaTunerError as error:
        sys.stderr.write(f"{type(error).__name__}: {' '.join(str(error).split())}\n")
        sys.exit(2)
    except Exception:  # noqa: BLE001 - whatever it was, 1 would say that the machine is at fault
        traceback.print_exc()
        sys.exit(2)
    console = Console()
    console.print(rendered, highlight=False)
    console.print(f"the report is in {output}", highlight=False)
    sys.exit(report.exit_status)
