"""Local files to examples: splits, media beside the data, faults found before training."""

import json
import re
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gemma_tuner.errors import DataError, SourceError
from gemma_tuner.records import Audio, Image
from gemma_tuner.sources.formats.files import PEEKED_ROWS
from gemma_tuner.sources.local import LocalSource


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pair(response="A", **more):
    return {"prompt": "Q", "response": response, **more}


def keys_of(source):
    return [example.key for _, example in source]


def errors_of(source):
    return [outcome for _, outcome in source if isinstance(outcome, DataError)]


def test_keys_name_file_and_line_or_are_the_id(tmp_path):
    write_lines(tmp_path / "a.jsonl", [pair(), pair()])
    write_lines(tmp_path / "sub" / "b.jsonl", [pair()])
    paths = [tmp_path / "a.jsonl", tmp_path / "sub" / "b.jsonl"]
    assert keys_of(LocalSource(paths)) == ["a.jsonl:1", "a.jsonl:2", "sub/b.jsonl:1"]
    path = write_lines(tmp_path / "c.jsonl", [pair(id=7, uid="u"), pair(id="x", uid="v")])
    assert keys_of(LocalSource(path)) == ["7", "x"]
    assert [origin for origin, _ in LocalSource(path)] == ["c.jsonl:1", "c.jsonl:2"]
    assert keys_of(LocalSource(path, keywords={"id": False})) == ["c.jsonl:1", "c.jsonl:2"]
    assert keys_of(LocalSource(path, keywords={"id": "uid"})) == ["u", "v"]


def test_a_split_column_keeps_its_rows_and_is_counted(tmp_path):
    rows = [pair(split="train"), pair(split="valid"), pair(split="train"), pair(split=None)]
    path = write_lines(tmp_path / "a.jsonl", rows)
    source = LocalSource(path, split="train")
    assert keys_of(source) == ["a.jsonl:1", "a.jsonl:3"]
    assert source.read_summary()["splits"] == {"train": 2, "valid": 1, "(none)": 1}
    for name in ("valid", "validation", "val"):
        assert keys_of(LocalSource(path, split=name)) == ["a.jsonl:2"]
    source = LocalSource(path)
    assert keys_of(source) == ["a.jsonl:1", "a.jsonl:3", "a.jsonl:4"]
    assert source.read_summary()["notes"] == ["rows of other splits not read (valid): 1"]
    with pytest.raises(SourceError, match=r"no split 'test'; .*: '\(none\)', 'train', 'valid'"):
        keys_of(LocalSource(path, split="test"))


def test_rows_of_other_splits_need_not_be_usable(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [pair(split="train"), pair("", split="test")])
    assert keys_of(LocalSource(path, split="train")) == ["a.jsonl:1"]


def test_files_named_by_split(tmp_path):
    for name in ("train", "valid", "test"):
        write_lines(tmp_path / f"{name}.jsonl", [pair()])
    assert keys_of(LocalSource(tmp_path, split="train")) == ["train.jsonl:1"]
    assert keys_of(LocalSource(tmp_path, split="val")) == ["valid.jsonl:1"]
    with pytest.raises(SourceError, match="of: test, train, validation"):
        keys_of(LocalSource(tmp_path, split="dev2"))
    source = LocalSource(tmp_path)
    assert keys_of(source) == ["train.jsonl:1"]
    assert source.read_summary()["notes"] == [
        "files of other splits not read (test, validation): 2"
    ]
    assert len(keys_of(LocalSource(str(tmp_path / "*.jsonl")))) == 3


