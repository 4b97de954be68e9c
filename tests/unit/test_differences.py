"""Differences between what was saved and what is here are all found, and a few are told."""

from hypothesis import given
from hypothesis import strategies as st

from gemma_tuner.differences import list_differences, shorten_differences

TREES = st.recursive(
    st.none() | st.integers(0, 2) | st.just("x") | st.just([1]),
    lambda inner: st.dictionaries(st.sampled_from("ab"), inner, min_size=1),
    max_leaves=4,
)
MAPPINGS = st.dictionaries(st.sampled_from("abc"), TREES)


@given(MAPPINGS, MAPPINGS)
def test_differences_are_empty_exactly_for_equals(left, right):
    assert (list_differences(left, right) == []) == (left == right)
    assert list_differences(left, left) == []


def test_differences_name_both_sides():
    assert list_differences({"a": {"b": 1, "c": None}}, {"a": {"b": 2}, "d": [3]}) == [
        "a.b: 1 → 2",
        "a.c: None → nothing",
        "d: nothing → [3]",
    ]


def test_the_least_nested_are_told_and_the_others_counted():
    saved = {"base": {"layers": {"a": 1}}, "seed": 0, "fingerprint": "0123456789abcdef" * 4}
    here = {"base": {"layers": {"a": 2}, "b": 1}, "seed": 1, "fingerprint": "f" * 64}
    differences = list_differences(saved, here)
    assert shorten_differences(differences) == (
        "seed: 0 → 1; fingerprint of the data: 01234567… → ffffffff…; base.b: nothing → 1; "
        "and 1 more"
    )
    assert shorten_differences(differences[:2]).count(";") == 1


def test_long_values_are_cut():
    (line,) = list_differences({"a": "x" * 100}, {"a": "y"})
    assert line == f"a: {'x' * 40}… (100 characters) → y"
