"""The real loop on a pretend MPS device: operators and dtypes, and nothing of what Metal computes.

Each part runs in a process of its own (conformance_runs.py), as a process cannot give the pretend
device back; the tests read what it wrote down.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gemma_tuner.testing.mps.pretend_device import supported_operators, why_not_pretend
from tests.mps.conformance_runs import CASES, PACKED

ROOT = Path(__file__).resolve().parents[2]

# Waits of the host in one optimizer step of one micro-batch. All of them are in transformers: how
# many tokens each expert gets (26B-A4B: twice a layer, and again in backward), which patches are
# no padding and how many of each picture, and in Gemma 3n how many positions hold media.
SYNCS = {
    ("gemma4-26b-a4b", "text"): 36,
    ("gemma4-12b", "image"): 2,
    ("gemma4-26b-a4b", "image"): 38,
    ("gemma4-e2b", "image"): 2,
    ("gemma4-e2b packed", "image"): 2,
    ("gemma4-31b", "image"): 2,
    ("gemma3n", "image"): 3,
    ("gemma3n", "audio"): 3,
}

# Floats of two dtypes in one elementwise operator, in bfloat16 runs. Everywhere: PEFT adds its
# float32 adapter to a bfloat16 layer, torch's attention adds a bfloat16 mask to float32 scores.
# Experts: transformers weighs bfloat16 outputs with float32 routes. Audio of E2B: transformers
# soft-caps float32 scores by a bfloat16 buffer, and scales by another.
MIXES = {"add BFloat16+Float"}
MORE_MIXES = {
    ("gemma4-26b-a4b", "text"): {"mul BFloat16+Float"},
    ("gemma4-26b-a4b", "image"): {"mul BFloat16+Float"},
    ("gemma4-e2b", "audio"): {
        "div BFloat16[]+Float",
        "mul BFloat16[]+Float",
        "mul BFloat16+Float",
    },
}


# The device comes before everything that could ask torch for MPS, as many imports do.
BEGIN = """
import sys
from gemma_tuner.testing.mps.pretend_device import pretend_mps
pretend_mps(sys.argv[2])
from tests.mps.conformance_runs import main
main()
"""


def run_part(part: str, folder: Path, cache: Path) -> dict:
    if reason := why_not_pretend():
        pytest.skip(f"MPS CONFORMANCE NOT TESTED: {reason}")
    path = folder / "results.json"
    done = subprocess.run(
        [sys.executable, "-c", BEGIN, str(path), str(cache), part],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def fast(request, tmp_path_factory):
    cache = request.config.cache.mkdir("pretend_mps")
    return run_part("fast", tmp_path_factory.mktemp("fast"), cache)


@pytest.fixture(scope="module")
def slow(request, tmp_path_factory):
    cache = request.config.cache.mkdir("pretend_mps")
    return run_part("slow", tmp_path_factory.mktemp("slow"), cache)


@pytest.fixture(scope="module")
def everywhere(request, tmp_path_factory):
    cache = request.config.cache.mkdir("pretend_mps")
    return run_part("everywhere", tmp_path_factory.mktemp("everywhere"), cache)


def check_case(case, result):
    family, modality, dtype = case
    assert "error" not in result, result["error"]
    assert result["unsupported"] == []
    assert set(result["operators"]) - {"copy_", "linear_backward"} - OVERRIDEABLE <= SUPPORTED
    assert result["most_elements"] < 2**31
    assert result["largest_bytes"] < 2**32
    assert result["longest_reduction"] <= 32_000
    assert "Double" not in result["dtypes"]
    assert result["not_contiguous"] == []

    ours = [sync for sync in result["syncs"] if "transformers" not in sync[1]]
    backward = [sync for sync in ours if sync[1] == "backward pass"]
    experts = 12 if family == "gemma4-26b-a4b" else 0
    assert [sync for sync in ours if sync not in backward and "/modeling_" not in sync[1]] == []
    assert sum(sync[2] for sync in backward) <= experts
    most = SYNCS.get((family, modality), 0)
    assert sum(sync[2] for sync in result["syncs"]) <= most

    if dtype == "float32":
        assert result["mixed_dtypes"] == []
        assert result["first_step"] == pytest.approx(result["first_step_on_cpu"], rel=1e-4)
    else:
        known = MIXES | MORE_MIXES.get((family, modality), set())
        assert set(result["mixed_dtypes"]) <= known


SUPPORTED = supported_operators()
OVERRIDEABLE = {"_mps_convolution", "mps_convolution_backward", "scaled_dot_product_attention"}


@pytest.mark.parametrize("case", CASES["fast"], ids="-".join)
def test_the_loop_uses_only_what_mps_has(fast, case):
    check_case(case, fast[" ".join(case)])


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES["slow"], ids="-".join)
def test_the_loop_uses_only_what_mps_has_in_every_case(slow, case):
    check_case(case, slow[" ".join(case)])


@pytest.mark.parametrize("grid", PACKED, ids=str)
def test_weights_of_few_bits_are_unpacked_there_without_a_wait(fast, grid):
    """By torch's operators, and by the shader, whose file is compiled as C++."""
    ways = fast[f"packed {grid}"]
    for result in ways.values():
        assert result["unsupported"] == []
        assert set(result["operators"]) - {"copy_", "linear_backward"} - OVERRIDEABLE <= SUPPORTED
        assert result["syncs"] == []
        assert result["held"][1] == result["held"][2]
    assert ways["shader"]["losses"] == ways["torch"]["losses"]
    shifts = {name for name in ways["torch"]["operators"] if "shift" in name}
    assert bool(shifts) == (grid.bits == 4)
    assert not shifts & set(ways["shader"]["operators"]), "the shader was not used"


