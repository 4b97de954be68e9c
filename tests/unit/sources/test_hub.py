"""Data sets that `datasets` wrote, read back as examples: map-style, streamed, and from disk."""

import importlib.util
import io
import json
import logging
import subprocess
import sys
import zipfile
from itertools import islice

import datasets
import huggingface_hub.utils
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value

from gemma_tuner.errors import ConfigError, DataError, SourceError
from gemma_tuner.media.load import load_media
from gemma_tuner.records import Audio, Image, Text
from gemma_tuner.sources.hub import HubSource
from gemma_tuner.streaming.manifest import Manifest, write_manifest

STREAMING = pytest.mark.parametrize("streaming", [False, True], ids=["map-style", "streamed"])


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    """Keep what datasets converts out of the user's cache."""
    cache = tmp_path / "caches"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", cache / "downloads")
    monkeypatch.setattr(datasets.config, "EXTRACTED_DATASETS_PATH", cache / "extracted")


def png(shade=0):
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (8, 8), (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def wav():
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros(1600, dtype=np.float32), 16_000, format="WAV")
    return buffer.getvalue()


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_parquet(folder, columns, features=None, split="train"):
    """Write Parquet with its features in the metadata, as `push_to_hub` does."""
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns, schema=features.arrow_schema if features else None)
    pq.write_table(table, folder / f"{split}-00000-of-00001.parquet")
    return str(folder)


def pairs(count):
    return {
        "prompt": [f"Q{number}" for number in range(count)],
        "response": [f"A{number}" for number in range(count)],
    }


def examples_of(source):
    return [outcome for _, outcome in source]


def answers_of(source):
    return [example.turns[-1].text for example in examples_of(source)]


@STREAMING
def test_rows_are_numbered_and_the_summary_says_where_they_come_from(tmp_path, streaming):
    folder = write_parquet(tmp_path / "my-pairs", {**pairs(40), "more": list(range(40))})
    (tmp_path / "my-pairs" / "README.md").write_text("---\nlicense: cc0-1.0\n---\n")
    source = HubSource(folder, streaming=streaming)
    outcomes = list(source)
    assert [origin for origin, _ in outcomes] == [
        f"my-pairs/default/train:{number}" for number in range(1, 41)
    ]
    assert [example.key for _, example in outcomes] == [origin for origin, _ in outcomes]
    assert answers_of(source) == pairs(40)["response"]
    assert source.read_summary() == {
        "format": "hub data set",
        "layout": "prompt and response",
        "columns": {"prompt": "prompt", "response": "response"},
        "unused": ["more"],
        "splits": {},
        "notes": ["read from the local folder 'my-pairs'", "licence of the data set: cc0-1.0"],
        "num_files": 1,
    }


def test_an_id_column_gives_the_keys(tmp_path):
    folder = write_parquet(tmp_path / "d", {**pairs(2), "id": ["x", "y"]})
    assert [example.key for example in examples_of(HubSource(folder))] == ["x", "y"]
    numbered = HubSource(folder, keywords={"id": False})
    assert examples_of(numbered)[1].key == "d/default/train:2"


@STREAMING
def test_a_damaged_picture_ends_nothing(tmp_path, streaming):
    features = Features({"image": datasets.Image(), "text": Value("string")})
    stored = [{"bytes": content, "path": None} for content in (png(1), b"damaged", png(3))]
    folder = write_parquet(tmp_path / "d", {"image": stored, "text": ["a", "b", "c"]}, features)
    examples = examples_of(HubSource(folder, streaming=streaming))
    assert [example.turns[0].parts[0] for example in examples] == [
        Image(png(1)),
        Image(b"damaged"),
        Image(png(3)),
    ]
    assert load_media(examples[2], root=tmp_path).turns[0].parts[0].source.getpixel((0, 0)) == (
        3,
        0,
        0,
    )
    with pytest.raises(DataError, match="d/default/train:2"):
        load_media(examples[1], root=tmp_path)


@STREAMING
def test_sounds_stay_encoded(tmp_path, streaming):
    features = Features({"audio": datasets.Audio(), "sentence": Value("string")})
    stored = [{"bytes": wav(), "path": "a.wav"}, {"bytes": b"damaged", "path": None}]
    folder = write_parquet(tmp_path / "d", {"audio": stored, "sentence": ["a", "b"]}, features)
    examples = examples_of(HubSource(folder, streaming=streaming))
    assert [example.turns[0].parts[0] for example in examples] == [
        Audio(wav()),
        Audio(b"damaged"),
    ]
    assert len(load_media(examples[0], root=tmp_path).turns[0].parts[0].source) == 1600


