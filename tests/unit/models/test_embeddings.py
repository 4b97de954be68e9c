"""The per-layer table stays in its file, and nothing else changes."""

import json
import subprocess
import sys

import pytest
import safetensors.torch
import torch

from gemma_tuner.checkpoints.loading import load_model
from gemma_tuner.errors import CheckpointError, ConfigError
from gemma_tuner.models.embeddings import MappedEmbedding, find_mapped_embedding
from gemma_tuner.models.lora import LoraConfig, add_lora
from gemma_tuner.testing import save_tiny_model, tiny_model

WITH_TABLE = ("gemma4-e2b", "gemma3n")


def outputs(model, batch):
    with torch.no_grad():
        return model.eval()(**batch).logits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shard", ["10GB", "100KB"])
@pytest.mark.parametrize("name", WITH_TABLE)
def test_a_mapped_table_computes_the_same(name, shard, dtype, tmp_path, make_batch, capsys):
    _, processor = save_tiny_model(name, tmp_path, max_shard_size=shard)
    modalities = ("text", "image", "audio")
    options = {"modalities": modalities, "device": "cpu", "dtype": dtype}
    plain, _ = load_model(tmp_path, per_layer_embeddings="device", **options)
    mapped, _ = load_model(tmp_path, per_layer_embeddings="disk", **options)
    assert "of per-layer embeddings stay on disk" in capsys.readouterr().err
    assert type(mapped) is type(plain)
    missing = plain.state_dict().keys() - mapped.state_dict().keys()
    table = "model.language_model.embed_tokens_per_layer"
    assert {key.removesuffix(".weight") for key in missing} == {table}
    batch = make_batch(processor, "image", "audio")
    batch = {k: v.to(plain.dtype) if v.is_floating_point() else v for k, v in batch.items()}
    assert torch.equal(outputs(mapped, batch), outputs(plain, batch))


def test_lora_gradients_are_the_same(checkpoints, make_batch):
    _, processor = tiny_model("gemma4-e2b")
    batch = make_batch(processor)
    gradients = []
    for place in ("disk", "device"):
        model, _ = load_model(checkpoints["gemma4-e2b"], device="cpu", per_layer_embeddings=place)
        model = add_lora(model, LoraConfig(rank=2))
        model(**batch).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_a_family_without_a_table_has_nothing_to_map(checkpoints):
    model, _ = load_model(checkpoints["gemma4-12b"], device="cpu", per_layer_embeddings="disk")
    assert find_mapped_embedding(model) is None


def test_choices_that_cannot_be(checkpoints):
    with pytest.raises(ConfigError, match="per_layer_embeddings='ram'"):
        load_model(checkpoints["gemma4-e2b"], device="cpu", per_layer_embeddings="ram")


def test_a_file_without_the_table_is_named(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"other": torch.zeros(2, 2)}, path)
    with pytest.raises(CheckpointError, match=r"model\.safetensors holds no table"):
        MappedEmbedding(path, "table", scale=1.0, dtype=torch.float32)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
def test_rows_are_those_of_an_embedding(stored, tmp_path):
    table = torch.randn(50, 6).to(stored)
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(3), "table": table}, path)
    mapped = MappedEmbedding(path, "table", scale=2.5, dtype=torch.bfloat16)
    ids = torch.randint(0, 50, (3, 7))
    expected = torch.nn.functional.embedding(ids, table).to(torch.bfloat16)
    expected *= torch.tensor(2.5, dtype=torch.bfloat16)
    assert torch.equal(mapped(ids), expected)
    assert mapped.num_bytes == table.nbytes


CHILD = """
import json, resource, sys, torch
from pathlib import Path
from gemma_tuner.models.embeddings import MappedEmbedding
mapped = MappedEmbedding(Path(sys.argv[1]), "table", scale=1.0, dtype=torch.bfloat16)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rows = mapped(torch.arange(0, 60_000, 600))
print(json.dumps([before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, rows.shape[0]]))
"""


def test_a_table_takes_no_memory(tmp_path):
    """256 MB of table, of which a hundred rows are read: what is mapped around them counts too."""
    path = tmp_path / "model.safetensors"
    table = torch.zeros(60_000, 2_133, dtype=torch.bfloat16)
    safetensors.torch.save_file({"table": table}, path)
    done = subprocess.run(
        [sys.executable, "-c", CHILD, path], capture_output=True, text=True, check=True
    )
    before, after, num_rows = json.loads(done.stdout)
    assert num_rows == 100
    assert (after - before) * 1024 < 0.15 * table.nbytes
