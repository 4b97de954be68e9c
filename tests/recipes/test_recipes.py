"""Every file in recipes/ runs, is counted, and stays short enough to read."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from gemma_tuner.testing import tiny_model

RECIPES = Path(__file__).parents[2] / "recipes"
TRAINING = ("audio", "image", "text")


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


@pytest.mark.slow
def test_the_demo(tmp_path):
    result = subprocess.run(
        [sys.executable, RECIPES / "demo.py", "--out", tmp_path / "demo"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("same logits") == 3
