"""Local media are what they were when their rows were read, or are refused by name."""

import io
import os
import random
import tarfile

import PIL.Image
import pytest

import gemma_tuner as gt
from gemma_tuner.media import pinned
from gemma_tuner.media.pinned import check_pinned, pin_file


def draw(color):
    file = io.BytesIO()
    PIL.Image.new("RGB", (16, 16), color).save(file, "BMP")
    return file.getvalue()


def write_folder(folder, colors):
    lines = ["file_name,text\n"]
    for number, color in enumerate(colors):
        (folder / f"{number}.bmp").write_bytes(draw(color))
        lines.append(f"{number}.bmp,{color}\n")
    if not (folder / "metadata.csv").exists():
        (folder / "metadata.csv").write_text("".join(lines))
    return folder


def write_tar(folder, colors):
    with tarfile.open(folder / "a.tar", "w") as tar:
        for number, color in enumerate(colors):
            for ending, content in (("bmp", draw(color)), ("txt", b"label")):
                member = tarfile.TarInfo(f"{number:03}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return folder / "a.tar"


@pytest.mark.parametrize("write", [write_folder, write_tar])
def test_a_change_during_a_run_is_named_and_costs_the_example(tmp_path, write):
    how = {"cache_dir": tmp_path / "cache", "max_bad_fraction": 1.0}
    stream = gt.stream_local(write(tmp_path, ["red", "green", "blue"]), **how)
    state = stream.state_dict()
    assert len(list(stream)) == 3
    write(tmp_path, ["red", "blue", "blue"])  # names and sizes are as they were
    assert sorted(example.key[-5:] for example in stream) == sorted(
        stream[row].key[-5:] for row in (0, 2)
    )
    (record,) = stream.inspect_quarantine()
    assert "not what it was when its row" in record.reason
    assert str(tmp_path) not in record.reason

    again = gt.stream_local(write(tmp_path, ["red", "blue", "blue"]), refresh=True, **how)
    assert len(list(again)) == 3
    if write is write_tar:  # whose rows and media are one file
        with pytest.raises(gt.ResumeError):
            again.load_state_dict(state)


def test_a_run_resumed_after_a_change_hears_of_it(tmp_path):
    how = {"cache_dir": tmp_path / "cache"}
    write_folder(tmp_path, ["red", "green"])
    state = gt.stream_local(tmp_path, **how).state_dict()
    write_folder(tmp_path, ["green", "red"])
    resumed = gt.stream_local(tmp_path, **how)
    resumed.load_state_dict(state)
    with pytest.raises(gt.DataError, match=r"'[01].bmp' is not what it was .* refresh=True"):
        list(resumed)


def test_what_is_copied_touched_or_moved_is_the_same(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(random.Random(0).randbytes(3_000_000))
    first = pin_file(path, "a")
    copy = tmp_path / "b.bin"
    copy.write_bytes(path.read_bytes())
    os.utime(copy, (1, 1))
    check_pinned(copy, first, key="k")


def test_every_changed_byte_is_seen_and_what_was_not_touched_is_read_once(tmp_path, monkeypatch):
    path = tmp_path / "a.bin"
    content = bytearray(random.Random(0).randbytes(2_500_000))
    path.write_bytes(content)
    first = pin_file(path, "a")
    for number, place in enumerate((0, 1 << 20, len(content) - 1)):
        changed = bytearray(content)
        changed[place] ^= 1
        path.write_bytes(changed)
        os.utime(path, (number, number))
        with pytest.raises(gt.DataError, match="not what it was"):
            check_pinned(path, first, key="k")
    monkeypatch.setattr(pinned, "_CHUNK_BYTES", None)  # reading would fail
    with pytest.raises(gt.DataError, match="not what it was"):
        check_pinned(path, first, key="k")


def test_a_file_that_is_gone_is_named_without_its_folder(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"1")
    first = pin_file(path, "a")
    path.unlink()
    with pytest.raises(gt.DataError, match=r"'a.bin' cannot be opened \(No such file") as caught:
        check_pinned(path, first, key="k")
    assert str(tmp_path) not in str(caught.value)
