"""Orders of mixes and shards: everything comes exactly once, and in proportion."""

import itertools
from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from gemma_tuner.streaming.order import Interleave, ShardOrder

weights = st.lists(st.fractions(Fraction(1, 100), 100), min_size=1, max_size=6)


@given(weights=weights, first=st.integers(0, 10**12))
def test_turns_run_on_without_a_gap(weights, first):
    interleave = Interleave(weights)
    turns = {}
    for slot in range(first, first + 60):
        index, turn = interleave.locate(slot)
        assert turn == turns.get(index, turn)
        turns[index] = turn + 1


@given(weights=weights, num_slots=st.integers(1, 500))
def test_every_stream_has_its_share_at_every_place(weights, num_slots):
    interleave = Interleave(weights)
    counts = [0] * len(weights)
    for slot in range(num_slots):
        index, turn = interleave.locate(slot)
        assert turn == counts[index]
        counts[index] += 1
        for weight, count in zip(weights, counts, strict=True):
            # Each halving rounds to the nearest whole number.
            assert abs(count - (slot + 1) * weight / sum(weights)) <= len(weights).bit_length()


def test_the_interleaving_is_pinned():
    interleave = Interleave([Fraction(7, 10), Fraction(1, 5), Fraction(1, 10)])
    assert [interleave.locate(slot)[0] for slot in range(20)] == [
        *(0, 1, 0, 0, 0, 2, 0, 0, 1, 0),
        *(0, 1, 0, 0, 0, 2, 0, 0, 1, 0),
    ]
    assert interleave.locate(10**15)[1] == 7 * 10**14


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    seed=st.integers(),
    epoch=st.integers(0, 5),
)
def test_every_row_of_every_shard_comes_once_and_shards_stay_together(sizes, seed, epoch):
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    order = ShardOrder(starts, sum(sizes), seed=seed, epoch=epoch)
    rows = [order[place] for place in range(len(order))]
    assert sorted(rows) == list(range(sum(sizes)))
    shards = [max(i for i, start in enumerate(starts) if start <= row) for row in rows]
    changes = sum(one != two for one, two in itertools.pairwise(shards))
    assert changes == len(sizes) - 1


def test_shards_and_their_rows_are_shuffled():
    order = ShardOrder([0, 100, 200], 300, seed=0, epoch=0)
    rows = [order[place] for place in range(300)]
    other = [ShardOrder([0, 100, 200], 300, seed=0, epoch=1)[place] for place in range(300)]
    assert rows[:100] != sorted(rows[:100])
    assert rows != other
    assert [row % 100 for row in rows[:100]] != [row % 100 for row in rows[100:200]]
