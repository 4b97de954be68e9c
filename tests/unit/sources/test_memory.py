"""Rows in memory, however they are held, make the examples that a file of them makes."""

import json
from itertools import repeat
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import PIL.Image
import pyarrow
import pytest

import gemma_tuner as gt
from gemma_tuner.errors import ConfigError, DataError, GemmaTunerError, SourceError
from gemma_tuner.media.load import load_media
from gemma_tuner.sources import memory

ROWS = [
    {"prompt": "Snow?", "response": "white", "n": 1},
    {"prompt": "Grass?", "response": "green", "n": 2},
    {"prompt": "", "response": "blue\nas the sky", "n": 3},
]
ROWS[2]["prompt"] = "Sea?"


class MapStyle:
    """As torch's data sets are: a length and places, and no iteration."""

    def __len__(self):
        return len(ROWS)

    def __getitem__(self, index):
        return ROWS[index]


class OfArrow:
    """As the tables of polars and others are: anything that hands out an Arrow stream."""

    def __arrow_c_stream__(self, requested_schema=None):
        return pyarrow.Table.from_pylist(ROWS).__arrow_c_stream__(requested_schema)


HELD = {
    "list": lambda: ROWS,
    "tuple": lambda: tuple(ROWS),
    "generator": lambda: (dict(row) for row in ROWS),
    "map-style": MapStyle,
    "pandas": lambda: pd.DataFrame(ROWS),
    "pyarrow": lambda: pyarrow.Table.from_pylist(ROWS),
    "arrow stream": OfArrow,
    "datasets": lambda: datasets.Dataset.from_list(ROWS),
    "datasets, in another order": lambda: datasets.Dataset.from_list(ROWS[::-1]).select([2, 1, 0]),
}


@pytest.fixture
def open_rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda rows, **keywords: gt.stream_rows(rows, cache_dir=tmp_path / "cache", **keywords)


def read_turns(stream):
    return [stream[index].turns for index in range(len(stream))]


@pytest.mark.parametrize("kind", HELD)
def test_rows_make_the_examples_of_a_file_however_they_are_held(open_rows, tmp_path, kind):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    of_file = gt.stream_local(path, cache_dir=tmp_path / "cache")
    stream = open_rows(HELD[kind]())
    assert read_turns(stream) == read_turns(of_file)
    assert sorted(row.key.rpartition(":")[2] for row in stream) == ["1", "2", "3"]
    assert "'n'" in str(stream.report())  # not used, as of a file


def test_the_same_rows_find_their_manifest_and_others_make_another(open_rows, tmp_path):
    def list_manifests():
        return sorted((tmp_path / "cache/manifests").iterdir())

    first = open_rows([dict(row) for row in ROWS])
    written = list_manifests()
    again = open_rows([dict(row) for row in ROWS])
    again.load_state_dict(first.state_dict())
    assert list_manifests() == written
    other = open_rows([*ROWS[:2], {**ROWS[2], "response": "grey"}])
    assert len(list_manifests()) == len(written) + 1
    with pytest.raises(gt.ResumeError):
        other.load_state_dict(first.state_dict())


TURNED = PIL.Image.new("RGB", (4, 2), "red")
TURNED.putpixel((0, 0), (0, 0, 255))
TURNED.getexif()[0x0112] = 6
PIXELS = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
SAMPLES = np.sin(np.arange(8000) / 9).astype(np.float32)
IMAGES = {
    "upright": (TURNED, TURNED.transpose(PIL.Image.Transpose.ROTATE_270)),
    "palette": (TURNED.convert("P"), TURNED.convert("P").convert("RGB")),
    "transparent": (PIL.Image.new("RGBA", (2, 2)), PIL.Image.new("RGB", (2, 2), "white")),
    "array": (PIXELS, PIL.Image.fromarray(PIXELS)),
    "grey array": (PIXELS[:, :, 0], PIL.Image.fromarray(PIXELS[:, :, 0]).convert("RGB")),
}


@pytest.mark.parametrize("place", ["column", "part", "Example"])
@pytest.mark.parametrize("kind", IMAGES)
def test_an_image_in_memory_is_kept_as_it_is_looked_at(open_rows, place, kind):
    given, expected = IMAGES[kind]
    part = {"type": "image", "image": given}
    rows = {
        "column": [{"image": given, "prompt": "What?", "response": "x"}],
        "part": [
            {
                "messages": [
                    {"role": "user", "content": [part, {"type": "text", "text": "What?"}]},
                    {"role": "assistant", "content": "x"},
                ]
            }
        ],
        "Example": [
            gt.Example(
                "a",
                (
                    gt.Turn("user", (gt.Image(given), gt.Text("What?"))),
                    gt.Turn("assistant", (gt.Text("x"),)),
                ),
            )
        ],
    }
    (image,) = open_rows(rows[place])[0].media
    assert image.source.mode == "RGB"
    assert image.source.tobytes() == expected.tobytes()


