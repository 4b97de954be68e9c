"""A checkpoint is packed once for a number of bits, and found again while it stays as it is."""

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import gemma_tuner as gt
from gemma_tuner.checkpoints.loading import load_model
from gemma_tuner.device import memory_private_bytes
from gemma_tuner.errors import CheckpointError, ConfigError
from gemma_tuner.models.adapter_files import CONFIG
from gemma_tuner.testing import tiny_model
from tests.examples import EVERY_FAMILY

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def save_base(folder, family="gemma4-e2b", seed=0):
    model, processor = tiny_model(family, seed=seed)
    model.to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def list_entries(home):
    return sorted((home / ".cache" / "gemma_tuner" / "packed").glob("[!.]*"))


def load(source, **options):
    return load_model(source, device="cpu", **options)[0]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_what_is_loaded_is_what_pack_writes(family, bits, tmp_path, home, caplog):
    base = save_base(tmp_path / "base", family)
    found = load(base, bits=bits, dtype="bfloat16")
    expected = load(gt.pack(base, tmp_path / "packed", bits=bits), dtype="bfloat16")
    assert found.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
    assert found.config.packed == expected.config.packed
    (entry,) = list_entries(home)
    assert entry.name.startswith(f"base-{'symmetric' if bits == 4 else 'affine'}-{bits}-")
    assert "base: is packed once, and kept in the cache" in caplog.text
    assert str(home) not in caplog.text


def test_a_second_load_does_not_pack_again(tmp_path, home, caplog):
    base = save_base(tmp_path / "base")
    first = load(base, bits=4).state_dict()
    (entry,) = list_entries(home)
    made = (entry / "model.safetensors").stat()
    caplog.clear()
    second = load(base, bits=4).state_dict()
    assert all(torch.equal(second[name], first[name]) for name in first)
    assert list_entries(home) == [entry]
    assert (entry / "model.safetensors").stat().st_ino == made.st_ino
    assert (entry / "config.json").stat().st_mtime_ns > made.st_mtime_ns  # when it was used
    assert "packing" not in caplog.text
    assert "symmetric-4-32" in caplog.text
    load(base, bits=8)
    assert len(list_entries(home)) == 2


@pytest.mark.parametrize("change", ["weights", "template"])
def test_a_source_that_has_changed_is_packed_anew(change, tmp_path, home):
    base = save_base(tmp_path / "base")
    before = load(base, bits=4).state_dict()
    if change == "weights":  # of the same names, shapes and sizes
        save_base(base, seed=1)
    else:
        (base / "chat_template.jinja").write_text(
            (base / "chat_template.jinja").read_text() + "{# other #}"
        )
    model, processor = load_model(base, device="cpu", bits=4)
    after = model.state_dict()
    name = next(name for name in before if name.endswith("q_proj.numbers"))
    assert torch.equal(before[name], after[name]) is (change == "template")
    assert processor.chat_template.endswith("{# other #}") is (change == "template")
    assert len(list_entries(home)) == 2


def test_a_packed_folder_is_taken_as_it_is_and_other_bits_are_refused(tmp_path, home):
    base = save_base(tmp_path / "base")
    packed = gt.pack(base, tmp_path / "packed", bits=4, grid="affine", group=32)
    for bits in (None, 4):
        assert set(load(packed, bits=bits).config.packed.values()) == {"affine-4-32"}
    with pytest.raises(ConfigError, match="bits is 8, and the weights of packed are packed in 4"):
        load(packed, bits=8)
    with pytest.raises(ConfigError, match="bits is 3"):
        load(base, bits=3)
    assert list_entries(home) == []


