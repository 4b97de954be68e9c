"""The loop: what a step is, what is reported, and what stops it."""

import json
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.utils import clip_grad_norm_
from torch.utils._python_dispatch import TorchDispatchMode

from gemma_tuner.collators.audio import AudioCollator
from gemma_tuner.collators.image import ImageCollator
from gemma_tuner.collators.text import TextCollator
from gemma_tuner.errors import ConfigError, DataError, DivergedError, ResumeError
from gemma_tuner.models.lora import add_lora
from gemma_tuner.models.loss import FrozenHeadCrossEntropy
from gemma_tuner.testing import save_tiny_model, tiny_model
from gemma_tuner.training.checkpoint import show_folder
from gemma_tuner.training.reporting.metrics import EvalRecord
from gemma_tuner.training.step import guarded_step
from gemma_tuner.training.trainer import FitResult, Trainer
from tests.runs import build_trainer, read_trace


def adapter(trainer):
    return torch.cat([p.detach().flatten().clone() for p in trainer.trainable])


@pytest.fixture(scope="module")
def one_step(tmp_path_factory):
    """The folder of a run of one step, for copies."""
    folder = tmp_path_factory.mktemp("one-step")
    build_trainer(folder, max_steps=1).fit()
    return folder


@pytest.fixture
def begun(one_step, tmp_path):
    return shutil.copytree(one_step, tmp_path / "begun")


def test_how_a_step_is_cut_does_not_change_it(tmp_path):
    def train(batch_size, accumulation):
        folder = tmp_path / f"{batch_size} times {accumulation}"
        trainer = build_trainer(
            folder,
            rows=24,
            max_steps=3,
            batch_size=batch_size,
            gradient_accumulation=accumulation,
            epsilon=1.0,  # a smooth step: Adam's default turns rounding into whole steps
        )
        before = adapter(trainer)
        trainer.fit()
        return adapter(trainer) - before

    reference = train(2, 4)
    for cut in ((1, 8), (4, 2), (8, 1)):
        assert float((train(*cut) - reference).norm()) <= 1e-5 * float(reference.norm()), cut


def test_the_log_has_every_step_and_the_held_out_loss(tmp_path):
    trainer = build_trainer(tmp_path, eval_every_steps=2)
    result = trainer.fit()
    steps = read_trace(tmp_path)
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5]
    assert [record["step"] for record in read_trace(tmp_path, "eval")] == [0, 2, 4, 5]
    assert [record.step for record in result.held_out] == [0, 2, 4, 5]
    assert result.held_out[-1].loss < result.held_out[0].loss
    assert steps[-1]["epoch"] == pytest.approx(2.0)
    assert steps[-1]["learning_rate"] < steps[0]["learning_rate"]
    assert all(record["grad_norm"] > 0 and record["tokens"] > 0 for record in steps)


@pytest.mark.parametrize("stop_after", [None, 1, 3])
def test_the_first_and_the_last_step_are_logged_whatever_is_configured(tmp_path, stop_after):
    trainer = build_trainer(tmp_path, log_every_steps=4, max_steps=6)
    trainer.stop_after = stop_after
    trainer.fit()
    if stop_after is not None:
        assert [record["step"] for record in read_trace(tmp_path)] == [1]
        build_trainer(tmp_path, log_every_steps=4, max_steps=6).fit(resume=True)
    assert [record["step"] for record in read_trace(tmp_path)] == [1, 4, 6]


