"""Device, dtype and memory facts, each with its reason.

The only module that asks torch about accelerators or reads the environment.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch

from gemma_tuner.errors import ConfigError

_DEVICE_TYPES = ("mps", "cuda", "cpu")
# Before 2.14 two MPS faults change results without an error at Gemma's sizes: rows beyond 2^31
# elements of an embedding table read as zeros, and matmuls with reductions over 32,768 read beyond
# their operands. Source: pytorch#188756 (fixed by #187109), pytorch#193487 (fixed by #183535).
_MPS_TORCH_FLOOR = (2, 14)
# Of what Metal recommends as a working set, which is two thirds to four fifths of memory.
_MPS_HIGH_WATERMARK = "1.0"
_MPS_OUT_OF_MEMORY = ("MPS backend out of memory", "Invalid buffer size")
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# What torchrun sets, and what launchers of MPI do. Source: accelerate 1.15, environment.py.
_INDEX = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_COUNT = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_INDEX_HERE = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK")
_COUNT_HERE = ("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE")
_MEETING_PLACE = ("MASTER_ADDR", "MASTER_PORT")


def prepare_environment() -> None:
    """Set what torch reads from the environment on a Mac, unless the user has."""
    # Operators that MPS lacks must not run on the CPU unnoticed; accelerate would set
    # ``PYTORCH_ENABLE_MPS_FALLBACK=1``, and child processes inherit what is set.
    # Memory must run out before the machine swaps: torch's own limit, 1.7 times what Metal
    # recommends, is more than there is. The limits count from when the allocator starts, with the
    # first tensor on the device.
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "0")
    high = os.environ.setdefault("PYTORCH_MPS_HIGH_WATERMARK_RATIO", _MPS_HIGH_WATERMARK)
    # torch refuses to start with a low mark above the high one. Source: MPSAllocator.mm,
    # "invalid low watermark ratio"; its own is 1.4.
    if "PYTORCH_MPS_LOW_WATERMARK_RATIO" not in os.environ:
        with suppress(ValueError):  # what is no number, torch explains better
            if float(high) > 0:
                low = str(round(float(high) * 0.9, 3))
                os.environ["PYTORCH_MPS_LOW_WATERMARK_RATIO"] = low


def choose_device(device: str | torch.device | None = None) -> tuple[torch.device, str]:
    """Choose where to compute: MPS, else CUDA, else the CPU."""
    prepare_environment()
    if device is not None:
        chosen = parse_device(device)
        _check_device(chosen)
        return chosen, "as asked"
    if torch.backends.mps.is_available():
        chosen = torch.device("mps")
        _check_device(chosen)
        return chosen, "a Metal GPU is there"
    if torch.cuda.is_available():
        chosen = parse_device("cuda")
        _check_device(chosen)
        return chosen, f"a CUDA GPU is there ({torch.cuda.get_device_name(chosen)})"
    return torch.device("cpu"), "no Metal or CUDA GPU is there"


def parse_device(device: str | torch.device) -> torch.device:
    """Read a device's name; whether it is there is not asked."""
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(
            f"device is {device!r}; it may be one of {', '.join(_DEVICE_TYPES)} or cuda:N"
        ) from error
    if chosen.type not in _DEVICE_TYPES:
        raise ConfigError(
            f"device is {str(device)!r}; it may be one of {', '.join(_DEVICE_TYPES)} or cuda:N"
        )
    if chosen == torch.device("cuda") and (index := _read_number(_INDEX_HERE)) is not None:
        return torch.device("cuda", index)
    return chosen


@dataclass(frozen=True, slots=True)
class Launch:
    """What the environment says of the processes of a run."""

    index: int
    count: int
    count_here: int  # on this machine
    missing: tuple[str, ...]  # variables without which several do not find each other


