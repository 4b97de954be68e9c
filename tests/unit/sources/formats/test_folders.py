"""What a path, a glob or a folder means."""

import pytest

from gemma_tuner.errors import ConfigError, SourceError
from gemma_tuner.sources.formats.folders import (
    choose_split,
    find_files,
    name_canonically,
    name_split,
)


def plant(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def names_of(found):
    return [path.relative_to(found.root).as_posix() for path in found.files]


@pytest.mark.parametrize(
    ("planted", "file_format", "expected"),
    [
        (["manifest.jsonl", "metadata.csv", "train.jsonl", "a.png"], "jsonl", ["manifest.jsonl"]),
        (["metadata.jsonl", "metadata.csv", "a.png", "a.txt"], "jsonl", ["metadata.jsonl"]),
        (["metadata.csv", "a.png"], "csv", ["metadata.csv"]),
        (["b.jsonl", "a.jsonl.gz", "c.json", "LICENSE.txt"], "jsonl", None),
        (["b.csv", "a.csv", "sub/c.jsonl"], "csv", ["a.csv", "b.csv"]),
        (["data/b.parquet", "data/a.parquet", "README.md"], "parquet", None),
        (["a.parquet", "dataset_info.json", "state.json", ".b.jsonl", "_c.csv"], "parquet", None),
        (["a.jpg", "a.txt", "sub/b.wav", "sub/b.txt"], "captions", ["a.jpg", "sub/b.wav"]),
        (["b.tar", "a.tar", "notes.txt"], "webdataset", ["a.tar", "b.tar"]),
        (["z.doc.gz", "sub-1/b.csv", "sub/a.csv"], "csv", ["sub/a.csv", "sub-1/b.csv"]),
    ],
)
def test_a_folder_means_the_first_of_manifest_data_files_captions(
    tmp_path, planted, file_format, expected
):
    plant(tmp_path, *planted)
    found = find_files(tmp_path)
    assert (found.format, found.root, found.is_folder) == (file_format, tmp_path, True)
    ending = (".jsonl", ".gz", ".json", ".csv", ".parquet")
    hidden = ("dataset_info.json", "state.json", ".b.jsonl", "_c.csv")
    default = sorted(name for name in planted if name.endswith(ending) and name not in hidden)
    assert names_of(found) == (expected or default)


def test_files_globs_and_lists(tmp_path):
    plant(tmp_path, "a/1.jsonl", "a/2.jsonl", "b/3.jsonl")
    assert names_of(find_files(tmp_path / "a" / "1.jsonl")) == ["1.jsonl"]
    assert names_of(find_files(str(tmp_path / "a" / "*.jsonl"))) == ["1.jsonl", "2.jsonl"]
    assert len(find_files(str(tmp_path / "**" / "*.jsonl")).files) == 3
    found = find_files([tmp_path / "b", tmp_path / "a" / "2.jsonl", tmp_path / "b" / "3.jsonl"])
    assert names_of(found) == ["b/3.jsonl", "a/2.jsonl"]
    assert found.root == tmp_path


def test_links_keep_their_names(tmp_path):
    plant(tmp_path, "blobs/0123")
    (tmp_path / "train.jsonl").symlink_to(tmp_path / "blobs" / "0123")
    assert names_of(find_files(tmp_path / "train.jsonl")) == ["train.jsonl"]


def test_folders_that_are_links_are_read_once(tmp_path):
    plant(tmp_path, "big/deep/1.jsonl", "data/valid/2.jsonl")
    data = tmp_path / "data"
    (data / "train").symlink_to(tmp_path / "big")
    (data / "again").symlink_to(data / "valid")
    (data / "loop").symlink_to(data)
    (data / "itself").symlink_to(data / "itself")
    (data / "gone").symlink_to(tmp_path / "none")
    assert names_of(find_files(data)) == ["train/deep/1.jsonl", "valid/2.jsonl"]


def test_two_formats_are_an_error_that_names_both_until_one_is_chosen(tmp_path):
    plant(tmp_path, "a.jsonl", "b.csv")
    with pytest.raises(SourceError, match=r"'a\.jsonl' and 'b\.csv'.*format="):
        find_files(tmp_path)
    assert names_of(find_files(tmp_path, "csv")) == ["b.csv"]
    with pytest.raises(SourceError, match="different formats"):
        find_files([tmp_path / "a.jsonl", tmp_path / "b.csv"])


def test_format_reads_files_of_any_name(tmp_path):
    plant(tmp_path, "dump.log", "dump.txt", "a.png", "a.txt", "b.jsonl")
    with pytest.raises(SourceError, match=r"'dump\.log' is of no known format"):
        find_files(tmp_path / "dump.log")
    assert find_files(tmp_path / "dump.log", "jsonl").format == "jsonl"
    found = find_files(tmp_path, "captions")
    assert names_of(found) == ["a.png"]
    assert found.num_unread_texts == 1


@pytest.mark.parametrize(
    ("paths", "file_format", "error", "words"),
    [
        ("nothing/here.jsonl", None, SourceError, "no file, folder or match"),
        ("*.jsonl", None, SourceError, "no file, folder or match"),
        ([], None, SourceError, "no paths"),
        ([{"text": "secret"}], None, ConfigError, "one is a dict;"),
        ("gs://bucket/a.jsonl", None, SourceError, "gs: URI"),
        (".", "xml", ConfigError, "format='xml'"),
        (".", None, SourceError, r"holds 1 \.md"),
        (".", "parquet", SourceError, "no parquet"),
    ],
)
def test_what_cannot_be_found_is_told(tmp_path, monkeypatch, paths, file_format, error, words):
    plant(tmp_path, "README.md")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=words):
        find_files(paths, file_format)


