"""What other trainers call settings works where it means the same, or is answered by meaning."""

import pytest
import typer
import yaml
from typer.testing import CliRunner

import gemma_tuner as gt
from gemma_tuner.cli.main import app
from gemma_tuner.cli.settings import normalize_flag
from gemma_tuner.errors import ConfigError
from gemma_tuner.habits import INSTEAD, SAME, find_meaning, translate_mlx
from gemma_tuner.settings import read_settings

# Source: transformers' TrainingArguments, TRL's SFTConfig, PEFT's LoraConfig, mlx-lm's arguments;
# beside each what the answer must name.
HABITS = {
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "gradient_accumulation",
    "num_train_epochs": "epochs",
    "save_total_limit": "keep_checkpoints",
    "logging_steps": "log_every_steps",
    "save_steps": "save_every_steps",
    "eval_steps": "eval_every_steps",
    "report_to": "trackers",
    "lr_scheduler_type": "schedule",
    "adam_epsilon": "epsilon",
    "adam_beta1": "betas",
    "warmup_ratio": "warmup_steps",
    "iters": "max_steps",
    "lr": "learning_rate",
    "bs": "batch_size",
    "optim": "optimizer=",
    "max_seq_length": "setting of the collator",
    "max_length": "setting of the collator",
    "lora_r": "setting of LoraConfig",
    "target_modules": "setting of LoraConfig",
    "bf16": "dtype of load_model",
    "resume_from_checkpoint": "resume=True",
    "dataset_text_field": "text=",
    "data_seed": "stream's seed",
    "packing_of_rows": "it has",
    "dataloader_num_workers": "FetchConfig",
    "push_to_hub": "nothing is uploaded",
    "val_batches": "held out",
}


@pytest.mark.parametrize(("habit", "named"), HABITS.items())
def test_a_habit_is_answered_with_what_it_means(habit, named):
    with pytest.raises(ConfigError) as caught:
        gt.TrainConfig(max_steps=1, **{habit: 1})
    answer = str(caught.value).partition("; ")[2]
    assert named in answer
    if "did you mean" in answer:
        assert SAME[habit] in answer.partition("?")[0]


def test_no_name_is_both_ours_and_foreign_and_no_answer_leads_nowhere():
    group = typer.main.get_command(app)
    options = {
        flag.lstrip("-").replace("-", "_")
        for command in group.commands.values()
        for option in command.params
        for flag in option.opts
        if flag.startswith("--")
    }
    assert not options & INSTEAD.keys()
    assert not SAME.keys() & INSTEAD.keys()
    for name in SAME:
        assert find_meaning(name, (), "{}")


@pytest.mark.parametrize(
    ("flag", "ours"),
    [
        ("per-device-train-batch-size", "batch-size"),
        ("gradient-accumulation-steps", "gradient-accumulation"),
        ("num-train-epochs", "epochs"),
        ("report-to", "trackers"),
        ("save-total-limit", "keep-checkpoints"),
        ("iters", "max-steps"),
        ("max-tokens", "max-tokens"),
        ("gradient-checkpointing", "grad-checkpoint"),
        ("output-dir", "out"),
        ("learning-rate", "learning-rate"),
    ],
)
def test_flags_that_mean_the_same_work(flag, ours):
    assert normalize_flag(flag) == ours


@pytest.mark.parametrize("name", sorted(INSTEAD))
def test_flags_that_mean_something_else_are_answered(name):
    done = CliRunner().invoke(app, ["train", f"--{name.replace('_', '-')}", "1"])
    assert done.exit_code == 2
    assert f"there is no --{name.replace('_', '-')}"[:30] in " ".join(done.stderr.split())


MLX = {
    "model": "tiny",
    "train": True,
    "fine_tune_type": "lora",
    "optimizer": "adamw",
    "optimizer_config": {"adamw": {"betas": [0.9, 0.98], "eps": 1e-6, "weight_decay": 0.05}},
    "data": "rows.jsonl",
    "seed": 0,
    "num_layers": 16,
    "batch_size": 4,
    "iters": 1000,
    "val_batches": 25,
    "learning_rate": "1e-5",
    "steps_per_report": 10,
    "steps_per_eval": 200,
    "resume_adapter_file": None,
    "adapter_path": "adapters",
    "save_every": 100,
    "test": False,
    "test_batches": 100,
    "max_seq_length": 2048,
    "grad_checkpoint": False,
    "lora_parameters": {"rank": 8, "scale": 20.0, "dropout": 0.1},
    "lr_schedule": {"name": "cosine_decay", "warmup": 100, "arguments": ["1e-5", 1000, "1e-7"]},
}


def test_a_settings_file_of_mlx_lm_means_what_it_means_there(tmp_path, caplog):
    file = tmp_path / "lora_config.yaml"
    file.write_text(yaml.safe_dump(MLX))
    kept = MLX.keys() - {"train", "test", "test_batches", "val_batches", "optimizer"}
    kept -= {"lora_parameters", "lr_schedule", "optimizer_config", "resume_adapter_file"}
    ours = {"rank", "alpha", "dropout", "schedule", "warmup_steps", "betas", "epsilon"}
    read = read_settings(file, kept | ours | {"weight_decay"})
    assert {name: read[name] for name in kept - {"learning_rate"}} == {
        name: MLX[name] for name in kept - {"learning_rate"}
    }
    assert (read["rank"], read["alpha"], read["dropout"]) == (8, 160.0, 0.1)
    assert (read["schedule"], read["warmup_steps"], read["learning_rate"]) == ("cosine", 100, 1e-5)
    assert (read["betas"], read["epsilon"], read["weight_decay"]) == ([0.9, 0.98], 1e-6, 0.05)
    assert "val_batches of the settings file is left out" in caplog.text


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"train": False}, "gemma-tuner evaluate"),
        ({"lora_parameters": [8]}, "not as mlx-lm writes it"),
        ({"lora_parameters": {"scale": "much"}}, "not as mlx-lm writes it"),
        ({"lr_schedule": "cosine"}, "not as mlx-lm writes it"),
        ({"optimizer_config": 3}, "not as mlx-lm writes it"),
        ({"optimizer": "muon"}, "given to Trainer as optimizer="),
        ({"lora_parameters": {"keys": ["self_attn.q_proj"]}}, "set num_layers: -1"),
        ({"lr_schedule": {"name": "step_decay", "arguments": [1e-5, 0.9, 10]}}, "lr_schedule"),
        ({"lr_schedule": {"name": "cosine_decay", "arguments": [1e-5, 9, 5e-6]}}, "lr_schedule"),
    ],
)
def test_what_mlx_lm_means_otherwise_is_refused(changed, says):
    with pytest.raises(ConfigError, match=says):
        translate_mlx({**MLX, **changed})


def test_keys_of_mlx_lm_are_a_pattern_where_all_layers_are_meant():
    lora = {"lora_parameters": {"keys": ["self_attn.q_proj", "mlp.up_proj"]}, "num_layers": -1}
    (pattern,) = translate_mlx(lora)["targets"]
    model, _ = gt.testing.tiny_model("gemma4-e2b")
    model = gt.add_lora(model, gt.LoraConfig(rank=2, targets=(pattern,)))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".language_model.layers." in name for name in trained)
    assert all("self_attn.q_proj" in name or "mlp.up_proj" in name for name in trained)


def test_files_of_our_own_are_left_as_they_are():
    own = {"model": "tiny", "max_steps": 3, "num_layers": 4}
    assert translate_mlx(own) == own
