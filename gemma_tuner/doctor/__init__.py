"""``gemma-tuner doctor``: checks of this machine, in the parts that the command line names."""

from __future__ import annotations

from enum import StrEnum


class Part(StrEnum):
    """A part, in the order in which they run; the last may end the process."""

    KERNELS = "kernels"
    PARITY = "parity"
    MEMORY = "memory"
    CALIBRATION = "calibration"
    LARGE_TABLE = "large_table"
