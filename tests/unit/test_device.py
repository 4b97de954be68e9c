import mmap
import os
from functools import partial

import psutil
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from gemma_tuner import device
from gemma_tuner.errors import ConfigError

CPU = torch.device("cpu")


def test_without_an_accelerator_the_cpu_is_chosen_and_told():
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        pytest.skip("this machine has an accelerator")
    assert device.choose_device() == (CPU, "no Metal or CUDA GPU is there")
    for name in ("cuda", "mps"):
        with pytest.raises(ConfigError, match=f"'{name}' is not available here.*device='cpu'"):
            device.choose_device(name)


def test_the_users_choice_stands():
    assert device.choose_device("cpu") == (CPU, "as asked")
    assert device.choose_device(CPU) == (CPU, "as asked")


@pytest.mark.parametrize("name", ["gpu", "xpu", "meta", ""])
def test_other_devices_are_refused(name):
    with pytest.raises(ConfigError, match="may be one of mps, cuda, cpu"):
        device.choose_device(name)


@pytest.mark.parametrize("version", ["2.13.0", "2.9.1+cpu", "1.13.1"])
def test_torch_that_is_wrong_on_mps_is_refused_with_the_reason(monkeypatch, version):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch, "__version__", version)
    for choice in (None, "mps"):
        with pytest.raises(ConfigError, match=r"silently computes wrong results on MPS.*2\.14"):
            device.choose_device(choice)


def test_a_device_that_is_there_but_refuses_work_is_refused(monkeypatch):
    """Virtual Macs say that MPS is available; here it is a machine without Metal that says so."""
    if torch.backends.mps.is_built():
        pytest.skip("this torch has Metal")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(ConfigError, match="refuses a small matmul"):
        device.choose_device()


@pytest.mark.parametrize("dtype", ["float16", torch.float16, "half"])
def test_float16_is_refused_with_the_reason(dtype):
    with pytest.raises(ConfigError, match=r"'bfloat16' or 'float32' \(float16 overflows"):
        device.choose_dtype(CPU, dtype)


def test_other_dtypes_are_refused():
    with pytest.raises(ConfigError, match=r"dtype is 'int8'; it may be 'bfloat16' or 'float32'$"):
        device.choose_dtype(CPU, torch.int8)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_a_dtype_by_name_or_by_itself(dtype):
    assert device.choose_dtype(CPU, dtype) == (torch.bfloat16, "as asked")


def test_dtype_without_a_choice():
    mps = torch.device("mps")
    assert device.choose_dtype(mps, None, torch.bfloat16)[0] == torch.bfloat16
    assert device.choose_dtype(mps, None, None)[0] == torch.bfloat16
    for chosen in (mps, CPU):
        assert device.choose_dtype(chosen, None, torch.float32) == (
            torch.float32,
            "the checkpoint is float32",
        )
    dtype, reason = device.choose_dtype(CPU, None, "bfloat16")
    assert dtype == torch.float32
    assert "CPU" in reason


def test_memory_of_this_process():
    before = device.memory_used_bytes(CPU)
    # More than the allocator may have kept from earlier tests.
    held = torch.ones(160 * 2**20, dtype=torch.uint8)
    assert device.memory_used_bytes(CPU) - before > 32 * 2**20
    assert device.memory_total_bytes(CPU) == psutil.virtual_memory().total
    del held
    device.synchronize(CPU)
    device.empty_cache(CPU)


def test_random_generators_resume_what_they_drew():
    generators = device.random_generators(CPU)
    assert list(generators) == ["cpu"]
    state = generators["cpu"].get_state()
    drawn = torch.rand(5)
    generators["cpu"].set_state(state)
    assert torch.equal(torch.rand(5), drawn)


@pytest.mark.parametrize(("set_by_user", "expected"), [(None, "0"), ("1", "1")])
def test_fallback_is_off_unless_the_user_says_otherwise(monkeypatch, set_by_user, expected):
    monkeypatch.delenv("PYTORCH_ENABLE_MPS_FALLBACK", raising=False)
    if set_by_user is not None:
        monkeypatch.setenv("PYTORCH_ENABLE_MPS_FALLBACK", set_by_user)
    device.prepare_environment()
    assert os.environ["PYTORCH_ENABLE_MPS_FALLBACK"] == expected


@pytest.mark.parametrize(
    ("high", "low", "expected"),
    [
        (None, None, ("1.0", "0.9")),
        ("0.8", None, ("0.8", "0.72")),
        ("1.5", "1.2", ("1.5", "1.2")),
        (None, "0.7", ("1.0", "0.7")),
        ("0.0", None, ("0.0", None)),  # no limit: torch's own low mark is below it
        ("much", None, ("much", None)),
    ],
)
def test_memory_runs_out_before_the_machine_swaps(monkeypatch, high, low, expected):
    names = ("PYTORCH_MPS_HIGH_WATERMARK_RATIO", "PYTORCH_MPS_LOW_WATERMARK_RATIO")
    for name, value in zip(names, (high, low), strict=True):
        monkeypatch.setenv(name, "to be restored")
        monkeypatch.delenv(name)
        if value is not None:
            monkeypatch.setenv(name, value)
    device.prepare_environment()
    assert tuple(os.environ.get(name) for name in names) == expected


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9.00 GiB, ..."), True),
        (RuntimeError("Invalid buffer size: 12.00 GiB"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (MemoryError(), False),
        (ValueError("MPS backend out of memory"), False),
    ],
)
def test_errors_that_say_that_memory_ran_out(error, expected):
    assert device.is_out_of_memory(error) is expected


