"""Every file in recipes/ runs, is counted, and stays short enough to read."""

import dataclasses
import importlib.util
import json
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel

import gemma_tuner as gt
from gemma_tuner.cli.defaults import GROUPS
from gemma_tuner.cli.settings import RecipeSettings
from gemma_tuner.settings import read_settings
from gemma_tuner.testing import sample_data, tiny_model

RECIPES = Path(__file__).parents[2] / "recipes"
SCORED = ("audio_transcribe", "audio_translate", "image_caption", "image_vqa", "multimodal")
TRAINING = (*SCORED, "stream_bigquery", "text_chat")
ALL_NAMES = {
    field.name for group in (*GROUPS, RecipeSettings) for field in dataclasses.fields(group)
}


def load_recipe(name):
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_recipe_is_run_by_a_test():
    assert sorted(path.stem for path in RECIPES.glob("**/*.py")) == sorted([*TRAINING, "demo"])


SAMPLES = {
    "audio_transcribe": "audio",
    "audio_translate": "translation",
    "image_caption": "image",
    "image_vqa": "vqa",
    "multimodal": "multimodal",
    "text_chat": "chat",
}


def short_run(name, steps, out):
    """The flags of a short run, of few rows."""
    flags = ["--steps", str(steps), "--out", str(out)]
    if name in SCORED:
        flags += ["--answers", "2", "--answer-tokens", "2"]
    if name in SAMPLES:
        data = Path(out).parent / "rows.jsonl"
        flags += ["--data", str(data), "--held-out", "test"]
        if not data.exists():
            write_few_rows(SAMPLES[name], data)
    return flags


def write_few_rows(samples, path):
    """Write nine rows to train on and two to hold out, beside their media."""
    folder = sample_data(samples)
    lines = (folder / "manifest.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    train, test = ([row for row in rows if row["split"] == split] for split in ("train", "test"))
    few = train[:9] + test[:2]
    for row in few:
        for kind in ("image", "audio"):
            if kind in row:
                medium = (folder / row[kind]).resolve()
                row[kind] = f"{medium.parent.name}-{medium.name}"
                shutil.copy(medium, path.with_name(row[kind]))
    path.write_text("".join(json.dumps(row) + "\n" for row in few))


def read_losses(out):
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [(record["kind"], record["step"], record["loss"]) for record in records
            if "loss" in record]  # fmt: skip


# Its recipe holds what those of one kind of media do.
FAST = ("multimodal", "stream_bigquery", "text_chat")


@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=() if x in FAST else pytest.mark.slow) for x in TRAINING],
)
def test_a_recipe_trains_and_its_adapter_opens_in_stock_peft(name, tmp_path, capsys):
    flags = ["--steps", "1", "--out", str(tmp_path)]
    scored = ["--answers", "2", "--answer-tokens", "2"] if name in SCORED else []
    trainer = load_recipe(name).main([*flags, *scored])
    assert trainer.step == 1
    said = capsys.readouterr().out
    assert "held-out loss: " in said
    if name in SCORED:  # loss and scores of both systems, and what is right without a look
        assert re.search(r"\n +adapter +base +difference +95 % interval\n", said)
        assert "\n exact_match (higher " in said
        assert "is right in " in said
    saved = read_settings(tmp_path / "settings.yaml", ALL_NAMES)
    assert saved["max_steps"] == 1
    assert saved["recipe"] == str(RECIPES / f"{name}.py")
    reloaded = PeftModel.from_pretrained(tiny_model("gemma4-e2b")[0], tmp_path / "adapter").eval()
    batch = trainer.collator([trainer.stream[0]])
    trainer.model.eval()
    with torch.no_grad():
        assert torch.equal(reloaded(**batch.inputs).logits, trainer.model(**batch.inputs).logits)


@pytest.mark.parametrize("name", TRAINING)
def test_a_recipe_says_first_how_it_differs(name):
    summary, commands, difference, *_ = load_recipe(name).__doc__.split("\n\n")
    assert summary.startswith("Fine-tune Gemma ")
    assert all(line.startswith(f"    python recipes/{name}.py") for line in commands.splitlines())
    if name == "text_chat":
        assert difference.startswith("The text recipe, from which the others differ.")
    else:
        other = difference.split()[2].rstrip(":")
        assert difference.startswith(f"Different from {other}: ")
        assert (RECIPES / other).is_file()


