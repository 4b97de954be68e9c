"""Settings stay ordinary dataclasses, and know what a misspelt name meant."""

import copy
import dataclasses
import inspect
import pickle

import pytest

from gemma_tuner.checks import is_number, is_whole_number
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