@STREAMING
def test_media_within_lists_and_messages_stay_encoded(tmp_path, streaming):
    part = {"type": Value("string"), "text": Value("string"), "image": datasets.Image()}
    features = Features({"messages": List({"role": Value("string"), "content": List(part)})})
    image = {"bytes": b"damaged", "path": None}
    question = [
        {"type": "image", "text": None, "image": image},
        {"type": "text", "text": "Q", "image": None},
    ]
    answer = [{"type": "text", "text": "A", "image": None}]
    row = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    folder = write_parquet(tmp_path / "messages", {"messages": [row]}, features)
    (example,) = examples_of(HubSource(folder, streaming=streaming))
    assert example.turns[0].parts == (Image(b"damaged"), Text("Q"))

    features = Features({"images": List(datasets.Image()), "text": Value("string")})
    columns = {"images": [[image, {"bytes": png(), "path": None}]], "text": ["T"]}
    folder = write_parquet(tmp_path / "lists", columns, features)
    (example,) = examples_of(HubSource(folder, streaming=streaming))
    assert example.turns[0].parts[:2] == (Image(b"damaged"), Image(png()))


@STREAMING
def test_json_that_mixes_types_is_what_it_was(tmp_path, streaming):
    first = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    second = [
        {"role": "user", "content": [{"type": "text", "text": "R"}]},
        {"role": "assistant", "content": "B"},
    ]
    rows = [{"messages": first}, {"messages": second}]
    write_lines(tmp_path / "lines" / "train.jsonl", rows)
    examples = examples_of(HubSource(str(tmp_path / "lines"), streaming=streaming))
    assert [example.turns[0].text for example in examples] == ["Q", "R"]
    (tmp_path / "array").mkdir()
    (tmp_path / "array" / "data.json").write_text(json.dumps([pair(1), pair(2)], indent=1))
    assert answers_of(HubSource(str(tmp_path / "array"), streaming=streaming)) == ["A1", "A2"]


def pair(number):
    return {"prompt": f"Q{number}", "response": f"A{number}"}


@STREAMING
def test_class_labels_are_read_as_their_names_and_counted(tmp_path, streaming):
    features = Features({"prompt": Value("string"), "label": ClassLabel(names=["cat", "dog"])})
    folder = write_parquet(
        tmp_path / "d", {"prompt": ["P", "Q", "R"], "label": [1, 0, -1]}, features
    )
    source = HubSource(folder, streaming=streaming, keywords={"response": "label"})
    first, second, third = examples_of(source)
    assert (first.turns[-1].text, second.turns[-1].text) == ("dog", "cat")
    assert isinstance(third, DataError)
    assert "holds -1, which is none of the 2 class labels" in str(third)
    assert "class labels of 'label' read as their names: 2" in source.read_summary()["notes"]


@STREAMING
def test_max_rows_ends_the_reading_before_what_comes_after(tmp_path, streaming):
    folder = write_parquet(tmp_path / "d", pairs(40))
    source = HubSource(folder, streaming=streaming, max_rows=17)
    assert answers_of(source) == pairs(40)["response"][:17]
    assert "stopped at max_rows: 17" in source.read_summary()["notes"]
    whole = HubSource(folder, streaming=streaming, max_rows=100)
    assert len(examples_of(whole)) == 40
    assert not any("max_rows" in note for note in whole.read_summary()["notes"])


def test_a_change_of_columns_is_told_of_with_the_rows_before_it(tmp_path):
    folder = tmp_path / "d"
    write_lines(folder / "train-0.jsonl", [pair(number) for number in range(19)])
    write_lines(folder / "train-1.jsonl", [{**pair(1), "secret": 2}])
    rows = iter(HubSource(str(folder), streaming=True))
    assert len(list(islice(rows, 19))) == 19
    with pytest.raises(SourceError, match=r"'d' cannot be read further than 19 rows") as caught:
        next(rows)
    assert len(examples_of(HubSource(str(folder), streaming=True, max_rows=19))) == 19
    with pytest.raises(
        SourceError, match="streaming=True converts less, and tells after how many rows"
    ) as prepared:
        list(HubSource(str(folder)))
    for error in (caught, prepared):
        assert "secret" not in str(error.value)
        assert str(tmp_path) not in str(error.value)
        assert error.value.__cause__ is None


