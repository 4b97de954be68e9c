"""A run from the first command to the last, on the tiny model and the bundled samples."""

import json
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from typer.testing import CliRunner

from gemma_tuner.cli.main import app
from gemma_tuner.cli.opening import open_streams
from gemma_tuner.cli.settings import DataSettings
from gemma_tuner.device import Launch
from gemma_tuner.errors import CheckpointError
from gemma_tuner.testing import sample_data, tiny_model
from gemma_tuner.training.adapters import find_adapter, load_adapter
from gemma_tuner.training.trainer import FitResult, Trainer
from gemma_tuner.watch.run import open_runs

STEPS = 3


def invoke(*arguments, input=None):
    return CliRunner().invoke(app, list(map(str, arguments)), input=input)


def read_losses(run):
    """What was logged of steps and held-out data, without what depends on the clock."""
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [
        (r["kind"], r["step"], r["loss"], r.get("grad_norm"))
        for r in records
        if r["kind"] != "event"
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("daily")


@pytest.fixture(scope="module")
def run(folder):
    """A finished run, with dropout, so that everything random matters."""
    out = folder / "runs/first"
    flags = ["--max-steps", STEPS, "--log-every-steps", 1, "--dropout", 0.1, "--seed", 7]
    flags += ["--rank", 4]
    flags += ["--batch-size", 2, "--gradient-accumulation", 1, "--max-tokens", 128]
    flags += ["--sample-every-steps", 2]
    done = invoke("train", *flags, "--out", out, "--cache-dir", folder / "cache")
    assert done.exit_code == 0, done.stderr
    assert "NO REAL MODEL" in done.stderr
    assert f"adapter: {out / 'adapter'}" in done.stdout
    return out


def test_saved_settings_start_the_same_run_again_to_the_bit(folder, run, monkeypatch):
    again = folder / "runs/again"
    done = invoke("train", "--config", run / "settings.yaml", "--out", again)
    assert done.exit_code == 0, done.stderr
    losses = read_losses(run)
    assert [kind for kind, *_ in losses].count("step") == STEPS
    assert [kind for kind, *_ in losses].count("eval") == 2
    assert read_losses(again) == losses
    names = ("adapter/adapter_model.safetensors", "checkpoints/step-00000003/trainer_state.json")
    for name in names:
        assert (again / name).read_bytes() == (run / name).read_bytes()
    monkeypatch.chdir(folder)
    compared = invoke("runs", "compare", run.relative_to(folder), "runs/again")
    assert "first" in compared.stdout
    assert "their settings are the same" in compared.stdout


def test_a_run_is_not_continued_with_settings_that_it_did_not_have(folder, run):
    done = invoke("train", "--out", run, "--resume")
    assert done.exit_code == 1
    told = " ".join(done.stderr.split())
    assert "has other settings" in told
    assert "max_steps" in told
    assert f"gemma-tuner train --config {run / 'settings.yaml'} --resume" in told
    done = invoke("train", "--out", folder / "runs/misspelt", "--resume")
    assert done.exit_code == 1
    assert "to go on with; check --out" in " ".join(done.stderr.split())
    assert not (folder / "runs/misspelt").exists()


def test_the_settings_of_a_recipe_start_with_that_recipe_alone(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("recipe: /my recipes/text_chat.py\nsteps: 3\nanswers: 64\n")
    done = invoke("train", "--config", file)
    assert done.exit_code == 1
    assert f"start that with: python '/my recipes/text_chat.py' --config {file}" in done.stderr
    done = invoke("evaluate", tmp_path)
    assert done.exit_code == 1
    assert "does not say what it was trained on" in " ".join(done.stderr.split())


def test_a_run_goes_on_from_another_folder_and_tells_no_path(tmp_path, monkeypatch):
    there, here = tmp_path / "there", tmp_path / "here"
    for folder in (there, here):
        folder.mkdir()
    rows = [{"prompt": f"{i}?", "response": f"{i}"} for i in range(6)]
    (there / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(there)
    flags = ["--data", "rows.jsonl", "--held-out", 0, "--out", "mine", "--cache-dir", "cache"]
    done = invoke("train", *flags, "--max-steps", 1, "--save-every", 1)
    assert done.exit_code == 0, done.stderr
    monkeypatch.chdir(here)
    done = invoke("train", "--config", "../there/mine/settings.yaml", "--iters", 2, "--resume")
    assert done.exit_code == 0, done.stderr
    assert [step for kind, step, *_ in read_losses(there / "mine") if kind == "step"] == [1, 2]
    assert list(here.iterdir()) == []
    kept = [path for path in (there / "mine").rglob("*") if path.is_file()]
    told = [path.name for path in kept if str(tmp_path).encode() in path.read_bytes()]
    assert told == ["settings.yaml"]


def test_a_run_of_a_script_is_not_measured_on_other_data(run, tmp_path):
    shutil.copytree(run / "adapter", tmp_path / "mine/adapter")
    done = invoke("evaluate", tmp_path / "mine")
    assert done.exit_code == 1
    assert "does not say what it was trained on" in " ".join(done.stderr.split())


def test_samples_of_held_out_examples_are_taken(run):
    lines = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [step for step in (0, 2, 3) for _ in range(4)]
    assert len({line["key"] for line in lines}) == 4


def test_the_adapter_computes_what_stock_peft_computes(run):
    adapter = find_adapter(run)
    ours = load_adapter(tiny_model("gemma4-e2b")[0], run)
    assert not any(p.requires_grad for p in ours.parameters())
    theirs = PeftModel.from_pretrained(tiny_model("gemma4-e2b")[0], adapter).eval()
    ids = {"input_ids": torch.arange(2, 30)[None]}
    with torch.no_grad():
        assert torch.equal(ours(**ids).logits, theirs(**ids).logits)
        with ours.disable_adapter():
            assert not torch.equal(ours(**ids).logits, theirs(**ids).logits)


@pytest.mark.slow
def test_an_adapter_of_another_release_is_refused(run):
    model, _ = tiny_model("gemma4-e2b", seed=1)
    with pytest.raises(CheckpointError, match=r"adapter adapter is not for .*give the model"):
        load_adapter(model, run)
    with pytest.raises(CheckpointError, match="is not for"):
        load_adapter(tiny_model("gemma3n")[0], run)


def test_generate_writes_the_answer_as_it_comes(run):
    done = invoke("generate", "--prompt", "-", "--adapter", run, "--max-new-tokens", 4, input="Hi")
    assert done.exit_code == 0, done.stderr
    assert done.stdout.endswith("\n")
    again = invoke("generate", "-p", "Hi", "--adapter", run / "adapter", "--max-new-tokens", 4)
    assert again.stdout == done.stdout


def test_preview_marks_what_is_trained_and_reports_the_data(folder):
    done = invoke("preview", "--cache-dir", folder / "cache", "--index", 1, "--count", 2)
    assert done.exit_code == 0, done.stderr
    assert "192 rows" in done.stdout
    assert "held out: 48 rows" in done.stdout
    assert "⟦cold<turn|>⟧" in done.stdout
    whole = invoke("preview", "--cache-dir", folder / "cache", "--no-mask-prompt", "--index", 1)
    assert "opposite of hot.<turn|>" in whole.stdout.partition("⟦")[2]


def test_runs_are_listed_and_shown(folder, run):
    listed = invoke("runs", "list", folder / "runs")
    assert listed.exit_code == 0, listed.stderr
    assert "3 of 3" in listed.stdout
    shown = invoke("runs", "show", run)
    assert f"learning_rate{' ' * 4}" in shown.stdout
    assert "0.005" in shown.stdout
    for kind, _, loss, _ in read_losses(run):
        assert f"{loss:.4f}" in shown.stdout, kind
    assert "saved step-00000003" in shown.stdout


def test_a_run_that_failed_is_listed_with_its_reason(tmp_path):
    lines = [
        {"kind": "eval", "step": 0, "loss": None, "nonfinite": {"loss": "nan"}},
        {"kind": "eval", "step": 2, "loss": 1.25},
        {"kind": "event", "step": 2, "name": "failed", "message": "DataError: example 'k': bad"},
        {"kind": "event", "step": 2, "name": "saved", "message": "saved step-00000002"},
    ]
    (tmp_path / "run").mkdir()
    (tmp_path / "run/log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    listed = invoke("runs", "list", tmp_path)
    assert "failed at step 2: DataError: example 'k': bad" in listed.stdout
    (opened,) = open_runs([tmp_path / "run"])
    opened.refresh()
    assert opened.history.best_held_out == (2, 1.25)  # NaN is none
    assert "step 2: DataError" in invoke("runs", "show", tmp_path / "run").stdout


@pytest.mark.slow
def test_a_run_goes_on_where_it_was_stopped(folder, run, monkeypatch):
    out = folder / "runs/stopped"

    class InterruptedTrainer(Trainer):
        def train_step(self, step_input):
            result = super().train_step(step_input)
            if self.step == 1:
                signal.raise_signal(signal.SIGINT)
            return result

    with monkeypatch.context() as patch:
        patch.setattr("gemma_tuner.training.trainer.Trainer", InterruptedTrainer)
        done = invoke("train", "--config", run / "settings.yaml", "--out", out)
    assert done.exit_code == 130
    command = f"gemma-tuner train --config {out / 'settings.yaml'} --resume"
    assert f"stopped after step 1, which is saved; go on with: {command}\n" in done.stderr
    assert not (out / "adapter").exists()
    assert invoke(*command.split()[1:]).exit_code == 0
    assert read_losses(out) == read_losses(run)


@pytest.fixture
def begun(monkeypatch):
    """Trainers of runs that a signal stops before they begin."""
    trainers = []

    class StoppedTrainer(Trainer):
        def fit(self, *, resume=False):
            trainers.append(self)
            return FitResult(0, "SIGTERM", ())

    monkeypatch.setattr("gemma_tuner.training.trainer.Trainer", StoppedTrainer)
    return trainers


@pytest.mark.parametrize(
    ("saved", "flag", "epochs", "max_steps"),
    [("max_steps: 5", "--epochs", 3, None), ("epochs: 5", "--max-steps", None, 3)],
)
def test_a_flag_wins_over_a_length_of_the_other_kind(
    folder, tmp_path, begun, saved, flag, epochs, max_steps
):
    (tmp_path / "mine.yaml").write_text(f"{saved}\ncache_dir: {folder / 'cache'}\n")
    done = invoke("train", "--config", tmp_path / "mine.yaml", flag, 3, "--out", tmp_path / "run")
    assert done.exit_code == 143, done.stderr
    assert (begun[0].config.epochs, begun[0].config.max_steps) == (epochs, max_steps)
    settings = (tmp_path / "run/settings.yaml").read_text()
    assert f"{flag[2:].replace('-', '_')}: 3\n" in settings
    assert saved.partition(":")[0] not in settings


def test_one_process_alone_writes_the_settings(folder, tmp_path, begun, monkeypatch):
    another = Launch(index=1, count=1, count_here=1, missing=())
    monkeypatch.setattr("gemma_tuner.training.processes.read_launch", lambda: another)
    done = invoke("train", "--out", tmp_path / "run", "--cache-dir", folder / "cache")
    assert done.exit_code == 143, done.stderr
    assert len(begun) == 1
    assert not (tmp_path / "run/settings.yaml").exists()


@pytest.fixture
def damaged(tmp_path):
    """Flags of data of two splits, in each of which the third picture is damaged."""
    sample = next((sample_data("image")).glob("*.png"))
    for split in ("train", "valid"):
        pictures = [tmp_path / f"{split} {i}.png" for i in range(20)]
        for picture in pictures:
            shutil.copy(sample, picture)
        pictures[2].write_bytes(b"no picture")
        rows = [{"prompt": "?", "response": "yes", "image": str(path)} for path in pictures]
        (tmp_path / "data").mkdir(exist_ok=True)
        lines = [json.dumps(row) + "\n" for row in rows]
        (tmp_path / f"data/{split}.jsonl").write_text("".join(lines))
    flags = ["--data", tmp_path / "data", "--modality", "image", "--cache-dir", tmp_path / "cache"]
    return [*flags, "--max-bad-fraction", 0.5, "--media-root", tmp_path]


def test_samples_pass_over_what_cannot_be_used(damaged, tmp_path, begun):
    flags = ["--held-out", "valid", "--sample-every-steps", 1, "--out", tmp_path / "run"]
    done = invoke("train", *damaged, *flags)
    assert done.exit_code == 143, done.stderr
    begun[0].samples.begin(tmp_path, 0)
    assert len(list((tmp_path / "samples").iterdir())) == 4


def test_quarantines_of_what_is_trained_on_and_held_out_are_listed(damaged, tmp_path):
    settings = DataSettings(
        data=[str(tmp_path / "data")],
        held_out="valid",
        max_bad_fraction=0.5,
        media_root=tmp_path,
        cache_dir=tmp_path / "cache",
    )
    for stream in open_streams(settings, "image"):
        assert stream is not None
        assert len(list(stream)) == 19
    listed = invoke("quarantine", *damaged, "--held-out", "valid").stdout
    assert "train.jsonl:3\n  decode: " in listed
    assert "valid.jsonl:3\n  decode: " in listed
    assert "in quarantine: 2; usable: 40" in listed
    tried = invoke("quarantine", *damaged, "--held-out", "valid", "--retry").stdout
    assert tried.startswith("released: 0; in quarantine: 2\n")
    # Both parts of a fraction have one quarantine.
    one = ["--split", "train", "--held-out", 0.3]
    assert "in quarantine: 1; usable: 20" in invoke("quarantine", *damaged, *one).stdout


@pytest.mark.slow
def test_quarantined_examples_are_listed_and_released(folder):
    data = folder / "mended"
    data.mkdir()
    rows = [{"prompt": f"{i}?", "response": "yes", "image": f"{i}.png"} for i in range(4)]
    (data / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sample = next(Path(__file__).parents[3].glob("gemma_tuner/testing/samples/image/*.png"), None)
    assert sample is not None
    for i in range(4):
        shutil.copy(sample, data / f"{i}.png")
    (data / "2.png").write_bytes(b"no picture")
    flags = ["--data", data / "rows.jsonl", "--image", "image", "--cache-dir", folder / "cache2"]
    flags += ["--max-bad-fraction", 0.5, "--modality", "image", "--held-out", 0]
    done = invoke("train", *flags, "--epochs", 1, "--out", folder / "bad", "--batch-size", 1)
    assert done.exit_code == 0, done.stderr
    listed = invoke("quarantine", folder / "bad")
    assert "rows.jsonl:3\n  decode: " in listed.stdout
    assert "in quarantine: 1; usable: 4" in listed.stdout
    shutil.copy(sample, data / "2.png")
    assert invoke("quarantine", folder / "bad", "--retry").stdout.startswith("released: ")


@pytest.mark.slow
def test_evaluate_plan_and_every_export(folder, run):
    done = invoke(
        *("evaluate", run, "--max-examples", 4, "--max-new-tokens", 4, "--score", "cer"),
        *("--output", folder / "report"),
    )
    assert done.exit_code == 0, done.stderr
    assert "Evaluation of a Gemma 4 made in memory\n" in done.stdout
    assert re.search(r"cer \(lower is better\) +\d\.\d{4} +\d\.\d{4} +[+-]\d\.\d{4} ", done.stdout)
    assert "\nrows of the stream: 48\n" in done.stdout
    assert "Writing model shards" not in done.stderr
    assert (folder / "report/report.md").is_file()
    planned = invoke("plan", "--memory-gib", 1, "--device", "cpu", "--modality", "image")
    assert "predicted peak" in planned.stdout
    for kind, target in (
        ("adapter", "peft"),
        ("merged", "merged"),
        ("mlx", "mlx"),
        ("gguf", "model.gguf"),
    ):
        done = invoke("export", kind, run, folder / target)
        assert done.exit_code == 0, done.stderr
        assert str(folder / target) in done.stdout
        assert (folder / target).exists()
    card = (folder / "peft/README.md").read_text()
    assert "| Rows | 192 |" in card
    assert '"learning_rate": 0.005' in card
    only = invoke("export", "gguf", run, folder / "lora.gguf", "--adapter-only")
    assert only.exit_code == 0, only.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "modality"),
    [
        *(("lora", modality) for modality in ("text", "audio", "multimodal")),
        *((kind, "image") for kind in ("dora", "rslora", "full")),
    ],
)
def test_what_was_trained_has_the_same_loss_when_it_is_loaded(folder, tmp_path, kind, modality):
    flags = ["--max-steps", 1, "--variant", kind, "--modality", modality]
    done = invoke("train", *flags, "--out", tmp_path, "--cache-dir", folder / "cache")
    assert done.exit_code == 0, done.stderr
    logged = [loss for kind, _, loss, _ in read_losses(tmp_path) if kind == "eval"]
    assert logged[0] != logged[-1]
    done = invoke("evaluate", tmp_path / "adapter", "--max-new-tokens", 1, "--no-compare-base")
    told = re.search(r"held-out loss.* (\d+\.\d{4})\n", done.stdout)
    # It is summed in batches of another size.
    assert told is not None, done.stdout
    assert float(told[1]) == pytest.approx(logged[-1], abs=1e-4)
    assert abs(logged[0] - logged[-1]) > 1e-2


def test_a_new_run_goes_on_with_an_adapter_of_a_run_or_of_mlx(folder, run):
    before = load_file(run / "adapter/adapter_model.safetensors")
    assert invoke("export", "mlx", run, folder / "of-mlx").exit_code == 0
    flags = ["--max-steps", 1, "--max-tokens", 128, "--learning-rate", 1e-9]
    flags += ["--cache-dir", folder / "cache"]
    for number, given in enumerate((run, folder / "of-mlx/adapters.safetensors")):
        out = folder / f"runs/further-{number}"
        flag = ("--adapter", "--resume-adapter-file")[number]
        done = invoke("train", flag, given, *flags, "--out", out)
        assert done.exit_code == 0, done.stderr
        after = load_file(out / "adapter/adapter_model.safetensors")
        assert after.keys() == before.keys()
        for key, tensor in before.items():
            torch.testing.assert_close(after[key], tensor, rtol=1e-6, atol=1e-8)
        again = invoke("train", "--config", out / "settings.yaml", "--resume")
        assert again.exit_code == 0, again.stderr
    done = invoke("train", "--adapter", run, "--rank", 8, *flags, "--out", folder / "runs/none")
    assert done.exit_code == 1
    assert "--adapter goes on with an adapter as it is, and rank would be" in done.stderr
