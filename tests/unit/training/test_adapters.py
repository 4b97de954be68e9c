"""Which adapter the folder of a run means."""

import json

import pytest

from gemma_tuner.models.adapter_files import FINGERPRINT, save_adapter
from gemma_tuner.training.adapters import find_adapter
from tests.unit.training.test_checkpoint import Run


@pytest.fixture
def behind(tmp_path):
    """A run that was saved after its second step, and went on for one more."""
    run = Run()
    run.train(2)
    run.save(tmp_path)
    save_adapter(run.model, tmp_path / "adapter", step=2)
    assert find_adapter(tmp_path) == tmp_path / "adapter"
    run.train(1)
    run.save(tmp_path)
    return run


def test_a_run_that_went_on_means_its_newest_checkpoint_and_says_so(behind, tmp_path, capsys):
    newest = tmp_path / "checkpoints/step-00000003"
    assert find_adapter(tmp_path) == newest
    assert capsys.readouterr().err == (
        f"gemma_tuner: {tmp_path.name} went on after its adapter was saved; its newest checkpoint "
        "is used, step-00000003\n"
    )
    assert find_adapter(tmp_path / "adapter") == tmp_path / "adapter"  # which is asked for
    save_adapter(behind.model, tmp_path / "adapter", step=3)
    assert find_adapter(tmp_path) == tmp_path / "adapter"
    assert capsys.readouterr().err == ""


def test_an_adapter_that_does_not_say_its_step_is_the_runs(behind, tmp_path, capsys):
    path = tmp_path / "adapter" / FINGERPRINT
    fingerprint = json.loads(path.read_text())
    assert fingerprint.pop("step") == 2
    path.write_text(json.dumps(fingerprint))
    assert find_adapter(tmp_path) == tmp_path / "adapter"
    path.unlink()  # as stock PEFT saves it
    assert find_adapter(tmp_path) == tmp_path / "adapter"
    assert capsys.readouterr().err == ""


def test_an_adapter_outside_of_a_run_has_no_step(tmp_path):
    save_adapter(Run().model, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / FINGERPRINT).read_text()).keys() == {
        "base_norms_sha256"
    }
