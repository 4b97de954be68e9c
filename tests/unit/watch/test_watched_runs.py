"""A run's folder as the page reads it: phases, samples, media, quarantine, settings."""

import json
import os
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_tuner.display import show_memory
from gemma_tuner.errors import ConfigError
from gemma_tuner.settings import save_settings
from gemma_tuner.streaming.quarantine import BadExample, Budget, Quarantine
from gemma_tuner.training.reporting.metrics import EvalRecord, JsonlLog, StepRecord
from gemma_tuner.watch.charts import (
    draw_learning_rate,
    draw_loss,
    draw_memory,
    draw_speed,
    draw_wait,
    find_memory_limits,
)
from gemma_tuner.watch.run import Run, list_setting_differences, open_runs, show_setting
from gemma_tuner.watch.samples import find_media, read_sample
from gemma_tuner.watch.summary import FIGURES, list_figures, list_tiles
from gemma_tuner.watch.units import show_count, show_seconds, show_share
from gemma_tuner.watch.watched import Watched

MAX_STEPS = 100


def write_run(folder, *, steps=10, max_steps=MAX_STEPS, config=None, name=None):
    """A run of one step a second that has logged every step; returns its log, still open."""
    log = JsonlLog(folder / "log.jsonl")
    log.event(0, "run", max_steps=max_steps, config=config or {"seed": 0})
    log.evaluation(EvalRecord(0, 3.0, 20.0, 50, 5))
    for step in range(1, steps + 1):
        write_step(log, step)
    return log


def write_step(log, step, **changes):
    values = {
        "step": step,
        "loss": 2.0 + 1 / step,
        "learning_rate": 1e-4,
        "grad_norm": 1.0,
        "tokens": 100 * step,
        "target_tokens": 10 * step,
        "tokens_per_second": 100.0,
        "target_tokens_per_second": 10.0,
        "data_wait_seconds": 0.25,
        "memory_bytes": 10**9,
        "skipped_steps": 0,
        "epoch": 0.5,
        "counts": {"passed_over": 2},
    }
    log.step(StepRecord(**(values | changes)))


def read_run(folder, name="a run"):
    run = Run(folder, name)
    run.refresh()
    return run


# --- where a run is --------------------------------------------------------------------------


def test_a_run_in_training_has_its_time_left(tmp_path):
    write_run(tmp_path, steps=10).close()
    phase = read_run(tmp_path).find_phase()
    assert (phase.name, phase.seconds_per_step, phase.seconds_left) == ("training", 1.0, 90.0)


def test_a_run_without_a_record_waits(tmp_path):
    assert read_run(tmp_path).find_phase().name == "waiting"


def test_a_log_of_an_older_version_ends_at_its_last_step_only_if_it_says_how_many(tmp_path):
    with JsonlLog(tmp_path / "log.jsonl") as log:
        write_step(log, 5)
    phase = read_run(tmp_path).find_phase()
    assert (phase.name, phase.seconds_left) == ("training", None)


@pytest.mark.parametrize("event", ["finished", "stopped"])
def test_an_ended_run_stays_ended_however_long_ago(tmp_path, event):
    with write_run(tmp_path) as log:
        log.event(10, event, message="")
    phase = read_run(tmp_path).find_phase(now_seconds=time.time() + 1e6)
    assert (phase.name, phase.seconds_left) == (event, None)


def test_a_run_that_was_killed_is_silent(tmp_path):
    write_run(tmp_path).close()
    run = read_run(tmp_path)
    assert run.find_phase(now_seconds=time.time() + 50).name == "training"
    phase = run.find_phase(now_seconds=time.time() + 200)
    assert (phase.name, phase.silent_seconds) == ("silent", 180)


def test_slow_steps_are_no_silence(tmp_path):
    with JsonlLog(tmp_path / "log.jsonl") as log:
        write_step(log, 1, tokens_per_second=1.0)  # a hundred seconds
    run = read_run(tmp_path)
    assert run.find_phase(now_seconds=time.time() + 900).name == "training"
    assert run.find_phase(now_seconds=time.time() + 1100).name == "silent"


