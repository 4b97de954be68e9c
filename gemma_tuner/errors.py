"""The exceptions of this library, all under one root.

GemmaTunerError
├── ConfigError        a setting that cannot work; names the setting and what it may be
├── CheckpointError    a model or adapter that is incomplete, damaged or of another shape
├── DataError          one example that cannot be used; carries ``.key``, the example's origin
├── SourceError        a data source that cannot be read: missing file, column, permission
├── DivergedError      a run whose gradients stay infinite or undefined
├── MemoryPlanError    nothing fits the memory there is; names the nearest plans that would
├── ProcessError       another process of the run met an error or is gone; says which
└── ResumeError        a saved run that does not continue this one; names what differs

Every message names the value at fault, the example where there is one, and the remedy.
"""

import re
from traceback import walk_tb

from gemma_tuner.display import quote_text

# A few words at most, of what names are made of: anything else may be a sentence of the data.
_NAME = re.compile(r"(?=.{1,80}$)[^\s|,;\"'<>{}=]+( [^\s|,;\"'<>{}=]+){0,2}")


MALFORMED = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What code raises that meets a file or settings of another form than it was written for."""


class GemmaTunerError(Exception):
    """Root of everything this library raises on purpose."""

    def __str__(self) -> str:
        return quote_text(super().__str__())  # a server's words are in it, or a file's name


class ConfigError(GemmaTunerError, ValueError):
    """A setting that cannot work."""


class CheckpointError(GemmaTunerError):
    """A model or adapter checkpoint that is incomplete, damaged or of another shape."""


class DataError(GemmaTunerError, ValueError):
    """One example that cannot be used for training.

    Args:
        message: What is wrong and what would mend it, without the key.
        key: The example's origin (``Example.key``); prefixed to the message.
    """

    def __init__(self, message: str, *, key: str) -> None:
        super().__init__(f"example {key!r}: {message}")
        self.key = key


class SourceError(GemmaTunerError):
    """A data source that cannot be read."""


class DivergedError(GemmaTunerError):
    """A run whose gradients stay infinite or undefined."""


class MemoryPlanError(GemmaTunerError):
    """No plan fits the memory there is."""


class ProcessError(GemmaTunerError):
    """Another process of the run met an error or is gone, so that this one ends, too."""


class ResumeError(GemmaTunerError):
    """A saved run that does not continue this one."""


def quote_name(text: str) -> str:
    """Quote a name of a file or column for a message; of what does not read as one, its length."""
    return repr(text) if _NAME.fullmatch(text) else f"(a text of {len(text):,} characters)"


def describe_error(error: BaseException) -> str:
    """Say in a sentence what an error is, without what it may repeat of the user's data."""
    name = type(error).__name__
    if isinstance(error, GemmaTunerError):
        return f"{name}: {' '.join(str(error).split())}"
    if isinstance(error, OSError) and error.strerror:
        return f"{name}: {error.strerror}"
    if not isinstance(error, Exception):
        return f"interrupted ({name}); steps since the newest checkpoint are not saved"
    places = [(f.f_globals.get("__name__", ""), n) for f, n in walk_tb(error.__traceback__)]
    own = [f"{module}, line {n}" for module, n in places if module.startswith("gemma_tuner.")]
    where = f" in {own[-1]}" if own else ""
    return f"{name}{where}; its message is not kept here, as it may repeat the data"
