"""How a process finds those that it runs with, and that it never trains without them."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

from gemma_tuner.device import read_launch
from gemma_tuner.errors import ConfigError
from gemma_tuner.training import processes
from gemma_tuner.training.processes import Processes

LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE"),
    "an MPI of Intel": ("PMI_RANK", "PMI_SIZE"),
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    "MVAPICH": ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),
}


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for names in (*LAUNCHERS.values(), ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")):
        for name in names:
            monkeypatch.delenv(name, raising=False)


def test_a_process_started_alone_is_alone_and_adds_nothing_up():
    alone = Processes(torch.device("cpu"))
    assert (alone.index, alone.count, alone.is_main) == (0, 1, True)
    assert alone.sum_counts([3, 4]) == [3, 4]
    alone.wait()


def test_a_number_that_was_left_in_the_environment_keeps_nothing_from_being_written(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    assert Processes(torch.device("cpu")).is_main


@pytest.mark.parametrize("device", ["cpu", "mps", "cuda:0"])
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_one_of_several_that_cannot_find_the_others_never_trains_alone(
    monkeypatch, launcher, device
):
    index, count = LAUNCHERS[launcher]
    monkeypatch.setenv(index, "1")
    monkeypatch.setenv(count, "2")
    assert (read_launch().index, read_launch().count) == (1, 2)
    with pytest.raises(ConfigError, match=r"one of 2 processes, and lacks MASTER_ADDR"):
        Processes(torch.device(device))


def test_one_of_several_whose_others_never_come_says_so(monkeypatch):
    monkeypatch.setattr(processes, "_JOIN_SECONDS", 0.3)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"process 0 of 2 does not find the others.*torchrun"):
        Processes(torch.device("cpu"))


def test_an_interrupt_ends_a_process_that_waits_for_the_others():
    code = (
        "import signal, torch; from gemma_tuner.training.processes import Processes\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "print('joins', flush=True)\n"
        "Processes(torch.device('cpu'))\n"
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    child = subprocess.Popen(
        [sys.executable, "-c", code], env=os.environ | place, stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout.readline() == "joins\n"
        time.sleep(1)
        child.send_signal(signal.SIGINT)
        assert child.wait(timeout=20) == -signal.SIGINT
    finally:
        child.kill()


def test_a_number_of_processes_that_is_none_is_an_error(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ConfigError, match="WORLD_SIZE is 'two'"):
        Processes(torch.device("cpu"))
