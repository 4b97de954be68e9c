"""What is there is the old or the new, whatever happens in between."""

import errno
import os
import subprocess
from pathlib import Path

import pytest

from gemma_tuner.disk import (
    check_room,
    disk_errors_explained,
    remove_folder,
    replaced,
    sync_all,
    temporary_sibling,
)
from tests.limits import files_limited_to


def write(path, text, kind):
    """Write a file, or a folder with a file in a folder."""
    if kind == "folder":
        (path / "inner").mkdir(parents=True)
        path = path / "inner" / "file"
    path.write_text(text)


def read(path):
    return (path / "inner" / "file" if path.is_dir() else path).read_text()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a full file system needs root and mount: NOT TESTED HERE")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture
def synced(monkeypatch, tmp_path):
    """The names that are forced to the disk while the test runs, in their order."""
    names, fsync = [], os.fsync

    def note(descriptor):
        found = os.fstat(descriptor)
        there = (tmp_path, *tmp_path.rglob("*"))
        names.extend(path.name for path in there if os.path.samestat(path.stat(), found))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    return names


# --- replaced -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("left", [None, "file", "folder"])
def test_the_new_takes_the_place_of_the_old(tmp_path, kind, left):
    path = tmp_path / "it"
    write(path, "old", kind)
    if left:
        write(tmp_path / ".it.tmp", "half, by a process that was killed", left)
        if kind == "folder":
            write(tmp_path / ".it.old", "the one before, by a process that was killed", left)
    with replaced(path) as temporary:
        assert not temporary.exists()
        write(temporary, "new", kind)
        assert read(path) == "old"
    assert read(path) == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_replaced_in_one_moment(tmp_path, monkeypatch):
    """Two renames would leave neither for a process that is killed between them."""
    write(tmp_path / "it", "old", "folder")
    monkeypatch.setattr(Path, "rename", None)
    monkeypatch.setattr(Path, "replace", None)
    with replaced(tmp_path / "it") as temporary:
        write(temporary, "new", "folder")
    assert read(tmp_path / "it") == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["it"]


def test_a_file_system_that_cannot_takes_two_moments(tmp_path, monkeypatch):
    monkeypatch.setattr("gemma_tuner.disk._swap", lambda one, other: False)
    write(tmp_path / "it", "old", "folder")
    with replaced(tmp_path / "it") as temporary:
        write(temporary, "new", "folder")
    assert read(tmp_path / "it") == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["it"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_it_is_on_the_disk_before_it_is_in_its_place(tmp_path, synced, kind):
    path = tmp_path / "it"
    write(path, "old", kind)
    with replaced(path) as temporary:
        write(temporary, "new", kind)
        synced.clear()
    inner = ["inner", "file"] if kind == "folder" else []
    assert synced == [*inner, ".it.tmp", tmp_path.name]


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("error", [OSError("no space"), KeyboardInterrupt()])
def test_a_block_that_fails_changes_nothing(tmp_path, kind, error):
    path = tmp_path / "it"
    write(path, "old", kind)

    def write_half():
        with replaced(path) as temporary:
            write(temporary, "ne", kind)
            raise error

    with pytest.raises(type(error)):
        write_half()
    assert read(path) == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_full_disk_changes_nothing(small_disk, kind):
    path = small_disk / "it"
    write(path, "old" * 200_000, kind)

    def write_too_much():
        with replaced(path) as temporary:
            write(temporary, "new" * 200_000, kind)

    with pytest.raises(OSError, match="No space left") as raised:
        write_too_much()
    assert raised.value.errno == errno.ENOSPC
    assert read(path) == "old" * 200_000
    assert list(small_disk.iterdir()) == [path]
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(OSError, match="Read-only"):
        write_too_much()
    assert read(path) == "old" * 200_000


def test_a_file_that_is_cut_changes_nothing(tmp_path):
    path = tmp_path / "it"
    path.write_text("old")

    def write_too_much():
        with replaced(path) as temporary:
            temporary.write_text("new" * 1000)

    with files_limited_to(1000), pytest.raises(OSError, match="File too large"):
        write_too_much()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("kind", "other"), [("file", "folder"), ("folder", "file")])
def test_a_file_takes_no_folders_place_and_no_folder_a_files(tmp_path, kind, other):
    path = tmp_path / "it"
    write(path, "old", other)

    def write_other():
        with replaced(path) as temporary:
            write(temporary, "new", kind)

    with pytest.raises(OSError, match="irectory"):
        write_other()
    assert read(path) == "old"
    assert list(tmp_path.iterdir()) == [path]


# --- the others ---------------------------------------------------------------------------------


def test_what_a_block_leaves_beside_a_path_is_removed(tmp_path):
    path = tmp_path / "it"
    path.write_text("mine")
    for kind in ("file", "folder"):
        with temporary_sibling(path) as temporary:
            assert not temporary.exists()
            write(temporary, "", kind)
        assert list(tmp_path.iterdir()) == [path]
    (tmp_path / ".it.tmp").mkdir()
    with temporary_sibling(path) as temporary:
        assert not temporary.exists()
    with pytest.raises(NotADirectoryError), temporary_sibling(path / "it"):
        pass
    assert path.read_text() == "mine"


def test_a_folder_is_removed_also_after_a_kill_and_a_link_to_one_alone(tmp_path):
    for name in ("it", ".it.old"):
        write(tmp_path / name, "x", "folder")
    remove_folder(tmp_path / "it")
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "elsewhere", "x", "folder")
    (tmp_path / "it").symlink_to(tmp_path / "elsewhere")
    remove_folder(tmp_path / "it")
    assert read(tmp_path / "elsewhere") == "x"
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]


def test_all_of_a_folder_is_forced_to_the_disk(tmp_path, synced):
    write(tmp_path / "it", "x", "folder")
    sync_all(tmp_path / "it")
    assert sorted(synced) == ["file", "inner", "it"]
    with pytest.raises(FileNotFoundError):
        sync_all(tmp_path / "absent")


def test_room_is_measured_with_a_margin(tmp_path, small_disk):
    check_room(tmp_path, 1)
    with pytest.raises(OSError, match=r"Errno 28\] 17 MB are needed and 1 MB are free$"):
        check_room(small_disk, 1)
    with pytest.raises(OSError, match=r"1,000,000,000,017 MB are needed and [\d,]+ MB are free"):
        check_room(tmp_path, 10**18)


def test_errors_are_explained_without_their_paths(tmp_path):
    def explain(reason):
        return RuntimeError(f"cannot write ({reason}); free disk space")

    def fail(error):
        with disk_errors_explained(explain, KeyError):
            raise error

    for error, reason in (
        (OSError(errno.ENOSPC, "No space left on device", str(tmp_path)), "No space left on devi"),
        (OSError(f"{tmp_path} is odd"), "OSError"),
        (KeyError(7), "7"),
        (KeyError(), "KeyError"),
    ):
        with pytest.raises(RuntimeError, match=rf"\({reason}.*\); free") as raised:
            fail(error)
        assert raised.value.__suppress_context__
        assert str(tmp_path) not in str(raised.value)
    with pytest.raises(ValueError, match="another"):
        fail(ValueError("another"))
