"""Hostile files by the thousand are read or refused, in little memory and time."""

import sys

import pytest

from tests import fuzz_rows
from tests.fuzz import find_readers, fuzz

# Those among them that were found to crash, hang or say too much stay found: the seed is the same.
COUNT = 1500
COUNT_OF_MEDIA = 200  # adapters take a tenth of a second each


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits and peaks are read from /proc")
@pytest.mark.parametrize("reader", sorted(find_readers()))
def test_hostile_files_are_read_or_refused(reader, tmp_path):
    count = COUNT if reader in fuzz_rows.READERS else COUNT_OF_MEDIA
    report = fuzz(reader, count=count, keep=tmp_path)
    assert not report.findings, "\n\n".join(report.findings[:5])
    assert sum(report.counts.values()) == count
    assert report.counts["read"] > count // 75