def test_the_bar_moves_with_each_step_and_not_with_each_record(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal, to rich
    trainer = build_trainer(tmp_path, log_every_steps=100, progress=True)
    trainer.stop_after = 3
    trainer.fit()
    assert [record["step"] for record in read_trace(tmp_path)] == [1]
    shown = re.sub(r"\x1b\[[\d;?]*\w", "", capsys.readouterr().err)
    assert re.findall(r"step (\d)/5", shown)[-1] == "3"


def test_a_checkpoint_is_due_every_hundred_steps_unless_configured(tmp_path):
    def due(**settings):
        run_state = build_trainer(tmp_path, max_steps=1000, **settings).run_state
        steps = []
        for run_state.step in range(1, 301):
            steps += [run_state.step] if run_state.save_is_due else []
        return steps

    assert due() == [100, 200, 300]
    assert due(save_every_steps=150) == [150, 300]
    assert due(save_every_steps=None) == []


def test_epochs_end_with_the_data(tmp_path):
    trainer = build_trainer(tmp_path, max_steps=None, epochs=2, rows=11)
    assert trainer.total_steps == 6
    assert trainer.fit().step == 6
    assert trainer.stream.state_dict()["position"] in {0, 11}
    assert read_trace(tmp_path)[-1]["target_tokens"] == 2 * trainer.evaluate().target_tokens


@pytest.mark.parametrize("batch_size", [1, 3, 10])
def test_held_out_loss_is_the_mean_over_tokens_however_batched(tmp_path, batch_size):
    trainer = build_trainer(tmp_path, batch_size=batch_size)
    record = trainer.evaluate()
    total, count = 0.0, 0
    with torch.no_grad():
        for index in range(len(trainer.eval_stream)):
            batch = trainer.collator([trainer.eval_stream[index]])
            loss = trainer.model(**batch.inputs, labels=batch.labels).loss
            total += float(loss) * batch.num_target_tokens
            count += batch.num_target_tokens
    assert record.target_tokens == count
    assert record.loss == pytest.approx(total / count, rel=1e-5)


def test_nothing_of_a_step_waits_for_the_device():
    class NoReadBack(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            assert operator not in {
                torch.ops.aten._local_scalar_dense.default,
                torch.ops.aten.nonzero.default,
                torch.ops.aten.masked_select.default,
            }, operator
            return operator(*args, **(kwargs or {}))

    hidden = torch.randn(6, 8, requires_grad=True)
    weight, targets = torch.randn(50, 8), torch.tensor([1, 2, 3, 49, -100, -100])
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], fused=True)
    parameter.grad = torch.ones(3)
    with NoReadBack():
        FrozenHeadCrossEntropy.apply(hidden, weight, targets, 30.0, 4).backward()
        guarded_step(optimizer, clip_grad_norm_([parameter], 1.0))


def test_a_non_finite_step_is_skipped_counted_and_finally_stops_the_run(tmp_path):
    trainer = build_trainer(tmp_path, max_nonfinite_steps=2, max_steps=20)
    bad_from = 3

    def spoil(gradient):
        return gradient * (float("nan") if trainer.step >= bad_from else 1.0)

    trainer.trainable[0].register_hook(spoil)
    with pytest.raises(
        DivergedError, match=r"last 2 steps up to step 5 .* lower the learning rate"
    ):
        trainer.fit()
    records = read_trace(tmp_path)
    assert [record["skipped_steps"] for record in records] == [0, 0, 0, 1, 2]
    assert records[-1]["grad_norm"] is None
    assert all(bool(p.isfinite().all()) for p in trainer.trainable)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_returns(tmp_path, number):
    trainer = build_trainer(tmp_path)
    before = signal.getsignal(number)
    step = trainer.train_step

    def interrupted_step(step_input):
        if trainer.step == 1:
            signal.raise_signal(number)
        return step(step_input)

    trainer.train_step = interrupted_step
    result = trainer.fit()
    assert (result.step, result.stopped_by) == (2, number.name)
    assert (tmp_path / "run/checkpoints/step-00000002").is_dir()
    assert signal.getsignal(number) == before


def test_a_bad_example_keeps_every_step_before_it(tmp_path):
    trainer = build_trainer(tmp_path, check_seconds=0)
    collate, bad = trainer.collator, []

    class Collator(type(collate)):
        def encode(self, example):
            row = super().encode(example)
            bad.append(example.key)
            if len(bad) == 15:
                raise DataError("damaged", key=example.key)
            return row

    trainer = Trainer(trainer.model, trainer.stream, Collator(collate.processor), trainer.config)
    with pytest.raises(DataError, match="damaged") as raised:
        trainer.fit()
    assert raised.value.key == bad[-1]
    assert trainer.step == 3
    assert (tmp_path / "run/checkpoints/step-00000003").is_dir()


def test_an_existing_run_is_never_overwritten(begun):
    with pytest.raises(ConfigError, match=r"already holds a run \(step-00000001\).*resume=True"):
        build_trainer(begun).fit()


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"learning_rate": 5e-3}, "learning_rate: 0.01 → 0.005"),
        ({"batch_size": 1, "gradient_accumulation": 4}, "batch_size: 2 → 1"),
        ({"rows": 9}, "rows|fingerprint|subset"),
        ({"family": "gemma4-31b"}, "base"),
    ],
)
def test_resuming_another_run_names_what_differs(begun, changed, match):
    with pytest.raises(ResumeError, match=match):
        build_trainer(begun, **changed).fit(resume=True)