def test_compressed_tars_are_refused_with_the_remedy(tmp_path):
    plant(tmp_path, "a.tar.gz")
    for path in (tmp_path, tmp_path / "a.tar.gz"):
        with pytest.raises(SourceError, match=r"'a\.tar\.gz' is a compressed tar.*plain \.tar"):
            find_files(path)


def test_a_split_is_chosen_by_the_names_of_the_files():
    names = ["train.tar", "val.tar", "extra.tar"]
    chosen, notes = choose_split(names, "webdataset", split="validation", is_folder=True)
    assert (chosen, notes) == ({"val.tar"}, [])
    chosen, notes = choose_split(names, "webdataset", split=None, is_folder=True)
    assert (chosen, len(notes)) == ({"train.tar", "extra.tar"}, 1)
    assert choose_split(names, "webdataset", split=None, is_folder=False) == (set(names), [])


def test_two_media_with_one_caption_are_refused(tmp_path):
    plant(tmp_path, "a.jpg", "a.wav", "a.txt")
    with pytest.raises(SourceError, match=r"'a\.jpg' and 'a\.wav' share"):
        find_files(tmp_path)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.jsonl", "train"),
        ("valid.jsonl", "validation"),
        ("val-00001-of-00003.jsonl", "validation"),
        ("gsm8k_test.jsonl", "test"),
        ("validation/part.jsonl", "validation"),
        ("holdout-00000-of-00002.jsonl", "validation"),
        ("train_test_mix.jsonl", "train_test_mix"),
        ("training.jsonl.gz", "train"),
        ("snli_1.0_train.jsonl", "train"),
        ("snli_1.0_test.JSONL.gz", "test"),
        ("corpus.train.jsonl", "train"),
        ("corpus_1.0.csv", "corpus_1.0"),
        ("c4.00000-of-00010.json.gz", "c4"),
        ("holdout.txt", "validation"),
    ],
)
def test_the_split_of_a_file_is_in_its_name(name, split):
    assert name_split(name, "jsonl") == split


def test_what_a_picture_is_called_is_no_split():
    assert name_split("train_1.jpg", "captions") == "(none)"
    assert name_split("test/b.jpg", "captions") == "test"
    assert name_canonically("VAL") == name_canonically("valid") == "validation"


@pytest.mark.parametrize("num_links", [1, 2, 3])
@pytest.mark.parametrize("pattern", ["**/*.jsonl", "*/*.jsonl", "**/a.jsonl", "**"])
def test_links_under_a_glob_repeat_no_file(tmp_path, num_links, pattern):
    folder = tmp_path / "data"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "a.jsonl").write_text('{"text": "a"}\n')
    for number in range(num_links):
        (folder / f"latest{number}").symlink_to(folder)
        (folder / f"linked{number}").symlink_to(folder / "inner")
    found = find_files(str(folder / pattern), None)
    assert [path.name for path in found.files] == ["a.jsonl"]
    assert found.files[0].parent == folder / "inner"


def test_a_linked_folder_elsewhere_is_found_under_a_glob(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.jsonl").write_text('{"text": "b"}\n')
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    for pattern in ("**/*.jsonl", "*/*.jsonl"):
        found = find_files(str(tmp_path / "data" / pattern), None)
        assert [path.name for path in found.files] == ["b.jsonl"]
