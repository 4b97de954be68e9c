"""One file holds a run's settings, and starts the same run again."""

import json
from pathlib import Path
from typing import Any

import pytest

from gemma_tuner.errors import ConfigError
from gemma_tuner.settings import (
    expand_home,
    is_of_recipe,
    pin_paths,
    read_settings,
    save_settings,
)

KNOWN = ("data", "learning_rate", "max_tokens", "resume")


def test_what_is_saved_is_read_back(tmp_path):
    settings = {"data": ["a.jsonl", "ü b.jsonl"], "learning_rate": 2e-4, "max_tokens": None}
    path = save_settings(tmp_path / "run", settings)
    assert read_settings(path, KNOWN) == {
        "data": ["a.jsonl", "ü b.jsonl"],
        "learning_rate": 2e-4,
    }


def test_json_and_dashes_are_read(tmp_path):
    path = tmp_path / "settings.json"
    path.write_text(json.dumps({"max-tokens": 64, "resume": True}))
    assert read_settings(path, KNOWN) == {"max_tokens": 64, "resume": True}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "unknown setting 'learning_rat'; did you mean 'learning_rate'"),
        ("max-tokens: 1\nmax_tokens: 2", "has 'max_tokens' twice"),
        ("max_tokens: 1\nmax_tokens: 2", "has 'max_tokens' twice; keep one"),
        ('{"data": "a", "data": "b"}', "has 'data' twice; keep one"),
        ("data: {a: b}", "must be a value or a list of values; got a dict"),
        ("data: [[a]]", "must be a value or a list of values; got a list"),
        ("- a", "holds a list; it must be a mapping"),
        ("", "holds nothing"),
        ("data: [a", "neither YAML nor JSON at line"),
        ("data: !!python/object/apply:os.getcwd []", "neither YAML nor JSON"),
        ("a: &a [1]\ndata: *a", "at line 2: it uses an anchor; write the value out"),
        ("a: &a [1]\ndata: [*a, *a]", "it uses an anchor"),
        ("a: &a {b: 1}\ndata:\n  <<: *a", "it uses an anchor"),
        ("data: &a [*a]", "it uses an anchor"),
        ("data: " + "[" * 100_000, "nested too deeply"),
        ("data:\n" + "- " * 9000, "nested too deeply"),
        ("max_tokens: !!bool x", "a value that YAML cannot read"),
        ("optimizer: 0x" + "f" * 4000, "a value that YAML cannot read"),
        ("lora_parameters: {scale: 0x" + "f" * 400 + "}", "is not as mlx-lm writes it"),
        ("max_tokens: !!timestamp x", "a value that YAML cannot read"),
        ("data: 2026-13-45", "a value that YAML cannot read"),
        ("data: " + "9" * 5000, "a value that YAML cannot read"),
        ("data: " + "x" * (1 << 20), "it is larger than 262,144 bytes"),
    ],
)
def test_bad_files_are_explained(tmp_path, text, message):
    path = tmp_path / "s.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_settings(path, KNOWN)
    assert message in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


def test_missing_and_unwritable(tmp_path):
    with pytest.raises(ConfigError, match=r"'none\.yaml' cannot be read"):
        read_settings(tmp_path / "none.yaml", KNOWN)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        save_settings(tmp_path / "file", {})


def test_paths_become_absolute_and_names_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").touch()
    (tmp_path / "tiny").mkdir()
    (tmp_path / "gemma").mkdir()
    here = str(tmp_path)
    data = ["rows.jsonl", "parts/*.jsonl", "gs://b/*.jsonl", "owner/name", f"{here}/rows.jsonl"]
    pinned = pin_paths({"data": data, "model": "gemma", "out": "runs/x", "system": "rows.jsonl"})
    assert pinned == {
        "data": [f"{here}/rows.jsonl", f"{here}/parts/*.jsonl", *data[2:]],
        "model": f"{here}/gemma",
        "out": f"{here}/runs/x",
        "system": "rows.jsonl",
    }
    assert pin_paths(pinned) == pinned
    assert pin_paths({"model": "tiny", "data": None}) == {"model": "tiny", "data": None}


def test_the_home_folder_stands_for_its_sign(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "gemma").mkdir()
    home: dict[str, Any] = {"cache_dir": "~/big", "model": "~/gemma", "out": Path("~/runs/x")}
    home |= {"data": ["~/*.csv"], "system": "~/no path", "revision": None}
    expected = {
        "cache_dir": f"{tmp_path}/big",
        "model": f"{tmp_path}/gemma",
        "out": tmp_path / "runs/x",
        "data": [f"{tmp_path}/*.csv"],
        "system": "~/no path",
        "revision": None,
    }
    assert expand_home(home) == expected
    assert pin_paths(home) == expected


def test_a_recipe_is_named_to_who_cannot_take_its_settings(tmp_path):
    path = save_settings(tmp_path, {"steps": 3, "recipe": "/r/chat.py"})
    assert is_of_recipe(path)
    assert read_settings(path, ("steps", "recipe"))["steps"] == 3
    with pytest.raises(ConfigError, match=f"start that with: python /r/chat.py --config {path}"):
        read_settings(path, ("max_steps",))
