"""A run that was stopped anywhere and resumed elsewhere is the run that never stopped."""

import multiprocessing

import pytest

from tests.runs import read_trace, run

STEPS = 5


@pytest.fixture(scope="module")
def processes():
    """New processes that have imported torch already: each begins with no state of ours."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.runs"])
    return context


def run_in_new_process(processes, folder, **options):
    process = processes.Process(target=run, args=(folder,), kwargs=options)
    process.start()
    process.join()
    assert process.exitcode == 0


@pytest.fixture(scope="module", params=["text", "image"])
def uninterrupted(request, processes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    options = {"modality": request.param, "dropout": 0.1, "eval_every_steps": 2}
    run_in_new_process(processes, folder, **options)
    return folder, options


@pytest.mark.parametrize("stop_after", range(1, STEPS))
def test_stop_anywhere_and_resume(processes, uninterrupted, tmp_path, stop_after):
    whole, options = uninterrupted
    run_in_new_process(processes, tmp_path, stop_after=stop_after, **options)
    assert read_trace(tmp_path)[-1]["step"] == stop_after
    run_in_new_process(processes, tmp_path, resume=True, **options)
    assert read_trace(tmp_path) == read_trace(whole)
    assert read_trace(tmp_path, "eval") == read_trace(whole, "eval")
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()
