"""A run that was stopped anywhere and resumed elsewhere is the run that never stopped."""

import multiprocessing
import signal

import pytest

from tests.runs import read_trace, run, run_in_cloud

STEPS = 5


@pytest.fixture(scope="module")
def processes():
    """New processes that have imported torch already: each begins with no state of ours."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.runs"])
    return context


def run_in_new_process(processes, folder, *, target=run, exit_code=0, **options):
    process = processes.Process(target=target, args=(folder,), kwargs=options)
    process.start()
    process.join()
    assert process.exitcode == exit_code


@pytest.fixture(scope="module")
def uninterrupted(request, processes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    options = {"modality": request.param, "dropout": 0.1, "eval_every_steps": 2}
    run_in_new_process(processes, folder, **options)
    return folder, options


def of_modality(modality, stops, marks=()):
    return [pytest.param(modality, stop, marks=marks) for stop in stops]


@pytest.mark.parametrize(
    ("uninterrupted", "stop_after"),
    [
        *of_modality("text", range(1, STEPS)),
        *of_modality("image", [2]),  # in the middle of the first epoch
        *of_modality("image", [1, 3, 4], marks=pytest.mark.slow),
    ],
    indirect=["uninterrupted"],
)
def test_stop_anywhere_and_resume(processes, uninterrupted, tmp_path, stop_after):
    whole, options = uninterrupted
    run_in_new_process(processes, tmp_path, stop_after=stop_after, **options)
    assert read_trace(tmp_path)[-1]["step"] == stop_after
    run_in_new_process(processes, tmp_path, resume=True, **options)
    assert read_trace(tmp_path) == read_trace(whole)
    assert read_trace(tmp_path, "eval") == read_trace(whole, "eval")
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("modality", ["text", "image", "audio"])
def test_a_run_from_the_cloud_is_killed_twice_and_ends_as_if_it_never_was(
    processes, tmp_path, modality
):
    options = {"target": run_in_cloud, "modality": modality}
    run_in_new_process(processes, tmp_path / "whole", **options)
    killed = tmp_path / "killed"
    for kill_after in (2, 4):
        run_in_new_process(
            processes,
            killed,
            kill_after=kill_after,
            resume=kill_after > 2,
            exit_code=-signal.SIGKILL,
            **options,
        )
    run_in_new_process(processes, killed, resume=True, **options)
    assert read_trace(killed) == read_trace(tmp_path / "whole")
    assert read_trace(killed, "eval") == read_trace(tmp_path / "whole", "eval")
    name = "adapter/adapter_model.safetensors"
    assert (killed / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
