"""The pool of daemon threads: work done once, in order, never holding the interpreter."""

import gc
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import CancelledError, wait

import pytest

from gemma_tuner import threads
from gemma_tuner.threads import DaemonPool


def wait_until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.005)


def count_threads(name):
    return sum(thread.name == name for thread in threading.enumerate())


def test_results_and_errors_come_back():
    pool = DaemonPool("results", 4)
    results = [pool.submit(pow, number, 2) for number in range(100)]
    assert [result.result(10) for result in results] == [number**2 for number in range(100)]
    with pytest.raises(ZeroDivisionError):
        pool.submit(lambda: 1 // 0).result(10)
    assert pool.submit(pow, 2, 3).result(10) == 8  # The thread has survived.
    pool.close()


def test_work_of_many_threads_is_done_exactly_once():
    pool, done, lock = DaemonPool("many", 8), [], threading.Lock()

    def work(number):
        with lock:
            done.append(number)

    def submit(first):
        wait([pool.submit(work, first + number) for number in range(200)])

    submitters = [threading.Thread(target=submit, args=(1000 * one,)) for one in range(8)]
    for submitter in submitters:
        submitter.start()
    for submitter in submitters:
        submitter.join(30)
    assert sorted(done) == [1000 * one + number for one in range(8) for number in range(200)]
    pool.close()


def test_no_more_threads_run_than_are_allowed_and_none_before_they_are_needed():
    pool, running, lock = DaemonPool("bounded", 3), [0, 0], threading.Lock()
    assert count_threads("bounded") == 0
    for _ in range(5):  # One after the other needs one thread.
        pool.submit(int).result(10)
        wait_until(lambda: pool._num_idle == 1)
    assert count_threads("bounded") == 1

    def work():
        with lock:
            running[0] += 1
            running[1] = max(running)
        time.sleep(0.02)
        with lock:
            running[0] -= 1

    wait([pool.submit(work) for _ in range(12)])
    assert running[1] == 3
    pool.close()
    wait_until(lambda: count_threads("bounded") == 0)


def test_close_cancels_what_waits_and_leaves_what_runs():
    pool, release = DaemonPool("closed", 1), threading.Event()
    runs = pool.submit(release.wait, 10)
    waits = [pool.submit(int) for _ in range(3)]
    wait_until(runs.running)
    pool.close()
    assert all(one.cancelled() for one in waits)
    with pytest.raises(CancelledError):
        waits[0].result(1)
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit(int)
    release.set()
    assert runs.result(10) is True
    pool.close()
    wait_until(lambda: count_threads("closed") == 0)


def test_cancelled_work_is_not_done():
    pool, release, done = DaemonPool("cancelled", 1), threading.Event(), []
    first = pool.submit(release.wait, 10)
    second, third = pool.submit(done.append, 2), pool.submit(done.append, 3)
    assert second.cancel()
    release.set()
    wait([first, third])
    assert done == [3]
    pool.close()


def test_idle_threads_end_and_come_back(monkeypatch):
    monkeypatch.setattr(threads, "_IDLE_SECONDS", 0.05)
    pool = DaemonPool("idle", 2)
    pool.submit(int).result(10)
    wait_until(lambda: count_threads("idle") == 0)
    assert pool.submit(pow, 3, 2).result(10) == 9
    pool.close()


def test_the_pool_keeps_no_result():
    class Large:
        pass

    pool = DaemonPool("memory", 1)
    future = pool.submit(Large)
    kept = weakref.ref(future.result(10))
    del future
    wait_until(lambda: gc.collect() >= 0 and kept() is None)
    pool.close()


def test_a_stalled_thread_does_not_hold_the_interpreter():
    script = (
        "import time; from gemma_tuner.threads import DaemonPool; "
        "future = DaemonPool('stalled', 2).submit(time.sleep, 600); time.sleep(0.1); "
        "print('running' if future.running() else 'not running')"
    )
    began = time.monotonic()
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert run.stdout == "running\n"
    assert time.monotonic() - began < 30
