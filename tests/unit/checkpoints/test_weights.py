"""Indexes of checkpoints name files of their own folder, or are refused."""

import json

import pytest
import torch
from safetensors.torch import save_file

from gemma_tuner.checkpoints.weights import INDEX, list_tensors
from gemma_tuner.errors import CheckpointError
from gemma_tuner.models.embeddings import MappedEmbedding


@pytest.mark.parametrize(
    "weight_map",
    [[], None, {"a": 1}, {"a": ["model.safetensors"]}, {"a": "../model.safetensors"}],
    ids=str,
)
def test_an_index_that_names_no_file_of_its_folder_is_refused(tmp_path, weight_map):
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="is damaged"):
        list_tensors(tmp_path)


def test_a_name_too_long_for_the_disk_is_a_file_that_is_not_there(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "m" * 999}}))
    with pytest.raises(CheckpointError, match="lacks 1 of 1 weight files"):
        list_tensors(tmp_path)


def test_a_mapped_table_is_no_larger_than_its_file(tmp_path):
    text = b'{"table": {"dtype": "F32", "shape": [1000000, 8], "data_offsets": [0, 16]}}'
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    with pytest.raises(Exception, match="invalid shape"):
        MappedEmbedding(path, "table", scale=1.0, dtype=torch.float32)
