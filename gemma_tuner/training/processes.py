"""Sums over the processes of a run, by torch.distributed; a single process pays nothing for them.

Numbers go over gloo, on the CPU; gradients over NCCL between CUDA devices, and as copies on the
CPU over gloo from others, as gloo knows no Metal. Every sum of numbers is of one size, and carries
who leaves the run: so a process that has met an error, or a signal, enters whatever sum the others
come to next, and all leave at the same place. Gradients are summed only when every process has
its own.
"""

from __future__ import annotations

import atexit
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import NoReturn, cast

import torch
from torch import Tensor, distributed
from torch.nn import Parameter

from gemma_tuner.device import Launch, read_launch, use_device
from gemma_tuner.errors import ConfigError, GemmaTunerError, ProcessError
from gemma_tuner.log import announce

_JOIN_SECONDS = 180
"""How much later than the first the last process may come: each loads the model before."""
_WAIT_SECONDS = 1800
"""How long one may wait for the others: they may be evaluating, or reading from a slow network."""
_NCCL_SECONDS = 20
"""How long a sum may take that all have begun: NCCL does not say that one of them is gone."""
_NUM_VALUES = 32
_STOPPED, _FAILED, _FAILED_INDEX = 0, 1, 2  # places in a sum before its values
_NUM_FLAGS = 3


class StoppedElsewhereError(GemmaTunerError):
    """Another process got a signal: it leaves the run before this step, and so do all."""


class Processes:
    """The processes that ``torchrun`` or ``accelerate launch`` started, or this one alone.

    Adapters are small and losses are sums, so gradients are added up once a step, in one
    transfer, instead of wrapping the model: the result is that of one process with all the data.

    Attributes:
        device: This process's device.
        index: This process's number.
        count: How many there are.
        is_main: Whether this is the one that writes.
        is_bereft: Whether another process is gone, so that any that is left may have to write.

    Raises:
        ConfigError: The environment says that there are several, and they do not find each other.
    """

    def __init__(self, device: torch.device) -> None:
        launch = read_launch()
        self.device = device
        self.index = launch.index
        self.count = launch.count
        self.is_main = self.index == 0
        self.is_bereft = False
        if self.count > 1:
            self._numbers, self._gradients = _join(launch, device)

    # --- sums ---------------------------------------------------------------------------------

    def sum_numbers(self, numbers: Sequence[float]) -> list[float]:
        """Add up numbers, each by itself, in one transfer."""
        return list(numbers) if self.count == 1 else self._exchange(numbers)

    def sum_counts(self, counts: Sequence[int]) -> list[int]:
        """Add up counts, which are exact up to 2**53."""
        return list(counts) if self.count == 1 else list(map(int, self._exchange(counts)))

    def sum_gradients(self, parameters: Sequence[Parameter], loss: Tensor) -> None:
        """Add up gradients and loss, in place."""
        # loss: ``[]`` float32.
        if self.count == 1:
            return
        self._exchange()  # all have their gradients, or all leave here
        # A process without examples in this step has no gradient.
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([*(gradient.flatten() for gradient in gradients), loss.reshape(1)])
        *summed, loss_sum = self._sum_tensor(flat).split([*(g.numel() for g in gradients), 1])
        for parameter, total in zip(parameters, summed, strict=True):
            parameter.grad = total.view_as(parameter)
        loss.copy_(loss_sum[0])

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.count > 1:
            self._exchange()

    # --- leaving ------------------------------------------------------------------------------

    def announce_stop(self) -> None:
        """Tell the others that this process stops before the next step."""
        if self.count > 1:
            self._exchange(stopped=1)

    @contextmanager
    def leaving_together(self) -> Iterator[None]:
        """Let the others leave, too, where an error ends this process's part."""
        try:
            yield
        except (ProcessError, StoppedElsewhereError):
            raise  # they know
        except Exception:
            if self.count > 1 and not self.is_bereft:
                # Others may have errors of their own, or be gone: here this one's is told.
                self._add_up([0.0, 1.0, float(self.index)], ignore_loss=True)
            raise

    def _exchange(self, values: Sequence[float] = (), *, stopped: int = 0) -> list[float]:
        """Add up numbers over all processes, unless one of them leaves."""
        summed = self._add_up([float(stopped), 0.0, 0.0, *values])
        if failed := int(summed[_FAILED]):
            which = (
                f"process {int(summed[_FAILED_INDEX])} of {self.count}"
                if failed == 1
                else f"{failed} of the {self.count} processes"
            )
            raise ProcessError(
                f"{which} met an error, which is told there; mend it, and go on with "
                "fit(resume=True): the steps before it are kept"
            )
        if summed[_STOPPED] and not stopped:
            raise StoppedElsewhereError("another process was asked to stop")
        return summed[_NUM_FLAGS : _NUM_FLAGS + len(values)]

    def _add_up(self, numbers: Sequence[float], *, ignore_loss: bool = False) -> list[float]:
        padding = [0.0] * (_NUM_FLAGS + _NUM_VALUES - len(numbers))
        tensor = torch.tensor([*numbers, *padding], dtype=torch.float64)
        try:
            distributed.all_reduce(tensor, group=self._numbers)
        except RuntimeError as error:  # gloo's: a connection is closed, or the time is over
            self.is_bereft = True
            if not ignore_loss:
                self._tell_loss(error)
        return tensor.tolist()

    def _sum_tensor(self, tensor: Tensor) -> Tensor:
        """Add up a tensor of any device."""
        if self._gradients is None:
            on_cpu = tensor.cpu()
            try:
                distributed.all_reduce(on_cpu, group=self._numbers)
            except RuntimeError as error:
                self._tell_loss(error)
            return on_cpu.to(tensor.device)
        work = distributed.all_reduce(tensor, group=self._gradients, async_op=True)
        deadline = time.monotonic() + _NCCL_SECONDS
        # Waiting by events keeps this device's own stream free of a sum that never ends, so that
        # the steps before it can be saved.
        while work is not None and not work.is_completed():
            if time.monotonic() > deadline:
                self._gradients.abort()
                self._tell_loss(None)
            time.sleep(0.0002)
        return tensor

    def _tell_loss(self, error: RuntimeError | None) -> NoReturn:
        self.is_bereft = True
        raise ProcessError(
            f"another of the {self.count} processes is gone (killed, or its machine does not "
            "answer); look at its output, and go on with fit(resume=True): the steps before it "
            "are kept"
        ) from error


