"""Identity says what makes a model the same and leaves the user's folders out."""

import json

import peft
import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from gemma_tuner.models.identity import describe_model, portable_name


def test_a_description_survives_json_and_names_no_path():
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        use_cache=True,
    )
    base = LlamaForCausalLM(config)
    base.name_or_path = config._name_or_path = "/home/ada/secret"
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["v_proj", "q_proj"]))
    described = describe_model(model)
    assert json.loads(json.dumps(described)) == described
    assert "secret" not in json.dumps(described)
    assert described["base"]["model_type"] == "llama"
    assert described["lora"]["target_modules"] == ["q_proj", "v_proj"]
    base.config.use_cache = False
    base.name_or_path = config._name_or_path = "other"
    assert describe_model(model) == described


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (None, None),
        ("", ""),
        ("google/gemma-4-E2B-it", "google/gemma-4-E2B-it"),
        ("gpt2", "gpt2"),
        ("/home/ada/models/my-gemma", "my-gemma"),
        ("/home/ada/models/my-gemma/", "my-gemma"),
        ("../models/my-gemma", "my-gemma"),
        ("~/models/my-gemma", "my-gemma"),
        (
            "/h/.cache/huggingface/hub/models--google--gemma-4-E2B/snapshots/a1",
            "google/gemma-4-E2B",
        ),
        ("/h/hub/models--some-org--with--dashes/snapshots/a1", "some-org/with--dashes"),
    ],
)
def test_portable_names(name, expected):
    assert portable_name(name) == expected


def test_a_relative_folder_that_exists_is_local(tmp_path, monkeypatch):
    (tmp_path / "secret" / "gemma").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert portable_name("secret/gemma") == "gemma"
    monkeypatch.chdir(tmp_path / "secret" / "gemma")
    assert portable_name(".") == "gemma"
