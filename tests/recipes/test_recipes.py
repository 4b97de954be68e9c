"""Every file in recipes/ runs, is counted, and stays short enough to read."""

import importlib.util
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel

import gemma_tuner as gt
from gemma_tuner.testing import tiny_model

RECIPES = Path(__file__).parents[2] / "recipes"
TRAINING = ("audio", "image", "stream_bigquery", "text")


def load_recipe(name):
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_recipe_is_run_by_a_test():
    assert sorted(path.stem for path in RECIPES.glob("**/*.py")) == sorted([*TRAINING, "demo"])


@pytest.mark.parametrize("name", TRAINING)
def test_a_recipe_trains_and_its_adapter_opens_in_stock_peft(name, tmp_path, capsys):
    trainer = load_recipe(name).main(["--steps", "2", "--out", str(tmp_path)])
    assert trainer.step == 2
    assert "held-out loss: " in capsys.readouterr().out
    reloaded = PeftModel.from_pretrained(tiny_model("gemma4-e2b")[0], tmp_path / "adapter").eval()
    batch = trainer.collator([trainer.stream[0]])
    trainer.model.eval()
    with torch.no_grad():
        assert torch.equal(reloaded(**batch.inputs).logits, trainer.model(**batch.inputs).logits)


@pytest.mark.parametrize("name", TRAINING)
def test_a_recipe_is_at_most_120_lines(name):
    assert len((RECIPES / f"{name}.py").read_text().splitlines()) <= 120


def test_a_recipe_resumes(tmp_path):
    recipe = load_recipe("text")
    recipe.main(["--steps", "1", "--out", str(tmp_path)])
    assert recipe.main(["--steps", "2", "--out", str(tmp_path), "--resume"]).step == 2


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def interrupted(request, monkeypatch):
    """A signal arrives after the first step of any run; gives the exit status that it asks for."""

    class InterruptedTrainer(gt.Trainer):
        def train_step(self, step_input):
            result = super().train_step(step_input)
            if self.step == 1:
                signal.raise_signal(request.param)
            return result

    monkeypatch.setattr(gt, "Trainer", InterruptedTrainer, raising=False)
    return 128 + request.param


def command_to_go_on(text):
    """Read the arguments of the command that is said last; it must name a recipe."""
    line = text.splitlines()[-1]
    assert line.startswith("stopped after step 1, which is saved; go on with: python ")
    script, *arguments = shlex.split(line.partition("go on with: python ")[2])
    assert Path(script).resolve().parent == RECIPES.resolve()
    return Path(script).stem, arguments


@pytest.mark.parametrize("name", TRAINING)
def test_a_signal_ends_a_recipe_with_its_status_and_the_command_that_goes_on(
    name, interrupted, tmp_path, capsys
):
    out = tmp_path / "a folder"
    with pytest.raises(SystemExit) as stopped:
        load_recipe(name).main(["--steps", "2", "--out", str(out), "--resume"])
    assert stopped.value.code == interrupted
    assert not (out / "adapter").exists()
    said = capsys.readouterr()
    assert "held-out loss: " not in said.out
    assert command_to_go_on(said.err) == (name, ["--steps", "2", "--out", str(out), "--resume"])
    assert load_recipe(name).main(command_to_go_on(said.err)[1]).step == 2


def test_a_signal_ends_the_demo(interrupted, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["demo.py", "--out", str(tmp_path / "demo")])
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit) as stopped:
        load_recipe("demo").main()
    assert stopped.value.code == interrupted
    said = capsys.readouterr()
    name, arguments = command_to_go_on(said.err)
    assert name == "text"
    assert arguments[arguments.index("--out") + 1] == str(tmp_path / "demo" / "text")
    assert "=== image" not in said.out


def run_in_new_process(name, *arguments):
    return subprocess.run(
        [sys.executable, RECIPES / f"{name}.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_an_error_is_one_line_and_status_1(tmp_path):
    (tmp_path / "empty.jsonl").write_text('{"prompt": "?", "response": ""}\n')
    done = run_in_new_process("text", "--data", tmp_path / "empty.jsonl", "--out", tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("DataError: example 'empty.jsonl:1': ")


@pytest.mark.slow
def test_the_demo(tmp_path):
    result = run_in_new_process("demo", "--out", tmp_path / "demo")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("same logits") == 3