@STREAMING
def test_a_broken_line_is_an_error_without_its_contents(tmp_path, streaming, capfd):
    folder = tmp_path / "d"
    write_lines(folder / "train-0.jsonl", [pair(1)] * 3)
    (folder / "train-1.jsonl").write_text('{"prompt": "secret", \n')
    with pytest.raises(SourceError, match=r"'d' cannot be read") as caught:
        list(HubSource(str(folder), streaming=streaming))
    assert ("further than 3 rows" in str(caught.value)) == streaming
    assert "secret" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_splits_by_any_of_their_names_and_none_that_is_not_there(tmp_path):
    write_parquet(tmp_path / "d", pairs(2))
    folder = write_parquet(tmp_path / "d", pairs(3), split="validation")
    for split in ("validation", "valid", "val"):
        source = HubSource(folder, split=split)
        assert next(iter(source))[0] == "d/default/validation:1"
        assert len(examples_of(source)) == 3
    expected = r"no split 'train\[:1\]'.*: train, validation .*max_rows"
    with pytest.raises(SourceError, match=expected):
        list(HubSource(folder, split="train[:1]"))
    with pytest.raises(SourceError, match="'d' has no subset 'x'; its subsets are: default"):
        list(HubSource(folder, subset="x"))


@STREAMING
def test_what_save_to_disk_wrote_is_read(tmp_path, streaming):
    one = Dataset.from_dict(pairs(3))
    one.save_to_disk(tmp_path / "one")
    DatasetDict({"train": one, "test": one.select([1])}).save_to_disk(tmp_path / "both")
    source = HubSource(str(tmp_path / "one"), streaming=streaming)
    assert answers_of(source) == ["A0", "A1", "A2"]
    assert next(iter(source))[0] == "one/default/train:1"
    assert answers_of(HubSource(str(tmp_path / "both"), split="test")) == ["A1"]
    with pytest.raises(SourceError, match="its splits are: test, train"):
        list(HubSource(str(tmp_path / "both"), split="dev"))
    with pytest.raises(ConfigError, match="keeps no subsets"):
        list(HubSource(str(tmp_path / "one"), subset="x"))


@STREAMING
def test_pictures_of_a_folder_are_named_from_it(tmp_path, streaming):
    folder = tmp_path / "d"
    write_lines(folder / "train" / "metadata.jsonl", [{"file_name": "0.png", "text": "T"}])
    (folder / "train" / "0.png").write_bytes(png())
    source = HubSource(str(folder), streaming=streaming)
    (example,) = examples_of(source)
    assert example.turns[0].parts[0] == Image("train/0.png")
    assert load_media(example, root=source.root).turns[0].parts[0].source.size == (8, 8)


@STREAMING
def test_pictures_within_an_archive(tmp_path, streaming):
    (tmp_path / "d").mkdir()
    with zipfile.ZipFile(tmp_path / "d" / "train.zip", "w") as archive:
        archive.writestr("0.png", png(7))
        archive.writestr("metadata.jsonl", json.dumps({"file_name": "0.png", "text": "T"}))
    source = HubSource(str(tmp_path / "d"), streaming=streaming)
    (example,) = examples_of(source)
    picture = load_media(example, root=source.root).turns[0].parts[0]
    assert picture.source.getpixel((0, 0)) == (7, 0, 0)


@STREAMING
def test_a_named_file_that_is_not_there_spoils_its_row_alone(tmp_path, streaming):
    names = ["gone.png", "../pictures/a.png", "http://example.test/a.png"]
    write_lines(tmp_path / "d" / "train.jsonl", [{"image": name, "text": "T"} for name in names])
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(png())
    source = HubSource(str(tmp_path / "d"), streaming=streaming)
    gone, there, remote = examples_of(source)
    assert "image 'gone.png' does not exist; paths are relative to the folder 'd'" in str(gone)
    assert load_media(there, root=source.root).turns[0].parts[0].source.size == (8, 8)
    assert isinstance(remote, DataError)


def test_sounds_in_files_are_streamed_and_else_need_a_package_that_is_named(tmp_path):
    folder = tmp_path / "d"
    write_lines(folder / "train" / "metadata.jsonl", [{"file_name": "0.wav", "text": "T"}])
    (folder / "train" / "0.wav").write_bytes(wav())
    (example,) = examples_of(HubSource(str(folder), streaming=True))
    assert example.turns[0].parts[0] == Audio("train/0.wav")
    if importlib.util.find_spec("torchcodec"):
        assert examples_of(HubSource(str(folder))) == [example]
    else:
        with pytest.raises(SourceError, match=r"'torchcodec' for such files.*streaming=True"):
            list(HubSource(str(folder)))


def test_the_identity_tells_folders_and_choices_apart(tmp_path):
    folder = write_parquet(tmp_path / "d", pairs(2))
    identity = HubSource(folder).read_identity()
    assert identity == HubSource(folder).read_identity()
    json.dumps(identity)
    for other in (
        HubSource(folder, max_rows=1),
        HubSource(folder, split="test"),
        HubSource(folder, keywords={"id": False}),
        HubSource("owner/name"),
        HubSource("owner/name", revision="v1"),
    ):
        assert other.read_identity() != identity
    write_parquet(tmp_path / "d", pairs(3))
    assert HubSource(folder).read_identity() != identity


