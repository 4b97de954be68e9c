"""The exported adapter opens in stock transformers and PEFT, and its card tells no secrets."""

import json
import socket

import huggingface_hub
import peft
import pytest
import torch
import transformers
from huggingface_hub import constants

from gemma_tuner.errors import CheckpointError, ConfigError
from gemma_tuner.export.adapter import export_adapter, push_to_hub
from gemma_tuner.testing import FAMILIES
from gemma_tuner.training.config import TrainConfig
from tests.export_parts import TARGETS, add_trained_lora, logits, save_base, text_inputs

DATA = {"fingerprint": "ab" * 32, "rows": 120, "seed": 3, "epoch": 1, "position": 4}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ada-secret")
    model, processor = save_base("gemma4-e2b", folder / "base")
    model.name_or_path = str(folder / "base")
    model = add_trained_lora(model, targets=TARGETS["gemma4-e2b"], variant="dora")
    export_adapter(
        model,
        folder / "adapter",
        processor=processor,
        data=DATA,
        scores={"wer": {"base": 0.66666, "adapter": 0.125}, "loss": 1.5},
        training=TrainConfig(max_steps=7, output_dir=folder / "run").to_dict(),
        plan="peak 3.2 GB",
    )
    return folder, logits(model, text_inputs())


def test_stock_transformers_and_peft_give_the_same_logits(exported):
    folder, expected = exported
    base = transformers.AutoModelForImageTextToText.from_pretrained(folder / "base")
    model = peft.PeftModel.from_pretrained(base, folder / "adapter")
    assert torch.equal(logits(model, text_inputs()), expected)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["lora", "rslora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_opens_in_stock_peft(family, variant, tmp_path):
    model, _ = save_base(family, tmp_path / "base")
    model = add_trained_lora(model, targets=TARGETS[family], variant=variant, layers=2)
    export_adapter(model, tmp_path / "adapter")
    base = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.equal(logits(again, text_inputs()), logits(model, text_inputs()))
    saved = peft.get_peft_model_state_dict(again)
    for name, tensor in peft.get_peft_model_state_dict(model).items():
        assert torch.equal(saved[name], tensor)


def test_the_card_says_what_it_is_made_of(exported):
    folder, _ = exported
    card = (folder / "adapter" / "README.md").read_text()
    for part in (
        "library_name: peft",
        "| Base model | base |",
        "| Chat template (SHA-256) | ",
        f"| Data (SHA-256) | {'ab' * 32} |",
        "| Rows | 120 |",
        "| Adapter | DoRA, rank 4, alpha 8 |",
        "| | base | adapter |",
        "| wer | 0.6667 | 0.125 |",
        "| loss |  | 1.5 |",
        '"max_steps": 7',
        "peak 3.2 GB",
        "transformers ",
    ):
        assert part in card, part


def test_no_file_holds_a_path(exported):
    folder, _ = exported
    for file in (folder / "adapter").iterdir():
        assert b"ada-secret" not in file.read_bytes(), file.name


def test_an_existing_folder_and_a_score_that_is_no_number_are_refused(exported, tmp_path):
    folder, _ = exported
    base = transformers.AutoModelForImageTextToText.from_pretrained(folder / "base")
    model = peft.PeftModel.from_pretrained(base, folder / "adapter")
    with pytest.raises(CheckpointError, match="'adapter' exists already"):
        export_adapter(model, folder / "adapter")
    with pytest.raises(ConfigError, match="the score 'wer' is a str"):
        export_adapter(model, tmp_path / "new", scores={"wer": "good"})
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_lists_what_would_be_uploaded(exported):
    folder, _ = exported
    (folder / "adapter" / "log.jsonl").write_text("private")
    (folder / "adapter" / ".hidden.json").write_text("{}")
    files = push_to_hub(folder / "adapter", "ada/tickets", dry_run=True)
    assert set(files) == {
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "gemma_tuner.json")
    }
    assert files["README.md"] == (folder / "adapter" / "README.md").stat().st_size


def test_nothing_is_uploaded_without_confirmation(exported, tmp_path):
    folder, _ = exported
    with pytest.raises(ConfigError, match=r"nothing was uploaded: pass confirm=True .* \(private"):
        push_to_hub(folder / "adapter", "ada/tickets")
    with pytest.raises(ConfigError, match="no name for a repository"):
        push_to_hub(folder / "adapter", "ada/tic kets", dry_run=True)
    with pytest.raises(CheckpointError, match="holds no exported weights"):
        push_to_hub(tmp_path, "ada/tickets", dry_run=True)


def test_a_hub_that_cannot_be_reached_is_explained(exported, monkeypatch):
    folder, _ = exported
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # and does not listen
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        with pytest.raises(CheckpointError, match=r"\(ConnectError\).*check the network"):
            push_to_hub(folder / "adapter", "ada/tickets", confirm=True)
    huggingface_hub.close_session()


@pytest.mark.slow
def test_the_base_and_its_commit_are_named(exported, tmp_path):
    folder, _ = exported
    base = transformers.AutoModelForImageTextToText.from_pretrained(folder / "base")
    base.config._name_or_path = f"/home/ada/models--google--tiny/snapshots/{'c' * 40}"
    base.name_or_path = base.config._name_or_path
    model = add_trained_lora(base)
    export_adapter(model, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "google/tiny"
    assert config["revision"] == "c" * 40
    assert "base_model: google/tiny" in (tmp_path / "adapter" / "README.md").read_text()
