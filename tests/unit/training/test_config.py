"""TrainConfig refuses what cannot work and says what would."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_tuner.errors import ConfigError
from gemma_tuner.training.config import SCHEDULES, TrainConfig


def test_defaults_need_only_an_end():
    config = TrainConfig(max_steps=500)
    assert (config.learning_rate, config.gradient_accumulation) == (2e-4, 8)
    assert TrainConfig(epochs=3).max_steps is None


def test_a_config_prints_what_is_not_the_default():
    config = TrainConfig(epochs=3, betas=(0.9, 0.99), output_dir=Path("runs/qa"))
    assert repr(config) == "TrainConfig(epochs=3, betas=(0.9, 0.99), output_dir='runs/qa')"
    assert eval(str(config)).to_dict() == config.to_dict()


@pytest.mark.parametrize("length", [{}, {"max_steps": 5, "epochs": 1}])
def test_a_run_has_exactly_one_end(length):
    with pytest.raises(ConfigError, match=r"either max_steps=.* or epochs="):
        TrainConfig(**length)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("max_steps", 0, "whole number from 1 up or None"),
        ("max_steps", "500", "whole number from 1 up or None"),
        ("max_steps", True, "whole number"),
        ("max_steps", 500.0, "whole number"),
        ("batch_size", 0, "whole number from 1 up;"),
        ("batch_size", None, "whole number from 1 up;"),
        ("gradient_accumulation", -1, "whole number"),
        ("learning_rate", 0.0, "finite number above 0"),
        ("learning_rate", float("nan"), "finite number above 0"),
        ("learning_rate", float("inf"), "finite number above 0"),
        ("learning_rate", "2e-4", "finite number above 0"),
        ("learning_rate", True, "finite number above 0"),
        ("schedule", "polynomial", "one of constant, cosine, linear"),
        ("schedule", ["cosine"], "one of constant, cosine, linear"),
        ("warmup_steps", -1, "whole number from 0 up"),
        ("warmup_steps", 100, "below max_steps=100"),
        ("weight_decay", -0.1, "finite number from 0 up"),
        ("betas", (0.9, 1.0), "two numbers from 0 up and below 1"),
        ("betas", [0.9, 0.999], "tuple of two numbers"),
        ("betas", (0.9,), "tuple of two numbers"),
        ("epsilon", 0, "finite number above 0"),
        ("max_grad_norm", 0.0, "finite number above 0"),
        ("seed", -1, "whole number from 0 up"),
        ("seed", 2**63, "whole number from 0 to 9223372036854775807"),
        ("gradient_checkpointing", 1, "True or False"),
        ("loss_chunk_tokens", 0, "whole number"),
        ("log_every_steps", 0, "whole number"),
        ("eval_every_steps", 0, "whole number from 1 up or None"),
        ("save_every_steps", 2.5, "whole number from 1 up or None"),
        ("keep_checkpoints", 0, "whole number"),
        ("max_nonfinite_steps", 0, "whole number"),
        ("output_dir", "", "a folder's path"),
        ("output_dir", None, "a folder's path"),
        ("progress", "yes", "True or False"),
    ],
)
def test_bad_values_are_named_with_what_is_allowed(name, value, allowed):
    settings: dict[str, Any] = {"max_steps": 100, name: value}
    with pytest.raises(ConfigError) as caught:
        TrainConfig(**settings)
    message = str(caught.value)
    assert message.startswith(f"{name} must be ")
    assert allowed in message
    assert f"got {value!r} ({type(value).__name__})" in message


def test_unknown_settings_name_the_nearest():
    with pytest.raises(ConfigError, match="'lerning_rate'; did you mean 'learning_rate'"):
        TrainConfig.from_dict({"max_steps": 1, "lerning_rate": 1e-4})
    with pytest.raises(ConfigError, match=r"'zzz'; it has max_steps, epochs"):
        TrainConfig.from_dict({"zzz": 1})
    with pytest.raises(ConfigError, match="'lr'; did you mean 'learning_rate'"):
        TrainConfig(lr=1e-4)
    with pytest.raises(ConfigError, match="'max_step'; did you mean 'max_steps'"):
        TrainConfig(max_step=1)


def test_every_setting_is_documented():
    for name in TrainConfig.__slots__:
        assert f"        {name}: " in (TrainConfig.__doc__ or ""), name


@given(
    st.builds(
        TrainConfig,
        max_steps=st.integers(101, 10**6),
        batch_size=st.integers(1, 64),
        learning_rate=st.floats(1e-9, 1.0),
        schedule=st.sampled_from(SCHEDULES),
        warmup_steps=st.integers(0, 100),
        betas=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
        seed=st.integers(0, 2**63 - 1),
        save_every_steps=st.none() | st.integers(1, 100),
        progress=st.booleans(),
    )
)
def test_a_config_survives_json(config):
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_to_dict_writes_paths_as_strings():
    assert TrainConfig(max_steps=1, output_dir=Path("runs") / "a").to_dict()["output_dir"] == (
        str(Path("runs") / "a")
    )