def test_many_changed_settings_are_shortened(begun):
    changed = {
        "batch_size": 1,
        "gradient_accumulation": 1,
        "learning_rate": 1.0,
        "schedule": "linear",
        "weight_decay": 0.5,
        "betas": (0.5, 0.5),
        "epsilon": 0.5,
        "max_grad_norm": 5.0,
        "seed": 5,
        "warmup_steps": 2,
    }
    with pytest.raises(ResumeError) as caught:
        build_trainer(begun, **changed).fit(resume=True)
    assert str(caught.value) == (
        "step-00000001 was saved with other settings (saved there → here): batch_size: 2 → 1; "
        "gradient_accumulation: 2 → 1; learning_rate: 0.01 → 1.0; and 7 more. Use the same "
        "settings, or start a new run in another output_dir"
    )


def test_a_checkpoint_of_an_older_version_resumes_exactly(tmp_path):
    build_trainer(tmp_path / "old", dropout=0.1, max_steps=2, schedule="constant").fit()
    folder = tmp_path / "old/run/checkpoints/step-00000002"
    save_file({"cpu": torch.get_rng_state()}, folder / "rng.safetensors")
    document = json.loads((folder / "trainer_state.json").read_text())
    del document["config"]["device"]
    (folder / "trainer_state.json").write_text(json.dumps(document))
    resumed = build_trainer(tmp_path / "old", dropout=0.1, schedule="constant")
    assert resumed.fit(resume=True).step == 5
    assert not (tmp_path / "old/run/checkpoints/step-00000005/rng.safetensors").exists()
    whole = build_trainer(tmp_path / "constant", dropout=0.1, schedule="constant")
    whole.fit()
    assert torch.equal(adapter(resumed), adapter(whole))


def test_a_run_of_another_device_is_not_continued(begun):
    path = begun / "run/checkpoints/step-00000001/trainer_state.json"
    document = json.loads(path.read_text())
    document["config"]["device"] = "mps"
    path.write_text(json.dumps(document))
    with pytest.raises(ResumeError, match="device: mps → cpu"):
        build_trainer(begun).fit(resume=True)


def test_resume_without_a_checkpoint_begins_and_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = build_trainer(tmp_path, max_steps=1, output_dir="runs/qa")
    assert trainer.fit(resume=True).step == 1
    said = capsys.readouterr().err
    assert "there is no checkpoint in 'runs/qa' to resume; the run begins at step 0" in said
    assert "nothing left" not in said


def test_resuming_a_finished_run_says_that_nothing_is_left(tmp_path, capsys):
    build_trainer(tmp_path, max_steps=2).fit()
    assert "nothing left" not in capsys.readouterr().err
    result = build_trainer(tmp_path, max_steps=2).fit(resume=True)
    assert (result.step, result.held_out) == (2, ())
    said = capsys.readouterr().err
    assert "nothing left to do: 2 of 2 steps are done; raise max_steps to train on" in said
    assert "no checkpoint" not in said


def test_a_result_prints_how_the_run_ended():
    records = tuple(
        EvalRecord(step=step, loss=loss, perplexity=1.0, target_tokens=1, examples=1)
        for step, loss in ((0, 3.25), (2, 1.5))
    )
    assert str(FitResult(2, None, records)) == (
        "FitResult(2 steps done, held-out loss 3.2500 (step 0) → 1.5000 (step 2))"
    )
    assert repr(FitResult(1, "SIGINT", ())) == "FitResult(1 steps done, stopped by SIGINT)"


def test_a_run_is_named_as_the_user_named_it():
    assert show_folder("runs/qa") == show_folder(Path("runs/qa")) == "runs/qa"
    assert show_folder("/home/ada/secret/qa") == "qa"


def test_preview_shows_the_trained_answer(tmp_path):
    trainer = build_trainer(tmp_path)
    preview = trainer.preview(3)
    answer = trainer.stream[3].turns[-1].text
    assert preview.trained_text == f"{answer}<turn|>"
    assert f"⟦{answer}<turn|>⟧" in str(preview)


def test_evaluate_without_a_held_out_stream(tmp_path):
    trainer = build_trainer(tmp_path)
    trainer.eval_stream = None
    with pytest.raises(ConfigError, match="eval_stream"):
        trainer.evaluate()


