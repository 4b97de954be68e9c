"""The doctor compares a device's ways to unpack with the CPU's, bit for bit."""

import pytest
import torch

from gemma_tuner.doctor import unpacking
from gemma_tuner.doctor.calibration import _measure_unpacking
from gemma_tuner.doctor.unpacking import check_unpacking
from gemma_tuner.models.few_bits.unpacking import unpack_plainly

CPU = torch.device("cpu")


def test_torch_alone_is_compared_with_the_cpu():
    check = check_unpacking(CPU)
    assert (check.result, check.figures) == ("ok", {"ways": 2})


def test_a_kernel_that_is_right_is_a_third_way(monkeypatch):
    def make(device, variant):
        return lambda packed: unpack_plainly(packed, variant.bits)

    monkeypatch.setattr(unpacking, "make_kernel", make)
    assert check_unpacking(CPU).figures == {"ways": 3}


def test_a_kernel_of_one_other_bit_is_wrong_and_avoided(monkeypatch):
    def make(device, variant):
        def unpack(packed):
            weight = unpack_plainly(packed, variant.bits)
            if variant.is_affine and variant.dtype == torch.bfloat16:
                weight.view(torch.int16)[-1, -1] ^= 1
            return weight

        return unpack

    monkeypatch.setattr(unpacking, "make_kernel", make)
    check = check_unpacking(CPU)
    assert check.result == "wrong"
    assert str(check.reason).startswith("affine 4-bit bfloat16: the device's kernel")
    assert "Training avoids it" in str(check.reason)


def test_operators_of_other_bits_are_wrong(monkeypatch):
    def unpack(packed, bits):
        return unpack_plainly(packed, bits) * (1 + 2**-7)

    monkeypatch.setattr(unpacking, "unpack_plainly", unpack)
    check = check_unpacking(CPU)
    assert check.result == "wrong"
    assert "than on the CPU" in str(check.reason)
    assert "Training avoids it" not in str(check.reason)


@pytest.mark.parametrize("error", [SyntaxError("no\nsuch thing"), ImportError("triton")])
def test_a_kernel_that_cannot_be_made_is_done_without(error, monkeypatch):
    def make(device, variant):
        raise error

    monkeypatch.setattr(unpacking, "make_kernel", make)
    check = check_unpacking(CPU)
    assert check.result == "skipped"
    assert type(error).__name__ in str(check.reason)
    assert "torch's operators unpack instead" in str(check.reason)


def test_both_ways_are_timed():
    measured = _measure_unpacking(CPU)
    assert measured["grid"] == "symmetric-4-32"
    assert measured["seconds"] > 0 < measured["plain_seconds"]
