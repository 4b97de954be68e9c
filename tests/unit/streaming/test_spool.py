"""Manifests of several processes, starts and kills: the newest rows, and nothing left over."""

import os
from contextlib import suppress

import pytest

import gemma_tuner as gt
from gemma_tuner.streaming import spool
from gemma_tuner.testing import GcsServer


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "q", "response": "old"}\n')
    return tmp_path


def read(folder):
    return gt.stream_local(folder / "a.jsonl", cache_dir=folder / "cache")[0].turns[-1].text


@pytest.mark.parametrize("hours", [-1, 0, 1])
def test_refresh_asks_whatever_the_clock_said_when_the_manifest_was_written(tmp_path, hours):
    with GcsServer() as server:
        how = {"cache_dir": tmp_path, "gcs_client": server.client()}
        server.put("b", "a.jsonl", b'{"prompt": "q", "response": "old"}\n')
        manifest = gt.stream_gcs("gs://b/a.jsonl", **how).report().manifest
        server.put("b", "a.jsonl", b'{"prompt": "q", "response": "new"}\n')
        time = manifest.stat().st_mtime + 3600 * hours
        os.utime(manifest, (time, time))
        assert gt.stream_gcs("gs://b/a.jsonl", **how)[0].turns[-1].text == "old"
        assert gt.stream_gcs("gs://b/a.jsonl", refresh=True, **how)[0].turns[-1].text == "new"


def test_what_another_process_wrote_while_this_one_waited_is_not_written_again(
    folder, monkeypatch
):
    lock, written = spool._locked, []

    def wait_while_another_writes(*arguments):
        if not written:
            written.append(True)
            read(folder)
        return lock(*arguments)

    monkeypatch.setattr(spool, "_locked", wait_while_another_writes)
    writes = []
    write = spool._write
    monkeypatch.setattr(spool, "_write", lambda *all_: writes.append(write(*all_)))
    assert read(folder) == "old"
    assert len(writes) == 1


def test_what_killed_writers_left_goes_and_what_is_being_written_stays(folder):
    manifests = folder / "cache" / "manifests"
    read(folder)
    killed = [manifests / f".{name * 32}.arrow.tmp" for name in "ab"]
    busy = manifests / f".{'c' * 32}.arrow.tmp"
    for path in (*killed, busy):
        path.write_text("half a manifest")
    with suppress(ValueError), spool._locked(folder / "cache", "c" * 32):
        (folder / "a.jsonl").write_text('{"prompt": "q", "response": "newer"}\n')
        assert read(folder) == "newer"
        assert not any(path.exists() for path in killed)
        assert busy.exists()
        raise ValueError("a failing writer gives its lock back")
    (folder / "a.jsonl").write_text('{"prompt": "q", "response": "newest"}\n')
    assert read(folder) == "newest"
    assert not busy.exists()


def test_a_manifest_is_never_there_without_its_rows_in_quarantine(folder, monkeypatch):
    def open_rows(*answers, **options):
        rows = "".join(f'{{"prompt": "q", "response": "{answer}"}}\n' for answer in answers)
        (folder / "a.jsonl").write_text(rows)
        os.utime(folder / "a.jsonl", (1, 1))  # so that it is taken for the same file
        options |= {"cache_dir": folder / "cache", "max_bad_fraction": 0.5}
        return gt.stream_local(folder / "a.jsonl", **options)

    def write_and_die(*arguments, **keywords):
        write(*arguments, **keywords)
        raise KeyboardInterrupt

    write = spool.write_manifest
    for answers, bad in ((("x", "", "y"), ["a.jsonl:2"]), (("", "x", "y"), ["a.jsonl:1"])):
        monkeypatch.setattr(spool, "write_manifest", write_and_die)
        with pytest.raises(KeyboardInterrupt):
            open_rows(*answers, refresh=True)
        monkeypatch.setattr(spool, "write_manifest", write)
        assert [one.key for one in open_rows(*answers).inspect_quarantine()] == bad
    open_rows("", "x", "y", refresh=True)
    assert len(list((folder / "cache" / "quarantine").iterdir())) == 1
