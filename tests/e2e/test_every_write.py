"""Killed at a call by which it writes, a writer leaves the old or the new, and can write again.

Here are some of the calls; ``python -m tests.kills`` kills at all of them.
"""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the calls are counted in Linux's own names")
def test_a_kill_at_a_call_leaves_the_old_or_the_new():
    command = [sys.executable, "-m", "tests.kills", "--most", "6"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "run: " in done.stdout
    assert done.stdout.count(" 0 found") == len(done.stdout.splitlines()) > 15
