"""The order of an epoch: a permutation computed place by place, from the seed and the epoch alone.

:class:`Order` permutes all rows; :class:`ShardOrder` permutes shards, and the rows within each.
:class:`Interleave` says from which of several streams each place of a mix is taken.

A Feistel network permutes the numbers below a power of four; walking its cycles until a number
falls below ``num_rows`` makes a permutation of exactly those rows. Nothing is stored and any
place costs the same, so that resuming in the middle of an epoch is arithmetic.

Source: J. Black and P. Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002 (the
generalised Feistel cipher and cycle walking). Mixing function: the finalizer of SplitMix64,
G. Steele, D. Lea and C. Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import accumulate

_NUM_ROUNDS = 6  # Four make it pseudorandom for large domains; small ones need a little more.
_MASK_64 = (1 << 64) - 1


class Order:
    """Which row comes at which place of one epoch.

    The order is part of saved runs: it is the same on every machine and for every version of
    Python, and a test pins it.
    """

    def __init__(self, num_rows: int, *, seed: int, epoch: int, shuffle: bool = True) -> None:
        self._num_rows = num_rows
        self._shuffle = shuffle and num_rows > 1
        self._half_bits = max(1, ((num_rows - 1).bit_length() + 1) // 2)
        self._half_mask = (1 << self._half_bits) - 1
        digest = hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=8 * _NUM_ROUNDS).digest()
        self._round_keys = [
            int.from_bytes(digest[start : start + 8], "little")
            for start in range(0, len(digest), 8)
        ]

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, position: int) -> int:
        """Return the row at a place of the epoch."""
        if not 0 <= position < self._num_rows:
            raise IndexError(f"place {position} of an epoch of {self._num_rows} rows")
        if not self._shuffle:
            return position
        row = self._permute(position)
        while row >= self._num_rows:
            row = self._permute(row)
        return row

    def _permute(self, value: int) -> int:
        left, right = value >> self._half_bits, value & self._half_mask
        for key in self._round_keys:
            # SplitMix64's finalizer scatters 64 bits over 64 bits.
            mixed = right ^ key
            mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & _MASK_64
            mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & _MASK_64
            left, right = right, left ^ ((mixed ^ mixed >> 31) & self._half_mask)
        return left << self._half_bits | right


class ShardOrder:
    """Shards one after the other in an order of the epoch's own, and so the rows of each shard.

    Neighbours in time are neighbours in a file: a disk reads a large tar from one end to the other
    instead of here and there. The shuffle is worse for it.
    """

    def __init__(self, starts: Sequence[int], num_rows: int, *, seed: int, epoch: int) -> None:
        shards = Order(len(starts), seed=seed, epoch=epoch)
        self._name = f"{seed}/{epoch}"
        self._shards = [shards[place] for place in range(len(starts))]
        self._starts = starts
        sizes = [end - start for start, end in zip(starts, (*starts[1:], num_rows), strict=True)]
        self._places = [0, *accumulate(sizes[shard] for shard in self._shards)]
        self._latest: tuple[int, Order] | None = None

    def __len__(self) -> int:
        return self._places[-1]

    def __getitem__(self, position: int) -> int:
        """Return the row at a place of the epoch; every row comes at exactly one."""
        if not 0 <= position < len(self):
            raise IndexError(f"place {position} of an epoch of {len(self)} rows")
        index = bisect.bisect_right(self._places, position) - 1
        if self._latest is None or self._latest[0] != index:
            size = self._places[index + 1] - self._places[index]
            shard_seed = int.from_bytes(
                hashlib.blake2b(f"{self._name}/{self._shards[index]}".encode()).digest()[:8]
            )
            self._latest = (index, Order(size, seed=shard_seed, epoch=0))
        return self._starts[self._shards[index]] + self._latest[1][position - self._places[index]]


class EpochOrders:
    """The order of every epoch, one after the other; that of the latest is kept."""

    def __init__(self, num_rows: int, make_order: Callable[[int], Order | ShardOrder]) -> None:
        self._num_rows = num_rows
        self._make_order = make_order
        self._latest: tuple[int, Order | ShardOrder] | None = None

    def __getitem__(self, turn: int) -> int:
        """Return the row at a place counted on over the epochs."""
        epoch, place = divmod(turn, self._num_rows)
        latest = self._latest  # streams of one data set share it, from several threads
        if latest is None or latest[0] != epoch:
            latest = self._latest = (epoch, self._make_order(epoch))
        return latest[1][place]


class Interleave:
    """Which of several streams each slot of a mix takes from: as even as whole numbers can be.

    Of any ``n`` slots in a row from the first, each of two streams has its share of ``n`` to
    within one; more streams are divided in halves, again and again. How often a stream was taken
    from before a slot is computed, so that nothing needs to be remembered.
    """

    def __init__(self, weights: Sequence[Fraction]) -> None:
        self._weights = weights

    def locate(self, slot: int) -> tuple[int, int]:
        """Return the stream that a slot is taken from, and how many of its slots came before."""
        first, last = 0, len(self._weights)
        while last - first > 1:
            middle = (first + last) // 2
            share = Fraction(sum(self._weights[first:middle])) / sum(self._weights[first:last])
            before, after = (int((place * share * 2 + 1) // 2) for place in (slot, slot + 1))
            if after > before:
                last, slot = middle, before
            else:
                first, slot = middle, slot - before
        return first, slot
