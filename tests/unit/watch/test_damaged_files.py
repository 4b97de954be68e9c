"""A run's folder in which anything is damaged: the page shows the rest, and says what it lacks."""

import json
import os
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nicegui import Client
from starlette.testclient import TestClient

from gemma_tuner.settings import save_settings
from gemma_tuner.streaming.quarantine import BadExample, Budget, Quarantine
from gemma_tuner.training.reporting.metrics import EvalRecord, JsonlLog
from gemma_tuner.watch import run as module
from gemma_tuner.watch.run import Run, open_runs
from gemma_tuner.watch.server import Guard, _build_app
from gemma_tuner.watch.watched import Watched
from tests.unit.watch.test_history import json_values, step_record

NUM = int(os.environ.get("PAGE_EXAMPLES", "30"))

# What only this file says, and what is on the page because of it.
SHOWN = {
    "log.jsonl": ("step 7", "an event of the log", "planned 2.00 GiB"),
    "settings.yaml": ("model-of-settings",),
    "samples.jsonl": ("a model's answer",),
    "quarantine.jsonl": ("a reason of the quarantine",),
}


def write_run(folder):
    with JsonlLog(folder / "log.jsonl") as log:
        log.event(0, "run", max_steps=9, config={"learning_rate": 0.5})
        log.event(1, "plan", parts={"w": 9}, peak_bytes=2**31, budget_bytes=2**32)
        for step in range(1, 8):
            log.step(step_record(step, counts={"passed_over": step}))
        log.evaluation(EvalRecord(7, 3.0, 20.1, 99, 7))
        log.event(7, "swap", message="an event of the log")
    save_settings(folder, {"model": "model-of-settings"})
    texts = {"key": "k", "prompt": "p", "reference": "r", "prediction": "a model's answer"}
    sample = {"step": 7, **texts, "media": ["001-1.png"], "tokens": [["r", 0.5]]}
    (folder / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    bad = BadExample("k:1", "k:1", 0, "decode", "DataError", "a reason of the quarantine")
    Quarantine(folder / "quarantine.jsonl", Budget()).add(bad)


@pytest.fixture(scope="module")
def page():
    """Shows a folder: the page's text, as a browser gets it before it runs anything."""
    watched = Watched([])
    with TestClient(
        _build_app(watched, Guard("t", 80)),
        base_url="http://127.0.0.1",
        cookies={"gemma_tuner_80": "t"},
    ) as client:

        def show(runs):
            vars(watched).update(vars(Watched(runs)))
            found = client.get("/")
            assert found.status_code == 200, [run.problems for run in runs]
            for each in list(Client.instances.values()):  # which wait for their browser
                each.delete()
            return found.text

        yield show


def replace_by(path, make):
    path.unlink()
    make(path)


WHOLE = {  # damages of a file as a whole -> whether the page is to name the file
    "gone": (lambda path: path.unlink(), False),
    "a folder": (lambda path: replace_by(path, type(path).mkdir), True),
    "a pipe": (lambda path: replace_by(path, os.mkfifo), True),
    "a link to itself": (lambda path: replace_by(path, lambda it: it.symlink_to(it)), True),
    "a link to nothing": (lambda path: replace_by(path, lambda it: it.symlink_to("x")), False),
    "empty": (lambda path: path.write_bytes(b""), False),
    "a device": (lambda path: replace_by(path, lambda it: it.symlink_to("/dev/zero")), True),
}


@pytest.mark.parametrize("when", ["before", "while"])
@pytest.mark.parametrize("name", SHOWN)
@pytest.mark.parametrize("damage", WHOLE)
def test_without_a_file_the_others_are_shown(page, tmp_path, name, damage, when):
    write_run(tmp_path)
    act, is_named = WHOLE[damage]
    if when == "before":
        act(tmp_path / name)
    watched = Watched(open_runs([tmp_path]))
    if when == "while":
        act(tmp_path / name)
        watched.refresh()
        watched.refresh()  # a problem stays one
    shown = page(watched.runs)
    for other, texts in SHOWN.items():
        # What was read of a file that has become unreadable stays.
        if other != name or (when == "while" and damage != "empty"):
            assert all(text in shown for text in texts), other
    if is_named or (name == "log.jsonl" and damage != "empty"):
        assert any(name in problem for problem in watched.runs[0].problems.values())
        assert f"{name} " in shown
    shutil.rmtree(tmp_path)
    watched.refresh()
    page(watched.runs)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
@pytest.mark.parametrize("name", SHOWN)
def test_a_file_that_may_not_be_read_is_named_until_it_may(page, tmp_path, name):
    write_run(tmp_path)
    (tmp_path / name).chmod(0)
    (run,) = open_runs([tmp_path])
    for _ in range(2):
        run.refresh()
        assert name in run.problems
    (tmp_path / name).chmod(0o600)
    run.refresh()
    assert not run.problems
    assert all(text in page([run]) for text in SHOWN[name])


@given(
    name=st.sampled_from([*SHOWN]),
    share=st.floats(0, 1),
    garbage=st.binary(max_size=300) | st.just(b"\n\x00\xff{") | st.just(b"\n" + b"[" * 9000),
    cuts=st.booleans(),
)
@settings(max_examples=NUM, deadline=None)
def test_cut_or_garbled_anywhere_a_file_loses_what_is_there_and_no_more(
    page, tmp_path_factory, name, share, garbage, cuts
):
    folder = tmp_path_factory.mktemp("run")
    write_run(folder)
    content = (folder / name).read_bytes()
    at = round(share * len(content))
    (folder / name).write_bytes(content[:at] + garbage + (b"" if cuts else content[at:]))
    (run,) = open_runs([folder])
    run.refresh()
    shown = page([run])
    for other in SHOWN.keys() - {name}:
        assert all(text in shown for text in SHOWN[other]), other
    if name == "log.jsonl":
        whole = [json.loads(line) for line in content[:at].split(b"\n")[:-1]]
        steps = [line["step"] for line in whole if line["kind"] == "step"]
        assert run.history.steps.tolist()[: len(steps)] == steps
        if not cuts:  # the garbage costs its own lines, and those it is in
            lines = content[at:].split(b"\n")[1:-1]
            steps = [line["step"] for line in map(json.loads, lines) if line["kind"] == "step"]
            assert run.history.steps.tolist()[-len(steps) :] == steps or not steps
    shutil.rmtree(folder)


values = json_values | st.just(5e-324) | st.just(1.7e308) | st.just("\ud800") | st.just("x" * 9999)
names = ("step", "key", "prompt", "prediction", "media", "tokens", "row", "stage", "reason",
         "kind", "name", "max_steps", "config", "counts", "epoch", "nonfinite", "device", "parts",
         "peak_bytes", "budget_bytes", "summary", "message", "loss", "tokens_per_second",
         "data_wait_seconds", "objects")  # fmt: skip


@given(
    lines=st.lists(st.dictionaries(st.sampled_from(names), values, max_size=9), max_size=8),
    kind=st.sampled_from(["step", "eval", "event"]),
    event=st.sampled_from(["run", "plan", "failed", "finished", "else"]),
    config=st.dictionaries(st.text(max_size=5), values, max_size=3),
)
@settings(max_examples=NUM, deadline=None)
def test_whatever_the_lines_hold_there_is_a_page(
    page, tmp_path_factory, lines, kind, event, config
):
    folder = tmp_path_factory.mktemp("run")
    for name in ("samples.jsonl", "quarantine.jsonl"):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    records = [{"kind": kind, "name": event, "step": i} | line for i, line in enumerate(lines)]
    records.append({"kind": "event", "name": "run", "config": config})
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in records))
    (folder / "settings.yaml").write_text(json.dumps(config))
    runs = open_runs([folder])
    runs[0].refresh()
    page(runs)
    page([*runs, Run(folder, "again")])
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    "settings_text",
    ["a: 0x" + "f" * 6000, "? [a, b]\n: 1", "a: 2020-01-01", "a: !!set {x, y}", "a: .inf",
     'a: "\\uD800"', "".join(f"a{i}: {i}\n" for i in range(5_000)), "a: !!binary aGk="],
    ids=range(8),
)  # fmt: skip
def test_whatever_settings_say_there_is_a_page(page, tmp_path, settings_text):
    write_run(tmp_path)
    (tmp_path / "settings.yaml").write_text(settings_text)
    (run,) = open_runs([tmp_path])
    assert "step 7" in page([run])
    assert bool(run.saved_settings) != bool(run.problems)


