"""A pretend ``mps`` device: real tensors in host memory, and only the operators that Metal has.

For tests on machines without a Mac. After :func:`pretend_mps`, torch finds an ``mps`` device in
this process; its operators run on the CPU, except those without an MPS kernel, which are refused
with the error that a Mac raises. What is run can be recorded: operators with dtypes and shapes,
waits of the host, copies from it, memory; and memory can be made to run out.

What this can show: that every operator has an MPS kernel, and that devices and dtypes are kept
apart. What it cannot: what Metal's kernels compute, which dtypes each of them takes, and how long
anything takes.

Which operators have an MPS kernel is read from the installed torch itself
(``torchgen/packaged/ATen/native/native_functions.yaml``), so the answer is about that version.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
import torchgen
import yaml

from gemma_tuner.disk import CACHE
from gemma_tuner.errors import ConfigError

_SOURCE = Path(__file__).with_suffix(".cpp")
_NAME = "gemma_tuner_pretend_mps"

# Kernels that torch registers for MPS outside its table. Source: MPSFallback.mm and the
# TORCH_LIBRARY_IMPL blocks under ATen/native/mps.
_REGISTERED_ELSEWHERE = (
    "embedding_renorm_",
    "linalg_svd",
    "linalg_svd.U",
    "col2im",
    "upsample_nearest3d.vec",
    "_slow_conv2d_forward",
)
_SIGNATURE = re.compile(r"([mcn])(\w+)\[([\d,]*)\]\|")
_FLOATS = {"Float", "Half", "BFloat16"}
# Matrix products, which sum over the last axis of their left operand.
_MATMULS = {"mm", "bmm", "addmm", "baddbmm", "addmv", "mv", "dot", "linear", "addbmm"}


@dataclass(frozen=True, slots=True)
class Operand:
    """A tensor that an operator took or returned."""

    place: Literal["device", "cpu", "number"]  # "number": Python made it of a number
    dtype: str  # in C++: Float, BFloat16, Long, Bool, …
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        """The product of the sizes."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class Call:
    """An operator that ran, with its tensors."""

    operator: str  # name and overload, such as add.Tensor
    inputs: tuple[Operand, ...]  # lists of tensors are flattened
    outputs: tuple[Operand, ...]

    @property
    def reductions(self) -> tuple[int, ...]:
        """The lengths that a matrix product sums over; empty for other operators."""
        name = self.operator.partition(".")[0]
        shapes = [operand.shape for operand in self.inputs]
        if name == "linear_backward":  # input, gradient, weight
            return (shapes[1][-1], prod(shapes[1][:-1]))
        if name not in _MATMULS:
            return ()
        # addmm and the like take the matrix that is added first.
        left = shapes[1] if name.startswith(("add", "baddbmm")) else shapes[0]
        return (left[-1],)

    @property
    def mixes_dtypes(self) -> bool:
        """Whether it is elementwise and reads floats of two dtypes from the device."""
        # The graph compiler of Metal has failed on some of these, scalars on the device included.
        # Source: karpathy/nanochat#741.
        floats = {
            operand.dtype
            for operand in self.inputs
            if operand.place == "device" and operand.dtype in _FLOATS
        }
        return len(floats) > 1 and _is_elementwise(self.operator)

    @property
    def graph(self) -> tuple[object, ...]:
        """The key of a compiled graph: the operator with its dtypes and shapes."""
        return (self.operator, *((o.dtype, o.shape) for o in self.inputs if o.place == "device"))


@dataclass(slots=True)
class Recording:
    """A record of the pretend device, filled in when :meth:`PretendMps.record` is left."""

    # Operators that ran, and those that were refused for want of an MPS kernel, with counts.
    calls: Mapping[Call, int] = field(default_factory=dict)
    unsupported: Mapping[str, int] = field(default_factory=dict)
    # Waits of the host for the device: the reason, and the line that asked.
    syncs: Counter[tuple[str, str]] = field(default_factory=Counter)
    # Copies from the host: "blocking", for which a Mac waits until the device has done all that
    # it was asked, and "queued" (non_blocking=True).
    uploads: Mapping[str, int] = field(default_factory=dict)
    num_allocations: int = 0
    peak_bytes: int = 0  # of all memory, including what was held before
    largest_bytes: int = 0  # of one allocation

    @property
    def num_syncs(self) -> int:
        """The number of the host's waits for the device, without uploads."""
        return sum(self.syncs.values())

    @property
    def most_elements(self) -> int:
        """Elements of the largest tensor that any operator read or wrote."""
        operands = (o for call in self.calls for o in (*call.inputs, *call.outputs))
        return max((operand.num_elements for operand in operands), default=0)

    @property
    def longest_reduction(self) -> int:
        """The longest inner dimension of a matrix product."""
        return max((length for call in self.calls for length in call.reductions), default=0)

    @property
    def mixed_dtypes(self) -> list[Call]:
        """Elementwise operators that read floats of two dtypes."""
        return [call for call in self.calls if call.mixes_dtypes]

    def graphs(self, min_elements: int = 0) -> set[tuple[object, ...]]:
        """The keys of graphs, one a shape, whose largest tensor has ``min_elements`` or more."""
        return {
            call.graph
            for call in self.calls
            if max((o.num_elements for o in (*call.inputs, *call.outputs)), default=0)
            >= min_elements
        }


