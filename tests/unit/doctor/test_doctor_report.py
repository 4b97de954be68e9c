"""The report: its names are stable, it tells nothing of the user, and it survives the process."""

import getpass
import json
import platform
from pathlib import Path

import pytest
import torch
from rich.console import Console

from gemma_tuner.doctor import Part, examination
from gemma_tuner.doctor.calibration import estimate_speed
from gemma_tuner.doctor.checks import Check
from gemma_tuner.doctor.examination import examine
from gemma_tuner.doctor.kernels import Kernel
from gemma_tuner.doctor.machine import find_evidence, is_pretend
from gemma_tuner.doctor.memory import judge_refusal
from gemma_tuner.doctor.report import SCHEMA, render_report
from gemma_tuner.doctor.unpacking import UNPACKING
from gemma_tuner.errors import ConfigError
from tests.limits import files_limited_to

CPU = torch.device("cpu")
QUICK = [k for k in examination.KERNELS if "262,144" not in k.name]
# Names that readers rely on. One more is fine; to take one away or change it, raise SCHEMA.
NAMES = {
    "schema",
    "machine",
    "device",
    "evidence",
    "parts",
    "counts",
    "checks",
    "calibration",
    "calibration_skipped",
    "unfinished",
}
MACHINE = {
    "system",
    "architecture",
    "chip",
    "is_virtual",
    "num_cpus",
    "load_average_1min",
    "memory_total_bytes",
    "memory_available_bytes",
    "swap_used_bytes",
    "python",
    "packages",
}
DEVICE = {
    "type",
    "name",
    "reason",
    "is_pretend",
    "dtype",
    "memory_total_bytes",
    "memory_used_bytes",
    "environment",
}


@pytest.fixture(scope="module")
def examined(tmp_path_factory):
    path = tmp_path_factory.mktemp("doctor") / "report.json"
    announced = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(examination, "KERNELS", QUICK)
        parts = (Part.KERNELS, Part.MEMORY)
        report = examine(path, "cpu", parts, announce=announced.append)
    return report, json.loads(path.read_text()), announced


def test_the_names_of_the_json_are_those_of_its_schema(examined):
    _, written, _ = examined
    assert SCHEMA == written["schema"] == 1
    assert set(written) == NAMES
    assert set(written["machine"]) == MACHINE
    assert set(written["device"]) == DEVICE
    assert set(written["evidence"]) == {"rung", "statement", "speeds_not_quotable"}
    assert set(written["counts"]) == {"ok", "wrong", "skipped"}
    for check in written["checks"]:
        assert set(check) == {"part", "name", "result", "reason", "source", "figures", "seconds"}


def test_every_check_is_there_and_right(examined):
    report, written, announced = examined
    assert announced == [*(kernel.name for kernel in QUICK), UNPACKING, "memory"]
    assert written["counts"] == {"ok": len(QUICK) + 1, "wrong": 0, "skipped": 1}
    assert written["unfinished"] is None
    assert written["parts"] == ["kernels", "memory"]
    assert report.exit_status == 0


def test_the_report_tells_nothing_of_the_user(examined):
    _, written, _ = examined
    text = json.dumps(written)
    assert str(Path.home()) not in text
    assert platform.node() not in text
    user = getpass.getuser()
    assert f"/{user}" not in text
    assert str(Path.cwd()) not in text


def test_a_person_reads_what_it_is_worth_and_what_was_skipped_and_why(examined):
    report, _, _ = examined
    console = Console(width=80, record=True, file=Path("/dev/null").open("w"))  # noqa: SIM115
    console.print(render_report(report))
    text = " ".join(console.export_text().split())
    assert "nothing of Metal or CUDA" in text
    assert "skipped: running out is recognised: a system may promise more memory" in text
    assert f"{len(QUICK) + 1} ok, 0 WRONG, 1 skipped" in text


def test_something_wrong_is_loud(examined):
    report, _, _ = examined
    report.checks.append(Check("kernels", "x", "wrong", "differs by 0.5", "pytorch#1"))
    try:
        assert report.exit_status == 1
        console = Console(width=80, record=True, file=Path("/dev/null").open("w"))  # noqa: SIM115
        console.print(render_report(report))
        text = " ".join(console.export_text().split())
        assert "WRONG: x: differs by 0.5 (known from pytorch#1)" in text
    finally:
        report.checks.pop()


def test_a_process_that_ends_leaves_what_it_was_doing(tmp_path, monkeypatch):
    def end(inputs):
        raise KeyboardInterrupt

    def draw(generator):
        return {"x": torch.ones(1)}

    deadly = Kernel(
        name="deadly", source="", make=draw, compute=end, reference=lambda inputs: inputs
    )
    monkeypatch.setattr(examination, "KERNELS", [QUICK[1], deadly])
    path = tmp_path / "report.json"
    with pytest.raises(KeyboardInterrupt):
        examine(path, "cpu", [Part.KERNELS])
    written = json.loads(path.read_text())
    assert written["unfinished"] == "deadly"
    assert [check["result"] for check in written["checks"]] == ["ok"]


def test_a_report_that_cannot_be_written_is_said_before_anything_runs(tmp_path):
    announced = []
    with pytest.raises(ConfigError, match="--output"):
        examine(tmp_path / "no" / "report.json", "cpu", announce=announced.append)
    assert len(announced) == 1


def test_a_full_disk_leaves_the_report_that_was_there(examined, tmp_path):
    report, _, _ = examined
    path = tmp_path / "report.json"
    path.write_text("old")
    with files_limited_to(1000), pytest.raises(ConfigError, match="File too large"):
        report.write(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


QUIET = {"is_virtual": False, "load_average_1min": 0.1, "num_cpus": 8, "swap_used_bytes": 0}


def test_evidence_is_what_the_device_is(monkeypatch):
    mps = torch.device("mps")
    assert find_evidence(CPU, QUIET)["rung"] == "cpu"
    if platform.system() != "Darwin":
        assert is_pretend(mps)
        assert find_evidence(mps, QUIET)["rung"] == "pretend"
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    monkeypatch.setattr("gemma_tuner.doctor.machine._name_chip", lambda: "Apple M4")
    assert find_evidence(mps, QUIET)["statement"].startswith("Measured on Apple M4")
    assert find_evidence(mps, QUIET)["speeds_not_quotable"] == []
    virtual = find_evidence(mps, QUIET | {"is_virtual": True})
    assert virtual["rung"] == "virtual"
    assert virtual["speeds_not_quotable"] == ["the machine is virtual"]
    busy = find_evidence(mps, QUIET | {"load_average_1min": 7.0, "swap_used_bytes": 9 * 2**30})
    assert len(busy["speeds_not_quotable"]) == 2


def test_a_full_device_must_be_recognised():
    known = RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)")
    assert judge_refusal(known, CPU)[0] == "ok"
    result, reason, _ = judge_refusal(RuntimeError("no room"), CPU)
    assert result == "wrong"
    assert "no room" in (reason or "")


def test_an_estimate_of_speed_follows_from_one_layer():
    speed = estimate_speed({"flop": 15.86e9, "seconds": 0.01})
    assert speed["all_targets_low"] == pytest.approx(100.0)
    assert speed["all_targets_low"] < speed["all_targets_high"] < speed["tenth_targets_low"]
