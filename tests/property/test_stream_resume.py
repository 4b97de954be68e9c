"""Stopping anywhere and continuing with a new stream equals never having stopped."""

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_tuner.streaming.opening import stream_local

EPOCHS = 2


@pytest.fixture(scope="module")
def folder():
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def open_stream(folder, num_rows, seed, shuffle, fraction):
    path = folder / f"{num_rows}.jsonl"
    if not path.exists():
        rows = [{"prompt": f"Q{i}", "response": f"A{i}"} for i in range(num_rows)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    stream = stream_local(path, seed=seed, shuffle=shuffle, cache_dir=folder / "cache")
    return stream.split(fraction)[0] if fraction else stream


def read(stream, count):
    """Hand out ``count`` examples, beginning epochs as they end."""
    keys = []
    while True:
        for example in stream:
            keys.append(example.key)
            if len(keys) == count:
                return keys


@settings(max_examples=60)
@given(
    num_rows=st.sampled_from([1, 2, 3, 10, 64, 101]),
    seed=st.integers(-(2**70), 2**70),
    shuffle=st.booleans(),
    fraction=st.sampled_from([None, None, 0.3]),
    data=st.data(),
)
def test_stopping_anywhere_changes_nothing(folder, num_rows, seed, shuffle, fraction, data):
    if num_rows < 10:
        fraction = None
    total = EPOCHS * len(open_stream(folder, num_rows, seed, shuffle, fraction))
    stops = sorted(data.draw(st.lists(st.integers(0, total - 1), min_size=1, max_size=3)))
    expected = read(open_stream(folder, num_rows, seed, shuffle, fraction), total)
    keys, state = [], None
    for stop in [*stops, total]:
        stream = open_stream(folder, num_rows, seed, shuffle, fraction)
        if state is not None:
            stream.load_state_dict(json.loads(state))
        if stop > len(keys):
            keys += read(stream, stop - len(keys))
        state = json.dumps(stream.state_dict())
    assert keys == expected
    assert sorted(keys[: total // EPOCHS]) == sorted(keys[total // EPOCHS :])


def test_every_place_to_stop(folder):
    expected = read(open_stream(folder, 10, 7, True, None), 20)
    for stop in range(1, 20):
        stream = open_stream(folder, 10, 7, True, None)
        begun = read(stream, stop)
        resumed = open_stream(folder, 10, 7, True, None)
        resumed.load_state_dict(stream.state_dict())
        assert begun + read(resumed, 20 - stop) == expected