def test_a_full_vocabulary_is_reduced_in_blocks(fast):
    result = fast["vocabulary"]
    assert result["longest_reduction"] == 32_000
    assert result["most_elements"] == 16 * 262_144
    assert result["num_syncs"] == 0


def test_examples_of_many_lengths_make_few_graphs(fast):
    result = fast["lengths"]
    new = result["new_graphs_by_step"]
    assert result["steps"] == len(new) == 40
    assert sum(new[20:]) == 0, "the second epoch has no shape that the first had not"
    assert sum(count > 0 for count in new) <= 4
    assert result["graphs"] <= 1_500


def test_layers_that_are_computed_twice_drop_the_same_both_times(fast):
    """It draws from a generator of its own, which torch's checkpointing does not replay."""
    once, twice = fast["dropout"]
    assert twice == pytest.approx(once, rel=1e-6)


def check_out_of_memory(result, failed):
    """Where the update ran out, the step is bit for bit the same; where a micro-batch did, it is
    that of a run which took half as many examples from the start."""
    assert result["failed"] >= failed
    assert set(result["halvings"]) == {"0", "1"}, "none is wrong"
    assert result["skipped"] == 0
    assert result["largest_gradient_difference"] < 1e-5
    assert result["messages"][0].startswith(
        "out of memory with 2 examples at a time; going on with 1"
    )


def test_a_step_survives_running_out_of_memory_anywhere(fast):
    check_out_of_memory(fast["out of memory"], failed=20)


@pytest.mark.slow
def test_a_step_survives_running_out_of_memory_at_more_places(slow):
    check_out_of_memory(slow["out of memory"], failed=150)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_step_survives_running_out_of_memory_everywhere(everywhere):
    result = everywhere["step"]
    assert result["failed"] == result["allocations"] >= 600
    check_out_of_memory(result, failed=600)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_an_evaluation_survives_running_out_of_memory(everywhere):
    """Where the first allocation of all fails, nothing is halved: it is tried again."""
    result = everywhere["evaluation"]
    assert result["failed"] >= 30
    assert set(result["outcomes"]) == {"0", "1"}, "nothing is leaked or miscounted"
    assert result["outcomes"]["0"] == 1
    assert result["largest_loss_difference"] < 1e-5


@pytest.mark.slow
def test_plans_fit_their_budgets_and_the_next_would_not(request, tmp_path):
    results = run_part("budgets", tmp_path, request.config.cache.mkdir("pretend_mps"))
    assert list(results) == ["8", "12", "16", "24", "32"]
    for gib, result in results.items():
        assert all(result["chosen fit"]), (gib, result)
        assert not any(result["next fit"]), (gib, result)
    levels = [result["levels"] for result in results.values()]
    assert len({str(each) for each in levels}) >= 4
    assert levels[0][-1][0] == 8  # all layers at the smallest, none at the largest
    assert levels[-1][0][0] == 0


def test_a_run_keeps_to_what_fits_and_says_so(fast):
    result = fast["too small"]
    assert max(result["fewer"]["rows"]) in (1, 2)
    assert result["fewer"]["events"] >= 1
    assert result["fewer"]["counted"] >= result["fewer"]["events"]
    assert result["fewer"]["difference"] < 1e-3  # after two steps at a rate of 1e-2
    assert "one example does not fit" in result["none"]
    assert "max_tokens" in result["none"]


def test_mistakes_that_fail_on_a_mac_fail_here(fast):
    answers = fast["faults"]
    assert len(answers) == 11
    for name, words in {
        "a mask left on the CPU": "RuntimeError: Expected all tensors to be on the same device",
        "labels left on the CPU": "RuntimeError: Expected all tensors to be on the same device",
        "ids left on the CPU": "RuntimeError: Expected all tensors to be on the same device",
        "float64 by a tensor": "TypeError: Cannot convert a MPS Tensor to float64",
        "float64 by numpy": "TypeError: Cannot convert a MPS Tensor to float64",
        "float64 by a cast": "TypeError: Cannot convert a MPS Tensor to float64",
        "complex128": "TypeError: Trying to convert ComplexDouble",
        "float8": "TypeError: Trying to convert Float8_e4m3fn",
        "no kernel": "NotImplementedError: The operator 'aten::fractional_max_pool2d",
        "a turned convolution weight": "RuntimeError: conv2d with a non-contiguous weight",
        "over the budget": "RuntimeError: MPS backend out of memory",
    }.items():
        assert (answers[name] or "").startswith(words), name


def test_the_recorder_sees_what_it_is_there_to_see(fast):
    result = fast["recorder"]
    assert [(reason, count) for reason, _, count in result["syncs"]] == [
        ("_local_scalar_dense", 1),
        ("copy to the CPU", 1),
        ("nonzero", 1),
        ("copy to the CPU", 1),
    ]
    assert all("conformance_runs.py" in where for _, where, _ in result["syncs"])
    assert result["uploads"] == {"blocking": 1}
    assert result["reduction"] == 5
    assert result["mixes"] == ["add BFloat16+Float"]
    assert result["allocations"] >= 5
    assert result["grown_bytes"] >= 3 * 256
    assert result["freed_bytes"] == 256
    assert "MPS backend out of memory" in result["failed"]


def test_the_table_of_kernels_is_that_of_this_torch():
    assert {"mm", "add.out", "_fused_adamw_", "linear", "index.Tensor_out"} <= SUPPORTED
    assert not {"_int_mm", "fractional_max_pool2d", "_linalg_eigvals"} & SUPPORTED
    assert len(SUPPORTED) > 800