def test_reading_again_finds_what_is_new_and_nothing_twice(tmp_path):
    with write_run(tmp_path, steps=3) as log:
        run = Run(tmp_path, "run")
        assert run.refresh()
        assert not run.refresh()
        write_step(log, 4)
        assert run.refresh()
        assert run.history.steps.tolist() == [1, 2, 3, 4]
    JsonlLog(tmp_path / "log.jsonl", resume_step=2).close()
    assert run.refresh()
    assert run.history.steps.tolist() == [1, 2]


# --- samples and media -----------------------------------------------------------------------


def test_samples_are_kept_by_step_and_key(tmp_path):
    write_run(tmp_path).close()
    lines = [
        {"step": 0, "key": "a", "prompt": "?", "reference": "yes", "prediction": "no"},
        {"step": 5, "key": "a", "prompt": "?", "reference": "yes", "prediction": "ye",
         "media": ["001-1.png"], "tokens": [["yes", 0.25], ["!", 0.75]]},
    ]  # fmt: skip
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "samples.jsonl").write_text(text)
    samples = read_run(tmp_path).samples
    assert list(samples) == [0, 5]
    assert samples[0]["a"].confidence is None
    assert samples[5]["a"].media == ("001-1.png",)
    assert samples[5]["a"].confidence == 0.5


@given(
    st.dictionaries(
        st.sampled_from(["step", "key", "prompt", "reference", "media", "tokens"]),
        st.none() | st.integers() | st.text(max_size=3)
        | st.lists(st.text(max_size=2) | st.lists(st.text(max_size=2) | st.floats(), max_size=3)),
    )
)  # fmt: skip
def test_no_sample_breaks_the_page(record):
    sample = read_sample(record)
    assert all(0 <= probability <= 1 for _, probability in sample.tokens)
    assert all(isinstance(name, str) for name in sample.media)


def test_only_media_of_the_run_are_served(tmp_path):
    run = tmp_path / "run"
    (run / "samples" / "inner").mkdir(parents=True)
    for path in ("samples/a.png", "samples/b.wav", "samples/inner/c.png", "log.jsonl"):
        (run / path).write_bytes(b"x")
    (tmp_path / "secret.png").write_bytes(b"secret")
    (run / "samples" / "link.png").symlink_to(tmp_path / "secret.png")
    for page in ("d.svg", "e.html", ".hidden.png"):
        (run / "samples" / page).write_bytes(b"x")
    assert find_media(run, "a.png") == run / "samples" / "a.png"
    assert find_media(run, "b.wav") is not None
    for name in (
        *("link.png", "d.svg", "e.html", ".hidden.png", "missing.png", "inner", "inner/c.png"),
        *("../log.jsonl", "../../secret.png", "..", "", "..\\..\\secret.png", "a.png\0.wav"),
        str(tmp_path / "secret.png"),
        "x" * 5000 + ".png",
    ):
        assert find_media(run, name) is None, name


