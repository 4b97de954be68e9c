"""What the library says: the logger ``gemma_tuner``, on stderr until a program configures it."""

from __future__ import annotations

import contextlib
import logging
import sys

from gemma_tuner.display import quote_line

logger = logging.getLogger("gemma_tuner")


class _StderrHandler(logging.Handler):
    """Writes ``gemma_tuner: message``, unless the root logger writes to the console already."""

    def emit(self, record: logging.LogRecord) -> None:
        if not any(map(_writes_to_console, logging.root.handlers)):
            # A terminal that is gone costs the message, never the image or the run it is about.
            with contextlib.suppress(AttributeError, OSError, ValueError):
                sys.stderr.write(f"{logger.name}: {record.getMessage()}\n")


def _quote(record: logging.LogRecord) -> bool:
    """Make a message the one line that it is meant to be, whoever writes it."""
    record.msg, record.args = quote_line(record.getMessage()), None
    return True


def _writes_to_console(handler: logging.Handler) -> bool:
    own = getattr(handler, "stream", None) or getattr(
        getattr(handler, "console", None), "file", None
    )
    return own in (sys.stderr, sys.stdout)


logger.addFilter(_quote)
if not logger.handlers:  # a program that added its own is obeyed
    logger.addHandler(_StderrHandler())
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)


def announce(message: str) -> None:
    """Tell the user about an automatic choice."""
    logger.info("%s", message)
