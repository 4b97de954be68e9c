"""What an adapter was trained with lies beside it, and is how it is asked, wherever it goes."""

import dataclasses
import json

import numpy as np
import PIL.Image
import pytest
import transformers

import gemma_tuner as gt
from gemma_tuner.cli.settings import RowSettings
from gemma_tuner.collators.settings import CollatorSettings
from gemma_tuner.models.adapter_files import (
    FINGERPRINT,
    TEMPLATE,
    read_trained_with,
    save_adapter,
    trained_with,
)
from gemma_tuner.testing import save_tiny_model
from gemma_tuner.training.adapters import load_adapter, note_collator

PICTURE = PIL.Image.fromarray(
    np.random.default_rng(0).integers(0, 255, (200, 200, 3), dtype=np.uint8)
)
CLIP = gt.Audio(np.full(16_000, 0.01, dtype="float32"), 16_000)
ALL = ("text", "image", "audio")
TRAINED = {"image_tokens": 140, "max_seconds": 0.4, "long_audio": "split", "enable_thinking": True}
COLLATORS = (gt.TextCollator, gt.ImageCollator, gt.AudioCollator, gt.MultimodalCollator)


def load(folder):
    return gt.load_model(folder, modalities=ALL, device="cpu")


def ask(model, processor, **options):
    """How many tokens of prompt are read of an image and of a clip that is too long."""
    asked = [("See", {"image": PICTURE}), ("Hear", {"audio": CLIP})]
    return [
        gt.generate(model, processor, p, **media, max_new_tokens=1, **options).num_prompt_tokens
        for p, media in asked
    ]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A base, an adapter that was trained in a way of its own, and what its prompts count."""
    root = tmp_path_factory.mktemp("trained_with")
    save_tiny_model("gemma4-e2b", root / "base")
    model, processor = load(root / "base")
    model = gt.add_lora(model, gt.LoraConfig(rank=1, layers=1))
    processor.chat_template = processor.chat_template.replace("\n'", " '", 1) + "{# mine #}"
    note_collator(model, gt.MultimodalCollator(processor, **TRAINED))
    save_adapter(model, root / "adapter")
    return root, ask(model, processor)


@pytest.mark.parametrize("way", ["adapter", "exported", "merged", "mlx"])
def test_wherever_an_adapter_goes_it_is_asked_as_it_was_trained(saved, way, tmp_path, capsys):
    root, wanted = saved
    if way == "merged":
        gt.export_merged(root / "adapter", tmp_path / "merged", base=root / "base")
        model, processor = load(tmp_path / "merged")
        assert processor.image_processor.max_soft_tokens == 140
        stock = transformers.AutoProcessor.from_pretrained(tmp_path / "merged")
        assert stock.chat_template == (root / "adapter" / TEMPLATE).read_text()
    else:
        model, processor = load(root / "base")
        folder = root / "adapter"
        if way == "exported":
            gt.export_adapter(load_adapter(load(root / "base")[0], folder), tmp_path / "exported")
            folder = tmp_path / "exported"
        if way == "mlx":
            gt.export_mlx(folder, tmp_path / "mlx", base=root / "base")
            gt.import_mlx(tmp_path / "mlx", tmp_path / "back", base=root / "base")
            folder = tmp_path / "back"
        model = load_adapter(model, folder)
    assert ask(model, processor) == wanted
    bare, base_processor = load(root / "base")
    with pytest.raises(gt.DataError, match="long_audio"):
        ask(bare, base_processor, max_seconds=0.4)
    known = trained_with(model)
    assert known is not None
    assert TRAINED.items() <= known.collator.items()
    assert "trained with other prompts" not in capsys.readouterr().err


def test_a_conflict_is_said_and_what_is_given_wins(saved, capsys):
    root, wanted = saved
    model, processor = load(root / "base")
    model = load_adapter(model, root / "adapter", trainable=True)
    other = ask(model, processor, image_tokens=70)
    assert other[0] < wanted[0]
    assert "it is asked with: image_tokens: 140 → 70" in capsys.readouterr().err
    rows = [gt.Turn("user", (gt.Text("q"),)), gt.Turn("assistant", (gt.Text("a"),))]
    assert rows
    note_collator(model, gt.ImageCollator(processor, image_tokens=70))
    said = capsys.readouterr().err
    assert "this run trains it with: " in said
    assert "image_tokens: 140 → 70" in said
    assert "chat_template_sha256" in said


def test_a_run_says_it_in_checkpoints_and_saved_adapters(tmp_path):
    model, processor = gt.testing.tiny_model("gemma4-e2b")
    model = gt.add_lora(model, gt.LoraConfig(rank=1, layers=1))
    (tmp_path / "rows.jsonl").write_text('{"prompt": "q", "response": "a"}\n')
    collator = gt.TextCollator(processor, max_tokens=64, enable_thinking=True)
    trainer = gt.Trainer(
        model,
        gt.stream_local(tmp_path / "rows.jsonl", cache_dir=tmp_path / "cache"),
        collator,
        gt.TrainConfig(max_steps=1, output_dir=tmp_path / "run", progress=False),
    )
    trainer.fit()
    folders = [trainer.save(tmp_path / "saved"), tmp_path / "run/checkpoints/step-00000001"]
    for folder in folders:
        known = read_trained_with(folder)
        assert known is not None
        assert known.collator == collator.list_settings()
        assert known.chat_template == processor.chat_template


def test_a_template_that_was_changed_is_refused(saved, tmp_path):
    root, _ = saved
    for name in (FINGERPRINT, TEMPLATE):
        (tmp_path / name).write_text((root / "adapter" / name).read_text())
    assert read_trained_with(tmp_path) is not None
    (tmp_path / TEMPLATE).write_text("another")
    with pytest.raises(gt.CheckpointError, match="not the one that it was trained with"):
        read_trained_with(tmp_path)
    assert json.loads((tmp_path / FINGERPRINT).read_text())["collator"]["image_tokens"] == 140


def test_collators_command_line_and_file_share_one_home():
    home = {f.name: f for f in dataclasses.fields(CollatorSettings)}
    taken = set()
    for kind in COLLATORS:
        for f in dataclasses.fields(kind):
            if f.name in home:
                taken.add(f.name)
                assert f.default == home[f.name].default, f"{kind.__name__}.{f.name}"
                assert f.type == home[f.name].type, f"{kind.__name__}.{f.name}"
            else:
                assert f.name in ("processor", "family", "_"), f"{kind.__name__}.{f.name}"
    assert taken == set(home)
    rows = {f.name for f in dataclasses.fields(RowSettings)}
    assert rows == set(home) - {"train_on"} | {"mask_prompt"}