def test_samples_in_memory_are_heard_at_their_rate(open_rows):
    rows = [{"audio": {"array": SAMPLES, "sampling_rate": 16_000}, "text": "a hum"}]
    (clip,) = open_rows(rows)[0].media
    np.testing.assert_array_equal(clip.source, SAMPLES)
    example = gt.Example(
        "a",
        (
            gt.Turn("user", (gt.Audio(SAMPLES, 8_000),)),
            gt.Turn("assistant", (gt.Text("a hum"),)),
        ),
    )
    (clip,) = open_rows([example])[0].media
    (wanted,) = load_media(example).media
    np.testing.assert_array_equal(clip.source, wanted.source)


def test_media_of_datasets_are_never_decoded_by_it_and_labels_are_names(open_rows, tmp_path):
    path = tmp_path / "a.png"
    TURNED.save(path)
    features = datasets.Features(
        {"image": datasets.Image(), "text": datasets.ClassLabel(names=["cat", "dog"])}
    )
    rows = datasets.Dataset.from_dict({"image": [str(path)], "text": [1]}, features=features)
    stream = open_rows(rows)
    assert stream[0].turns[-1].text == "dog"
    assert next(stream[0].media).source.size == TURNED.size


def test_paths_start_from_the_working_directory(open_rows, tmp_path):
    TURNED.save(tmp_path / "a.png")
    (image,) = open_rows([{"image": Path("a.png"), "caption": "x"}])[0].media
    assert image.source.mode == "RGB"
    with pytest.raises(DataError, match=r"rows:1.*'b.png' does not exist"):
        open_rows([{"image": "b.png", "caption": "x"}])


def test_what_a_data_frame_lacks_is_absent(open_rows):
    frame = pd.DataFrame({"prompt": ["a", "b"], "system": ["s", np.nan], "response": ["c", "d"]})
    assert [turns[0].role for turns in read_turns(open_rows(frame))] == ["system", "user"]


def test_examples_keep_their_keys_and_resume(open_rows):
    examples = [
        gt.Example(
            f"mine/{n}", (gt.Turn("user", (gt.Text("a"),)), gt.Turn("assistant", (gt.Text(t),)))
        )
        for n, t in enumerate("xyz")
    ]
    stream = open_rows(examples)
    assert sorted(example.key for example in stream) == ["mine/0", "mine/1", "mine/2"]
    assert read_turns(stream) == [example.turns for example in examples]


SECRET = "a secret, of the row"
REFUSED = {
    "a path": ("rows.jsonl", "stream_local"),
    "columns": ({"prompt": [SECRET], "response": [SECRET]}, "Dataset.from_dict"),
    "splits": (
        datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}),
        "give one of them: 'train'",
    ),
    "an endless data set": (
        datasets.Dataset.from_list(ROWS).to_iterable_dataset(),
        "rows.take",
    ),
    "a transform": (
        datasets.Dataset.from_list(ROWS).with_transform(lambda rows: rows),
        "map()",
    ),
    "an endless generator": (repeat({"prompt": SECRET, "response": SECRET}), "may have no end"),
    "nothing": ([], "rows is empty"),
    "texts": ([SECRET], "the first row is text"),
    "a number": (3, "rows is a int"),
    "a column": (pd.Series([SECRET]), "cannot read as a table"),
    "two kinds": ([ROWS[0], gt.Example("a", document=SECRET)], "rows:2"),
    "two kinds, turned": ([gt.Example("a", document=SECRET), ROWS[0]], "rows:2"),
    "an object": ([{"prompt": object(), "response": SECRET}], "rows:1"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_list_of_rows_is_refused_without_its_contents(open_rows, monkeypatch, kind):
    monkeypatch.setattr(memory, "MAX_GENERATED_ROWS", 5)
    rows, words = REFUSED[kind]
    with pytest.raises(GemmaTunerError) as caught:
        open_rows(rows)
    assert words in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_row_that_holds_itself_is_refused(open_rows):
    row = {"response": "x"}
    row["prompt"] = [row]
    with pytest.raises(DataError, match="hold themselves"):
        open_rows([row])


def test_examples_take_no_columns(open_rows):
    with pytest.raises(ConfigError, match="leave out prompt"):
        open_rows([gt.Example("a", document="x")], prompt="question")


@pytest.mark.parametrize("function", [gt.stream_local, gt.stream_gcs, gt.stream_hub])
@pytest.mark.parametrize("kind", ["list", "generator", "pandas", "pyarrow", "datasets"])
def test_rows_where_a_place_is_asked_for_are_answered(function, kind):
    with pytest.raises(ConfigError, match=r"stream_rows\(rows\)") as caught:
        function(HELD[kind]())
    assert "Snow" not in str(caught.value)


def test_a_split_is_a_column(open_rows):
    rows = [
        {**row, "split": split}
        for row, split in zip(ROWS, ("train", "test", "train"), strict=True)
    ]
    assert len(open_rows(rows, split="test")) == 1
    with pytest.raises(SourceError, match="train"):
        open_rows(rows, split="dev")
