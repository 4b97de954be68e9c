"""One example followed through the package: which functions it passes, in order.

A function counts if the example, its slot or row, the batch made of it or its optimizer step goes
in or comes out. What carries only a row's number or tensors cannot be told from other functions
by its arguments; the tables of docs/architecture.md name those as well. Left out are
constructors, properties, validators (``check_…``, ``refuse_…``), and private helpers that call no
other function of the package.
"""

import functools
import re
import sys
import threading
from pathlib import Path
from types import CodeType, FrameType
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
        self.main: dict[str, None] = {}
        self.other_threads: dict[str, None] = {}
        self.carries: set[str] = set()
        self.has_callees: set[str] = set()
        self._seen: set[tuple[str, CodeType]] = set()
        self._is_waiting = True
        self._lock = threading.Lock()

    def __enter__(self) -> "Walk":
        threading.setprofile(self._profile)  # some threads begin when a stream is opened
        return self

    def __exit__(self, *error: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)

    def begin(self) -> None:
        """Record from here on."""
        self._is_waiting = False
        sys.setprofile(self._profile)

    def _profile(self, frame: FrameType, event: str, argument: Any) -> None:
        if self._is_waiting or event not in ("call", "return"):
            return
        name = name_of_code(frame.f_code)
        if name is None:
            return
        if event == "call":
            if name not in self.order:
                with self._lock:
                    self.order.setdefault(name)
                    is_main = threading.current_thread() is threading.main_thread()
                    (self.main if is_main else self.other_threads).setdefault(name)
            self._note_caller(frame, name)
            values = list(frame.f_locals.values())
        else:
            values = [argument]
        if name not in self.carries and any(is_carried(value) for value in values):
            self.carries.add(name)

    def _note_caller(self, frame: FrameType, name: str) -> None:
        """Note who of the package called it, with others in between."""
        caller = frame.f_back
        if caller is None or (name, caller.f_code) in self._seen:
            return
        self._seen.add((name, caller.f_code))
        while caller is not None and name_of_code(caller.f_code) in (None, name):
            caller = caller.f_back
        if caller is not None:
            self.has_callees.add(str(name_of_code(caller.f_code)))

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


@functools.cache
def name_of_code(code: CodeType) -> str | None:
    """``room/module.py Class.function``; of what is nested, the outermost."""
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
    """The functions of a table in docs/architecture.md, in order: ``room/module.py name``."""
    section = PAGE.read_text().partition(f"### {heading}\n")[2].partition("\n#")[0]
    rows = re.findall(r"^\|[^|]*\| `([^`]+)` \| `([^`]+)` \|", section, re.M)
    return [f"{path} {name}" for name, path in rows]
