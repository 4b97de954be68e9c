"""The order of an epoch: a permutation computed place by place, from the seed and the epoch alone.

A Feistel network permutes the numbers below a power of four; walking its cycles until a number
falls below ``num_rows`` makes a permutation of exactly those rows. Nothing is stored and any
place costs the same, so that resuming in the middle of an epoch is arithmetic.

Source: J. Black and P. Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002 (the
generalised Feistel cipher and cycle walking). Mixing function: the finalizer of SplitMix64,
G. Steele, D. Lea and C. Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014.
"""

from __future__ import annotations

import hashlib

_NUM_ROUNDS = 6  # Four make it pseudorandom for large domains; small ones need a little more.
_MASK_64 = (1 << 64) - 1


class Order:
    """Which row comes at which place of one epoch.

    The order is part of saved runs: it is the same on every machine and for every version of
    Python, and a test pins it.

    Args:
        num_rows: Rows of the data, at least 1.
        seed: Any whole number.
        epoch: From 0; each has an order of its own.
        shuffle: False keeps the rows as they stand.
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
        """Return the row at a place of the epoch.

        Args:
            position: From 0 to ``len(self) - 1``.

        Returns:
            The row, from 0; every row comes at exactly one place.

        Raises:
            IndexError: There is no such place.
        """
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
            left, right = right, left ^ (_mix(right ^ key) & self._half_mask)
        return left << self._half_bits | right


def _mix(value: int) -> int:
    """Scatter 64 bits over 64 bits."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK_64
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK_64
    return value ^ value >> 31
