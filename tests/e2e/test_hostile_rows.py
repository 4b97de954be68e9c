"""Files of rows that hold far more than a row should are refused, or read in little memory."""

import sys

import pytest

from tests.hostile_rows import measure

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc"),
]

# How each ends.
EXPECTED = {
    "a line of a gigabyte": "more than 33,554,432 bytes in line 1",
    "a million empty lists in a line": "1,048,576 values",
    "100,000 columns": "more than 1,024 columns",
    "a quote that is never closed": "close the quotes in it",
    "a million delimiters": "1,048,576 delimiters",
    "a text of 200 MB": "write media to files of their own",
}


@pytest.mark.parametrize("case", EXPECTED)
def test_hostile_rows_take_little_memory(case):
    peak, ended = measure(case)
    assert EXPECTED[case] in ended
    assert peak <= 300
