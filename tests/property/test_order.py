"""The order of an epoch: a permutation, unlike the rows' own order, the same everywhere."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_tuner.streaming.order import Order


def list_order(num_rows, **settings):
    order = Order(num_rows, **settings)
    return [order[position] for position in range(len(order))]


@given(st.integers(1, 3000), st.integers(), st.integers(0, 1000))
def test_every_row_comes_exactly_once(num_rows, seed, epoch):
    rows = list_order(num_rows, seed=seed, epoch=epoch)
    assert sorted(rows) == list(range(num_rows))


@given(st.integers(1, 2**40), st.data())
def test_any_place_of_any_size_is_within_the_rows(num_rows, data):
    position = data.draw(st.integers(0, num_rows - 1))
    assert 0 <= Order(num_rows, seed=1, epoch=0)[position] < num_rows


def test_the_order_is_pinned():
    # Saved runs stand on these numbers: change them, and STATE_VERSION with them.
    assert list_order(10, seed=0, epoch=0) == [2, 5, 7, 9, 4, 3, 6, 1, 8, 0]
    assert [Order(1_000_000, seed=7, epoch=3)[position] for position in range(5)] == [
        572165,
        212471,
        168142,
        56902,
        157900,
    ]


def test_without_shuffling_rows_stand_as_they_are():
    assert list_order(7, seed=3, epoch=5, shuffle=False) == list(range(7))


def test_seeds_and_epochs_have_orders_of_their_own():
    orders = {
        tuple(list_order(50, seed=seed, epoch=epoch)) for seed in (-1, 0, 1) for epoch in range(20)
    }
    assert len(orders) == 60


@pytest.mark.parametrize("position", [-1, 5])
def test_places_beyond_the_epoch_are_an_index_error(position):
    with pytest.raises(IndexError):
        Order(5, seed=0, epoch=0)[position]


@pytest.mark.parametrize("num_rows", [1000, 1024, 4096, 4097])
def test_the_order_has_nothing_to_do_with_the_rows_own(num_rows):
    places = np.arange(num_rows)
    for seed in range(8):
        rows = np.array(list_order(num_rows, seed=seed, epoch=0))
        # For random orders: deviation 1/sqrt(n); 2 of n steps go from a row to a neighbour.
        assert abs(np.corrcoef(places, rows)[0, 1]) < 4.5 / num_rows**0.5
        assert abs(np.corrcoef(rows[:-1], rows[1:])[0, 1]) < 4.5 / num_rows**0.5
        assert (np.abs(np.diff(rows)) == 1).sum() < 12
        following = np.array(list_order(num_rows, seed=seed, epoch=1))
        assert abs(np.corrcoef(rows, following)[0, 1]) < 4.5 / num_rows**0.5


@pytest.mark.parametrize("num_rows", [2, 3, 5, 8, 33])
def test_every_row_comes_first_about_as_often(num_rows):
    num_orders = 400 * num_rows
    for position in (0, num_rows - 1):
        counts = np.bincount(
            [Order(num_rows, seed=seed, epoch=0)[position] for seed in range(num_orders)],
            minlength=num_rows,
        )
        assert (np.abs(counts - 400) < 110).all(), counts
