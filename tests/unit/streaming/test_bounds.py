"""A stream keeps to its bounds of memory, disk and start-up time: small runs of the benchmark."""

import os
import sys

import numpy as np
import pytest

from benchmarks.streaming import (
    describe_order,
    measure_hedging,
    measure_shuffle,
    measure_throughput,
)
from benchmarks.streaming_bounds import (
    MB,
    MemoryWatch,
    measure_cache,
    measure_memory,
    measure_start,
    run_fresh,
    write_rows,
    write_texts,
)
from gemma_tuner.records import Example
from gemma_tuner.streaming.opening import stream_local
from gemma_tuner.streaming.window import _measure_bytes

needs_proc = pytest.mark.skipif(
    sys.platform != "linux", reason="NOT TESTED: memory is measured by /proc, which is Linux's"
)
SLACK_MB = 40  # of threads, of the allocator, and of what one example takes on its way


@needs_proc
@pytest.mark.parametrize(
    "kind",
    ["sounds", *(pytest.param(k, marks=pytest.mark.slow) for k in ("texts", "Chinese texts"))],
)
def test_a_slow_consumer_holds_no_more_than_the_window(kind):
    # Without the bound all 180 would be read ahead: 90 MB of sounds and texts, 180 of Chinese.
    found = measure_memory(kind, 8 * MB, num_items=180, num_bytes=500_000, num_slow=2)
    assert 0 < found["window_says_mb"] <= 8 + 3
    assert found["extra_anon_mb"] <= 8 + SLACK_MB
    assert found["extra_all_mb"] <= 8 + 2 * SLACK_MB  # with pages of the manifest, batch by batch


def test_wide_characters_count_as_what_they_take():
    for character, num_bytes in (("x", 1), ("\u4e00", 2), ("\U0001f600", 4)):
        document = character * 10_000
        assert _measure_bytes(Example("k", document=document)) >= 10_000 * num_bytes


def test_the_cache_never_passes_its_budget():
    found = measure_cache(200, 20_000)
    assert found["read"] == 400
    assert found["looks"] > 10
    assert 0 < found["peak_bytes"] <= found["budget_bytes"]


def iterate_and_watch(rows, folder):
    stream = stream_local(rows, cache_dir=folder)
    with MemoryWatch() as watch:
        num_read = sum(1 for _ in stream)
    return {"read": num_read, **watch.describe()}


@needs_proc
def test_a_large_manifest_is_never_in_memory(tmp_path):
    write_texts(tmp_path / "rows.jsonl", 8_000, 20_000, "some words of ")
    first = measure_start(tmp_path / "rows.jsonl", tmp_path / "cache")
    (manifest,) = (tmp_path / "cache" / "manifests").iterdir()
    second = measure_start(tmp_path / "rows.jsonl", tmp_path / "cache")
    assert first["rows"] == second["rows"] == 8_000
    assert manifest.stat().st_size > 150 * MB
    assert first["peak_all_mb"] < 220  # of a process that had some 75 before
    assert second["peak_all_mb"] < 120
    found = run_fresh(iterate_and_watch, tmp_path / "rows.jsonl", tmp_path / "cache")
    assert found["read"] == 8_000
    assert found["extra_anon_mb"] < SLACK_MB
    assert found["extra_all_mb"] < 2 * SLACK_MB


@needs_proc
def test_the_second_start_reads_no_rows(tmp_path):
    rows = tmp_path / "rows.jsonl"
    write_rows(rows, 30_000)
    first = measure_start(rows, tmp_path / "cache")
    found = rows.stat()
    rows.write_bytes(b"?" * found.st_size)  # nobody looks: the file's size and time are enough
    os.utime(rows, ns=(found.st_atime_ns, found.st_mtime_ns))
    second = measure_start(rows, tmp_path / "cache")
    assert first["rows"] == second["rows"] == 30_000
    assert not second["imports_torch"]
    assert second["open_seconds"] < first["open_seconds"] / 3
    assert second["process_seconds"] < 10


def test_an_epoch_is_as_well_mixed_as_a_permutation():
    found = {one["order"]: one for one in measure_shuffle(20, 100)}
    ours, by_shard = found["ours"], found['ours, locality="shard"']
    assert abs(ours["rank_correlation"]) < 0.1  # four standard errors
    assert ours["mean_displacement"] == pytest.approx(1 / 3, abs=0.03)
    assert ours["same_file_neighbours"] == pytest.approx(1 / 20, abs=0.02)
    assert by_shard["same_file_neighbours"] == pytest.approx(0.99, abs=0.01)


def test_an_order_that_loses_a_row_is_told():
    with pytest.raises(RuntimeError, match="lost or repeated"):
        describe_order(np.array([0, 1, 1]), 10)


@pytest.mark.slow
def test_many_small_objects_come_side_by_side():
    """Loose bounds: the benchmark shows 12 and 0.8 on a machine that is not busy."""
    found = {one["way"]: one for one in measure_throughput(120, 2, with_others=False)}
    assert found["ours, no cache"]["times_sequential"] >= 6
    assert found["ours, no cache"]["times_bare_pool"] >= 0.5
    assert found["ours, warm cache"]["times_sequential"] >= 6


@pytest.mark.slow
def test_hedges_spare_the_last_percent_a_stall():
    without, with_hedges = measure_hedging(400)
    assert without["p99_seconds"] > 2
    assert with_hedges["p99_seconds"] < without["p99_seconds"] / 2
    assert with_hedges["extra_requests"] <= 0.11