def test_settings_that_would_take_long_to_read_are_named(page, tmp_path):
    write_run(tmp_path)
    (tmp_path / "settings.yaml").write_text("".join(f"a{i}: {i}\n" for i in range(30_000)))
    (run,) = open_runs([tmp_path])
    assert "too large for settings" in page([run])


def test_large_lists_are_cut_and_counted(page, tmp_path):
    write_run(tmp_path)
    sample = {"step": 7, "key": "k", "prediction": "y" * 10_000, "media": ["a.png"] * 10_000}
    sample["tokens"] = [["t", 0.5]] * 300_000
    (tmp_path / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    shown = page(open_runs([tmp_path]))
    for words in ("299,000 more tokens", "9,984 more files", "6,000 more characters"):
        assert words in shown, words
    assert len(shown) < 1_000_000


def test_folders_whose_names_no_page_can_hold(page, tmp_path):
    folder = tmp_path / os.fsdecode(b"run\xff\x1b[31m")
    folder.mkdir()
    write_run(folder)
    (run,) = open_runs([folder])
    assert run.name == "run��[31m"
    assert "step 7" in page([run])


def test_a_long_log_is_shown_before_it_is_read(page, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "read_steps", lambda lines: (None, lines))
    with JsonlLog(tmp_path / "log.jsonl") as log:
        log.event(0, "run", max_steps=20_000, config={})
        for step in range(1, 20_001):
            log.step(step_record(step))
    (run,) = open_runs([tmp_path])
    run.refresh(seconds=0)
    assert 0 < run.share_read < 1
    assert (run.history.step, run.history.max_steps) == (20_000, 20_000)
    some = run.history.steps
    assert some[0] == 1
    assert 1000 < len(some) < 20_000
    assert (some[1:] > some[:-1]).all()
    assert "of its log are read" in page([run])
    while run.share_read < 1:
        assert run.refresh(seconds=0)
    assert run.history.steps.tolist() == list(range(1, 20_001))
    assert "of its log are read" not in page([run])
