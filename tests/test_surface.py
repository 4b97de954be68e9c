"""The public names are a contract: what exists, what importing costs, and what each one takes."""

import ast
import dataclasses
import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import gemma_tuner

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {
    "PIL",
    "accelerate",
    "datasets",
    "google.cloud",
    "numpy",
    "peft",
    "pyarrow",
    "soundfile",
    "torch",
    "torchaudio",
    "torchvision",
    "transformers",
}
REQUIRED = inspect.Parameter.empty


def import_in_new_process(*modules: str) -> tuple[float, set[str]]:
    """Return how many seconds importing the modules takes, and which heavy ones came along."""
    code = (
        "import importlib, json, sys, time\n"
        "start = time.perf_counter()\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "print(json.dumps([time.perf_counter() - start, sorted(sys.modules)]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    seconds, loaded = json.loads(done.stdout)
    return seconds, HEAVY.intersection(loaded)


def test_importing_the_package_loads_nothing_heavy_and_is_quick():
    seconds, heavy = import_in_new_process("gemma_tuner")
    assert heavy == set()
    assert seconds < 0.5


@pytest.mark.parametrize("room", ["errors", "records", "sources", "streaming"])
def test_the_data_side_imports_no_torch(room):
    place = ROOT / "gemma_tuner" / room
    names = [f"gemma_tuner.{room}"]
    names += [f"gemma_tuner.{room}.{path.stem}" for path in sorted(place.glob("[!_]*.py"))]
    _, heavy = import_in_new_process(*names)
    assert not heavy & {"torch", "torchaudio", "torchvision", "transformers", "peft", "accelerate"}
    assert "google.cloud" not in heavy, "cloud clients load when first used"


def test_all_is_sorted_and_free_of_repeats():
    names = [name for name in gemma_tuner.__all__ if name != "testing"]
    assert names == sorted(set(names))


@pytest.mark.parametrize("name", gemma_tuner.__all__)
def test_every_public_name_is_importable_and_is_what_its_home_defines(name):
    value = getattr(gemma_tuner, name)
    if inspect.ismodule(value):
        assert value.__name__ == f"gemma_tuner.{name}"
    else:
        home = importlib.import_module(value.__module__)
        assert value.__module__.startswith("gemma_tuner.")
        assert getattr(home, name) is value
        assert value.__doc__


def test_what_type_checkers_see_is_what_exists():
    tree = ast.parse((ROOT / "gemma_tuner" / "__init__.py").read_text())
    seen = {
        alias.asname: (node.module, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module != "__future__"
        for alias in node.names
        if alias.asname
    }
    assert set(seen) == set(gemma_tuner.__all__)
    for name, (module, original) in seen.items():
        assert original == name
        assert (f"gemma_tuner.{gemma_tuner._HOME.get(name, '')}").rstrip(".") == module


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = gemma_tuner.no_such_name


def test_dir_lists_the_public_names():
    assert set(gemma_tuner.__all__) <= set(dir(gemma_tuner))


# name -> the parameters that callers may rely on: their defaults, or REQUIRED. ``*`` stands before
# the first keyword-only one. More parameters may follow; these may not change. ImageCollator's
# image_tokens=None is the checkpoint's own budget, 280 for Gemma 4: Gemma 3n would refuse a fixed
# 280.
CONTRACT = {
    "load_model": {
        "name_or_path": REQUIRED,
        "*": None,
        "modalities": ("text",),
        "device": None,
        "dtype": None,
        "bits": None,
        "plan": None,
        "revision": None,
    },
    "plan": {
        "name_or_path": REQUIRED,
        "*": None,
        "memory_gib": ...,
        "modalities": ("text",),
        "max_tokens": ...,
    },
    "generate": {
        "model": REQUIRED,
        "processor": REQUIRED,
        "prompts": REQUIRED,
        "*": None,
        "image": None,
        "audio": None,
    },
    "evaluate": {"model": REQUIRED, "stream": REQUIRED, "collator": REQUIRED, "*": None},
    "LoraConfig": {
        "rank": 16,
        "alpha": 32,
        "dropout": 0.0,
        "targets": ("language",),
        "layers": None,
        "variant": "lora",
    },
    "add_lora": {"model": REQUIRED, "config": ...},
    "stream_local": {
        "paths": REQUIRED,
        "*": None,
        "messages": None,
        "prompt": None,
        "response": None,
        "text": None,
        "system": None,
        "image": None,
        "audio": None,
        "id": None,
        "seed": 0,
        "shuffle": True,
    },
    "TextCollator": {"processor": REQUIRED, "max_tokens": ...},
    "ImageCollator": {"processor": REQUIRED, "max_tokens": ..., "image_tokens": None},
    "AudioCollator": {"processor": REQUIRED, "max_tokens": ..., "max_seconds": 30.0},
    "MultimodalCollator": {"processor": REQUIRED, "max_tokens": ...},
    "TrainConfig": {"max_steps": ..., "output_dir": ...},
    "Trainer": {
        "model": REQUIRED,
        "stream": REQUIRED,
        "collator": REQUIRED,
        "config": REQUIRED,
        "eval_stream": None,
    },
    "Trainer.plan": {"self": REQUIRED},
    "Trainer.preview": {"self": REQUIRED},
    "Trainer.fit": {"self": REQUIRED, "resume": False},
    "Trainer.evaluate": {"self": REQUIRED},
    "Trainer.save": {"self": REQUIRED, "path": REQUIRED},
    "ExampleStream.__iter__": {"self": REQUIRED},
    "ExampleStream.__len__": {"self": REQUIRED},
    "ExampleStream.__getitem__": {"self": REQUIRED, "index": REQUIRED},
    "ExampleStream.preview": {"self": REQUIRED},
    "ExampleStream.report": {"self": REQUIRED},
    "ExampleStream.state_dict": {"self": REQUIRED},
    "ExampleStream.load_state_dict": {"self": REQUIRED, "state": REQUIRED},
    "testing.tiny_model": {"family": REQUIRED, "seed": 0},
    "testing.save_tiny_model": {
        "family": REQUIRED,
        "folder": REQUIRED,
        "seed": 0,
        "max_shard_size": "10GB",
    },
    "testing.sample_data": {"modality": REQUIRED},
}


@pytest.mark.parametrize("name", CONTRACT)
def test_the_contract_of_each_public_name_holds(name):
    target: Any = gemma_tuner
    for part in name.split("."):
        target = getattr(target, part)
    parameters = inspect.signature(target).parameters
    keyword_only = False
    for parameter, default in CONTRACT[name].items():
        if parameter == "*":
            keyword_only = True
            continue
        assert parameter in parameters, f"{name} takes no {parameter}"
        if default is not ...:
            assert parameters[parameter].default == default, f"{name}({parameter}=)"
        if keyword_only:
            assert parameters[parameter].kind is inspect.Parameter.KEYWORD_ONLY
    added = [p for p in parameters.values() if p.name not in CONTRACT[name]]
    assert all(
        p.default is not REQUIRED or p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in added
    ), f"{name} requires more than the contract says: {added}"


@pytest.mark.parametrize(
    "name", ["Audio", "Example", "Image", "LoraConfig", "Text", "TrainConfig", "Turn"]
)
def test_records_and_configurations_are_frozen(name):
    kind = getattr(gemma_tuner, name)
    assert dataclasses.is_dataclass(kind)
    assert vars(kind)["__dataclass_params__"].frozen


def test_every_error_has_the_one_root_and_data_errors_carry_the_key():
    names = [name for name in gemma_tuner.__all__ if name.endswith("Error")]
    for name in names:
        assert issubclass(getattr(gemma_tuner, name), gemma_tuner.GemmaTunerError)
    error = gemma_tuner.DataError("no answer; fill the column", key="rows.jsonl:7")
    assert error.key == "rows.jsonl:7"
    assert "rows.jsonl:7" in str(error)