def fix_memory(monkeypatch, available, total):
    found = psutil.virtual_memory()._replace(available=available, total=total)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: found)
    monkeypatch.setattr(device, "_CONTROL_GROUPS", ())


def test_mapped_files_are_counted_once(tmp_path, monkeypatch):
    """Weights that are mapped are pages of files, which the system counts as available."""
    fix_memory(monkeypatch, 10 * 2**30, 64 * 2**30)
    path = tmp_path / "weights"
    path.write_bytes(bytes(200 * 2**20))
    before, held = device.memory_budget_bytes(CPU)[0], device.memory_used_bytes(CPU)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert sum(mapped[:: mmap.PAGESIZE]) == 0
        assert device.memory_used_bytes(CPU) > held + 150 * 2**20
        assert device.memory_budget_bytes(CPU)[0] < before + 20 * 2**20
    kept = torch.ones(100 * 2**20, dtype=torch.uint8)
    assert device.memory_budget_bytes(CPU)[0] > before + 0.9 * kept.nbytes  # held already


def test_no_more_is_promised_than_there_is(monkeypatch):
    total = psutil.virtual_memory().total
    fix_memory(monkeypatch, total, total)  # nothing is held by others, and this process by itself
    assert device.memory_budget_bytes(CPU) == (total, "free in RAM")


@pytest.mark.parametrize("prefix", ["", "total_"])
def test_a_container_leaves_what_others_in_it_do_not_hold(tmp_path, monkeypatch, prefix):
    fix_memory(monkeypatch, 40 * 2**30, 64 * 2**30)
    limit, used = tmp_path / "memory.max", tmp_path / "memory.current"
    limit.write_text(f"{20 * 2**30}\n")
    used.write_text(f"{12 * 2**30}\n")  # 5 GiB of it files, which give way
    files = {"active_file": 2**30, "inactive_file": 4 * 2**30}
    lines = [f"{prefix}{name} {num_bytes}" for name, num_bytes in files.items()]
    (tmp_path / "memory.stat").write_text("\n".join(["anon 7", *lines]))
    monkeypatch.setattr(device, "_CONTROL_GROUPS", ((str(limit), str(used), prefix),))
    budget, source = device.memory_budget_bytes(CPU)
    assert budget == pytest.approx(13 * 2**30 + device.memory_private_bytes(), abs=2**24)
    assert "container" in source
    limit.write_text("max\n")
    assert device.memory_budget_bytes(CPU)[1] == "free in RAM"


def test_cuda_is_chosen_and_measured():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU here")
    chosen, reason = device.choose_device()
    assert chosen.type == "cuda"
    assert "CUDA GPU" in reason
    before = device.memory_used_bytes(chosen)
    held = torch.ones(2**20, device=chosen)
    assert device.memory_used_bytes(chosen) - before >= held.numel() * 4
    generators = device.random_generators(chosen)
    state = generators["cuda"].get_state()
    drawn = torch.rand(5, device=chosen)
    generators["cuda"].set_state(state)
    assert torch.equal(torch.rand(5, device=chosen), drawn)


def test_each_process_of_a_launch_has_a_gpu_of_its_own(monkeypatch):
    assert device.parse_device("cuda") == torch.device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert device.parse_device("cuda") == torch.device("cuda:1")
    assert device.parse_device("cuda:0") == torch.device("cuda:0")
    assert device.parse_device("mps") == torch.device("mps")


def test_the_environment_is_prepared_before_a_device_is_tried(monkeypatch):
    monkeypatch.setenv("PYTORCH_MPS_HIGH_WATERMARK_RATIO", "to be restored")
    monkeypatch.delenv("PYTORCH_MPS_HIGH_WATERMARK_RATIO")
    device.choose_device("cpu")
    assert os.environ["PYTORCH_MPS_HIGH_WATERMARK_RATIO"] == "1.0"


@pytest.mark.parametrize("is_replayed", [True, False])
def test_a_recomputation_draws_what_the_forward_pass_drew(is_replayed):
    """With a generator that torch's checkpointing does not know of, as that of MPS."""
    generator = torch.Generator().manual_seed(0)

    def drop(x):
        kept = torch.bernoulli(torch.full_like(x, 0.5), generator=generator)
        return (x * x) * kept

    def differentiate(function):
        generator.manual_seed(0)
        x = torch.ones(64, requires_grad=True)
        output = function(x)
        torch.rand(5, generator=generator)  # another layer draws
        after = generator.get_state()
        output.sum().backward()
        return output.detach(), x.grad, torch.equal(generator.get_state(), after)

    options = {"context_fn": partial(device.replayed, generator)} if is_replayed else {}
    output, gradient, is_as_before = differentiate(
        lambda x: checkpoint(drop, x, use_reentrant=False, **options)
    )
    expected_output, expected_gradient, _ = differentiate(drop)
    assert torch.equal(output, expected_output)
    assert torch.equal(gradient, expected_gradient) == is_replayed
    assert is_as_before == is_replayed
