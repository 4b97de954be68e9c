"""Each name that means something, beside each layout: its content is used, or it is refused."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from PIL import Image

from gemma_tuner.errors import DataError, GemmaTunerError
from gemma_tuner.sources.columns import MEANINGS
from gemma_tuner.sources.local import LocalSource

MARK = "zebra"
MESSAGES = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
LAYOUTS = {
    "chat": {"messages": MESSAGES},
    "prompt and response": {"prompt": "Q", "response": "A"},
    "question and answer": {"question": "Q", "answer": "A"},
    "instruction and output": {"instruction": "Q", "output": "A"},
    "image and caption": {"image": "a.png", "caption": "A"},
    "clip and transcript": {"audio": "a.wav", "transcript": "A"},
    "image, question and answer": {"image": "a.png", "question": "Q", "answer": "A"},
    "file and text": {"file_name": "a.wav", "text": "A"},
    "document": {"text": "A"},
}
ARGUMENTS = ("=", "and none where it")
VALUES = {
    "messages": [{"role": "user", "content": MARK}, {"role": "assistant", "content": "B"}],
    "history": [[MARK, "B"]],
    "tools": [{"type": "function", "function": {"name": MARK, "parameters": {}}}],
    "image": f"{MARK}.png",
    "audio": f"{MARK}.wav",
    "file": f"{MARK}.png",
    "video": f"{MARK}.mp4",
    "start": 0.123,
    "end": 0.456,
    "duration": 0.789,
    "split": "test",
    "choices": [MARK],
    "score": 0.5,
    "weight": 0,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name in ("a", MARK):
        Image.new("RGB", (8, 8)).save(folder / f"{name}.png")
        soundfile.write(folder / f"{name}.wav", np.zeros(160, np.float32), 16_000)
    return folder


def write(folder, file_format, row):
    path = folder / f"rows.{file_format}"
    if file_format == "jsonl":
        path.write_text(json.dumps(row) + "\n")
    else:
        pq.write_table(pa.Table.from_pylist([row]), path)
    return path


def is_used(example, part):
    shown = repr(example)
    return {
        "start": "start_seconds=0.123",
        "end": "0.456",
        "duration": "duration_seconds=0.789",
    }.get(part, MARK) in shown


def try_name(folder, layout, name, value, file_format="jsonl"):
    """Return what is wrong with how a name fares, or None."""
    row = {**LAYOUTS[layout], name: value}
    try:
        ((_, outcome),) = LocalSource(write(folder, file_format, row))
    except GemmaTunerError as error:
        outcome = error
    if not isinstance(outcome, GemmaTunerError):
        return None if is_used(outcome, MEANINGS[name][0]) else "passed over"
    said = str(outcome)
    is_told = f"'{name}'" in said and any(word in said for word in ARGUMENTS)
    is_told |= isinstance(outcome, DataError) and name in said  # a value that is no such part
    return None if is_told else f"refused by: {said}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_name_that_means_something_is_used_or_refused(folder, layout):
    faults = {}
    for name, parts in MEANINGS.items():
        # A class is learnt from documents alone; elsewhere it says what kind of row it is.
        if name not in LAYOUTS[layout] and (parts[0] != "class" or layout == "document"):
            value = VALUES.get(parts[-1], VALUES.get(parts[0], MARK))
            faults[name] = try_name(folder, layout, name, value)
    assert {name: fault for name, fault in faults.items() if fault} == {}


def test_columns_that_a_parquet_file_has_are_held_to_the_same_rule(folder):
    faults = {}
    for name, parts in MEANINGS.items():
        if name not in ("prompt", "response") and parts[0] != "class":
            value = VALUES.get(parts[-1], VALUES.get(parts[0], MARK))
            value = json.dumps(value) if parts[0] in ("history", "tools", "messages") else value
            faults[name] = try_name(folder, "prompt and response", name, value, "parquet")
    assert {name: fault for name, fault in faults.items() if fault} == {}


def test_spellings_of_a_name_mean_the_same(folder):
    for name, value in (("imagePath", "image"), ("Image-Path", "image"), ("AUDIO FILE", "audio")):
        path = write(folder, "jsonl", {"prompt": "Q", "response": "A", name: VALUES[value]})
        ((_, example),) = LocalSource(path)
        assert MARK in repr(example)
