"""The command: what it loads, and what it says where something is missing."""

import subprocess
import sys

import pytest

from gemma_tuner.errors import ConfigError
from gemma_tuner.watch.command import watch


def run_module(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "gemma_tuner.watch", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={"PATH": "", "COLUMNS": "80"},
    )


def test_help_reads_well_and_describing_it_loads_neither_torch_nor_the_page():
    found = run_module("--help")
    assert found.returncode == 0
    assert "{RUN}..." in found.stdout
    assert "parent-pid" not in found.stdout
    assert max(map(len, found.stdout.splitlines())) <= 80
    check = (
        "import sys, gemma_tuner.watch.command; "
        "print([name for name in ('torch', 'nicegui', 'numpy') if name in sys.modules])"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", check], capture_output=True, text=True, check=True
    )
    assert loaded.stdout.strip() == "[]", loaded.stderr


def test_an_error_is_a_sentence_and_no_traceback(tmp_path):
    found = run_module(str(tmp_path))
    assert found.returncode == 1
    assert found.stderr.startswith("ConfigError: ")
    assert "has no log.jsonl" in found.stderr
    assert found.stderr.count("\n") == 1


def test_without_its_package_it_says_how_to_install_it(tmp_path, monkeypatch):
    (tmp_path / "log.jsonl").touch()
    monkeypatch.setitem(sys.modules, "nicegui", None)
    with pytest.raises(ConfigError, match=r"pip install 'gemma_tuner\[watch\]'"):
        watch([tmp_path])
