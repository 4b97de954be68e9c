import json

import pytest
import torch

from gemma_tuner.errors import MemoryPlanError
from gemma_tuner.training.memory import MicroBatchSize, retry_once
from gemma_tuner.training.trainer import Trainer
from tests.runs import build_trainer

CPU = torch.device("cpu")


class SmallDeviceTrainer(Trainer):
    """On a device that holds so many examples: others raise what a Mac raises, half way."""

    holds = 4

    def _accumulate(self, target_tokens, batches):
        largest = max((len(batch) for batch in batches), default=0)
        if largest > self.holds:
            super()._accumulate(target_tokens, batches[:1])  # its gradient must not count
            raise RuntimeError("MPS backend out of memory (MPS allocated: 9.00 GiB, ...)")
        return super()._accumulate(target_tokens, batches)


def fit(folder, monkeypatch, holds, **settings):
    trainer = build_trainer(folder, **{"batch_size": 4, "gradient_accumulation": 1, **settings})
    trainer.__class__ = type("Small", (SmallDeviceTrainer,), {"holds": holds})
    trainer.fit()
    events = [
        record["step"]
        for record in map(json.loads, (folder / "run" / "log.jsonl").read_text().splitlines())
        if record["kind"] == "event" and record["name"] == "out_of_memory"
    ]
    return trainer, events


def gradient_like(trainer):
    return [state["exp_avg"] for state in trainer.optimizer.state.values()]


@pytest.mark.parametrize(("holds", "size", "halvings"), [(4, 4, 0), (3, 2, 1), (1, 1, 2)])
def test_a_micro_batch_that_does_not_fit_is_halved_and_the_step_is_the_same(
    tmp_path, monkeypatch, holds, size, halvings
):
    settings = {"max_steps": 1, "modality": "image"}
    whole, _ = fit(tmp_path / "whole", monkeypatch, 4, **settings)
    cut, events = fit(tmp_path / "cut", monkeypatch, holds, **settings)
    assert cut.micro_batch_size.value == size
    assert cut.counts["out_of_memory"] == halvings
    assert events == [1] * halvings
    for a, b in zip(gradient_like(whole), gradient_like(cut), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-7)


def test_a_run_remembers_what_fits(tmp_path, monkeypatch):
    cut, events = fit(tmp_path, monkeypatch, 2, max_steps=3)
    assert events == [1]
    assert (cut.micro_batch_size.value, cut.micro_batch_size.num_halvings) == (2, 1)
    assert cut.counts["out_of_memory"] == 1


def test_one_example_that_does_not_fit_ends_the_run_with_what_helps(tmp_path, monkeypatch):
    with pytest.raises(MemoryPlanError, match=r"one example does not fit.*tokens.*max_tokens"):
        fit(tmp_path, monkeypatch, 0)


def test_other_errors_are_not_taken_for_want_of_memory():
    def fail(*arguments):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        retry_once(fail, device=CPU)


def test_the_second_want_of_memory_is_raised():
    calls = []

    def fail(value):
        calls.append(value)
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        retry_once(fail, 7, device=CPU)
    assert calls == [7, 7]


def test_nothing_is_cut_where_everything_fits():
    size = MicroBatchSize(4, CPU, collate=lambda examples: pytest.fail("collated again"))
    assert size.take_messages() == []
    assert size.value == 4
