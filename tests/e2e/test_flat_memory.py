"""A long run over examples of many lengths holds as much at its end as at its beginning."""

import pytest

from gemma_tuner.device import memory_private_bytes
from gemma_tuner.training.reporting.monitor import MANY_SHAPES
from tests.long_runs import STEPS, count_open, count_tensor_bytes, run_long
from tests.mps.test_conformance import run_part


def check_flat(held, shapes_by_step):
    """No step after the 50th holds more, and new shapes get rare: there are only so many."""
    steps = len(held)
    assert len(shapes_by_step) == steps >= 160
    assert max(held[steps // 2 :]) <= 1.02 * max(held[49 : steps // 2])
    first, *_, before_last, last = shapes_by_step[steps // 4 - 1 :: steps // 4]
    assert last - before_last <= first / 2
    assert last < MANY_SHAPES


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_long_run_on_the_cpu_is_flat(tmp_path):
    """Tensors are counted now and then, as that takes longer than a step; batches read ahead are
    among them."""
    private = {}
    opened = []

    def hold(step):
        if step % 50 == 0:
            held.append(count_tensor_bytes())
            private[step] = memory_private_bytes()
            opened.append(count_open())
        return held[-1]

    held = [0]
    trainer = run_long(tmp_path, hold)
    assert max(trainer.held[49:]) <= 1.03 * min(trainer.held[49:])
    assert private[STEPS] <= 1.1 * private[100]
    assert max(opened[1:]) <= opened[1]  # files and threads


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_long_run_on_a_pretend_mps_device_is_flat(request, tmp_path):
    """There every byte is counted after every step."""
    result = run_part("long", tmp_path, request.config.cache.mkdir("pretend_mps"))
    check_flat(result["held"], result["shapes_by_step"])