def test_settings_and_state_hold_no_path_of_the_user(one_step):
    for path in (one_step / "run").rglob("*.json*"):
        assert str(one_step) not in path.read_text(), path.name
    state = json.loads((one_step / "run/checkpoints/step-00000001/trainer_state.json").read_text())
    assert state["step"] == 1


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A trainer whose arguments are given to others, some of them changed."""
    trainer = build_trainer(tmp_path_factory.mktemp("parts"))
    names = ("model", "stream", "collator", "config", "eval_stream")
    return {name: getattr(trainer, name) for name in names}


@pytest.mark.parametrize(
    ("name", "given", "says"),
    [
        ("model", torch.nn.Linear(2, 2), r"^model is a Linear; .*add_lora\(model\)"),
        ("model", (1, 2), r"^model is a tuple; wrap what load_model returns"),
        ("collator", print, r"^collator is a builtin_function_or_method; give TextCollator\("),
        ("config", {"max_steps": 1}, r"^config is a dict; give TrainConfig\(max_steps"),
        (
            "stream",
            ["Rosebud"],
            r"^stream is a list, which has no .*state_dict, .*; .*stream_rows\(rows\)",
        ),
        ("stream", "Rosebud.jsonl", r"^stream is a str, .*; stream_local\(paths\)"),
        ("eval_stream", Path("Rosebud"), r"^eval_stream is a PosixPath, .*; stream_local\("),
        ("stream", None, r"^stream is a NoneType, "),
        ("eval_stream", ["Rosebud"], r"^eval_stream is a list, "),
    ],
)
def test_an_argument_of_another_kind_is_refused_with_the_remedy(parts, name, given, says):
    with pytest.raises(ConfigError, match=says) as caught:
        Trainer(**{**parts, name: given})
    assert "Rosebud" not in str(caught.value)


@pytest.mark.parametrize(
    ("family", "other", "says"),
    [
        (
            "gemma4-e2b",
            "gemma3n",
            r"model is Gemma 4 \(gemma4\), .* of Gemma 3n \(gemma3n\); give",
        ),
        (
            "gemma3n",
            "gemma4-e2b",
            r"model is Gemma 3n \(gemma3n\), .* of Gemma 4 \(gemma4\); give",
        ),
        ("gemma4-12b", "gemma4-31b", r"\(gemma4_unified\), .*processor is of Gemma 4 \(gemma4\)"),
    ],
)
def test_a_processor_of_another_family_is_refused(parts, family, other, says):
    model, collator = add_lora(tiny_model(family)[0]), TextCollator(tiny_model(other)[1])
    with pytest.raises(ConfigError, match=says + r".* that load_model returned together"):
        Trainer(model, parts["stream"], collator, parts["config"])


def test_a_collator_for_media_that_the_model_has_no_part_for_is_refused(parts):
    model, processor = tiny_model("gemma4-31b")  # it has no audio part
    model = add_lora(model)
    Trainer(model, parts["stream"], ImageCollator(processor), parts["config"])
    says = r"AudioCollator is for audio, .*\(it has text, image\); load it with .*'audio'\)"
    with pytest.raises(ConfigError, match=says):
        Trainer(model, parts["stream"], AudioCollator(processor), parts["config"])


def test_media_without_a_tower_is_refused_with_the_remedy(tmp_path):
    from gemma_tuner.checkpoints.loading import load_model
    from gemma_tuner.collators.multimodal import MultimodalCollator

    save_tiny_model("gemma4-e2b", tmp_path / "base")
    model, processor = load_model(tmp_path / "base", device="cpu")
    images = build_trainer(tmp_path, modality="image")
    trainer = Trainer(
        add_lora(model),
        images.stream,
        MultimodalCollator(processor),
        images.config,
    )
    with pytest.raises(DataError, match=r"load_model\(\.\.\., modalities=\('text', 'image'\)\)"):
        trainer.fit()


def test_a_row_that_was_too_long_can_be_remedied_and_the_run_resumed(tmp_path):
    trainer = build_trainer(tmp_path, max_steps=2)
    trainer.fit()
    resumed = build_trainer(tmp_path, max_steps=3)
    resumed.collator.too_long, resumed.collator.max_tokens = "cut", 1024
    assert resumed.fit(resume=True).step == 3


@pytest.mark.parametrize("family", ["gemma4-e2b", pytest.param("gemma3n", marks=pytest.mark.slow)])
def test_training_leaves_every_frozen_weight_as_it_was(tmp_path, family):
    trainer = build_trainer(tmp_path, family=family, modality="image", dropout=0.1)
    gemma = trainer.model.get_base_model()
    frozen = {n: t.clone() for n, t in gemma.state_dict().items() if "lora_" not in n}
    trainer.fit()
    for name, tensor in frozen.items():
        assert torch.equal(gemma.state_dict()[name], tensor), name
    assert not any(module.training for module in trainer.model.modules())
