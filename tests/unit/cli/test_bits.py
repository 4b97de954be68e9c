"""Bits of weights from the command line: given once, kept by the run and by its adapter."""

import json

import pytest
import yaml
from typer.testing import CliRunner

from gemma_tuner.cli.main import app
from gemma_tuner.models.adapter_files import FINGERPRINT
from gemma_tuner.testing import save_tiny_model


def invoke(*arguments):
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exit_code == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of one step with ``--bits 4``, beside its base."""
    folder = tmp_path_factory.mktemp("bits")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(folder / "home"))
        save_tiny_model("gemma4-e2b", folder / "base")
        flags = ["--max-steps", 1, "--max-tokens", 64, "--device", "cpu", "--rank", 2]
        invoke("train", "--model", folder / "base", "--bits", 4, *flags, "--out", folder / "run")
    return folder


@pytest.fixture(autouse=True)
def home(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder / "home"))


def test_a_run_keeps_its_bits_and_so_does_its_adapter(folder, caplog):
    assert yaml.safe_load((folder / "run" / "settings.yaml").read_text())["bits"] == 4
    fingerprint = folder / "run" / "adapter" / FINGERPRINT
    assert json.loads(fingerprint.read_text())["grid"] == "symmetric-4-32"
    asked = ["generate", "--prompt", "hello", "--max-new-tokens", 2]
    invoke(*asked, "--adapter", folder / "run")  # by its settings
    bare = (folder / "run" / "adapter").rename(folder / "adapter")  # by what lies beside it
    try:
        invoke(*asked, "--adapter", bare, "--model", folder / "base", "--device", "cpu")
    finally:
        bare.rename(folder / "run" / "adapter")
    assert caplog.text.count("weights packed as symmetric-4-32") == 2
    assert "another model" not in caplog.text


def test_a_run_is_merged_into_what_it_was_trained_on_unless_a_model_is_given(folder, caplog):
    invoke("export", "merged", folder / "run", folder / "merged")
    assert "packed as symmetric-4-32, as in training" in (folder / "merged/README.md").read_text()
    assert "another model" not in caplog.text
    invoke("export", "merged", folder / "run", folder / "other", "--model", folder / "base")
    assert "another model" in (folder / "other" / "README.md").read_text()
    assert "another model" in caplog.text


def test_convert_writes_what_plan_and_train_take(folder):
    done = invoke("convert", folder / "base", folder / "packed", "--bits", 8, "--group", 32)
    assert str(folder / "packed") in done.stdout
    config = json.loads((folder / "packed" / "config.json").read_text())
    assert set(config["packed"].values()) == {"affine-8-32"}
    asked = ["--memory-gib", 4, "--device", "mps", "--max-tokens", 64, "--batch-size", 1]
    assert (
        "predicted peak" in invoke("plan", "--model", folder / "base", "--bits", 8, *asked).stdout
    )
    contradicted = ["plan", "--model", folder / "packed", "--bits", 4, *asked]
    done = CliRunner().invoke(app, list(map(str, contradicted)))
    assert done.exit_code == 1
    assert "packed in 8 already" in done.stderr


@pytest.mark.parametrize("command", ["train", "plan"])
def test_the_tiny_model_is_not_packed(command):
    done = CliRunner().invoke(app, [command, "--bits", "4"])
    assert done.exit_code == 1
    assert "bits is 4, and 'tiny' is not packed" in done.stderr
