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


class GemmaTunerError(Exception):
    """Root of everything this library raises on purpose."""


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
