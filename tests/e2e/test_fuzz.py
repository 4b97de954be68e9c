"""Hostile files by the thousand are read or refused, in little memory and time."""

import sys

import pytest

from tests.fuzz import find_readers, fuzz

# Those among them that were found to crash, hang or say too much stay found: the seed is the same.
COUNT = 1500


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits and peaks are read from /proc")
@pytest.mark.parametrize("reader", sorted(find_readers()))
def test_hostile_files_are_read_or_refused(reader, tmp_path):
    report = fuzz(reader, count=COUNT, keep=tmp_path)
    assert not report.findings, "\n\n".join(report.findings[:5])
    assert sum(report.counts.values()) == COUNT
    assert report.counts["read"] > 20
