"""Fewer points: never too many, never without a peak."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gemma_tuner.watch.thinning import MAX_POINTS, smooth, thin

finite = st.floats(min_value=-1e6, max_value=1e6)


@given(
    values=st.lists(finite | st.just(float("nan")), max_size=300),
    max_points=st.integers(min_value=8, max_value=64),
)
def test_thinning_keeps_ends_order_and_extremes(values, max_points):
    values = np.array(values)
    steps = np.arange(len(values)) * 10 + 1
    points = thin(steps, values, max_points)
    assert len(points) <= max_points
    drawn_steps = [step for step, _ in points]
    assert drawn_steps == sorted(set(drawn_steps))
    if len(values) <= max_points:
        assert drawn_steps == steps.tolist()
    if len(values):
        assert (drawn_steps[0], drawn_steps[-1]) == (steps[0], steps[-1])
    known = values[np.isfinite(values)]
    if len(known):
        drawn = [value for _, value in points if value is not None]
        for extreme in (known.min(), known.max()):
            assert float(f"{extreme:.6g}") in drawn


def test_one_spike_among_a_hundred_thousand_steps_is_drawn():
    values = np.full(100_000, 1.0)
    values[43_210] = 50.0
    points = thin(np.arange(100_000), values)
    assert (43_210, 50.0) in points
    assert len(points) <= MAX_POINTS


def test_a_gap_stays_a_gap():
    points = thin(np.array([1, 2, 3]), np.array([1.0, np.nan, 3.0]))
    assert points == [(1, 1.0), (2, None), (3, 3.0)]


@given(st.lists(finite, min_size=1, max_size=60), st.integers(min_value=1, max_value=20))
def test_smoothing_is_the_mean_of_the_last_values(values, window):
    found = smooth(np.array(values), window)
    expected = [np.mean(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_smoothing_passes_over_what_is_not_finite():
    found = smooth(np.array([np.nan, 1.0, np.nan, 3.0, np.nan, np.nan]), 2)
    np.testing.assert_array_equal(found, [np.nan, 1.0, 1.0, 3.0, 3.0, np.nan])