def test_an_adapter_names_the_checkpoint_and_not_the_cache(tmp_path, home):
    base = save_base(tmp_path / "my-base")
    model = gt.add_lora(load(base, bits=4), gt.LoraConfig(rank=2))
    gt.export_adapter(model, tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert settings["base_model_name_or_path"] == "my-base"
    written = "".join(
        file.read_text()
        for file in (tmp_path / "adapter").iterdir()
        if file.suffix != ".safetensors"
    )
    assert str(home) not in written
    assert "symmetric-4-32-" not in written


def test_a_model_of_the_hub_is_packed_by_its_commit_and_needs_its_files_no_more(
    model_hub, tmp_path, home
):
    model_hub.folder = save_base(tmp_path / "base")
    model = load("files/model", bits=4, revision="release")
    assert model.name_or_path == "files/model"
    assert model.config._commit_hash == "0" * 40
    (entry,) = list_entries(home)
    assert entry.name.startswith("files--model-symmetric-4-32-")
    (model_hub.folder / "model.safetensors").unlink()
    for file in (tmp_path / "cache").rglob("model.safetensors"):
        file.unlink()
    again = load("files/model", bits=4, revision="release")
    assert again.name_or_path == "files/model"
    assert list_entries(home) == [entry]


def measure_peak(load_it):
    """The most private bytes while something is loaded, over those before."""
    before, peak, is_over = memory_private_bytes(), [0], threading.Event()

    def watch():
        while not is_over.wait(0.002):
            peak.append(memory_private_bytes() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    loaded = load_it()
    is_over.set()
    watcher.join()
    return max(peak), loaded


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_loading_peaks_at_what_stays(dtype, tmp_path):
    model, processor = tiny_model("gemma4-31b")
    load(save_base(tmp_path / "small", "gemma4-31b"), bits=4)  # what is made once
    text = model.config.text_config
    text.hidden_size, text.intermediate_size = 1024, 4096
    large = type(model)(model.config).to(torch.bfloat16)
    large.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    dense = sum(parameter.nbytes for parameter in large.parameters())
    del large
    gc.collect()
    packing, _ = measure_peak(lambda: load(tmp_path / "base", bits=4, dtype=dtype))
    gc.collect()
    peak, loaded = measure_peak(lambda: load(tmp_path / "base", bits=4, dtype=dtype))
    held = sum(tensor.nbytes for tensor in (*loaded.parameters(), *loaded.buffers()))
    assert dense > 150e6
    assert held < 0.4 * dense
    assert peak <= held + 8e6
    assert packing <= held + 0.8 * dense  # in blocks of rows, float32 on the way


LOAD = "import gemma_tuner as gt, sys; gt.load_model(sys.argv[1], device='cpu', bits=4)"


def start(base, before=""):
    return subprocess.Popen(
        [sys.executable, "-c", before + LOAD, base],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_two_processes_at_once_pack_once(tmp_path, home):
    base = save_base(tmp_path / "base")
    both = [start(base) for _ in range(2)]
    told = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    assert sum("packing" in text for text in told) == 1
    assert len(list_entries(home)) == 1


@pytest.mark.slow
def test_a_packing_that_is_killed_leaves_nothing(tmp_path, home):
    base = save_base(tmp_path / "base")
    stuck = (
        "import time\n"
        "from gemma_tuner.models.few_bits.grids import Grid\n"
        "pack = Grid.pack\n"
        "Grid.pack = lambda *given: (time.sleep(0.5), pack(*given))[1]\n"
    )
    process = start(base, stuck)
    folder = home / ".cache" / "gemma_tuner" / "packed"
    deadline = time.monotonic() + 60
    while not list(folder.glob(".*.tmp/model.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert list(folder.glob(".*.tmp"))
    assert list_entries(home) == []
    other = save_base(tmp_path / "other", seed=1)
    load(other, bits=4)  # the lock is free, and what was left is gone
    assert [entry.name[:5] for entry in list_entries(home)] == ["other"]
    assert list(folder.glob(".*.tmp")) == []


def test_a_cache_that_cannot_be_written_is_told_with_the_way_out(tmp_path, home):
    base = save_base(tmp_path / "base")
    home.mkdir()
    (home / ".cache").write_text("a file")
    with pytest.raises(CheckpointError, match=r"base cannot be packed in the cache: .*convert"):
        load(base, bits=4)
