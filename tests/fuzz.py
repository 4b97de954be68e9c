"""Hostile inputs by the thousand, each read in a child of little memory and a watchdog.

    python -m tests.fuzz READER --count 20000 --seed 0 [--keep FOLDER] [--first N]

An input is one of a valid kind, mutated by a ``random.Random`` of reader, seed and number, so that
each can be made again by itself. It may be read, or be refused by a GemmaTunerError that tells
nothing of its rows. Anything else is a finding: another exception, a crash, more than 10 s, or
more than 300 MB above what the process held before; its files are kept in the folder. Readers are
in ``fuzz_rows`` and ``fuzz_media``.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import importlib.util
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

SECRET = "Rosebud, the sled; "
"""Begins the texts of valid inputs, is never a name, and may stand in no error."""
SECONDS, PEAK_BYTES, EXTRA_BYTES = 10, 300_000_000, 1 << 30
NOT_WRITTEN = "not written"
_MODULES = ("tests.fuzz_rows", "tests.fuzz_media")
_SCRATCH = "/dev/shm" if Path("/dev/shm").is_dir() else None


@dataclass(frozen=True, slots=True)
class Reader:
    """What is tried: how an input is written, and how it is read to its end.

    Args:
        write: Writes input ``rng`` stands for below an empty folder.
        read: Opens that folder's input as a user would, and reads all of it.
    """

    write: Callable[[random.Random, Path], None]
    read: Callable[[Path], object]


@dataclass(slots=True)
class Report:
    counts: Counter[str] = field(default_factory=Counter)  # by outcome: read, refused: Kind, ...
    findings: list[str] = field(default_factory=list)  # "number: what happened"


# --- mutations, shared by all readers ---------------------------------------------------------

WORDS = (
    *(b"NaN", b"-Infinity", b"1e999", b"-1e999", b"9" * 400, b"0" * 5000 + b"1", b"1" * 5000),
    *(b"null", b"true", b"[", b"{", b"[[[[", b"]", b"}", b'"', b"'", b"\\", b",", b"\t", b"|"),
    *(b"\\ud800", b"\\udfff\\ud800", b"\\u0000", b"\xed\xa0\x80", b"\xff", b"\xc3", b"\xf8\x88"),
    *(b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff", b"\0", b"\0" * 512, b"\r", b"\n", b"\r\n"),
    *(b"\xe2\x80\xa8", b"\x1f\x8b", b"BZh9", b"\x28\xb5\x2f\xfd", b"../", b"/dev/zero", b"~"),
    *(b"\xff\xff\xff\x7f", b"\xff\xff\xff\xff", b"\0\0\0\x80", b"\xff" * 8, b"\x7f" + b"\xff" * 7),
)


def mutate(data: bytes, rng: random.Random, *others: bytes) -> bytes:
    """Damage bytes a little: ``others`` are valid inputs whose parts may be spliced in."""
    content = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6, 20))):
        start = rng.randrange(len(content) + 1)
        end = min(len(content), start + rng.choice((1, 1, 2, 4, 8, 64, 512, 1 << 20)))
        match rng.randrange(8):
            case 0 if content:  # a bit
                content[start - 1] ^= 1 << rng.randrange(8)
            case 1 if content:  # a byte of those at which lengths and marks turn
                content[start - 1] = rng.choice((0, 1, 0x7F, 0x80, 0xFE, 0xFF, 10, 34, 44, 92))
            case 2:
                del content[start:end]
            case 3:
                del content[start:]
            case 4:
                content[start:start] = content[start:end] * rng.choice((1, 2, 50))
            case 5:
                word = rng.choice(WORDS)
                content[start : start + rng.choice((0, len(word)))] = word
            case 6:
                other = rng.choice(others) if others else data
                cut = rng.randrange(len(other) + 1)
                content[start:end] = other[cut : cut + rng.choice((4, 64, 1024, len(other)))]
            case _:
                content[start:end] = rng.randbytes(end - start if end - start < 4096 else 16)
    return bytes(content)


# --- the parent ---------------------------------------------------------------------------------


def find_readers() -> dict[str, Reader]:
    """Collect every reader that can be tried."""
    readers: dict[str, Reader] = {}
    for name in _MODULES:
        if importlib.util.find_spec(name):
            readers |= importlib.import_module(name).READERS
    return readers


def fuzz(
    reader: str, *, count: int, seed: int = 0, first: int = 0, keep: Path | None = None
) -> Report:
    """Try inputs ``first`` to ``first + count`` in children; each crash costs one of them."""
    report = Report()
    number, end = first, first + count
    environment = {
        **os.environ,
        # What is reserved and never used would count in the address space.
        "MALLOC_ARENA_MAX": "2",
        "ARROW_DEFAULT_MEMORY_POOL": "system",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    while number < end:
        command = [sys.executable, "-m", "tests.fuzz", reader, "--child", "--seed", str(seed)]
        command += ["--first", str(number), "--count", str(end - number)]
        command += ["--keep", str(keep.absolute())] if keep else []
        tried = number - 1
        with tempfile.TemporaryFile("w+") as errors:
            with subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, env=environment, text=True
            ) as child:
                for line in child.stdout or ():
                    event = json.loads(line)
                    if "tried" in event:
                        tried = event["tried"]
                        continue
                    report.counts[event["outcome"]] += 1
                    if event["finding"]:
                        report.findings.append(f"{event['number']}: {event['finding']}")
                status = child.wait()
            errors.seek(0)
            tail = errors.read()[-3000:]
        number, begun = end, number
        if status:
            if tried < begun:
                raise RuntimeError(f"the child did not start: {tail}")
            what = "hang" if status == 1 and "Timeout (" in tail else f"crash ({_say(status)})"
            report.counts[what] += 1
            report.findings.append(f"{tried}: {what}\n{tail}")
            if keep:
                _write_again(reader, seed, tried, keep)
            number = tried + 1
    return report


def _say(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"exit {status}"


def _write_again(reader: str, seed: int, number: int, keep: Path) -> None:
    folder = keep / f"{reader}-{seed}-{number}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    find_readers()[reader].write(random.Random(f"{reader}/{seed}/{number}"), folder)


# --- the child ----------------------------------------------------------------------------------


def _tell(**event: object) -> None:
    sys.__stdout__.write(f"{json.dumps(event)}\n")
    sys.__stdout__.flush()


def _try_inputs(name: str, seed: int, first: int, count: int, keep: Path | None) -> None:
    reader = find_readers()[name]
    with _scratch() as folder, contextlib.suppress(Exception):  # imports what is imported late
        reader.write(random.Random(f"{name}/warm"), folder)
        reader.read(folder)
    limit = _read_status("VmSize") + EXTRA_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    base = _read_status("VmRSS")
    for number in range(first, first + count):
        with _scratch() as folder:
            _tell(tried=number)
            try:
                reader.write(random.Random(f"{name}/{seed}/{number}"), folder)
            except (
                ArithmeticError,
                LookupError,
                MemoryError,
                RecursionError,
                ValueError,
            ):  # no library writes such a file
                _tell(number=number, outcome=NOT_WRITTEN, finding="")
                continue
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            faulthandler.dump_traceback_later(SECONDS, exit=True)
            outcome, finding = _try_one(reader, folder)
            faulthandler.cancel_dump_traceback_later()
            peak = _read_status("VmHWM") - base
            if not finding and peak > PEAK_BYTES:
                outcome, finding = "memory", f"{peak / 1e6:,.0f} MB above the base"
        _tell(number=number, outcome=outcome, finding=finding)
        if finding and keep:
            _write_again(name, seed, number, keep)


def _try_one(reader: Reader, folder: Path) -> tuple[str, str]:
    from gemma_tuner.errors import GemmaTunerError

    try:
        reader.read(folder)
    except GemmaTunerError as error:
        for link in _list_chain(error):
            if isinstance(link, MemoryError):
                return "memory", _show(link)
            # What a traceback prints; what is suppressed is not.
            if SECRET.strip() in str(link):
                return "leak", _show(link)
        return f"refused: {type(error).__name__}", ""
    except BaseException as error:  # noqa: BLE001 - which is what is looked for
        return f"raw {type(error).__name__}", _show(error)
    return "read", ""


def _list_chain(error: BaseException) -> list[BaseException]:
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None:
        chain.append(link)
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return chain


def _show(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))[-2500:]


@contextlib.contextmanager
def _scratch():
    with tempfile.TemporaryDirectory(dir=_SCRATCH, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def _read_status(name: str) -> int:
    text = Path("/proc/self/status").read_text()
    line = next(line for line in text.splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reader")
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--child", action="store_true")
    given = parser.parse_args()
    if given.child:
        _try_inputs(given.reader, given.seed, given.first, given.count, given.keep)
        return 0
    report = fuzz(
        given.reader, count=given.count, seed=given.seed, first=given.first, keep=given.keep
    )
    lines = [f"{finding}\n" for finding in report.findings]
    lines += [f"{outcome}: {number:,}" for outcome, number in sorted(report.counts.items())]
    total = sum(report.counts.values())
    lines.append(f"{given.reader}: {total:,} inputs, {len(report.findings)} findings")
    sys.stdout.write("\n".join(lines) + "\n")
    return bool(report.findings)


if __name__ == "__main__":
    sys.exit(main())
