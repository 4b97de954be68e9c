"""A run that was stopped anywhere and resumed elsewhere is the run that never stopped."""

import multiprocessing
import signal
from functools import cache

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
def run_whole(processes, tmp_path_factory):
    """Trains without a stop, once a modality; gives the folder and the options."""

    @cache
    def run_whole(modality):
        folder = tmp_path_factory.mktemp("whole")
        options = {"modality": modality, "dropout": 0.1, "eval_every_steps": 2}
        run_in_new_process(processes, folder, **options)
        return folder, options

    return run_whole


def assert_same_run(folder, other):
    assert read_trace(folder) == read_trace(other)
    assert read_trace(folder, "eval") == read_trace(other, "eval")
    name = "adapter/adapter_model.safetensors"
    assert (folder / name).read_bytes() == (other / name).read_bytes()


@pytest.mark.parametrize(
    ("modality", "stops"),
    [
        ("text", [1, 2, 3, 4]),
        ("image", [2]),  # in the middle of the first epoch
        *(
            pytest.param(modality, [stop], marks=pytest.mark.slow)
            for modality in ("text", "image")
            for stop in range(1, STEPS)
        ),
    ],
)
def test_stop_anywhere_and_resume(processes, run_whole, tmp_path, modality, stops):
    whole, options = run_whole(modality)
    for stop in stops:
        resume = stop > stops[0]
        run_in_new_process(processes, tmp_path, stop_after=stop, resume=resume, **options)
        assert read_trace(tmp_path)[-1]["step"] == stop
    run_in_new_process(processes, tmp_path, resume=True, **options)
    assert_same_run(tmp_path, whole)


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
    assert_same_run(killed, tmp_path / "whole")