@pytest.mark.parametrize(
    ("name", "arguments", "error", "expected"),
    [
        ("", {}, ConfigError, "name=''"),
        ("owner/name", {"split": None}, ConfigError, "split=None; give text$"),
        ("owner/name", {"subset": 3}, ConfigError, "subset=3; give text, or None"),
        ("owner/name", {"max_rows": 0}, ConfigError, "max_rows=0"),
        ("owner/name", {"max_rows": True}, ConfigError, "max_rows=True"),
        ("https://hub/datasets/owner/name", {}, ConfigError, "got a URL"),
        ("/no/such/folder", {}, SourceError, "there is no folder 'folder'"),
        ("./folder", {}, SourceError, "there is no folder 'folder'"),
    ],
)
def test_arguments_that_cannot_work(name, arguments, error, expected):
    with pytest.raises(error, match=expected):
        HubSource(name, **arguments)


def test_names_that_are_no_data_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "train.jsonl", [pair(1)])
    with pytest.raises(ConfigError, match=r"'train.jsonl' is a file; stream_local"):
        HubSource("train.jsonl")
    with pytest.raises(ConfigError, match="is a folder, which has none"):
        HubSource(str(tmp_path), revision="main")
    with pytest.raises(SourceError, match="'json' is the name of a file format"):
        list(HubSource("json"))
    with pytest.raises(SourceError, match="HF_HUB_OFFLINE forbids"):
        list(HubSource("owner/name"))


def test_the_libraries_are_quiet_and_left_as_they_were(tmp_path, capfd):
    folder = write_parquet(tmp_path / "d", pairs(40))
    capfd.readouterr()  # what writing printed
    datasets.logging.set_verbosity(logging.INFO)
    huggingface_hub.utils.logging.set_verbosity(logging.INFO)
    try:
        rows = iter(HubSource(folder))
        next(rows)
        for _ in range(2):
            assert datasets.logging.get_verbosity() == logging.INFO
            assert huggingface_hub.utils.logging.get_verbosity() == logging.INFO
            assert not datasets.are_progress_bars_disabled()
            assert not huggingface_hub.utils.are_progress_bars_disabled()
            list(rows)
    finally:
        datasets.logging.set_verbosity_warning()
        huggingface_hub.utils.logging.set_verbosity_warning()
    assert capfd.readouterr() == ("", "")


def test_a_manifest_keeps_the_examples(tmp_path):
    features = Features({"image": datasets.Image(), "text": Value("string")})
    stored = [{"bytes": png(1), "path": None}, {"bytes": png(2), "path": None}]
    folder = write_parquet(tmp_path / "d", {"image": stored, "text": ["a", "b"]}, features)
    source = HubSource(folder)
    path = tmp_path / "manifest.arrow"
    write_manifest(path, source, root=source.root, read_summary=source.read_summary)
    manifest = Manifest(path)
    kept = [manifest.read_example(row) for row in range(len(manifest))]
    assert kept == examples_of(source)
    assert manifest.summary["format"] == "hub data set"


def test_torch_is_not_imported_for_map_style(tmp_path):
    folder = write_parquet(tmp_path / "d", pairs(2))
    code = (
        "import sys; from gemma_tuner.sources.hub import HubSource; "
        "assert 'datasets' not in sys.modules; "
        f"assert len(list(HubSource({folder!r}))) == 2; assert 'torch' not in sys.modules"
    )
    environment = {"HF_HOME": str(tmp_path / "home"), "PATH": "", "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 0, ended.stderr


@STREAMING
def test_media_that_no_column_name_tells_are_refused(tmp_path, streaming):
    pair = {"prompt": ["Q"] * 60, "response": ["A"] * 60}
    rows = {**pair, "xyz": [None] * 50 + [png()] * 10, "number": [1] * 60}
    Dataset.from_dict(rows).to_parquet(tmp_path / "data" / "train.parquet")
    source = HubSource(str(tmp_path / "data"), streaming=streaming)
    with pytest.raises(SourceError, match=r"'xyz' holds image.*image=.*ignore="):
        list(source)
    free = HubSource(str(tmp_path / "data"), streaming=streaming, keywords={"ignore": ("xyz",)})
    assert len(list(free)) == 60
    assert free.read_summary()["unused"] == ["number"]


def test_rows_that_are_marked_as_of_another_split_are_left_out(tmp_path):
    pair = {"prompt": ["Q"] * 4, "response": ["A"] * 4, "split": ["train", "test"] * 2}
    Dataset.from_dict(pair).to_parquet(tmp_path / "data" / "train.parquet")
    source = HubSource(str(tmp_path / "data"))
    assert len(list(source)) == 2
    assert "rows of other splits not read (test): 2" in source.read_summary()["notes"]
