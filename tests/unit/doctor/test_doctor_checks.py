"""Comparing answers, and what becomes of a device's errors."""

from pathlib import Path

import pytest
import torch

from gemma_tuner.doctor.checks import describe_error, find_difference, judge, run_check

RIGHT = {"a": torch.tensor([1.0, -4.0]), "b": torch.tensor([[2**40, 2**40 + 1]])}


def test_an_equal_answer_has_no_difference_and_dtypes_do_not_matter():
    answer = {"a": RIGHT["a"].half(), "b": RIGHT["b"]}
    assert find_difference(answer, RIGHT) == ("a", 0.0)


@pytest.mark.parametrize(
    ("name", "wrong", "difference"),
    [
        ("a", torch.tensor([1.0, -3.0]), 0.25),
        ("b", torch.tensor([[2**40, 2**40]]), 2**-40),
        ("a", torch.tensor([1.0, float("nan")]), torch.inf),
        ("a", torch.tensor([1.0, float("inf")]), torch.inf),
        ("a", torch.tensor([1.0]), torch.inf),
    ],
)
def test_a_wrong_answer_is_found_and_named(name, wrong, difference):
    found = find_difference({**RIGHT, name: wrong}, RIGHT)
    assert found == (name, pytest.approx(difference, rel=1e-6))
    result, reason, figures = judge(found, 0.0)
    assert result == "wrong"
    assert reason.startswith(name)
    assert figures["worst"] == name


def test_an_answer_that_is_missing_is_wrong():
    assert find_difference({"a": RIGHT["a"]}, RIGHT) == ("b", torch.inf)


def test_zeros_instead_of_zeros_are_right_and_instead_of_values_are_wrong():
    zeros = {"a": torch.zeros(3)}
    assert find_difference(zeros, zeros) == ("a", 0.0)
    assert find_difference(zeros, {"a": torch.ones(3)}) == ("a", 1.0)


def refuse(error):
    def measure():
        raise error

    return measure


@pytest.mark.parametrize(
    ("error", "refusal", "result"),
    [
        (NotImplementedError("no kernel"), "wrong", "wrong"),
        (RuntimeError("error 212"), "skipped", "skipped"),
        (TypeError("no float64"), "wrong", "wrong"),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1)"), "wrong", "skipped"),
    ],
)
def test_what_a_device_refuses_is_a_result(error, refusal, result):
    check = run_check("kernels", "x", refuse(error), refusal=refusal)
    assert check.result == result
    assert str(error) in (check.reason or "")


def test_an_error_that_no_device_raises_is_not_swallowed():
    with pytest.raises(KeyError):
        run_check("kernels", "x", refuse(KeyError("x")))


def test_errors_are_told_without_folders_of_users():
    error = RuntimeError(f"in {Path.home()}/x, /Users/ada/y and /home/ada lovelace\nmore")
    text = describe_error(error)
    assert str(Path.home()) not in text
    assert "ada/" not in text
    assert "more" not in text
    assert text.startswith("RuntimeError: in ~/x, ~/y and ~")