@pytest.mark.parametrize("name", TRAINING)
def test_every_setting_of_a_recipe_has_its_help(name, capsys):
    with pytest.raises(SystemExit) as ended:
        load_recipe(name).main(["--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert {"--config", "--learning-rate", "--out,--adapter-path"} <= set(said.split())
    assert f"runs/{name.removeprefix('stream_')}]" in said


@pytest.mark.parametrize("name", TRAINING)
def test_a_recipe_is_at_most_120_lines(name):
    assert len((RECIPES / f"{name}.py").read_text().splitlines()) <= 120


def test_a_recipe_resumes(tmp_path):
    recipe = load_recipe("text_chat")
    recipe.main(["--steps", "1", "--out", str(tmp_path)])
    assert recipe.main(["--steps", "2", "--out", str(tmp_path), "--resume"]).step == 2
    assert read_settings(tmp_path / "settings.yaml", ALL_NAMES)["max_steps"] == 2


def start_again(name, folder, flags):
    """Run a recipe, and once more from the settings that it has saved; the same to the bit."""
    first, second = folder / "first", folder / "second"
    load_recipe(name).main([*short_run(name, 3, first), *flags])
    load_recipe(name).main(["--config", str(first / "settings.yaml"), "--out", str(second)])
    losses = read_losses(first)
    assert losses[-1][1] == 3
    assert read_losses(second) == losses
    adapters = [out / "adapter/adapter_model.safetensors" for out in (first, second)]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()
    saved = [read_settings(out / "settings.yaml", ALL_NAMES) for out in (first, second)]
    assert saved[1] == saved[0] | {"out": str(second)}
    return losses


# tests/unit/cli/test_run_from_first_to_last.py says the same of the command.
@pytest.mark.slow
def test_the_settings_of_a_run_start_it_again(tmp_path):
    flags = ["--batch-size", "2", "--learning-rate", "1e-3", "--max-tokens", "256"]
    losses = start_again("text_chat", tmp_path, flags)
    load_recipe("text_chat").main(short_run("text_chat", 3, tmp_path / "others"))
    assert read_losses(tmp_path / "others") != losses


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TRAINING if name != "text_chat"])
def test_the_settings_of_any_run_start_it_again(name, tmp_path):
    flags = ["--cache-dir", str(tmp_path / "cache")] if name == "stream_bigquery" else []
    start_again(name, tmp_path, flags)


def test_a_run_that_refuses_other_settings_keeps_its_own(tmp_path):
    recipe = load_recipe("text_chat")
    recipe.main(["--steps", "1", "--out", str(tmp_path)])
    saved = (tmp_path / "settings.yaml").read_bytes()
    others = ["--steps", "1", "--out", str(tmp_path), "--batch-size", "1"]
    with pytest.raises(gt.ConfigError, match="already holds a run"):
        recipe.main(others)
    with pytest.raises(gt.ResumeError, match="other settings"):
        recipe.main([*others, "--resume"])
    assert (tmp_path / "settings.yaml").read_bytes() == saved


@pytest.fixture
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


@pytest.mark.parametrize(
    ("name", "interrupted"),
    [
        ("text_chat", signal.SIGTERM),
        *(
            pytest.param(
                name, signal.SIGINT, marks=() if name == "text_chat" else pytest.mark.slow
            )
            for name in TRAINING
        ),
    ],
    indirect=["interrupted"],
)
def test_a_signal_ends_a_recipe_with_its_status_and_the_command_that_goes_on(
    name, interrupted, tmp_path, capsys
):
    out = tmp_path / "a folder"
    flags = short_run(name, 2, out)
    with pytest.raises(SystemExit) as stopped:
        load_recipe(name).main([*flags, "--resume"])
    assert stopped.value.code == interrupted
    assert not (out / "adapter").exists()
    said = capsys.readouterr()
    assert "held-out loss: " not in said.out
    assert command_to_go_on(said.err) == (name, [*flags, "--resume"])
    assert load_recipe(name).main(command_to_go_on(said.err)[1]).step == 2


@pytest.mark.parametrize("interrupted", [signal.SIGINT], indirect=True)
def test_a_signal_ends_the_demo(interrupted, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["demo.py", "--out", str(tmp_path / "demo")])
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit) as stopped:
        load_recipe("demo").main()
    assert stopped.value.code == interrupted
    said = capsys.readouterr()
    name, arguments = command_to_go_on(said.err)
    assert name == "text_chat"
    assert arguments[arguments.index("--out") + 1] == str(tmp_path / "demo" / "text_chat")
    assert "=== image_caption" not in said.out


def test_the_demo_deletes_only_what_is_its_own(tmp_path, monkeypatch):
    for name in ("text_chat", "tiny-gemma-4-e2b", "mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").write_text("mine")

    def stop(family, folder):
        raise gt.ConfigError("far enough")

    monkeypatch.setattr(gt.testing, "save_tiny_model", stop)
    monkeypatch.setattr(sys, "argv", ["demo.py", "--out", str(tmp_path)])
    with pytest.raises(gt.ConfigError, match="far enough"):
        load_recipe("demo").main()
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_an_error_is_one_line_and_status_1(tmp_path, monkeypatch, capsys):
    (tmp_path / "empty.jsonl").write_text('{"prompt": "?", "response": ""}\n')
    flags = ["--data", str(tmp_path / "empty.jsonl"), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["text_chat.py", *flags])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(RECIPES / "text_chat.py"), run_name="__main__")
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith("DataError: example 'empty.jsonl:1': ")


@pytest.mark.slow
def test_the_demo(tmp_path):
    command = [sys.executable, RECIPES / "demo.py", "--out", tmp_path / "demo"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("same logits") == 3