def read_launch() -> Launch:
    """Read as which of how many processes this one was started."""
    count = max(1, _read_number(_COUNT) or 1)
    index = _read_number(_INDEX)
    places = [name for name in _MEETING_PLACE if not os.environ.get(name)]
    missing = [*([_INDEX[0]] if index is None else []), *places]
    return Launch(
        index=(index or 0) if count > 1 else 0,  # a number that was left behind names no other
        count=count,
        count_here=_read_number(_COUNT_HERE) or 1,
        missing=tuple(missing) if count > 1 else (),
    )


def _read_number(names: tuple[str, ...]) -> int | None:
    """The first of some variables that is set."""
    name = next((name for name in names if os.environ.get(name)), None)
    if name is None:
        return None
    value = os.environ[name]
    if not value.isdecimal():
        raise ConfigError(
            f"{name} is {value!r} in the environment; give a whole number, or unset it"
        )
    return int(value)


def use_device(device: torch.device) -> None:
    """Let what names no device go to this one, as NCCL's buffers do."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # NCCL's watchdog would end the process where a sum fails, and with it steps not yet saved.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")


def _check_device(device: torch.device) -> None:
    """Raise unless the device is there and computes."""
    if device.type == "cpu":
        return
    remedy = "pass device='cpu'"
    if device.type == "mps":
        found = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
        if found < _MPS_TORCH_FLOOR:
            raise ConfigError(
                f"torch {torch.__version__} silently computes wrong results on MPS at Gemma's "
                "sizes (large embedding tables read as zeros, long matrix products read foreign "
                f"memory); install torch 2.14 or newer, or {remedy}"
            )
        available = torch.backends.mps.is_available()
    else:
        available = torch.cuda.is_available()
    if not available:
        raise ConfigError(f"device {str(device)!r} is not available here; {remedy}")
    try:
        probe = torch.ones(16, 16, device=device)
        total = (probe @ probe).sum().item()
    except RuntimeError as error:  # virtual Macs report MPS and then refuse 256 bytes
        raise ConfigError(
            f"device {str(device)!r} refuses a small matmul: {error}; {remedy}"
        ) from error
    if total != 16.0**3:
        raise ConfigError(
            f"device {str(device)!r} computes a small matmul wrongly ({total}, not 4096); {remedy}"
        )


def choose_dtype(
    device: torch.device,
    dtype: str | torch.dtype | None = None,
    checkpoint_dtype: str | torch.dtype | None = None,
) -> tuple[torch.dtype, str]:
    """Choose the dtype of the frozen weights; adapters are always float32."""
    if dtype is not None:
        name = _name_dtype(dtype)
        if name not in _DTYPES:
            # Source: transformers#46277: 2300 x 33.9 > 65504 in the 26B and 31B vision pooler
            reason = " (float16 overflows in Gemma's towers: the loss becomes NaN)"
            raise ConfigError(
                f"dtype is {name!r}; it may be {' or '.join(map(repr, _DTYPES))}"
                f"{reason if name in {'float16', 'half'} else ''}"
            )
        return _DTYPES[name], "as asked"
    if checkpoint_dtype is not None and _name_dtype(checkpoint_dtype) == "float32":
        return torch.float32, "the checkpoint is float32"
    if device.type == "cpu":
        return torch.float32, "CPUs compute bfloat16 slowly and with less precision"
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float32, "this GPU has no bfloat16 arithmetic"
    return torch.bfloat16, "half the memory of float32, with its range"


def _name_dtype(dtype: str | torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@cache
def _process(pid: int) -> psutil.Process:
    return psutil.Process(pid)  # which costs more than what it is asked


def memory_used_bytes(device: torch.device) -> int:
    """Bytes held by live tensors (CUDA, MPS) or resident in this process (CPU)."""
    match device.type:
        case "cuda":
            return torch.cuda.memory_allocated(device)
        case "mps":
            return torch.mps.current_allocated_memory()
        case _:
            return _process(os.getpid()).memory_info().rss


def memory_driver_bytes(device: torch.device) -> int:
    """Bytes of tensors, pools and compiled graphs; on the CPU, resident in this process."""
    match device.type:
        case "cuda":
            return torch.cuda.memory_reserved(device)
        case "mps":
            return torch.mps.driver_allocated_memory()
        case _:
            return _process(os.getpid()).memory_info().rss


def take_peak_bytes(device: torch.device) -> int | None:
    """The most that live tensors have held since this was last asked."""
    if device.type != "cuda":
        return None
    peak_bytes = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak_bytes


def memory_private_bytes() -> int:
    """Resident bytes of this process that belong to it alone: not pages of files (Linux)."""
    info = _process(os.getpid()).memory_info()
    return info.rss - getattr(info, "shared", 0)


def swap_used_bytes() -> int:
    """Bytes that the machine, not this process alone, has in swap; 0 where there is none."""
    return psutil.swap_memory().used


def memory_total_bytes(device: torch.device) -> int:
    """Bytes there are: of the GPU, of the working set that Metal recommends, or of RAM."""
    match device.type:
        case "cuda":
            return torch.cuda.get_device_properties(device).total_memory
        case "mps":
            return torch.mps.recommended_max_memory()
        case _:
            return psutil.virtual_memory().total


def memory_budget_bytes(device: torch.device) -> tuple[int, str]:
    """Bytes that this process may hold on a device, what it holds already included."""
    match device.type:
        case "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            return free + torch.cuda.memory_reserved(device), "free on the GPU"
        case "mps":
            return torch.mps.recommended_max_memory(), "recommended by Metal"
        case _:
            held = _process(os.getpid()).memory_info().rss
            available = psutil.virtual_memory().available + held
            limit = _container_limit_bytes()
            if limit is not None and limit < available:
                return limit, "this container's limit"
            return available, "free in RAM"


def _container_limit_bytes() -> int | None:
    """What control groups allow this process on Linux; None where they do not limit it."""
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # absent, or "max"
            return int(Path(path).read_text(encoding="ascii"))
    return None


def is_available(device: torch.device) -> bool:
    """Whether torch has the device on this machine; it is not tried."""
    match device.type:
        case "cuda":
            return torch.cuda.is_available()
        case "mps":
            return torch.backends.mps.is_available()
        case _:
            return True


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def empty_cache(device: torch.device) -> None:
    """Give pooled memory back to the system."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def compile_shader(source: str) -> Any:
    """Compile Metal's language; the kernels are the answer's attributes."""
    return torch.mps.compile_shader(source)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device has no memory for another tensor."""
    # Source: torch's MPSAllocator.mm; accelerate.utils.memory matches the same words.
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError)
        and any(words in str(error) for words in _MPS_OUT_OF_MEMORY)
    )


def random_generators(device: torch.device) -> dict[str, torch.Generator]:
    """The default generators that training on a device draws from (dropout), by device type."""
    generators = {"cpu": torch.default_generator}
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        generators["cuda"] = torch.cuda.default_generators[index]
    elif device.type == "mps":
        # torch.mps.set_rng_state does no more, but only with the state itself
        generators["mps"] = torch.mps._get_default_mps_generator()  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
    return generators


def replayed(
    generator: torch.Generator,
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Let a checkpointed layer draw in its recomputation what it drew in its forward pass."""
    # ``torch.utils.checkpoint`` does so for the CPU's generator and for those of devices that say
    # whether they are initialized; torch.mps does not, and dropout there would drop others: the
    # gradient would be wrong without a word (pytorch#127676).
    return nullcontext(), _drawing_from(generator, generator.get_state())


@contextmanager
def _drawing_from(generator: torch.Generator, state: torch.Tensor) -> Iterator[None]:
    before = generator.get_state()
    generator.set_state(state)
    try:
        yield
    finally:
        generator.set_state(before)


@contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Draw random numbers from a seed for a while, and then go on as if nothing had been drawn."""
    generators = random_generators(device).values()
    states = [generator.get_state() for generator in generators]
    for generator in generators:
        generator.manual_seed(seed)
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
