"""Following a growing file: each line once, whatever moment it is read at."""

import json
import os
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_tuner.errors import SourceError
from gemma_tuner.training.reporting.metrics import JsonlLog
from gemma_tuner.watch import tail as module
from gemma_tuner.watch.tail import Gain, JsonlTail


def read_all(tail):
    gains = list(tail.read())
    return Gain(
        [record for gain in gains for record in gain.records],
        any(gain.has_restarted for gain in gains),
    )


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
        gain = read_all(tail)
        assert not gain.has_restarted
        read += gain.records
    assert read == records
    assert tail.num_damaged == 0


def test_a_file_that_is_not_there_yet_has_nothing(tmp_path):
    tail = JsonlTail(tmp_path / "log.jsonl")
    assert read_all(tail).records == []
    (tmp_path / "log.jsonl").write_text('{"a": 1}\n')
    gain = read_all(tail)
    assert gain.records == [{"a": 1}]
    assert not gain.has_restarted


def test_a_resumed_run_has_its_log_read_from_its_beginning(tmp_path):
    path = tmp_path / "log.jsonl"
    tail = JsonlTail(path)
    with JsonlLog(path) as log:
        for step in range(5):
            log.event(step, "x")
    assert len(read_all(tail).records) == 5
    with JsonlLog(path, resume_step=2) as log:
        log.event(3, "again")
        gain = read_all(tail)
    assert gain.has_restarted
    assert [record["step"] for record in gain.records] == [0, 1, 2, 3]


def test_a_file_that_became_shorter_is_another_one(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n')
    tail = JsonlTail(path)
    read_all(tail)
    path.write_text('{"a": 3}\n')
    gain = read_all(tail)
    assert (gain.records, gain.has_restarted) == ([{"a": 3}], True)


def test_damaged_lines_are_passed_over_and_counted(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": \n[1]\n\xff\xfe\n\n' + b"[" * 5000 + b'\n{"a": 2}\n')
    tail = JsonlTail(path)
    assert read_all(tail).records == [{"a": 1}, {"a": 2}]
    assert tail.num_damaged == 4


@pytest.mark.parametrize("block_bytes", [1, 7, 64])
@given(
    sizes=st.lists(st.integers(min_value=0, max_value=150), max_size=8), cut=st.integers(0, 900)
)
def test_blocks_lose_nothing_and_too_long_lines_are_damaged(
    tmp_path_factory, block_bytes, sizes, cut
):
    path = tmp_path_factory.mktemp("tail") / "log.jsonl"
    lines = [json.dumps({"a": "x" * size}) for size in sizes]
    content = "".join(f"{line}\n" for line in lines).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK_BYTES", block_bytes)
        patch.setattr(module, "_LONGEST_LINE_BYTES", 64)
        tail = JsonlTail(path)
        path.write_bytes(content[:cut])
        records = read_all(tail).records
        path.write_bytes(content)
        records += read_all(tail).records
    # A line is damaged for certain beyond two blocks of slack, and read for certain below.
    short = [json.loads(line) for line in lines if len(line) < 64]
    assert [record for record in records if len(record["a"]) < 64 - 9] == short
    assert len(records) + tail.num_damaged == len(lines)


def test_a_pipe_in_its_place_holds_nobody(tmp_path):
    os.mkfifo(tmp_path / "log.jsonl")
    with pytest.raises(SourceError, match="is not a file"):
        read_all(JsonlTail(tmp_path / "log.jsonl"))


def test_a_log_is_never_in_memory_as_a_whole(tmp_path):
    path = tmp_path / "log.jsonl"
    line = json.dumps({"kind": "step", "text": "x" * 400}) + "\n"
    path.write_text(line * 50_000)
    tail = JsonlTail(path)
    tracemalloc.start()
    try:
        num_records = sum(len(gain.records) for gain in tail.read())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert num_records == 50_000
    assert peak < 8 << 20


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read_is_an_error_with_a_remedy(tmp_path):
    path = tmp_path / "log.jsonl"
    path.touch(mode=0o000)
    with pytest.raises(SourceError, match=r"log.jsonl cannot be read .*make it readable"):
        read_all(JsonlTail(path))


def test_a_folder_in_its_place_is_an_error(tmp_path):
    with pytest.raises(SourceError, match="is not a file"):
        read_all(JsonlTail(tmp_path))
