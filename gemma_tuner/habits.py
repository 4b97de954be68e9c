"""What other trainers call settings: which of ours means the same, or where it is said instead.

A table decides, so that nobody is led to a setting of another meaning because it is spelt alike.
Source: arguments of transformers' TrainingArguments, TRL's SFTConfig, PEFT's LoraConfig (2026) and
mlx-lm's lora_config.yaml.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from gemma_tuner.errors import MALFORMED, ConfigError
from gemma_tuner.log import announce

_SAME = {
    "alpha": "lora_alpha",
    "batch_size": "bs per_device_train_batch_size train_batch_size",
    "dropout": "lora_dropout",
    "epochs": "num_epochs num_train_epochs",
    "epsilon": "adam_epsilon",
    "eval_every_steps": "eval_steps steps_per_eval",
    "gradient_accumulation": "grad_accumulation_steps gradient_accumulation_steps",
    "gradient_checkpointing": "grad_checkpoint",
    "keep_checkpoints": "save_total_limit",
    "layers": "num_layers",
    "learning_rate": "lr",
    "log_every_steps": "logging_steps steps_per_report",
    "max_new_tokens": "max_tokens",
    "max_steps": "iters steps",
    "max_tokens": "max_length max_seq_length",
    "model": "model_name_or_path",
    "rank": "lora_r lora_rank r",
    "save_every_steps": "save_every save_steps",
    "schedule": "lr_scheduler_type",
    "targets": "target_modules",
    "trackers": "report_to",
    "variant": "fine_tune_type",
}
SAME = {theirs: ours for ours, names in _SAME.items() for theirs in names.split()}
"""What others call a setting -> ours, which means the same."""

_SCHEDULE = "schedule is cosine, linear or constant, with warmup_steps"
_AFTERWARDS = "measure a run afterwards: gemma-tuner evaluate RUN, or evaluate() in a script"
_OPTIMIZER = "AdamW trains; another is given to Trainer as optimizer="
_INSTEAD = {
    "give both as betas=(beta1, beta2)": "adam_beta1 adam_beta2",
    "answers alone are trained on; the collator's train_on says otherwise": (
        "assistant_only_loss completion_only_loss"
    ),
    "weights have the dtype of load_model (dtype=), adapters are float32": "bf16 fp16",
    "the order of the data is the stream's seed": "data_seed",
    "streams read ahead by themselves; FetchConfig says how far": "dataloader_num_workers",
    "name the columns when the stream is opened: text=, or prompt= and response=": (
        "dataset_text_field remove_unused_columns"
    ),
    "fit() trains, and measures what is held out": "do_eval do_train",
    "checkpoints, log and held-out loss come every so many steps: save_, log_, eval_every_steps": (
        "eval_strategy evaluation_strategy logging_strategy save_strategy"
    ),
    "lengths are padded to few sizes; the order is the seed's": "group_by_length",
    "the data set is data: owner/name, its columns prompt, response or text": "hf_dataset",
    "nothing is uploaded; export the adapter, and upload it with hf": "hub_model_id push_to_hub",
    "the adapter of the lowest held-out loss is kept by keep_best": (
        "load_best_model_at_end metric_for_best_model"
    ),
    "log and name of a run are its folder's, output_dir": "logging_dir run_name",
    "a run has a folder of its own; give another output_dir": "overwrite_output_dir",
    _SCHEDULE: "lr_scheduler_kwargs",
    _OPTIMIZER: "optim optimizer",
    "held-out data is measured in batches of batch_size; that changes no number": (
        "per_device_eval_batch_size"
    ),
    "a run goes on with fit(resume=True), on the command line --resume, in its own folder": (
        "resume_from_checkpoint"
    ),
    _AFTERWARDS: "test test_batches",
    "say it as variant='rslora'": "use_rslora",
    "say it as variant='dora'": "use_dora",
    "say it as variant='qalora'": "use_qalora",
    "all that is held out is measured; hold out less with held_out": "val_batches",
    "say it as trackers=('wandb',)": "wandb",
    "give steps: warmup_steps is the ratio times the steps of the run": "warmup_ratio",
}
INSTEAD = {theirs: answer for answer, names in _INSTEAD.items() for theirs in names.split()}
"""What others call a setting that is none here -> where the same is said."""

_SETTINGS = {
    "LoraConfig": "alpha dropout layers rank targets variant",
    "TrainConfig": (
        "batch_size betas early_stopping_patience epochs epsilon eval_every_steps "
        "gradient_accumulation gradient_checkpointing keep_best keep_checkpoints learning_rate "
        "log_every_steps max_steps output_dir save_every_steps schedule trackers warmup_steps "
        "weight_decay"
    ),
    "generate": "max_new_tokens temperature top_k top_p",
    "load_model": "bits device dtype modalities model revision",
    "the collator": (
        "enable_thinking image_tokens long_audio mask_prompt max_seconds max_tokens too_long "
        "train_on"
    ),
    "the stream": (
        "audio cache_dir fetch image locality max_bad_fraction messages prompt response shuffle "
        "split system text"
    ),
}
_OWNERS = {ours: owner for owner, names in _SETTINGS.items() for ours in names.split()}


def find_meaning(name: str, known: Collection[str], form: str) -> str:
    """Say what a setting is here: one of those that are known, or where it belongs; or nothing."""
    meant = SAME.get(name, name)
    if meant in known:
        return form.format(meant)
    if name in INSTEAD:
        return INSTEAD[name]
    ours = name if name in _OWNERS else meant
    return f"{ours} is a setting of {_OWNERS[ours]}" if ours in _OWNERS else ""


# --- mlx-lm's lora_config.yaml -------------------------------------------------------------------

_MLX_ALONE = {"lora_parameters", "lr_schedule", "optimizer_config", "test_batches", "val_batches"}
_MLX_ALONE |= {"train", "test", "clear_cache_threshold", "optimizer", "resume_adapter_file"}


def translate_mlx(content: Mapping[Any, Any]) -> dict[Any, Any]:
    """Say with our settings what a ``lora_config.yaml`` of mlx-lm says; other files stay."""
    told = dict(content)
    mlx = {name: told.pop(name) for name in _MLX_ALONE & content.keys()}
    if mlx.get("train") is False:
        raise ConfigError(f"train is false; {_AFTERWARDS}")
    if mlx.get("resume_adapter_file"):
        told["resume_adapter_file"] = mlx["resume_adapter_file"]
    optimizer = str(mlx.get("optimizer") or "adamw").lower()
    if optimizer not in ("adam", "adamw"):
        raise ConfigError(f"optimizer is {optimizer!r}; {_OPTIMIZER}")
    try:
        found = {
            **_read_lora(mlx.get("lora_parameters") or {}, told.get("num_layers", -1)),
            **_read_schedule(mlx.get("lr_schedule") or {}),
            **_read_optimizer((mlx.get("optimizer_config") or {}).get(optimizer) or {}),
        }
    except MALFORMED as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            "lora_parameters, lr_schedule or optimizer_config of the settings file is not as "
            "mlx-lm writes it: names with their values below it"
        ) from None
    left_out = sorted(mlx.keys() & INSTEAD.keys() - {"optimizer"})
    if mlx.get("test") is False:
        left_out = [name for name in left_out if not name.startswith("test")]
    for name in left_out:
        announce(f"{name} of the settings file is left out: {INSTEAD[name]}")
    return {**told, **found}


def _read_lora(lora: Mapping[str, Any], num_layers: object) -> dict[str, Any]:
    rank = lora.get("rank", 8)  # mlx-lm's
    found = {name: lora[name] for name in ("rank", "dropout") if name in lora}
    if "scale" in lora:  # of the product itself, where ours is alpha / rank
        found |= {"rank": rank, "alpha": float(lora["scale"]) * rank}
    if keys := lora.get("keys"):
        pattern = "|".join(str(key).replace(".", r"\.") for key in keys)
        targets = rf".*language_model\.layers\.\d+\.({pattern})"
        if num_layers not in (-1, None):
            raise ConfigError(
                f"lora_parameters.keys of the settings file go with num_layers: {num_layers}, and "
                f"a pattern means all layers here; set num_layers: -1 to train {targets!r}, or "
                "leave keys out to train every linear layer of the last so many"
            )
        found["targets"] = [targets]
    return found


def _read_schedule(given: Mapping[str, Any]) -> dict[str, Any]:
    if not given:
        return {}
    names = {"cosine_decay": "cosine", "linear_schedule": "linear"}
    name = given.get("name")
    rate, *rest = [float(number) for number in given.get("arguments") or (0,)]
    ends = rest[:1] if name == "linear_schedule" else rest[1:2]  # the steps stand before or after
    if name not in names or not rate or any(end > rate / 100 for end in ends):
        raise ConfigError(
            f"lr_schedule of the settings file is {name!r}, of the arguments "
            f"{given.get('arguments')}; here {_SCHEDULE}, down to 0: give these and the rate"
        )
    found = {"schedule": names[name], "learning_rate": rate}
    return found | ({"warmup_steps": given["warmup"]} if given.get("warmup") else {})


def _read_optimizer(given: Mapping[str, Any]) -> dict[str, Any]:
    names = {"betas": "betas", "eps": "epsilon", "weight_decay": "weight_decay"}
    return {ours: given[name] for name, ours in names.items() if name in given}
