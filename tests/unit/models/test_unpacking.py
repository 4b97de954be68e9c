"""A device's kernel unpacks as plain torch does, to the bit, or is not used."""

import logging
import os
import subprocess
import sys

import pytest
import torch

from gemma_tuner.models.few_bits import unpacking
from gemma_tuner.models.few_bits.grids import Grid
from gemma_tuner.models.few_bits.unpacking import (
    VARIANTS,
    agrees,
    make_kernel,
    make_samples,
    unpack_plainly,
)
from tests.metal_shader import Library

CPU, CUDA, MPS = map(torch.device, ("cpu", "cuda", "mps"))
# Rows of experts, the smallest row, one of E2B's widest.
SHAPES = ((2, 3, 384), (5, 128), (2, 12288))


@pytest.fixture
def metal(tmp_path, monkeypatch):
    """Let Metal's compiler be that of C++; returns what else to do to the source."""
    changes = []

    def compile_shader(source):
        for change in changes:
            assert change[0] in source
            source = source.replace(*change)
        return Library(source, tmp_path)

    monkeypatch.setattr(unpacking, "compile_shader", compile_shader)
    unpacking._compile_metal.cache_clear()
    yield changes
    unpacking._compile_metal.cache_clear()


@pytest.fixture
def choose(monkeypatch):
    """Choose how to unpack on a device, which is the CPU under its name."""
    unpacking._choose.cache_clear()

    def choose(device, variant):
        monkeypatch.setattr(unpacking, "make_kernel", lambda _, found: make_kernel(device, found))
        return unpacking._choose(CPU, variant)

    yield choose
    unpacking._choose.cache_clear()


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_thread_of_the_shader_writes_what_plain_torch_does(variant, metal):
    kernel = make_kernel(MPS, variant)
    assert kernel is not None
    assert agrees(kernel, CPU, variant)
    for group in (32, 64, 128):
        grid = Grid(variant.bits, group, is_affine=variant.is_affine)
        for shape in SHAPES:
            weight = torch.randn(shape, generator=torch.Generator().manual_seed(group))
            packed = grid.pack(weight.to(variant.dtype))
            found = kernel(packed)
            assert found.dtype == variant.dtype
            assert torch.equal(found, unpack_plainly(packed, variant.bits))


def is_whole(variant):
    return variant.bits == 8


FAULTS = {
    "one rounding for both": (
        "T(float(product) + float(biases[group]))",
        "T(float(number) * float(scales[group]) + float(biases[group]))",
        lambda variant: variant.is_affine and variant.dtype == torch.bfloat16,
    ),
    "no sign": ("((both & 15) ^ 8) - 8", "both & 15", lambda v: not (v.is_affine or is_whole(v))),
    "halves exchanged": ("side == 0", "side == 1", lambda variant: not is_whole(variant)),
    "the next group": (
        "weight >> group_shift",
        "(weight + 1) >> group_shift",
        lambda variant: True,
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_shader_of_other_bits_is_not_used(fault, metal, choose, caplog):
    *change, concerns = FAULTS[fault]
    metal.append(change)
    for variant in VARIANTS:
        with caplog.at_level(logging.INFO, logger="gemma_tuner"):
            caplog.clear()
            unpack = choose(MPS, variant)
            assert choose(MPS, variant) is unpack
        sample = next(make_samples(variant))
        assert torch.equal(unpack(sample), unpack_plainly(sample, variant.bits))
        said = [record.getMessage() for record in caplog.records]
        if concerns(variant):
            assert len(said) == 1
            assert said[0].startswith(f"{variant} weights are unpacked by torch's operators")
            assert "gives other bits" in said[0]
        else:
            assert said == []


def test_a_shader_that_does_not_compile_is_done_without(metal, choose, caplog):
    metal.append(("uint2 at", "uint3 at"))
    with caplog.at_level(logging.INFO, logger="gemma_tuner"):
        unpack = choose(MPS, VARIANTS[0])
    sample = next(make_samples(VARIANTS[0]))
    assert torch.equal(unpack(sample), unpack_plainly(sample, VARIANTS[0].bits))
    assert "its kernel cannot be made (SyntaxError)" in caplog.text


def test_cuda_without_triton_is_unpacked_by_torch(choose, caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "gemma_tuner.models.few_bits.unpack_triton", raising=False)
    with caplog.at_level(logging.INFO, logger="gemma_tuner"):
        unpack = choose(CUDA, VARIANTS[0])
    sample = next(make_samples(VARIANTS[0]))
    assert torch.equal(unpack(sample), unpack_plainly(sample, VARIANTS[0].bits))
    assert "its kernel cannot be made (ModuleNotFoundError)" in caplog.text


def test_a_full_device_is_no_fault_of_the_kernel(choose, monkeypatch):
    def fill(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(unpacking, "agrees", fill)
    for _ in range(2):  # nor is it remembered
        with pytest.raises(torch.OutOfMemoryError):
            choose(CUDA, VARIANTS[0])


def test_the_samples_tell_kernels_apart():
    for variant in VARIANTS:
        samples = list(make_samples(variant))
        assert len(samples) == 3
        for packed in samples:
            assert len(packed.numbers.unique()) == 256
            assert (packed.scales.shape[-1] % 2 == 1) == (packed.scales.shape[-1] == 19)


TRITON = """
import torch
from gemma_tuner.models.few_bits.unpacking import VARIANTS, agrees, make_kernel

for variant in VARIANTS:
    if variant.dtype != torch.float32:
        continue  # which the interpreter rounds towards zero; a GPU does not
    kernel = make_kernel(torch.device("cuda"), variant)
    assert agrees(kernel, torch.device("cpu"), variant), variant
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Triton is on Linux")
def test_triton_in_its_interpreter_writes_what_plain_torch_does():
    done = subprocess.run(
        [sys.executable, "-c", TRITON],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
