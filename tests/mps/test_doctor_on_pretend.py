"""The doctor on a pretend MPS device: every operator that it tries is one that Metal has."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gemma_tuner.doctor.kernels import KERNELS
from gemma_tuner.doctor.parity import MODALITIES
from gemma_tuner.doctor.unpacking import UNPACKING
from gemma_tuner.testing.mps.pretend_device import why_not_pretend

ROOT = Path(__file__).resolve().parents[2]

# A minute and a half where nothing else runs.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1_200)]

# The device comes before everything that could ask torch for MPS.
EXAMINE = """
import sys
from gemma_tuner.testing.mps.pretend_device import pretend_mps
pretend_mps(sys.argv[1])
import typer
from gemma_tuner.doctor.command import doctor
sys.argv[1:] = sys.argv[2:]
typer.run(doctor)
"""


@pytest.fixture(scope="module")
def examined(request, tmp_path_factory):
    if reason := why_not_pretend():
        pytest.skip(f"DOCTOR NOT TESTED ON MPS: {reason}")
    path = tmp_path_factory.mktemp("doctor") / "report.json"
    cache = request.config.cache.mkdir("pretend_mps")
    done = subprocess.run(
        [sys.executable, "-c", EXAMINE, str(cache), "--output", str(path)],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert path.exists(), done.stderr[-4000:]
    return done, json.loads(path.read_text())


def test_nothing_is_wrong_but_what_metal_refuses_and_training_avoids(examined):
    done, report = examined
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert report["unfinished"] is None
    skipped = {
        check["name"]: check["reason"] for check in report["checks"] if check["result"] != "ok"
    }
    assert "looks rows up on the CPU" in skipped.pop("embedding rows past 2^31 elements")
    # A pretence has no compiler of Metal's language.
    assert "torch's operators unpack instead" in skipped.pop(UNPACKING)
    assert list(skipped) == ["conv2d with a weight that is not contiguous"]
    assert "Training avoids it: weights are loaded contiguous" in skipped.popitem()[1]
    by_part = dict.fromkeys(report["parts"], 0)
    for check in report["checks"]:
        by_part[check["part"]] += 1
    assert by_part["kernels"] == len(KERNELS) + 1
    assert by_part["parity"] == 4 * sum(map(len, MODALITIES.values()))
    assert by_part["memory"] == by_part["large_table"] == 1


def test_a_pretence_is_named_and_not_timed(examined):
    done, report = examined
    assert report["evidence"]["rung"] == "pretend"
    assert report["device"]["is_pretend"]
    assert report["device"]["dtype"] == "bfloat16"
    assert report["device"]["environment"]["PYTORCH_ENABLE_MPS_FALLBACK"] == "0"
    assert report["calibration"] is None
    assert "nothing of what Metal computes" in " ".join(done.stdout.split())
