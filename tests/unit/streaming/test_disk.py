"""A file is the old one or the new one, whatever happens in between."""

import pytest

from gemma_tuner.streaming.disk import replaced_file


def test_a_file_is_replaced_once_it_is_written(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text("old")
    (tmp_path / ".log.jsonl.tmp").write_text("half, by a writer that was killed")
    with replaced_file(path) as temporary:
        assert not temporary.exists()
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError("no space"), KeyboardInterrupt()])
def test_a_failed_writing_leaves_the_old_file_alone(tmp_path, error):
    path = tmp_path / "log.jsonl"
    path.write_text("old")

    def write_half():
        with replaced_file(path) as temporary:
            temporary.write_text("ne")
            raise error

    with pytest.raises(type(error)):
        write_half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