def test_a_linked_folder_of_samples_is_not_served(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.png").write_bytes(b"x")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "samples").symlink_to(tmp_path / "elsewhere")
    assert find_media(tmp_path / "run", "a.png") is None


def test_the_quarantine_is_read_again_when_it_changes(tmp_path):
    write_run(tmp_path).close()
    run = read_run(tmp_path)
    assert run.quarantine == []
    bad = BadExample("k:1", "k:1", 0, "decode", "DataError", "damaged")
    Quarantine(tmp_path / "quarantine.jsonl", Budget()).add(bad)
    assert run.refresh()
    assert run.quarantine == [bad]


# --- several runs ----------------------------------------------------------------------------


def test_opening_says_what_is_wrong(tmp_path):
    write_run(tmp_path / "runs" / "a").close()
    with pytest.raises(ConfigError, match="there is no folder 'nowhere'"):
        open_runs([tmp_path / "nowhere"])
    with pytest.raises(ConfigError, match=r"not the folder of a run.* the runs in it are a$"):
        open_runs([tmp_path / "runs"])
    with pytest.raises(ConfigError, match="given twice"):
        open_runs([tmp_path / "runs" / "a", tmp_path / "runs" / "." / "a"])
    assert open_runs([tmp_path / "new"], may_be_empty=True)[0].name == "new"


def test_runs_of_one_name_are_told_apart(tmp_path):
    for parent in ("x", "y"):
        write_run(tmp_path / parent / "run").close()
    runs = open_runs([tmp_path / "x" / "run", tmp_path / "y" / "run"])
    assert [run.name for run in runs] == ["x/run", "y/run"]


def test_settings_that_differ_are_listed(tmp_path):
    for name, rate in (("a", 1e-4), ("b", 2e-4)):
        config = {"learning_rate": rate, "seed": 0, "betas": [0.9, 0.99], "output_dir": name}
        write_run(tmp_path / name, config=config).close()
    save_settings(tmp_path / "a", {"model": "m", "learning_rate": "overruled by the log"})
    runs = [read_run(tmp_path / name) for name in "ab"]
    assert list_setting_differences(runs) == [
        ("model", ["m", "–"]),
        ("learning_rate", ["0.0001", "0.0002"]),
    ]


# --- what is drawn ---------------------------------------------------------------------------


def test_one_run_is_drawn_with_its_held_out_loss_and_its_plan(tmp_path):
    with write_run(tmp_path, steps=60) as log:
        log.event(60, "plan", parts={"weights": 3}, peak_bytes=2 * 2**30, budget_bytes=3 * 2**30)
    run = read_run(tmp_path)
    loss = draw_loss([run])
    assert [series["name"] for series in loss["series"]] == [
        "each record",
        "train, mean of 2 records",
        "held-out",
    ]
    assert loss["series"][0]["data"][:2] == [(1, 3.0), (2, 2.5)]
    assert loss["series"][2]["data"] == [(0, 3.0)]
    assert loss["xAxis"]["max"] == MAX_STEPS
    marks = draw_memory([run])["series"][0]["markLine"]["data"]
    assert [mark["yAxis"] for mark in marks] == [2.0, 3.0]
    assert draw_wait([run])["series"][0]["data"][-1] == (60, 25.0)
    assert draw_speed([run])["series"][1]["data"][-1] == (60, 10.0)


def test_a_budget_far_above_the_rest_does_not_flatten_the_chart(tmp_path):
    with write_run(tmp_path) as log:
        log.event(1, "plan", parts={"w": 1}, peak_bytes=2**30, budget_bytes=2**37)
    limits = find_memory_limits(read_run(tmp_path).history)
    assert [limit.value for limit in limits] == [1.0]


def test_runs_are_drawn_over_one_another_with_the_same_mean(tmp_path):
    write_run(tmp_path / "a", steps=60).close()
    write_run(tmp_path / "b", steps=90).close()
    runs = [read_run(tmp_path / name, name) for name in "ab"]
    loss = draw_loss(runs)
    assert [series["name"] for series in loss["series"]] == [
        *("a: train, mean of 3 records", "a: held-out"),
        *("b: train, mean of 3 records", "b: held-out"),
    ]
    first, _, second, _ = (series["color"] for series in loss["series"])
    assert first != second
    assert len(draw_learning_rate(runs)["series"]) == 2


def test_hostile_names_are_values_and_never_keys(tmp_path):
    write_run(tmp_path).close()
    name = ":<script>alert(1)</script>"
    other = read_run(tmp_path, name)

    def keys(value):
        if isinstance(value, dict):
            return [*value, *(key for inner in value.values() for key in keys(inner))]
        return [key for item in value for key in keys(item)] if isinstance(value, list) else []

    options = draw_loss([other, other])
    assert name in json.dumps(options)
    assert {key for key in keys(options) if key.startswith(":")} == {":valueFormatter"}


def test_the_figures_are_those_of_the_log(tmp_path):
    with write_run(tmp_path, steps=30) as log:
        log.evaluation(EvalRecord(30, 2.5, 12.2, 50, 5))
        log.event(30, "plan", parts={"w": 1}, peak_bytes=2 * 2**30, budget_bytes=8 * 2**30)
    run = read_run(tmp_path)
    tiles = {title: (figure, below) for title, figure, below in list_tiles(run, run.find_phase())}
    assert tiles["Loss"][0] == "2.0333"
    assert tiles["Held-out loss"] == ("2.5000", "best 2.5000 at step 30")
    assert tiles["Tokens a second"] == ("100", "10 trained on · 1.0 s a step")
    assert tiles["Data wait"][0] == "25%"
    assert tiles["Peak memory"] == ("–", "planned 2.00 GiB of 8.00 GiB")
    assert tiles["Tokens read"] == ("3,000", "0.50 epochs · 2 passed over")
    figures = dict(zip(FIGURES, list_figures(run, run.find_phase()), strict=True))
    assert figures["step"] == "30 of 100"
    assert figures["best held-out"] == "2.5000"


def test_an_empty_run_has_figures_that_say_so(tmp_path):
    run = read_run(tmp_path)
    tiles = list_tiles(run, run.find_phase())
    assert {tile.figure for tile in tiles} == {"–"}
    assert "no held-out loss yet" in tiles[1].below
    for draw in (draw_loss, draw_speed, draw_memory, draw_wait, draw_learning_rate):
        assert all(series["data"] == [] for series in draw([run])["series"])


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (show_count(9_999), "9,999"),
        (show_count(12_300), "12.3 k"),
        (show_count(4_560_000), "4.56 M"),
        (show_memory(5 * 2**20), "5.0 MiB"),
        (show_memory(4.7e9), "4.38 GiB"),
        (show_seconds(0.25), "250 ms"),
        (show_seconds(8.13), "8.1 s"),
        (show_seconds(59.7), "60 s"),
        (show_seconds(3599), "1 h 00 min"),
        (show_seconds(7320), "2 h 02 min"),
        (show_seconds(200_000), "2 days 7 h"),
        (show_seconds(None), "–"),
        (show_share(0.004), "0.4%"),
        (show_share(0.25), "25%"),
    ],
)
def test_figures_read_well(shown, expected):
    assert shown == expected


