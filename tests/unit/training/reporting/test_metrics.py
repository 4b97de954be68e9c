"""The log resumes to what an uninterrupted run would have written; progress suits its reader."""

import dataclasses
import io
import json
import math
import subprocess
import sys

import pytest
from rich.console import Console

from gemma_tuner.errors import CheckpointError
from gemma_tuner.training.reporting.metrics import EvalRecord, JsonlLog, StepRecord
from gemma_tuner.training.reporting.progress import Progress


def make_step(step, loss=2.0, **changes):
    record = StepRecord(
        step=step,
        loss=loss,
        learning_rate=2e-4,
        grad_norm=0.5,
        tokens=1000 * step,
        target_tokens=100 * step,
        tokens_per_second=812.4,
        target_tokens_per_second=81.2,
        data_wait_seconds=0.25,
        memory_bytes=3 * 2**30,
        skipped_steps=0,
        epoch=step / 10,
    )
    return dataclasses.replace(record, **changes)


def make_eval(step, loss=1.5):
    return EvalRecord(
        step=step, loss=loss, perplexity=math.exp(loss), target_tokens=640, examples=16
    )


def read(path):
    return [
        json.loads(line, parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))
        for line in path.read_text().splitlines()
    ]


@pytest.fixture(autouse=True)
def stopped_clock(monkeypatch):
    monkeypatch.setattr("gemma_tuner.training.reporting.metrics.time.time", lambda: 5.0)


# --- log --------------------------------------------------------------------------------------


def test_each_record_is_a_line_at_once(tmp_path):
    path = tmp_path / "new" / "log.jsonl"
    with JsonlLog(path) as log:
        log.event(0, "started", device="cpu")
        log.step(make_step(1))
        log.evaluation(make_eval(1))
        lines = read(path)  # before closing: each line is flushed
    assert lines[0] == {"kind": "event", "step": 0, "name": "started", "device": "cpu", "time": 5}
    assert lines[1] == {"kind": "step", **dataclasses.asdict(make_step(1)), "time": 5}
    assert lines[2] == {"kind": "eval", **dataclasses.asdict(make_eval(1)), "time": 5}


def test_nan_and_infinity_are_null_and_named(tmp_path):
    path = tmp_path / "log.jsonl"
    with JsonlLog(path) as log:
        log.step(make_step(1, loss=math.nan, grad_norm=math.inf))
    (line,) = read(path)
    assert (line["loss"], line["grad_norm"], line["learning_rate"]) == (None, None, 2e-4)
    assert line["nonfinite"] == {"loss": "nan", "grad_norm": "inf"}


def write_run(path, steps, resume_step=None):
    with JsonlLog(path, resume_step) as log:
        for step in steps:
            log.step(make_step(step))
            if step % 4 == 0:
                log.evaluation(make_eval(step))


@pytest.mark.parametrize("saved", [0, 1, 4, 5, 9])
def test_a_resumed_log_is_the_log_of_a_run_that_never_stopped(tmp_path, saved):
    write_run(tmp_path / "whole.jsonl", range(1, 13))
    write_run(tmp_path / "log.jsonl", range(1, 10))
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"kind": "step", "st')  # killed while it wrote
    write_run(tmp_path / "log.jsonl", range(saved + 1, 13), resume_step=saved)
    assert (tmp_path / "log.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.jsonl", "whole.jsonl"]


def test_resuming_without_a_log_starts_one(tmp_path):
    write_run(tmp_path / "log.jsonl", [8], resume_step=7)
    assert [line["step"] for line in read(tmp_path / "log.jsonl")] == [8, 8]


@pytest.mark.parametrize("line", ["not json", '{"kind": "step"}', "[1]", '{"step": null}'])
def test_a_foreign_log_is_refused_and_kept(tmp_path, line):
    path = tmp_path / "log.jsonl"
    path.write_text(f'{{"kind": "event", "step": 0, "name": "a"}}\n{line}\n')
    before = path.read_text()
    with pytest.raises(CheckpointError, match=r"line 2 of the log .*log\.jsonl"):
        JsonlLog(path, resume_step=5)
    assert path.read_text() == before


# --- progress ---------------------------------------------------------------------------------


def show(*, enabled=True, **settings):
    file = io.StringIO()
    with Progress(20, enabled, console=Console(file=file, **settings)) as progress:
        progress.message("saved to runs/[a]/b")
        progress.step(make_step(10, loss=2.3456))
        progress.evaluation(make_eval(10))
        progress.step(make_step(20, loss=1.2345, skipped_steps=2))
    return file.getvalue()


def test_a_pipe_gets_one_plain_line_a_record():
    text = show(width=40)
    assert text.splitlines() == [
        "saved to runs/[a]/b",
        "step 10/20  loss 2.3456  lr 2.00e-04  812 tokens/s  3.00 GiB  data wait 0.2 s",
        "step 10/20  held-out loss 1.5000  perplexity 4.48  (640 target tokens, 16 examples)",
        "step 20/20  loss 1.2345  lr 2.00e-04  812 tokens/s  3.00 GiB  data wait 0.2 s  skipped 2",
    ]


@pytest.mark.parametrize("width", [200, 60])
def test_a_terminal_gets_a_live_bar(width):
    text = show(force_terminal=True, width=width)
    assert "\x1b[" in text
    last = " ".join(text.rsplit("20/20", 1)[1].split())
    for figure in ("1.2345", "held-out", "1.5000", "812", "3.00", "0.2", "skipped"):
        assert figure in last, figure
    assert "saved to runs/[a]/b" in text


def test_disabled_progress_is_silent():
    assert show(force_terminal=True, enabled=False) == ""
    assert show(enabled=False) == ""


def test_a_bar_moves_between_records_and_a_pipe_stays_quiet():
    bar, pipe = io.StringIO(), io.StringIO()
    for file, settings in ((bar, {"force_terminal": True}), (pipe, {})):
        with Progress(20, console=Console(file=file, **settings)) as progress:
            progress.advance(7)
    assert "7/20" in bar.getvalue()
    assert pipe.getvalue() == ""


def test_a_resumed_bar_starts_where_the_run_does():
    file = io.StringIO()
    with Progress(20, done_steps=15, console=Console(file=file, force_terminal=True)):
        pass
    assert "15/20" in file.getvalue()


def test_it_goes_to_stderr_and_outlives_its_reader():
    code = (
        "import os, sys\n"
        "from gemma_tuner.training.reporting.progress import Progress\n"
        "print('out')\n"
        "with Progress(20) as progress:\n"
        "    progress.message('err')\n"
        "    sys.stderr.flush()\n"
        "    read, write = os.pipe()\n"
        "    os.close(read)\n"
        "    os.dup2(write, 2)\n"
        "    for _ in range(1000): progress.message('nobody reads this')\n"
        "print('alive')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.stdout == "out\nalive\n"
    assert done.stderr == "err\n"
