"""Processes killed at every system call by which they write, one after another.

    python -m tests.kills [WRITER ...] [--most 25] [--at NUMBER] [--no-swap] [--list]
    python -m tests.kills --random 300 [--seed 1]

A writer (``kill_writers``) writes below a folder as a user's program does. It is run once
without a kill, which counts its calls (``kills.c``: writes, renames, links, unlinks, syncs,
truncations, and what makes files and folders). Then a child of one warm process is killed at
a call, on a copy of the folder as it was before. What is there is read as the next reader reads
it, and has to be the old or the new. The writer is run again, and has to come to what the
unkilled one came to, names of files included. Calls that write bytes are cut twice: before the
first byte and after half of them. ``--random`` kills a run from outside, at any moment and started
again where it was killed, while its page and a second reader look on.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import urllib.request
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.kill_writers import Writer

_SOURCE = Path(__file__).with_suffix(".c")
_WRITING = {"write", "pwrite", "writev", "sendfile", "copy_file_range"}
_SCRATCH = "/dev/shm" if Path("/dev/shm").is_dir() else None


@dataclass(slots=True)
class Outcome:
    """What came of the kills of one writer."""

    writer: str
    num_calls: int
    kills: Counter[str] = field(default_factory=Counter)  # by what was cut
    found: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        cut = ", ".join(f"{count} {what}" for what, count in sorted(self.kills.items()))
        head = f"{self.writer}: {self.num_calls} calls, {self.kills.total()} kills ({cut}), "
        return "\n  ".join([f"{head}{len(self.found)} found", *self.found])


# --- children of this process, which is warm and has no threads ----------------------------------


def _fork(work: Callable[[], Any], note: Path) -> int:
    """Let a child do something, and write down what it returns, or its error."""
    note.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
            note.write_text(json.dumps(work(), default=str))
            status = 0
        except BaseException:  # noqa: BLE001 - told by the parent
            note.write_text(json.dumps(traceback.format_exc()[-2000:]))
        finally:
            os._exit(status)
    return child


def _end(child: int) -> int:
    """Kill a child, and return its status: it may have ended before."""
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


class Bench:
    """A folder in which one writer is killed again and again."""

    def __init__(self, name: str, writer: Writer, scratch: Path, *, no_swap: bool = False) -> None:
        self.name, self.writer, self._no_swap = name, writer, no_swap
        self.folder = scratch / "folder"
        self._before, self._killed = scratch / "before", scratch / "killed"
        self._journal, self._note = scratch / "journal", scratch / "note"
        self.folder.mkdir()
        self._call(lambda: writer.prepare(self.folder))
        shutil.copytree(self.folder, self._before, symlinks=True)
        self._old = self._call(lambda: writer.read(self.folder))  # which may write, too
        self.restore()
        begun = time.monotonic()
        self._call(lambda: self._write(0, is_half=False))
        self.seconds = time.monotonic() - begun
        self.calls = self._read_journal()
        self._names = self._list_names()
        self._new = self._call(lambda: writer.read(self.folder))
        known = {call.rpartition("/")[2] for call in self.calls}
        made = [path for path in self._names if not (self._before / path).exists()]
        if unseen := [path for path in made if Path(path).name not in known]:
            raise RuntimeError(f"{name}: no call was seen that makes {unseen}")

    def _try(self, work: Callable[[], Any]) -> tuple[int, Any]:
        _, status = os.waitpid(_fork(work, self._note), 0)
        return status, json.loads(self._note.read_text()) if self._note.exists() else None

    def _call(self, work: Callable[[], Any]) -> Any:
        status, result = self._try(work)
        if status:
            raise RuntimeError(f"{self.name}, without a kill: {result}")
        return result

    def _write(self, number: int, *, is_half: bool) -> None:
        """Write, in a child that is killed at a call; 0 is none."""
        journal = os.open(self._journal, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        where = os.fsencode(self.folder)
        ctypes.CDLL(None).kills_arm(where, ctypes.c_long(number), is_half, self._no_swap, journal)
        self.writer.write(self.folder)

    def _read_journal(self) -> list[str]:
        lines = self._journal.read_text().splitlines()
        return [line.split("\t", 1)[1].replace("\t", " ") for line in lines]

    def _list_names(self) -> list[str]:
        return [str(path.relative_to(self.folder)) for path in _walk(self.folder)]

    def points(self) -> list[tuple[int, bool]]:
        """Every call, those that write bytes twice."""
        return [
            (number, is_half)
            for number, call in enumerate(self.calls, 1)
            for is_half in ((False, True) if call.split(" ")[0] in _WRITING else (False,))
        ]

    def restore(self, kept: Path | None = None) -> None:
        """Lay the folder out as it was before the writer began, or as it was kept."""
        shutil.rmtree(self.folder)
        shutil.copytree(kept or self._before, self.folder, symlinks=True)

    def kill(self, number: int, *, is_half: bool) -> tuple[str | None, str | None]:
        """Kill the writer at a call; return what was cut, if any, and what is wrong then."""
        self.restore()
        status, result = self._try(lambda: self._write(number, is_half=is_half))
        call = self._read_journal()[-1]
        problem = None
        if status == signal.SIGKILL:
            problem = self.check()
        elif status:
            problem = f"the writer failed: {result}"
        elif number <= len(self.calls) - 5:  # threads take turns, so that there are a few fewer
            problem = "it was not killed"
        where = f"call {number}{' (half)' if is_half else ''}, {call}"
        cut = call.split(" ")[0] + (" (half)" if is_half else "")
        return cut if status else None, problem and f"{where}: {problem}"

    def kill_after(self, seconds: float) -> tuple[bool, str | None]:
        """Go on where the writer was killed, and kill it again, unless it comes to its end."""
        child = _fork(lambda: self.writer.write(self.folder), self._note)
        time.sleep(seconds)
        status = _end(child)
        if status not in (0, signal.SIGKILL):
            return False, f"the writer failed: {self._note.read_text()}"
        return status != 0, self._read_what_was_left()

    def check(self) -> str | None:
        """Read what a kill left, write again, and read that; return what is wrong."""
        return self._read_what_was_left() or self.check_end()

    def _read_what_was_left(self) -> str | None:
        shutil.rmtree(self._killed, ignore_errors=True)
        shutil.copytree(self.folder, self._killed, symlinks=True)
        status, got = self._try(lambda: self.writer.read(self.folder))
        if status:
            return f"cannot be read: {got}\nleft: {self._list_names()}"
        between = self.writer.between
        if between is not None and got not in (self._old, self._new, *between):
            return f"neither the old nor the new: {str(got)[:500]}\nleft: {self._list_names()}"
        self.restore(self._killed)
        return None

    def check_end(self) -> str | None:
        """Write once more, and compare what is there with what is there without a kill."""
        left = self._list_names()
        status, problem = self._try(lambda: self.writer.write(self.folder))
        if status:
            return f"cannot be written again: {problem}\nleft: {left}"
        names = set(self._list_names())
        more, lost = sorted(names - set(self._names)), sorted(set(self._names) - names)
        status, got = self._try(lambda: self.writer.read(self.folder))
        if status or got != self._new:
            return f"written again it is another: {_compare(got, self._new)}\nleft: {left}"
        return f"written again it has {more} more, and lacks {lost}" if more or lost else None


def _walk(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


def _compare(got: Any, expected: Any) -> str:
    if not isinstance(got, dict) or not isinstance(expected, dict):
        return str(got)[:2000]
    names = [name for name in {**got, **expected} if got.get(name) != expected.get(name)]
    return "; ".join(f"{name}: {got.get(name)}, not {expected.get(name)}" for name in names)[:2000]


# --- kills at every call, and at any moment ------------------------------------------------------


def kill_everywhere(bench: Bench, *, most: int | None = None, at: int | None = None) -> Outcome:
    """Kill a writer at each of its calls, or at some drawn among them, or at one."""
    outcome = Outcome(bench.name, len(bench.calls))
    points = bench.points()
    if most is not None and most < len(points):
        points = sorted(random.Random(bench.name).sample(points, most))
    for number, is_half in points:
        if at is None or at == number:
            cut, problem = bench.kill(number, is_half=is_half)
            outcome.kills[cut or "too late"] += 1
            outcome.found += [problem] if problem else []
    return outcome


def kill_at_random(bench: Bench, *, count: int, seed: int) -> Outcome:
    """Kill a run, started again and again where it was killed, while others read it."""
    from gemma_tuner.training.reporting.page import open_page

    draw = random.Random(seed)
    outcome = Outcome(bench.name, len(bench.calls))
    note = bench.folder.with_name("reader")
    address = open_page(bench.folder / "run")
    while outcome.kills["at random"] < count and not outcome.found:
        bench.restore()
        reader = _fork(lambda: _look_on(bench.folder / "run", address), note)
        problem, is_killed = None, True
        while problem is None and is_killed:
            is_killed, problem = bench.kill_after(draw.uniform(0, 1.2 * bench.seconds))
            outcome.kills["at random"] += is_killed
        outcome.kills["came to the end"] += problem is None
        problem = problem or bench.check_end()
        if _end(reader) != signal.SIGKILL:
            problem = f"a reader failed: {note.read_text()}"
        outcome.found += [problem] if problem else []
    return outcome


def _look_on(run: Path, address: str) -> None:
    """Read a run as the page does, and ask the page, again and again."""
    from gemma_tuner.watch.run import Run

    watched, is_open, begun = Run(run, "run"), False, time.monotonic()
    for number in itertools.count():
        watched.refresh()
        watched.find_phase()
        if watched.num_damaged:
            raise RuntimeError(f"{watched.num_damaged} lines are damaged")
        try:
            if number % 50 == 0:  # a page keeps who has asked for a while
                with urllib.request.urlopen(address, timeout=60) as answer:
                    is_open = bool(answer.read())
        except OSError:
            if is_open or time.monotonic() > begun + 60:
                raise
        time.sleep(0.02)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("writers", nargs="*", help="by default all")
    parser.add_argument("--most", type=int, help="so many kills of each writer")
    parser.add_argument("--at", type=int, help="at this call alone")
    parser.add_argument("--no-swap", action="store_true", help="folders cannot change places")
    parser.add_argument("--list", action="store_true", help="show the calls, and kill nothing")
    parser.add_argument("--random", type=int, help="kill a run so often, at any moment")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=_SCRATCH) as scratch:
        if "KILLS_BASE" not in os.environ:
            shim = Path(scratch) / "kills.so"
            command = ["gcc", "-shared", "-fPIC", "-O1", "-o", str(shim), str(_SOURCE)]
            subprocess.run([*command, "-ldl", "-lpthread"], check=True)
            settings = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
            settings |= {"KILLS_BASE": scratch, "LD_PRELOAD": str(shim)}
            command = [sys.executable, "-m", "tests.kills", *sys.argv[1:]]
            sys.exit(subprocess.run(command, env=os.environ | settings, check=False).returncode)
        from tests.kill_writers import WRITERS, warm

        warm()
        gc.collect()
        gc.freeze()
        num_found = 0
        for number, name in enumerate(["run"] if given.random else given.writers or WRITERS):
            place = Path(scratch).resolve() / str(number)
            place.mkdir()
            bench = Bench(name, WRITERS[name], place, no_swap=given.no_swap)
            if given.list:
                sys.stdout.write("\n".join([name, *bench.calls, ""]))
                continue
            if given.random:
                outcome = kill_at_random(bench, count=given.random, seed=given.seed)
            else:
                outcome = kill_everywhere(bench, most=given.most, at=given.at)
            sys.stdout.write(f"{outcome}\n")
            sys.stdout.flush()
            num_found += len(outcome.found)
            shutil.rmtree(place)
    sys.exit(num_found > 0)


if __name__ == "__main__":
    main()
