"""What does an open page cost the run that it shows?

    python -m benchmarks.watch_overhead [--minutes 60] [--block-seconds 15]

A tiny model trains on one thread and on rows of one length, with a record every ten steps.
`gemma-tuner watch` serves the run, and a headless Chromium shows it. Server and browser are
stopped (SIGSTOP) in one block of each two, in random order. A block's step time is the mean of the
steps in it, logging and waiting for data included; its first second, in which a page that wakes
catches up, does not count. The ratio is the mean over the pairs of blocks, a tenth of them cut at
either end, with a bootstrap interval. Wants two idle cores and chromium; on a shared machine one
percent takes an hour to see.
"""

import argparse
import json
import multiprocessing
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from torch import Tensor

import gemma_tuner as gt
from gemma_tuner.training.feed import StepInput
from tests.browser import Browser

WAKING_SECONDS = 1.0


class TimedTrainer(gt.Trainer):
    """Writes down when each step ended."""

    def train_step(self, step_input: StepInput) -> tuple[Tensor, Tensor]:
        result = super().train_step(step_input)
        with Path(self.config.output_dir, "ends").open("a") as file:
            file.write(f"{time.time()}\n")
        return result


def train(folder: Path, batch_size: int) -> None:
    """Train until terminated, in ``folder / "run"``."""
    torch.set_num_threads(1)
    model, processor = gt.testing.tiny_model("gemma4-e2b")
    rows = folder / "rows.jsonl"
    row = {"prompt": "What is the colour of the sky?", "response": "Blue, by day."}
    rows.write_text("".join(f"{json.dumps({'id': str(i), **row})}\n" for i in range(1000)))
    stream = gt.stream_local(rows, cache_dir=folder / "cache")
    config = gt.TrainConfig(
        max_steps=1_000_000,
        batch_size=batch_size,
        save_every_steps=None,
        log_every_steps=10,
        progress=False,
        output_dir=folder / "run",
    )
    model = gt.add_lora(model, gt.LoraConfig(rank=4))
    TimedTrainer(model, stream, gt.TextCollator(processor), config).fit()


class Block(NamedTuple):
    """A while in which the page was open or stopped; times on the clock of ``time.time``."""

    is_open: bool
    start_seconds: float
    end_seconds: float
    page_cpu_seconds: float

    def step_seconds(self, ends: list[float]) -> float:
        """The mean time of the steps that lie in it."""
        inside = [end for end in ends if self.start_seconds <= end <= self.end_seconds]
        return (inside[-1] - inside[0]) / (len(inside) - 1)


def cpu_seconds(processes: Iterable[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def alternate(page: list[psutil.Process], minutes: float, seconds: float) -> Iterator[Block]:
    """Measure pairs of blocks, open and stopped, in random order."""
    for _ in range(round(60 * minutes / (2 * seconds))):
        for is_open in random.sample((True, False), 2):
            for process in page:
                process.send_signal(signal.SIGCONT if is_open else signal.SIGSTOP)
            time.sleep(WAKING_SECONDS)
            start, used = time.time(), cpu_seconds(page)
            time.sleep(seconds - WAKING_SECONDS)
            yield Block(is_open, start, time.time(), cpu_seconds(page) - used)
    for process in page:
        process.send_signal(signal.SIGCONT)


def trimmed_mean(values: Iterable[float]) -> float:
    """The mean without the smallest and the largest tenth."""
    ordered = sorted(values)
    cut = len(ordered) // 10
    return statistics.fmean(ordered[cut : len(ordered) - cut])


def report(blocks: list[Block], ends: list[float]) -> dict[str, float | list[float]]:
    """What the page costs: the ratio of step times, and its own processor time."""
    open_blocks = [block for block in blocks if block.is_open]
    pairs = zip(blocks[::2], blocks[1::2], strict=True)
    times = [[block.step_seconds(ends) for block in sorted(pair, reverse=True)] for pair in pairs]
    ratios = [opened / stopped for opened, stopped in times]
    again = sorted(trimmed_mean(random.choices(ratios, k=len(ratios))) for _ in range(10_000))
    return {
        "pairs": len(ratios),
        "step_seconds": statistics.median(stopped for _, stopped in times),
        "ratio": trimmed_mean(ratios),
        "ratio_95_percent": [again[250], again[-250]],
        "ratio_median": statistics.median(ratios),
        "page_cores": sum(block.page_cpu_seconds for block in open_blocks)
        / sum(block.end_seconds - block.start_seconds for block in open_blocks),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--block-seconds", type=float, default=15)
    parser.add_argument("--batch-size", type=int, default=16)
    options = parser.parse_args()
    random.seed(0)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        spawn = multiprocessing.get_context("spawn")
        trainer = spawn.Process(target=train, args=(folder, options.batch_size))
        trainer.start()
        ends = folder / "run" / "ends"
        while not ends.exists() or ends.read_text().count("\n") < 50:
            time.sleep(0.5)
        watch = [sys.executable, "-m", "gemma_tuner.watch", folder / "run"]
        server = subprocess.Popen(watch, stdout=subprocess.PIPE, text=True)
        assert server.stdout is not None
        try:
            with Browser(folder / "profile") as browser:
                browser.open(server.stdout.readline().strip())
                browser.wait_for("document.querySelectorAll('canvas').length === 6", 60)
                shown = psutil.Process(browser.pid)
                page = [psutil.Process(server.pid), shown, *shown.children(recursive=True)]
                blocks = [*alternate(page, options.minutes, options.block_seconds)]
                browser.wait_for("document.querySelectorAll('canvas').length === 6")
        finally:
            for process in (server, trainer):
                process.terminate()
            server.wait()
            trainer.join()
        print(json.dumps(report(blocks, [float(line) for line in ends.read_text().split()])))


if __name__ == "__main__":
    main()
