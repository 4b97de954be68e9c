"""Settings stay ordinary dataclasses, and know what a misspelt name meant."""

import copy
import dataclasses
import inspect
import pickle
from dataclasses import field
from pathlib import Path
from typing import Literal

import pytest

from gemma_tuner.checks import (
    SEED,
    bounds,
    check_fields,
    check_value,
    is_number,
    is_whole_number,
    suggest,
)
from gemma_tuner.errors import ConfigError
from gemma_tuner.models.lora import LoraConfig
from gemma_tuner.training.config import TrainConfig

CONFIGS = [LoraConfig(rank=3), TrainConfig(max_steps=3)]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_a_config_is_an_ordinary_dataclass(config):
    kind = type(config)
    names = [field.name for field in dataclasses.fields(kind)]
    assert list(inspect.signature(kind).parameters) == names
    assert repr(config).startswith(f"{kind.__name__}({names[0]}=")
    for copied in (pickle.loads(pickle.dumps(config)), copy.copy(config)):
        assert copied == config
        assert hash(copied) == hash(config)
    assert dataclasses.replace(config, seed=5).seed == 5
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 5
    assert not hasattr(TrainConfig, "__dict__") or "__slots__" in vars(TrainConfig)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_an_unknown_name_is_answered_with_the_nearest(config):
    kind = type(config)
    says = f"^{kind.__name__} has no setting 'sede'; did you mean 'seed'\\? It has .*seed"
    with pytest.raises(ConfigError, match=says):
        kind(sede=1)
    with pytest.raises(ConfigError, match=f"^{kind.__name__} has no setting 'zzz'; it has .*seed"):
        dataclasses.replace(config, zzz=1)
    with pytest.raises(TypeError, match="positional"):
        kind(16)


def test_true_is_no_number():
    values = (1, 1.5, True, "1", None)
    assert [is_whole_number(value) for value in values] == [True, False, False, False, False]
    assert [is_number(value) for value in values] == [True, True, False, False, False]


@dataclasses.dataclass
class Oven:
    heat: float = field(default=1.0, metadata=bounds(above=0, at_most=9))
    racks: int | None = field(default=None, metadata=bounds(at_least=1, at_most=4))
    share: float = field(default=0.5, metadata=bounds(at_least=0, below=1))
    fan: bool = True
    mode: Literal["bake", "grill"] = "bake"
    tray: Literal["glass", False] | None = None
    place: str | Path | None = None
    seed: int = field(default=0, metadata=SEED)

    def __post_init__(self):
        check_fields(self)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("heat", 0, "a finite number above 0 and at most 9"),
        ("heat", float("inf"), "a finite number above 0 and at most 9"),
        ("heat", 10**400, "a finite number above 0 and at most 9"),
        ("racks", 5, "a whole number from 1 to 4 or None"),
        ("racks", True, "a whole number from 1 to 4 or None"),
        ("racks", 1.0, "a whole number from 1 to 4 or None"),
        ("share", 1, "a finite number from 0 up and below 1"),
        ("fan", 1, "True or False"),
        ("mode", "girll", "one of bake, grill (did you mean 'grill'?)"),
        ("mode", ["bake"], "one of bake, grill"),
        ("tray", 0, "one of glass, False or None"),
        ("place", "", "a folder's path, str or Path or None"),
        ("seed", -1, "a whole number from 0 up"),
        ("seed", 2**63, "a whole number from 0 to 9223372036854775807"),
    ],
)
def test_a_field_says_what_it_may_be(name, value, allowed):
    with pytest.raises(ConfigError) as caught:
        Oven(**{name: value})
    assert str(caught.value) == f"{name} is {value!r}; it must be {allowed}"


def test_what_is_within_bounds_is_taken():
    Oven(heat=9, racks=4, share=0, fan=False, mode="grill", tray=False, place="x", seed=2**63 - 1)
    check_value("count", None, int | None, at_least=1)
    with pytest.raises(ConfigError, match=r"^count is 0; it must be a whole number from 1 up$"):
        check_value("count", 0, int, at_least=1)


def test_what_was_meant_is_suggested():
    assert suggest("grlil", ["bake", "grill"]) == " (did you mean 'grill'?)"
    assert suggest("grlil", ["bake", "grill"], "or {}?") == "or grill?"
    assert suggest("zzz", ["bake", "grill"]) == ""


def test_a_whole_number_beyond_all_floats_is_no_float():
    with pytest.raises(ConfigError, match=r"^epsilon must be a finite number above 0; got 1000"):
        TrainConfig(max_steps=1, epsilon=10**400)
