"""Where media lie whose paths start elsewhere."""

import json

import pytest

from gemma_tuner.errors import DataError, SourceError
from gemma_tuner.sources.local import LocalSource
from gemma_tuner.sources.media_places import MediaPlaces, check_media_root, start_at
from tests.examples import picture


def write_row(folder, source):
    folder.mkdir(parents=True)
    (folder / "a.jsonl").write_text(json.dumps({"image": source, "caption": "a dog"}))
    return folder / "a.jsonl"


@pytest.mark.parametrize(
    "source", ["1.png", "coco/1.png", "/home/ann/coco/1.png", "../coco/1.png"]
)
def test_media_root_takes_the_longest_end_of_a_path(tmp_path, source):
    path = write_row(tmp_path / "data", source)
    for folder in ("media", "media/coco"):
        (tmp_path / folder).mkdir()
        picture().save(tmp_path / folder / "1.png")
    ((_, example),) = LocalSource(path, media_root=tmp_path / "media")
    expected = "media/1.png" if source == "1.png" else "media/coco/1.png"
    assert str(next(iter(example.media)).source).endswith(expected)
    ((_, error),) = LocalSource(path)
    assert isinstance(error, DataError)
    assert error.key == "a.jsonl:1"
    assert "media_root=" in str(error)


def test_a_file_is_taken_only_where_its_whole_path_ends_so_and_no_other_does():
    places = MediaPlaces(["a/x/1.png", "b/x/1.png", "b/2.png", "b/2.txt", "c/3.wav", "c/3.png"])
    assert places.find("image", "a/x/1.png", "k") == "a/x/1.png"
    assert places.find("image", "2.png", "k") == "b/2.png"
    assert places.find("image", "c/2.png", "k") is None
    assert places.find("audio", "2.png", "k") is None
    assert places.find("audio", "3", "k") == "c/3.wav"
    with pytest.raises(DataError, match=r"any of 2 files.*media_root="):
        places.find("image", "x/1.png", "k")


def refuse(kind, source, folder, key):
    raise DataError("refused", key=key)


@pytest.mark.parametrize("source", ["../secret.png", "/etc/secret.png", "a/../../secret.png"])
def test_rows_without_a_folder_never_leave_the_root(tmp_path, source):
    (tmp_path / "root").mkdir()
    picture().save(tmp_path / "secret.png")
    for root in (tmp_path / "root", "gs://bucket/root"):
        locate = start_at(check_media_root(root), refuse)
        with pytest.raises(DataError, match="below media_root="):
            locate("image", source, "", "k")


def test_rows_without_a_folder_start_at_the_root(tmp_path):
    picture().save(tmp_path / "1.png")
    assert (
        start_at(check_media_root("gs://b/m"), refuse)("image", "1.png", "", "k")
        == "gs://b/m/1.png"
    )
    assert start_at(tmp_path, refuse)("image", "1.png", "", "k") == str(tmp_path / "1.png")
    with pytest.raises(SourceError, match="no folder that is there"):
        check_media_root(tmp_path / "none")
