"""What users meet on the Hub, from a server on this machine that answers as the Hub does."""

import pytest

from gemma_tuner.checkpoints.loading import load_model
from gemma_tuner.errors import CheckpointError
from tests.model_hub import TOKEN


@pytest.mark.parametrize(
    ("name", "hints"),
    [
        ("gated/model", ["licence", "https://huggingface.co/gated/model", "hf auth login"]),
        ("absent/model", ["no such model", "https://huggingface.co/absent/model"]),
    ],
)
def test_locked_and_absent_models(model_hub, name, hints, capfd):
    with pytest.raises(CheckpointError) as caught:
        load_model(name, device="cpu")
    for hint in hints:
        assert hint in str(caught.value)
    assert model_hub.requests, "the Hub was never asked"
    assert any(TOKEN in (authorization or "") for _, authorization in model_hub.requests)
    printed = capfd.readouterr()
    assert TOKEN not in str(caught.value) + printed.out + printed.err


def test_an_unknown_revision_is_named(model_hub):
    with pytest.raises(CheckpointError, match="no-such"):
        load_model("files/model", device="cpu", revision="no-such")


def test_an_adapter_on_the_hub(model_hub, tmp_path):
    model_hub.folder = tmp_path / "adapter"
    model_hub.folder.mkdir()
    (model_hub.folder / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds an adapter"):
        load_model("files/model", device="cpu")


def test_a_model_is_downloaded_at_its_revision(model_hub, checkpoints):
    model_hub.folder = checkpoints["gemma4-e2b"]
    model, processor = load_model("files/model", device="cpu", revision="release")
    assert model.config.model_type == "gemma4"
    assert processor.chat_template
    asked = {path.split("/")[4] for path, _ in model_hub.requests if "/resolve/" in path}
    assert asked <= {"release", "0" * 40}  # the branch, and the commit that it was found to be
