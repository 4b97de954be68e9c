"""Following a growing file: each line once, whatever moment it is read at."""

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_tuner.errors import SourceError
from gemma_tuner.training.metrics import JsonlLog
from gemma_tuner.watch.tail import JsonlTail


@given(
    records=st.lists(st.dictionaries(st.text(max_size=5), st.text(max_size=8)), max_size=8),
    cuts=st.lists(st.integers(min_value=0, max_value=400), max_size=6),
)
def test_lines_come_once_wherever_the_file_ends_when_it_is_read(tmp_path_factory, records, cuts):
    path = tmp_path_factory.mktemp("tail") / "log.jsonl"
    content = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    encoded = content.encode()
    tail, read = JsonlTail(path), []
    for end in [*sorted(min(cut, len(encoded)) for cut in cuts), len(encoded)]:
        path.write_bytes(encoded[:end])
        gain = tail.read()
        assert not gain.has_restarted
        read += gain.records
    assert read == records
    assert tail.num_damaged == 0


def test_a_file_that_is_not_there_yet_has_nothing(tmp_path):
    tail = JsonlTail(tmp_path / "log.jsonl")
    assert tail.read().records == []
    (tmp_path / "log.jsonl").write_text('{"a": 1}\n')
    gain = tail.read()
    assert gain.records == [{"a": 1}]
    assert not gain.has_restarted


def test_a_resumed_run_has_its_log_read_from_its_beginning(tmp_path):
    path = tmp_path / "log.jsonl"
    tail = JsonlTail(path)
    with JsonlLog(path) as log:
        for step in range(5):
            log.event(step, "x")
    assert len(tail.read().records) == 5
    with JsonlLog(path, resume_step=2) as log:
        log.event(3, "again")
        gain = tail.read()
    assert gain.has_restarted
    assert [record["step"] for record in gain.records] == [0, 1, 2, 3]


def test_a_file_that_became_shorter_is_another_one(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n')
    tail = JsonlTail(path)
    tail.read()
    path.write_text('{"a": 3}\n')
    gain = tail.read()
    assert (gain.records, gain.has_restarted) == ([{"a": 3}], True)


def test_damaged_lines_are_passed_over_and_counted(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": \n[1]\n\xff\xfe\n\n{"a": 2}\n')
    tail = JsonlTail(path)
    assert tail.read().records == [{"a": 1}, {"a": 2}]
    assert tail.num_damaged == 3


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read_is_an_error_with_a_remedy(tmp_path):
    path = tmp_path / "log.jsonl"
    path.touch(mode=0o000)
    with pytest.raises(SourceError, match=r"log.jsonl cannot be read .*make it readable"):
        JsonlTail(path).read()


def test_a_folder_in_its_place_is_an_error(tmp_path):
    with pytest.raises(SourceError, match="cannot be read"):
        JsonlTail(tmp_path).read()
