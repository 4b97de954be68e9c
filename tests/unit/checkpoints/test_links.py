"""Exports and uploads hold a checkpoint's own files, and none that a link leads to elsewhere."""

import logging

import pytest

from gemma_tuner.checkpoints.writing import list_own_files


@pytest.mark.parametrize("is_cached", [False, True])
def test_links_are_followed_within_a_checkpoint_alone(tmp_path, is_cached, caplog):
    home = tmp_path / "models--me--m"
    folder = home / "snapshots" / "abc" if is_cached else home
    folder.mkdir(parents=True)
    (tmp_path / "private").write_text("a key")
    (home / "blobs").mkdir()
    (home / "blobs" / "1234").write_text("{}")
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").symlink_to(home / "blobs" / "1234")
    (folder / "notes.txt").symlink_to(tmp_path / "private")
    (folder / "gone.txt").symlink_to(tmp_path / "gone")
    with caplog.at_level(logging.WARNING, "gemma_tuner"):
        own = [file.name for file in list_own_files(folder)]
    assert own == ["config.json", "tokenizer.json"]
    assert "links that lead out of its folder: notes.txt" in caplog.text
    assert str(tmp_path) not in caplog.text
