"""A long run over examples of many lengths holds as much at its end as at its beginning."""

import gc

import pytest
import torch

from gemma_tuner.device import memory_private_bytes
from gemma_tuner.training.reporting.monitor import MANY_SHAPES
from tests.long_runs import STEPS, run_long
from tests.mps.test_conformance import run_part


def count_tensor_bytes():
    """Bytes of all tensors that Python knows, each memory counted once."""
    gc.collect()
    held = {}
    for left in gc.get_objects():
        if issubclass(type(left), torch.Tensor):  # isinstance would wake lazy objects
            storage = left.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
    return sum(held.values())


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

    def hold(step):
        if step % 50 == 0:
            held.append(count_tensor_bytes())
            private[step] = memory_private_bytes()
        return held[-1]

    held = [0]
    trainer = run_long(tmp_path, hold)
    assert max(trainer.held[49:]) <= 1.03 * min(trainer.held[49:])
    assert private[STEPS] <= 1.1 * private[100]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_long_run_on_a_pretend_mps_device_is_flat(request, tmp_path):
    """There every byte is counted after every step."""
    result = run_part("long", tmp_path, request.config.cache.mkdir("pretend_mps"))
    check_flat(result["held"], result["shapes_by_step"])
