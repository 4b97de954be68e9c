"""The command line: quick to describe itself, and brief about what is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gemma_tuner.cli.main import app
from gemma_tuner.doctor.parts import Part

ROOT = Path(__file__).resolve().parents[3]
COMMAND = "import sys; from gemma_tuner.cli.main import app; sys.argv[0] = 'gemma-tuner'; app()"


def run(*arguments, code=COMMAND):
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "80", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_help_is_quick_and_loads_nothing_heavy():
    code = (
        "import resource, sys\n"
        "from gemma_tuner.cli.main import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: pass\n"
        "usage = resource.getrusage(resource.RUSAGE_SELF)\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pyarrow'} & set(sys.modules)\n"
        "sys.stderr.write(f'{usage.ru_utime + usage.ru_stime} {sorted(heavy)}')"
    )
    runs = [run(code=code) for _ in range(3)]
    assert "doctor" in runs[0].stdout
    assert {done.stderr.partition(" ")[2] for done in runs} == {"[]"}
    # Of the processor, and the best of three: wall seconds depend on who else runs.
    assert min(float(done.stderr.partition(" ")[0]) for done in runs) < 0.6


@pytest.mark.parametrize("arguments", [(), ("--help",), ("doctor", "--help")])
def test_help_fits_eighty_columns(arguments):
    done = run(*arguments)
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "Usage: gemma-tuner" in done.stdout


def test_help_names_every_part_and_option():
    text = "".join(run("doctor", "--help").stdout.replace("│", "").split())
    for option in ("--output", "--device", "--only"):
        assert option in text
    for part in Part:
        assert part.value in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--device", "tpu"), "it may be one of mps, cuda, cpu"),
        (("--device", "cpu", "--output", "/no/such/folder/x.json"), "give --output a file in"),
    ],
)
def test_what_keeps_it_from_running_is_one_line_and_status_2(arguments, words):
    done = CliRunner().invoke(app, ["doctor", *arguments])
    assert done.exit_code == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("ConfigError: ")
    assert words in done.stderr
    assert done.stdout == ""


def test_an_unknown_part_is_refused_with_those_there_are():
    done = CliRunner().invoke(app, ["doctor", "--only", "everything"])
    assert done.exit_code == 2
    assert "calibration" in done.stderr


def test_the_report_is_written_and_shown(tmp_path):
    path = tmp_path / "report.json"
    arguments = ["doctor", "--device", "cpu", "--only", "memory", "--output", str(path)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.stderr
    assert "0 ok, 0 WRONG, 1 skipped" in done.stdout
    assert json.loads(path.read_text())["parts"] == ["memory"]


@pytest.mark.slow
def test_the_doctor_runs_as_a_module_and_writes_its_report(tmp_path):
    path = tmp_path / "report.json"
    arguments = ["--device", "cpu", "--only", "memory", "--output", str(path)]
    done = subprocess.run(
        [sys.executable, "-m", "gemma_tuner.doctor", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"the report is in {path}" in " ".join(done.stdout.split())
    assert json.loads(path.read_text())["parts"] == ["memory"]
