"""Mixes keep their proportions, shards share them, and one number resumes both."""

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from gemma_tuner.errors import ConfigError, ResumeError
from gemma_tuner.streaming.mixing import mix
from gemma_tuner.streaming.opening import stream_local


def open_stream(folder: Path, name: str, num_rows: int, **options: Any):
    path = folder / f"{name}.jsonl"
    rows = [{"id": f"{name}{i}", "prompt": "Q", "response": "A"} for i in range(num_rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return stream_local(path, cache_dir=folder / "cache", **options)


def read_keys(stream, count):
    keys = []
    while True:
        for example in stream:
            keys.append(example.key)
            if len(keys) == count:
                return keys


def test_a_mix_takes_in_proportion_and_leaves_no_row_out(tmp_path):
    small, large = open_stream(tmp_path, "s", 10), open_stream(tmp_path, "l", 90)
    both = mix({small: 3, large: 1})
    assert len(both) == 100
    keys = read_keys(both, 400)
    assert Counter(key[0] for key in keys) == {"s": 300, "l": 100}
    for start in range(0, 400, 4):
        assert Counter(key[0] for key in keys[start : start + 4]) == {"s": 3, "l": 1}
    # Each goes on where it was: 30 epochs of the small one, one and a part of the large one.
    in_small = [key for key in keys if key[0] == "s"]
    assert set(Counter(in_small).values()) == {30}
    assert len({key for key in keys if key[0] == "l"}) == 90
    assert [in_small[:10], in_small[10:20]] == [read_keys(small, 20)[:10], in_small[10:20]]


def test_a_mix_does_not_depend_on_where_its_streams_stand(tmp_path):
    streams = [open_stream(tmp_path, name, 20, seed=4) for name in "ab"]
    expected = read_keys(mix({streams[0]: 0.5, streams[1]: 0.5}), 60)
    next(iter(streams[0]))
    assert read_keys(mix({streams[0]: 0.5, streams[1]: 0.5}), 60) == expected


def test_a_mix_by_index_by_split_and_by_report(tmp_path):
    streams = [open_stream(tmp_path, name, 50) for name in "ab"]
    both = mix({streams[0]: 0.9, streams[1]: 0.1})
    assert [both[i].key for i in (0, 49, 50, -1)] == ["a0", "a49", "b0", "b49"]
    rest, held_out = both.split(0.3)
    assert len(rest) + len(held_out) == 100
    assert {e.key for e in rest.read_rows(range(len(rest)))} == {
        key for stream in streams for key in (e.key for e in stream.split(0.3)[0])
    }
    text = str(both.report())
    assert "90.0% of the mix: 50 rows" in text
    assert "of 100 handed out" in text
    with pytest.raises(AttributeError, match="each of its parts"):
        _ = both.report().fingerprint


def test_mixes_that_cannot_be(tmp_path):
    stream = open_stream(tmp_path, "a", 5)
    other = open_stream(tmp_path, "b", 5)
    streams: Any
    for streams in (
        {},
        [stream],
        {stream: 0},
        {stream: -1},
        {stream: "1"},
        {stream: float("inf")},
    ):
        with pytest.raises(ConfigError, match="mix"):
            mix(streams)
    both = mix({stream: 1, other: 1})
    with pytest.raises(ConfigError, match="mix"):
        mix({both: 1})
    with pytest.raises(ConfigError, match="mix"):
        mix({stream.shard(0, 2): 1})
    with pytest.raises(ConfigError, match="take"):
        both.take(1)


def test_one_key_for_examples_of_two_data_sets_is_refused(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
    one, other = (open_stream(tmp_path / name, "t", 25) for name in "ab")
    assert one.report().fingerprint == other.report().fingerprint
    for same in (other, one.take(3), one.split(0.5)[0]):  # the same examples
        with pytest.raises(ConfigError, match=r"an example 't\d+' each.*the same data.*split\(\)"):
            mix({one: 1, same: 1})
    other = open_stream(tmp_path / "b", "t", 7)
    with pytest.raises(ConfigError, match=r"an example 't\d' each.*id="):
        mix({one: 1, other: 1})
    rest, held_out = one.split(0.5)
    assert len(mix({rest: 1, held_out: 1})) == len(one)
    numbered = open_stream(tmp_path / "b", "u", 7, id=False)
    assert len(mix({one: 1, numbered: 1})) == 32


def test_a_state_of_another_mix_is_refused_by_what_differs(tmp_path):
    streams = [open_stream(tmp_path, name, 20) for name in "ab"]
    state = mix({streams[0]: 0.5, streams[1]: 0.5}).state_dict()
    json.dumps(state)
    with pytest.raises(ResumeError, match=r"weights: \['1/2', '1/2'\] → \['3/5', '2/5'\]"):
        mix({streams[0]: 0.6, streams[1]: 0.4}).load_state_dict(state)
    other = open_stream(tmp_path, "b", 20, seed=1)
    with pytest.raises(ResumeError, match=r"stream 2\.seed: 0 → 1"):
        mix({streams[0]: 0.5, other: 0.5}).load_state_dict(state)
    with pytest.raises(ResumeError, match="lacks"):
        streams[0].load_state_dict(state)


def test_shards_share_the_slots_in_order(tmp_path):
    stream = open_stream(tmp_path, "a", 10)
    whole = read_keys(stream, 20)
    shards = [stream.shard(index, 4) for index in range(4)]
    fresh = open_stream(tmp_path, "a", 10)
    shards = [fresh.shard(index, 4) for index in range(4)]
    parts = [read_keys(shard, 5) for shard in shards]
    assert [parts[slot % 4][slot // 4] for slot in range(20)] == whole
    assert len({json.dumps(shard.state_dict()) for shard in shards}) == 1


@pytest.mark.parametrize("num_rows", [7, 24, 101])
@pytest.mark.parametrize("worlds", [(1, 2, 4, 1), (4, 3, 2), (2, 5, 1, 7)])
def test_any_number_of_shards_resumes_what_another_number_left(tmp_path, worlds, num_rows):
    whole = read_keys(open_stream(tmp_path, "a", num_rows), 120)
    keys, state = [], None
    for world in worlds:
        stream = open_stream(tmp_path, "a", num_rows)
        if state is not None:
            stream.load_state_dict(json.loads(state))
        shards = [stream.shard(index, world) for index in range(world)]
        first = len(keys)
        parts = [read_keys(shard, 6) for shard in shards]
        # Slot n belongs to shard n % world, wherever the change came.
        turns = [list(part) for part in parts]
        keys += [turns[slot % world].pop(0) for slot in range(first, first + 6 * world)]
        states = {json.dumps(shard.state_dict()) for shard in shards}
        assert len(states) == 1
        state = states.pop()
    assert keys == whole[: len(keys)]


def test_a_shard_left_in_mid_epoch_begins_the_next_with_the_others(tmp_path):
    stream = open_stream(tmp_path, "a", 10)
    shards = [stream.shard(index, 2) for index in range(2)]
    for shard in shards:
        next(iter(shard))
    epoch = [e.key for pair in zip(*shards, strict=True) for e in pair]
    assert sorted(epoch) == sorted(f"a{i}" for i in range(10))


def test_shards_that_cannot_be(tmp_path):
    stream = open_stream(tmp_path, "a", 10)
    for index, count in ((-1, 2), (2, 2), (0, 0), (0.5, 2)):
        with pytest.raises(ConfigError, match="shard"):
            stream.shard(index, count)
    with pytest.raises(ConfigError, match="shard"):
        stream.shard(0, 2).shard(0, 2)


def test_shards_by_locality_keep_files_together(tmp_path):
    for name in "abc":
        rows = [{"id": f"{name}{i}", "prompt": "Q", "response": "A"} for i in range(20)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)
    paths = [tmp_path / f"{name}.jsonl" for name in "abc"]
    stream = stream_local(paths, cache_dir=tmp_path / "cache", locality="shard")
    keys = read_keys(stream, 120)
    assert sorted(keys[:60]) == sorted(keys[60:])
    for start in range(0, 120, 20):
        assert len({key[0] for key in keys[start : start + 20]}) == 1
    assert keys[:20] != sorted(keys[:20])
    held_out = stream.split(0.5)[1]
    names = [e.key[0] for e in held_out]
    assert sum(one != two for one, two in pairwise(names)) == 2
    plain = stream_local(paths, cache_dir=tmp_path / "cache")
    with pytest.raises(ResumeError, match="locality: shard → None"):
        plain.load_state_dict(stream.state_dict())