# --- following -------------------------------------------------------------------------------


def test_a_page_has_something_new_only_when_something_is(tmp_path):
    with write_run(tmp_path) as log:
        watched = Watched([Run(tmp_path, "run")])
        version = watched.version
        watched.refresh()
        assert watched.version == version
        write_step(log, 11)
        watched.refresh()
    assert watched.version == version + 1


def test_a_file_that_cannot_be_read_any_more_is_told_and_not_the_end(tmp_path):
    write_run(tmp_path).close()
    watched = Watched([Run(tmp_path, "run")])
    (tmp_path / "log.jsonl").rename(tmp_path / "moved")
    (tmp_path / "log.jsonl").mkdir()
    watched.refresh()
    assert "log.jsonl is not a file" in watched.problem
    (tmp_path / "log.jsonl").rmdir()
    (tmp_path / "moved").rename(tmp_path / "log.jsonl")
    watched.refresh()
    assert watched.problem == ""


def test_what_cannot_be_read_for_a_moment_loses_nothing_else(tmp_path):
    log = write_run(tmp_path, steps=1)
    watched = Watched(open_runs([tmp_path]))
    (run,) = watched.runs
    for step, name in ((2, "samples.jsonl"), (3, "quarantine.jsonl")):
        write_step(log, step)
        (tmp_path / name).mkdir()
        before = watched.version
        watched.refresh()
        assert run.history.steps.tolist() == list(range(1, step + 1))
        assert watched.version > before
        assert (name in watched.problem) or name == "quarantine.jsonl"
        (tmp_path / name).rmdir()
    log.close()
    watched.refresh()
    assert not watched.problem


@pytest.mark.parametrize("depth", [2, 3, 900])
def test_settings_nested_deep_are_shown_shortened(tmp_path, depth):
    nested: list = ["x"]
    for _ in range(depth - 1):
        nested = [nested]
    write_run(tmp_path, config={"nested": nested}).close()
    (run,) = open_runs([tmp_path])
    run.refresh()
    assert show_setting(run.settings["nested"]) == ("x" if depth <= 3 else "…")


def test_the_end_of_the_parent_is_noticed(tmp_path):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as parent:
        watched = Watched([Run(tmp_path, "run")], parent.pid)
        assert not watched.has_parent_ended
        parent.kill()
        os.waitid(os.P_PID, parent.pid, os.WEXITED | os.WNOWAIT)  # dead, and still in the table
        watched.refresh()
        assert watched.has_parent_ended