def test_parquet_shards_named_by_split(tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        table = pa.table({"question": ["Q"], "answer": ["A"], "unused": [1.5]})
        pq.write_table(table, tmp_path / "data" / f"{name}.parquet")
    source = LocalSource(tmp_path, split="train")
    assert keys_of(source) == [
        "data/train-00000-of-00002.parquet:1",
        "data/train-00001-of-00002.parquet:1",
    ]
    assert source.read_summary()["unused"] == ["unused"]


def test_media_are_named_from_the_root_and_looked_for_beside_their_data_file(tmp_path):
    (tmp_path / "sub" / "media").mkdir(parents=True)
    (tmp_path / "sub" / "media" / "a.png").write_bytes(b"x")
    (tmp_path / "b.wav").write_bytes(b"x")
    rows = [pair(image="media/a.png", audio="../b.wav")]
    write_lines(tmp_path / "sub" / "metadata.jsonl", rows)
    write_lines(tmp_path / "top.jsonl", [pair(audio=str(tmp_path / "b.wav"))])
    source = LocalSource([tmp_path / "sub", tmp_path / "top.jsonl"])
    (_, first), (_, second) = source
    assert list(first.media) == [Image("sub/media/a.png"), Audio("sub/../b.wav")]
    assert list(second.media) == [Audio("b.wav")]
    assert source.read_summary()["notes"] == ["pictures: 1", "sounds: 2"]


def test_a_missing_media_file_is_found_before_training(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    (tmp_path / "empty.png").touch()
    good = pair(image="a.png")
    for bad, words in (
        ("private/folder/b.png", r"image 'b\.png' does not exist; paths are relative to"),
        ("empty.png", r"image 'empty\.png' is empty"),
        ("https://secret.example/b.png?token=1", "https: URI"),
        ("a\0b.png", "does not exist|cannot be read"),
        (".", "does not exist"),
        ("QUJD" * 100, "image is text of 400 characters and no path; give base64 as"),
    ):
        path = write_lines(tmp_path / "a.jsonl", [good, good, pair(image=bad)])
        outcomes = list(LocalSource(path))
        assert [origin for origin, _ in outcomes] == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3"]
        (error,) = errors_of(outcomes)
        assert error.key == "a.jsonl:3"
        assert re.search(words, str(error))
        assert "private" not in str(error)
        assert "secret" not in str(error)


def test_what_is_wrong_with_a_row_comes_in_its_place(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [pair(), pair(""), pair()])
    path.write_text(path.read_text() + "nonsense\n" + json.dumps(pair()) + "\n")
    source = LocalSource(path)
    outcomes = list(source)
    assert [origin for origin, _ in outcomes] == [f"a.jsonl:{n}" for n in range(1, 6)]
    empty, nonsense = errors_of(outcomes)
    assert "empty answer" in str(empty)
    assert "not valid JSON" in str(nonsense)
    assert [error.key for error in (empty, nonsense)] == ["a.jsonl:2", "a.jsonl:4"]
    assert source.read_summary()["num_files"] == 1


def test_a_column_that_comes_late_and_matters_is_refused(tmp_path):
    rows = [pair() for _ in range(PEEKED_ROWS)]
    late = pair(image="a.png")
    path = write_lines(tmp_path / "a.jsonl", [*rows, pair(comment="fine"), late])
    with pytest.raises(DataError, match="columns 'image' come first here") as caught:
        list(LocalSource(path))
    assert caught.value.key == f"a.jsonl:{PEEKED_ROWS + 2}"
    path = write_lines(tmp_path / "a.jsonl", [*rows, pair(comment="fine")])
    assert len(list(LocalSource(path))) == PEEKED_ROWS + 1
    path = write_lines(tmp_path / "a.jsonl", [pair(), late])
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(DataError, match="other rows have") as caught:
        list(LocalSource(path))
    assert caught.value.key == "a.jsonl:1"


def test_files_with_other_columns_are_told_by_the_row(tmp_path):
    write_lines(tmp_path / "a.jsonl", [pair()])
    write_lines(tmp_path / "b.jsonl", [{"prompt": "Q", "level": 3}])
    (error,) = errors_of(LocalSource(tmp_path))
    assert "no column 'response'" in str(error)
    assert error.key == "b.jsonl:1"


def test_captions_with_texts_that_belong_to_nothing(tmp_path):
    for name in ("a.jpg", "b.wav"):
        (tmp_path / name).write_bytes(b"x")
    for name in ("a.txt", "b.txt", "LICENSE.txt"):
        (tmp_path / name).write_text("Words.")
    source = LocalSource(tmp_path)
    (_, first), (_, second) = source
    assert list(first.media) == [Image("a.jpg")]
    assert list(second.media) == [Audio("b.wav")]
    assert first.turns[1].text == "Words."
    notes = source.read_summary()["notes"]
    assert notes[0] == ".txt files without media: 1"
    assert sum("default prompt" in note for note in notes) == 2
    (tmp_path / "b.txt").unlink()
    (error,) = errors_of(LocalSource(tmp_path))
    assert "'b.txt'" in str(error)
    assert error.key == "b.wav"


def test_the_identity_follows_files_and_choices(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [pair()])
    one = LocalSource(path).read_identity()
    assert json.loads(json.dumps(one)) == one
    assert LocalSource(path).read_identity() == one
    assert LocalSource(path, split="train").read_identity() != one
    assert LocalSource(path, keywords={"id": False}).read_identity() != one
    write_lines(path, [pair(), pair()])
    assert LocalSource(path).read_identity() != one


REAL = {
    "fsdd": (600, {"train": 300, "test": 300}, Counter(Audio=600)),
    "optdigits": (450, {"train": 360, "test": 90}, Counter(Image=450)),
    "tuxpaint": (428, {"train": 363, "test": 65}, Counter(Image=403, Audio=305)),
    "wikisql-mlx": (1200, {"train": 1000, "valid": 100, "test": 100}, Counter()),
    "gsm8k": (700, {"train": 500, "test": 200}, Counter()),
    "multiturn": (330, {"train": 300, "test": 30}, Counter()),
}

KEYWORDS = {  # of sets with a second answer
    "gsm8k": {"prompt": "prompt", "response": "response"},
    "tuxpaint": {"prompt": "prompt", "response": "response"},
}


@pytest.mark.parametrize("name", REAL)
def test_real_data_are_read_whole(shared_data, name):
    num_rows, splits, media = REAL[name]
    keywords = KEYWORDS.get(name, {})
    source = LocalSource(shared_data / name, keywords={**keywords, "ignore": ("split",)})
    examples = [example for _, example in source]
    lines = (shared_data / name / "manifest.jsonl").read_text().split("\n")
    rows = [json.loads(line) for line in lines if line]
    assert len(examples) == num_rows == len(rows)
    source = LocalSource(shared_data / name, keywords=keywords)
    assert len(list(source)) == splits["train"]
    assert source.read_summary()["splits"] == splits
    assert Counter(type(part).__name__ for e in examples for part in e.media) == media
    for example, row in zip(examples, rows, strict=True):
        assert example.key == row["id"]
        if "messages" in row:
            texts = [message["content"] for message in row["messages"]]
            assert [turn.text for turn in example.turns] == texts
        else:
            assert [turn.text for turn in example.turns] == [row["prompt"], row["response"]]
