"""What is kept for later runs is listed, and removed where nobody used it."""

import os
import time

import pytest
from typer.testing import CliRunner

from gemma_tuner.cli.main import app
from gemma_tuner.streaming.opening import stream_local

OLD = time.time() - 40 * 24 * 60 * 60


@pytest.fixture
def cache(tmp_path):
    folder = tmp_path / "cache"
    for name in ("old", "new"):
        (tmp_path / f"{name}.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
        stream_local(tmp_path / f"{name}.jsonl", cache_dir=folder)
        for path in folder.rglob("*"):
            if name == "old" and path.is_file():
                os.utime(path, (OLD, OLD))
    packed = folder / "packed" / "gemma-symmetric-4-32-0"
    packed.mkdir(parents=True)
    (packed / "model.safetensors").write_bytes(bytes(1000))
    for path in (packed / "model.safetensors", packed):
        os.utime(path, (OLD, OLD))
    return folder


def run(*arguments):
    result = CliRunner().invoke(app, ["cache", *map(str, arguments)])
    assert result.exit_code == 0, result.stderr
    return result.stdout


def test_what_is_kept_is_listed(cache):
    said = run("list", "--cache-dir", cache)
    assert "manifests" in said
    assert "1 kB" in said
    assert "40 days ago" in said


def test_what_was_not_used_is_removed(cache, tmp_path):
    assert "removed: 3 entries" in run("prune", "--cache-dir", cache)
    assert len(list((cache / "manifests").iterdir())) == 1
    assert len(list((cache / "locks").iterdir())) == 1
    assert not list((cache / "packed").iterdir())
    assert len(stream_local(tmp_path / "old.jsonl", cache_dir=cache)) == 1


def test_what_is_used_stays(cache, tmp_path):
    stream_local(tmp_path / "old.jsonl", cache_dir=cache)
    assert "removed: 1 entries" in run("prune", "--cache-dir", cache)
    assert len(list((cache / "manifests").iterdir())) == 2


def test_a_manifest_keeps_its_quarantine(tmp_path):
    rows = '{"prompt": "a", "response": ""}\n{"prompt": "a", "response": "b"}\n'
    (tmp_path / "rows.jsonl").write_text(rows)
    stream = stream_local(tmp_path / "rows.jsonl", cache_dir=tmp_path, max_bad_fraction=0.5)
    (path,) = (tmp_path / "quarantine").iterdir()
    os.utime(path, (OLD, OLD))
    run("prune", "--cache-dir", tmp_path)
    assert len(stream.inspect_quarantine()) == 1
    os.utime(path, (OLD, OLD))
    (tmp_path / "manifests" / f"{path.stem.partition('-')[0]}.arrow").unlink()
    run("prune", "--cache-dir", tmp_path)
    assert not path.exists()


def test_one_kind_alone_is_removed(cache):
    assert "removed: 1 entries, 1 kB" in run("prune", "--cache-dir", cache, "--kind", "packed")


def test_an_empty_cache_is_said_to_be(tmp_path):
    assert "nothing is kept" in run("list", "--cache-dir", tmp_path)
