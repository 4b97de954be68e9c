"""Packed weights mean what the files mean, to the bit."""

import itertools

import gguf
import pytest
import torch

from gemma_tuner.checkpoints.mlx import dequantise
from gemma_tuner.errors import ConfigError
from gemma_tuner.models.few_bits.grids import Grid, Packed

GRIDS = [
    Grid(bits, group, is_affine=a) for bits in (4, 8) for group in (32, 64, 128) for a in (0, 1)
]
DTYPES = [torch.float32, torch.bfloat16]


def make_weight(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


def spell_out(grid, packed):
    """The weights, a number at a time."""
    numbers, scales, biases = packed
    columns = scales.shape[-1] * grid.group
    found = torch.empty(*numbers.shape[:-1], columns, dtype=scales.dtype)
    for *rows, column in itertools.product(*map(range, found.shape)):
        row = tuple(rows)
        half = columns // 2
        number = int(numbers[row][column if grid.bits == 8 else column % half]) & 255
        if grid.bits == 4:
            number = number >> 4 if column >= half else number & 15
        if not grid.is_affine and number >= 2 ** (grid.bits - 1):
            number -= 2**grid.bits
        group = column // grid.group
        product = scales[row][group] * torch.tensor(number, dtype=scales.dtype)
        found[row][column] = product if biases is None else product + biases[row][group]
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_unpacking_is_scale_times_number_plus_bias(grid, dtype):
    for shape in ((3, 128), (2, 2, 384)):  # groups of 128 straddle the middle of 384
        packed = grid.pack(make_weight(*shape, dtype=dtype))
        assert torch.equal(grid.unpack(packed), spell_out(grid, packed))
        assert all(
            part is None or (part.shape, part.dtype) == (empty.shape, empty.dtype)
            for part, empty in zip(
                packed, grid.empty(*shape, dtype=dtype, device=packed.scales.device), strict=True
            )
        )


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_blocks_of_rows_change_nothing(grid, monkeypatch):
    packed = grid.pack(make_weight(7, 256))
    whole = grid.unpack(packed)
    monkeypatch.setattr("gemma_tuner.models.few_bits.unpacking._BLOCK_ELEMENTS", 600)
    assert torch.equal(grid.unpack(packed), whole)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_errors_are_of_a_step_and_what_is_packed_again_stays(grid):
    weight = make_weight(16, 256)
    packed = grid.pack(weight)
    found = grid.unpack(packed)
    step = packed.scales.abs().repeat_interleave(grid.group, dim=-1)
    # Half a step, and more at a group's ends, which a grid may cut.
    assert ((found - weight).abs() <= 1.6 * step).all()
    if not grid.is_affine:  # mx.quantize takes a new grid for what lies on one
        assert torch.allclose(grid.unpack(grid.pack(found)), found, rtol=0, atol=1e-6)
    zeros = grid.pack(torch.zeros(2, 128))
    assert torch.equal(grid.unpack(zeros), torch.zeros(2, 128))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_affine_weights_are_those_of_mlx(bits, dtype):
    grid = Grid(bits, 64, is_affine=True)
    numbers = torch.randint(0, 2**bits, (5, 256), dtype=torch.uint8)
    scales, biases = make_weight(5, 4, dtype=dtype), make_weight(5, 4, seed=1, dtype=dtype)
    places = 8 // bits
    in_bytes = sum(numbers[:, i::places] << (bits * i) for i in range(places))
    words = in_bytes.contiguous().view(torch.uint32)
    stored = dequantise(words, scales, biases, bits=bits, group_size=64)
    assert torch.equal(grid.unpack(Packed(grid.join(numbers), scales, biases)), stored)


def test_symmetric_weights_are_those_of_q4_0():
    grid = Grid(4, 32)
    weight = make_weight(6, 128).numpy()
    blocks = gguf.quantize(weight, gguf.GGMLQuantizationType.Q4_0)
    expected = torch.from_numpy(gguf.dequantize(blocks, gguf.GGMLQuantizationType.Q4_0))
    parts = torch.from_numpy(blocks).unflatten(-1, (-1, 18))
    scales = parts[..., :2].contiguous().view(torch.float16).squeeze(-1).float()
    in_bytes = parts[..., 2:]
    numbers = torch.cat((in_bytes & 15, in_bytes >> 4), dim=-1).to(torch.int8) - 8
    found = grid.unpack(Packed(grid.join(numbers.flatten(-2)), scales, None))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("seed", range(4))
def test_the_step_of_quantisation_aware_training_is_found(seed):
    # A lattice as in Google's QAT checkpoints: its groups' extremes are any number of the grid.
    generator = torch.Generator().manual_seed(seed)
    numbers = (torch.randn(512, 8, 32, generator=generator) * 2.2).round().clamp(-8, 7)
    scales = (torch.rand(512, 8, 1, generator=generator) * 0.02 + 0.001).to(torch.bfloat16)
    weight = (numbers.to(torch.bfloat16) * scales).flatten(-2)
    found = Grid(4, 32).unpack(Grid(4, 32).pack(weight)).float()
    error = (found - weight.float()).norm() / weight.float().norm()
    assert error <= 0.003
    extreme = weight.float().unflatten(-1, (-1, 32))
    step = extreme.gather(-1, extreme.abs().argmax(-1, keepdim=True)) / -8
    usual = ((extreme / step).round().clamp(-8, 7) * step - extreme).norm() / extreme.norm()
    assert usual > 0.02  # what the usual formula makes of it


def test_other_grids_are_refused():
    with pytest.raises(ConfigError, match="bits is 3"):
        Grid(3, 32)
    with pytest.raises(ConfigError, match="group is 48"):
        Grid(4, 48)