def _join(
    launch: Launch, device: torch.device
) -> tuple[distributed.ProcessGroup, distributed.ProcessGroup | None]:
    """Find the other processes; returns the groups that add up numbers, and gradients."""
    remedy = (
        f"start all {launch.count} by torchrun or accelerate launch, or unset WORLD_SIZE to train "
        "in one process"
    )
    if launch.missing:
        raise ConfigError(
            f"the environment says that this is one of {launch.count} processes, and lacks "
            f"{', '.join(launch.missing)}, by which they find each other; {remedy}"
        )
    if not distributed.is_available():
        raise ConfigError(f"this torch was built without torch.distributed; {remedy}")
    use_device(device)
    if device.type == "mps" and launch.index == 0 and launch.count_here > 1:
        announce(
            f"{launch.count_here} processes share this machine's one Metal GPU and its memory, "
            "which is no faster than one"
        )
    try:
        if not distributed.is_initialized():
            with _interrupt_ends_at_once():
                distributed.init_process_group(
                    "gloo",
                    rank=launch.index,
                    world_size=launch.count,
                    timeout=timedelta(seconds=_JOIN_SECONDS),
                )
        if distributed.get_world_size() != launch.count:
            raise ConfigError(
                f"the environment says that this is one of {launch.count} processes, and "
                f"torch.distributed was set up for {distributed.get_world_size()}; {remedy}"
            )
        return _make_groups(device)
    except (RuntimeError, ValueError) as error:
        if isinstance(error, GemmaTunerError):
            raise
        raise ConfigError(
            f"process {launch.index} of {launch.count} does not find the others "
            f"({type(error).__name__}); {remedy}. All must begin within {_JOIN_SECONDS} s of each "
            "other, reach MASTER_ADDR and MASTER_PORT, and have a GPU of their own"
        ) from error


@contextmanager
def _interrupt_ends_at_once() -> Iterator[None]:
    """Let Ctrl-C end a process that waits in torch, where no handler of Python is called."""
    python = signal.default_int_handler
    if threading.current_thread() is not threading.main_thread() or (
        signal.getsignal(signal.SIGINT) is not python
    ):
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, python)


@cache
def _make_groups(
    device: torch.device,
) -> tuple[distributed.ProcessGroup, distributed.ProcessGroup | None]:
    def make(backend: str, on: torch.device | None = None) -> distributed.ProcessGroup:
        timeout = timedelta(seconds=_WAIT_SECONDS)
        group = distributed.new_group(backend=backend, timeout=timeout, device_id=on)
        return cast(distributed.ProcessGroup, group)

    numbers = make("gloo")
    if device.type != "cuda" or not distributed.is_nccl_available():
        return numbers, None
    gradients = make("nccl", device)
    atexit.register(gradients.abort)  # it complains of whatever is left open
    return numbers, gradients
