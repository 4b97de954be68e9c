"""What was trained on packed weights is merged into these, and says so where it is not."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file

import gemma_tuner as gt
from gemma_tuner.checkpoints.weights import list_tensors
from gemma_tuner.errors import ResumeError
from gemma_tuner.export.merged import export_merged
from gemma_tuner.models.adapter_files import FINGERPRINT
from gemma_tuner.training.checkpoint import TrainerState, load_checkpoint, save_checkpoint
from gemma_tuner.training.config import TrainConfig
from gemma_tuner.training.optim import build_optimizer
from tests.export_parts import add_trained_lora, save_base


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base, that packed, and an adapter that was trained with ``bits=4``."""
    folder = tmp_path_factory.mktemp("packed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(folder / "home"))
        save_base("gemma4-e2b", folder / "base")
        gt.pack(folder / "base", folder / "packed")
        model, _ = gt.load_model(folder / "base", device="cpu", bits=4)
        gt.export_adapter(add_trained_lora(model), folder / "adapter")
    return folder


@pytest.fixture
def here(folder, monkeypatch):
    """Where the base is found by its name alone."""
    monkeypatch.setenv("HOME", str(folder / "home"))
    monkeypatch.chdir(folder)
    return folder


def read(path):
    return load_file(path / "model.safetensors")


def is_equal(one, other):
    return all(torch.equal(one[name], other[name]) for name in {*one, *other})


def test_an_adapter_is_merged_into_what_it_was_trained_on(here, tmp_path, caplog):
    known = json.loads((here / "adapter" / FINGERPRINT).read_text())
    assert known["grid"] == "symmetric-4-32"
    export_merged(here / "adapter", tmp_path / "named")
    export_merged(here / "adapter", tmp_path / "given", base=here / "packed")
    assert is_equal(read(tmp_path / "named"), read(tmp_path / "given"))
    assert "another model" not in caplog.text
    assert "packed as symmetric-4-32, as in training" in (tmp_path / "named/README.md").read_text()


def test_the_original_as_base_is_another_model_and_named_so(here, tmp_path, caplog):
    export_merged(here / "adapter", tmp_path / "merged", base=here / "base")
    export_merged(here / "adapter", tmp_path / "exact", base=here / "packed")
    words = "not packed, and the adapter was trained on it packed as symmetric-4-32: another model"
    assert words in (tmp_path / "merged" / "README.md").read_text()
    (warning,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert words in warning.getMessage()
    merged, exact, base = map(read, (tmp_path / "merged", tmp_path / "exact", here / "base"))
    name = next(name for name in base if name.endswith("0.self_attn.q_proj.weight"))
    learned = exact[name] - list_tensors(here / "packed")[name].read()
    assert learned.abs().max() > 1e-3
    assert torch.allclose(merged[name] - base[name], learned, atol=1e-5)


def test_what_was_merged_is_not_packed_in_4_bits_without_a_word(here, tmp_path, caplog):
    export_merged(here / "adapter", tmp_path / "merged", base=here / "packed")
    gt.pack(tmp_path / "merged", tmp_path / "8", bits=8, group=32)
    assert "undo" not in caplog.text
    gt.pack(tmp_path / "merged", tmp_path / "4", bits=4)
    assert "merged has an adapter merged in, and 4 bits undo" in caplog.text


def test_an_adapter_for_mlx_says_which_base_it_lies_beside(here, tmp_path, caplog):
    gt.export_mlx(here / "adapter", tmp_path / "mlx")
    assert "trained on base packed as symmetric-4-32" in caplog.text
    assert sorted(path.name for path in (tmp_path / "mlx").iterdir())[0] == "adapter_config.json"


def test_an_adapter_on_weights_of_other_bits_says_so(here, caplog):
    gt.load_adapter(gt.load_model(here / "base", device="cpu", bits=4)[0], here / "adapter")
    assert "another model" not in caplog.text
    gt.load_adapter(gt.load_model(here / "base", device="cpu")[0], here / "adapter")
    assert "packed as symmetric-4-32, and these are not packed: together" in caplog.text


def test_a_run_does_not_go_on_on_another_grid(here, tmp_path):
    config = TrainConfig(max_steps=2, output_dir=tmp_path)

    def start(**options):
        model = gt.add_lora(gt.load_model(device="cpu", **options)[0], gt.LoraConfig(rank=2))
        return model, build_optimizer(model.named_parameters(), config, torch.device("cpu"))

    state = TrainerState(step=1, config=config.to_dict(), stream={}, totals={})
    saved = save_checkpoint(tmp_path, state, *start(name_or_path=here / "base", bits=4), keep=1)
    load_checkpoint(saved, *start(name_or_path=here / "packed"))
    with pytest.raises(ResumeError, match=r"fingerprint of the base's packed weights"):
        load_checkpoint(saved, *start(name_or_path=here / "base"))
    with pytest.raises(ResumeError, match=r"fingerprint of the base's packed weights"):
        load_checkpoint(saved, *start(name_or_path=here / "base", bits=8))
