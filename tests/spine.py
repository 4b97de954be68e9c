"""One example followed through the package: which functions it passes, in order.

A function counts if the example, its slot or row, the batch made of it or its optimizer step goes
in or comes out, or if it is named in the table of docs/architecture.md. Left out are what the
table would gain nothing by: constructors, properties, validators (``check_…``), and private
helpers that call no other function of the package.
"""

import re
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import gemma_tuner
from gemma_tuner.batch import Batch, Row
from gemma_tuner.records import Example
from gemma_tuner.streaming.view import Slot
from gemma_tuner.training.feed import StepInput

PACKAGE = Path(gemma_tuner.__file__).parent
PAGE = PACKAGE.parent / "docs" / "architecture.md"
CARRIED = (Example, Slot, Row, Batch, StepInput)
PASSED_DUNDERS = ("__call__", "__getitem__", "__iter__", "__next__")


class Walk:
    """Records, in every thread, the functions of the package that are called."""

    def __init__(self) -> None:
        self.order: dict[str, None] = {}
        self.carries: set[str] = set()
        self.has_callees: set[str] = set()
        self._lock = threading.Lock()

    def __enter__(self) -> "Walk":
        threading.setprofile(self._profile)
        sys.setprofile(self._profile)
        return self

    def __exit__(self, *error: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)

    def _profile(self, frame: FrameType, event: str, argument: Any) -> None:
        if event not in ("call", "return"):
            return
        name = name_of(frame)
        if name is None:
            return
        with self._lock:
            if event == "call":
                self.order.setdefault(name)
                caller = frame.f_back
                while caller is not None and (name_of(caller) in (None, name)):
                    caller = caller.f_back
                if caller is not None:
                    self.has_callees.add(str(name_of(caller)))
                values = list(frame.f_locals.values())
            else:
                values = [argument]
            if any(is_carried(value) for value in values):
                self.carries.add(name)

    def list_passed(self) -> list[str]:
        """The functions that count, in the order of their first call."""
        return [name for name in self.order if name in self.carries and self._counts(name)]

    def _counts(self, name: str) -> bool:
        function = name.split()[1].rpartition(".")[2]
        if function.startswith("__"):
            return function in PASSED_DUNDERS
        if re.match("_?(check|refuse)_", function) or is_property(name):
            return False
        return not function.startswith("_") or name in self.has_callees


def is_carried(value: Any) -> bool:
    if isinstance(value, CARRIED):
        return True
    return isinstance(value, list | tuple) and any(isinstance(item, CARRIED) for item in value)


def name_of(frame: FrameType) -> str | None:
    """``room/module.py Class.function``; of what is nested, the outermost."""
    code = frame.f_code
    if not code.co_filename.startswith(str(PACKAGE)):
        return None
    path = Path(code.co_filename).relative_to(PACKAGE)
    name = code.co_qualname.split(".<locals>")[0]
    return None if name.startswith("<") else f"{path} {name}"


def is_property(name: str) -> bool:
    path, _, qualified = name.partition(" ")
    value: Any = sys.modules["gemma_tuner." + path.removesuffix(".py").replace("/", ".")]
    for part in qualified.split("."):
        value = getattr(value, part, None)
    return isinstance(value, property)


def read_table(heading: str) -> list[str]:
    """The functions of a table in docs/architecture.md, in its order."""
    section = PAGE.read_text().partition(f"### {heading}\n")[2].partition("\n#")[0]
    return re.findall(r"^\|[^|]*\| `([^`]+)` in `([^`]+)` \|", section, re.M) and [
        f"{path} {name}"
        for name, path in re.findall(r"^\|[^|]*\| `([^`]+)` in `([^`]+)` \|", section, re.M)
    ]
