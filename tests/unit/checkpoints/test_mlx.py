"""Numbers packed as MLX packs them come out as they went in."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from gemma_tuner.checkpoints.mlx import dequantise, from_mlx
from gemma_tuner.errors import CheckpointError


def pack(numbers, bits):
    """A stream of numbers in little-endian words, first in the lowest bits; [rows, words]."""
    rows = []
    for row in numbers:
        stream = sum(number << (bits * i) for i, number in enumerate(row))
        words = [(stream >> (32 * i)) & (2**32 - 1) for i in range(len(row) * bits // 32)]
        rows.append([word - 2**32 if word >= 2**31 else word for word in words])
    return torch.tensor(rows, dtype=torch.int32).view(torch.uint32)


@settings(max_examples=12, deadline=None)
@given(st.sampled_from([2, 3, 4, 5, 6, 8]), st.sampled_from([32, 64, 128]), st.randoms())
def test_every_number_comes_back(bits, group_size, random):
    numbers = [[random.randrange(2**bits) for _ in range(128)] for _ in range(2)]
    scales = torch.randn(2, 128 // group_size)
    biases = torch.randn(2, 128 // group_size)
    weight = dequantise(pack(numbers, bits), scales, biases, bits=bits, group_size=group_size)
    grouped = torch.tensor(numbers).reshape(2, -1, group_size)
    expected = scales[..., None] * grouped + biases[..., None]
    assert torch.equal(weight, expected.reshape(2, 128))


@pytest.fixture
def quantised(tmp_path):
    folder = tmp_path / "mlx"
    folder.mkdir()
    module = "language_model.model.layers.0.mlp.up_proj"
    tensors = {
        f"{module}.weight": pack([[3] * 64] * 2, 4),
        f"{module}.scales": torch.full((2, 1), 2.0),
        f"{module}.biases": torch.full((2, 1), -1.0),
    }
    config = {
        "model_type": "gemma4",
        "text_config": {"vocab_size": 8},
        "quantization": {"group_size": 64, "bits": 4},
    }
    return folder, module, tensors, config


def write(folder, tensors, config):
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


def test_a_checkpoint_is_renamed_and_dequantised(quantised, tmp_path):
    folder, _, tensors, config = quantised
    write(folder, tensors, config)
    from_mlx(folder, tmp_path / "out")

    (item,) = load_file(tmp_path / "out" / "model.safetensors").items()
    assert item[0] == "model.language_model.layers.0.mlp.up_proj.weight"
    assert torch.equal(item[1], torch.full((2, 64), 5.0))
    assert "quantization" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_another_kind_of_quantisation_is_refused(quantised, tmp_path):
    folder, module, tensors, config = quantised
    write(folder, tensors, config | {"quantization": {"mode": "mxfp4", "bits": 4}})
    with pytest.raises(CheckpointError, match="quantised as 'mxfp4"):
        from_mlx(folder, tmp_path / "out")
    own = {module: {"group_size": 64, "bits": 8}}
    write(folder, tensors, config | {"quantization": {"group_size": 64, "bits": 4, **own}})
    with pytest.raises(CheckpointError, match="does not fit its configuration"):
        from_mlx(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_gemma_3n_without_projectors_is_refused(quantised, tmp_path):
    folder, _, tensors, config = quantised
    write(folder, tensors, config | {"model_type": "gemma3n"})
    with pytest.raises(CheckpointError, match="use a checkpoint that mlx-vlm made"):
        from_mlx(folder, tmp_path / "out")