class PretendMps:
    """The pretend device of this process; from :func:`pretend_mps`."""

    def __init__(self, extension: Any) -> None:
        self._extension = extension
        self._syncs: Counter[tuple[str, str]] = Counter()
        extension.on_sync(self._note_sync)

    @property
    def live_bytes(self) -> int:
        """Memory held by tensors on the device."""
        return self._extension.memory()["live"]

    @contextmanager
    def record(self) -> Iterator[Recording]:
        """Record what runs while the context is open; recordings do not nest."""
        recording = Recording()
        self._syncs.clear()
        self._extension.start()
        try:
            yield recording
        finally:
            self._extension.stop()
            calls = self._extension.calls().items()
            memory = self._extension.memory()
            recording.calls = {_read_signature(text): count for text, count in calls}
            recording.unsupported = self._extension.unsupported()
            recording.syncs = self._syncs.copy()
            recording.uploads = self._extension.uploads()
            recording.num_allocations = memory["allocations"]
            recording.peak_bytes = memory["peak"]
            recording.largest_bytes = memory["largest"]

    @contextmanager
    def limit(self, num_bytes: int) -> Iterator[None]:
        """Let memory run out, with the error of a Mac, at so many bytes in all."""
        before = self._extension.set_budget(num_bytes, 1.0)
        try:
            yield
        finally:
            self._extension.set_budget(*before)

    @contextmanager
    def fail_allocation(self, number: int) -> Iterator[None]:
        """Let one allocation fail with the error of a Mac: 1 is the next one."""
        self._extension.fail_allocation(number)
        try:
            yield
        finally:
            self._extension.fail_allocation(0)

    def _note_sync(self, reason: str) -> None:
        frames = traceback.extract_stack()
        # The line that asked, not torch's own around it.
        asking = next(
            (
                frame
                for frame in reversed(frames[:-1])
                if f"{_TORCH_FOLDER}/" not in frame.filename
            ),
            None,
        )
        where = "backward pass" if asking is None else _place(asking)
        self._syncs[reason, where] += 1


_TORCH_FOLDER = str(Path(torch.__file__).parent)


def _place(frame: traceback.FrameSummary) -> str:
    path = Path(frame.filename)
    return f"{'/'.join(path.parts[-3:])}:{frame.lineno} {frame.name}"


def why_not_pretend() -> str | None:
    """The reason why this process cannot pretend to have an MPS device; None if it can."""
    # Not asked through device.py, whose questions make torch remember that there is no MPS.
    if torch.backends.mps.is_built():  # noqa: TID251
        return "this torch has Metal: use the real device"
    if torch.cuda.is_available():  # noqa: TID251
        return "this process sees a CUDA GPU, and torch takes one kind only: hide it"
    if shutil.which("c++") is None and shutil.which("g++") is None:
        return "there is no C++ compiler (c++ or g++) to build it with"
    if shutil.which("ninja") is None:
        return "there is no ninja to build it with"
    return None


def supported_operators() -> frozenset[str]:
    """Operators for which the installed torch has a kernel of its own on MPS."""
    table = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    with table.open(encoding="utf-8") as file:
        functions = {f["func"].partition("(")[0]: f for f in yaml.load(file, Loader=loader)}

    def has_kernel(function: Mapping[str, Any]) -> bool:
        keys = ",".join(function.get("dispatch") or {}).replace(" ", "").split(",")
        return "MPS" in keys

    return frozenset(_REGISTERED_ELSEWHERE) | {
        name
        for name, function in functions.items()
        if has_kernel(function)
        or has_kernel(functions.get(function.get("structured_delegate"), {}))
    }


@cache
def pretend_mps(cache_dir: str | Path | None = None) -> PretendMps:
    """Give this process a pretend ``mps`` device. There is no way back: use a process of its own.

    The first call on a machine compiles it, which takes about a minute.

    Args:
        cache_dir: Where the compiled half is kept; None is ``~/.cache/gemma_tuner``.

    Returns:
        What records and limits the device.

    Raises:
        ConfigError: This process cannot have one; :func:`why_not_pretend` says why.
    """
    if reason := why_not_pretend():
        raise ConfigError(f"there can be no pretend mps device here: {reason}")
    from torch.utils import cpp_extension  # noqa: PLC0415 - it looks for CUDA, and says so

    home = Path.home() / CACHE if cache_dir is None else Path(cache_dir)
    source = _SOURCE.read_bytes()
    version = f"{torch.__version__}-{hashlib.sha256(source).hexdigest()[:16]}"
    folder = home / "pretend_mps" / version
    folder.mkdir(parents=True, exist_ok=True)
    extension: Any = cpp_extension.load(
        _NAME, [str(_SOURCE)], build_directory=str(folder), extra_cflags=["-O1", "-w"]
    )
    if not torch.backends.mps.is_available():  # noqa: TID251
        raise ConfigError(
            "torch has been asked for MPS before and remembers that there was none; call "
            "pretend_mps() first in a process"
        )
    extension.support(list(supported_operators()))
    return PretendMps(extension)


@cache
def _is_elementwise(operator: str) -> bool:
    name, _, overload = operator.partition(".")
    packet = getattr(torch.ops.aten, name)
    return torch.Tag.pointwise in getattr(packet, overload or "default").tags


@cache
def _read_signature(text: str) -> Call:
    """Read ``add.Tensor(mFloat[2,3]|nDouble[]|>mFloat[2,3]|``."""
    places: dict[str, Literal["device", "cpu", "number"]] = {
        "m": "device",
        "c": "cpu",
        "n": "number",
    }

    def operands(part: str) -> tuple[Operand, ...]:
        return tuple(
            Operand(places[place], dtype, tuple(int(size) for size in sizes.split(",") if size))
            for place, dtype, sizes in _SIGNATURE.findall(part)
        )

    operator, _, rest = text.partition("(")
    inputs, _, outputs = rest.partition(">")
    return Call(operator, operands(inputs), operands(outputs))
