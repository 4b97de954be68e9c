"""Media that hold far more than their bytes are refused, or read in little memory."""

import sys

import pytest

from tests.hostile_media import measure

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc"),
]

# What each may take above the base, in MB, and how it ends.
EXPECTED = {
    "image: 900 million pixels": (50, "decompression bombs"),
    "image: a line of 20 million": (50, "no side may be longer than 65,535"),
    "image: a tall strip": (50, "read"),
    "image: the largest, 16 bits": (50, "takes 707 MB to decode"),
    "image: 33 million, RGBA": (320, "read"),
    "image: 65 million, progressive": (300, "read"),
    "image: 16 million, WebP": (300, "read"),
    "image: frames that are claimed": (50, "read"),
    "sound: an hour of FLAC": (300, "read"),
    "sound: ten hours of FLAC": (50, "the limits are 3,600 seconds"),
    "sound: frames that are claimed": (50, "read"),
    "sound: a rate of 4 GHz": (50, "cannot be decoded"),
    "sound: 65,535 channels": (50, "cannot be decoded"),
    "sound: a rate below the model's that shares no factor with it": (50, "read"),
}


@pytest.mark.parametrize("case", EXPECTED)
def test_hostile_media_take_little_memory(case):
    limit, ending = EXPECTED[case]
    peak, ended = measure(case)
    assert peak <= limit
    assert ending in ended
