"""How a script that trains ends: the exit status, and the one line that its user reads."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from gemma_tuner.errors import GemmaTunerError

if TYPE_CHECKING:
    from gemma_tuner.training.trainer import FitResult


def run_script(main: Callable[[], object]) -> None:
    """Call a script's main function; an error of this library is one line on stderr.

    Args:
        main: What the script does.

    Raises:
        SystemExit: With status 1, instead of a ``GemmaTunerError`` and its traceback.
    """
    try:
        main()
    except GemmaTunerError as error:
        sys.stderr.write(f"{type(error).__name__}: {' '.join(str(error).split())}\n")
        raise SystemExit(1) from None


def exit_if_stopped(result: FitResult, script: str, arguments: Sequence[str] | None) -> None:
    """End the process where a signal has stopped the run, and say how to go on.

    Args:
        result: What ``Trainer.fit`` returned.
        script: The script's file; it takes ``--resume``.
        arguments: What it was called with; None, as for argparse, is the command line's.

    Raises:
        SystemExit: With 128 and the signal's number, as shells expect: 130 for SIGINT, 143 for
            SIGTERM (also where the signal reached another process of the run).
    """
    if result.stopped_by is None:
        return
    given = sys.argv[1:] if arguments is None else arguments
    flags = [argument for argument in given if argument != "--resume"]
    command = shlex.join(["python", os.path.relpath(script), *flags, "--resume"])
    sys.stderr.write(f"stopped after step {result.step}, which is saved; go on with: {command}\n")
    number = signal.SIGINT if result.stopped_by == "SIGINT" else signal.SIGTERM
    raise SystemExit(128 + number)
