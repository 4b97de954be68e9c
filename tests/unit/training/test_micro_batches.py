import json

import pytest
import torch

from gemma_tuner.batch import Row, pad_rows
from gemma_tuner.errors import MemoryPlanError
from gemma_tuner.planning.choice import CheckpointingLevel
from gemma_tuner.records import Example
from gemma_tuner.training.feed import StepInput
from gemma_tuner.training.micro_batches import MicroBatches, retry_once
from gemma_tuner.training.step import Stepper
from tests.runs import build_trainer

CPU = torch.device("cpu")


class SmallDeviceStepper(Stepper):
    """On a device that holds so many examples: others raise what a Mac raises, half way."""

    holds = 4
    holds_checkpointed = 4

    def loss_sum(self, batch):
        if not torch.is_grad_enabled():  # held-out examples
            return super().loss_sum(batch)
        layers = self._model.get_base_model().model.language_model.layers
        is_checkpointed = all(layer.gradient_checkpointing for layer in layers)
        self.tried.append((len(batch), is_checkpointed))
        loss = super().loss_sum(batch)
        if len(batch) > (self.holds_checkpointed if is_checkpointed else self.holds):
            loss.backward()  # this gradient must not count
            raise RuntimeError("MPS backend out of memory (MPS allocated: 9.00 GiB, ...)")
        return loss


def fit(folder, holds, holds_checkpointed=None, **settings):
    trainer = build_trainer(folder, **{"batch_size": 4, "gradient_accumulation": 1, **settings})
    attributes = {
        "holds": holds,
        "holds_checkpointed": holds if holds_checkpointed is None else holds_checkpointed,
        "tried": [],
    }
    trainer.stepper.__class__ = type("Small", (SmallDeviceStepper,), attributes)
    trainer.fit()
    events = [
        record["step"]
        for record in map(json.loads, (folder / "run" / "log.jsonl").read_text().splitlines())
        if record["kind"] == "event" and record["name"] == "out_of_memory"
    ]
    return trainer, events


def gradient_like(trainer):
    return [state["exp_avg"] for state in trainer.optimizer.state.values()]


IMAGES = {"max_steps": 1, "modality": "image"}


@pytest.fixture(scope="module")
def whole_gradient(tmp_path_factory):
    """Of a step of four images that fit at once."""
    return gradient_like(fit(tmp_path_factory.mktemp("whole"), 4, **IMAGES)[0])


@pytest.mark.parametrize(
    ("holds", "tried", "retries"),
    [(4, [4], 0), (3, [4, 2, 2], 1), (1, [4, 2, 1, 1, 1, 1], 2)],
)
def test_a_micro_batch_that_does_not_fit_is_halved_and_the_step_is_the_same(
    tmp_path, whole_gradient, holds, tried, retries
):
    cut, events = fit(tmp_path, holds, **IMAGES)
    assert cut.stepper.tried == [(size, False) for size in tried]
    assert cut.counts["out_of_memory"] == retries
    assert events == [1] * retries
    for a, b in zip(whole_gradient, gradient_like(cut), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-7)


def test_a_run_remembers_what_fits(tmp_path):
    cut, events = fit(tmp_path, 2, max_steps=3)
    assert events == [1]
    assert cut.stepper.tried[0] == (4, False)
    # in tokens: longer rows than the first step's are taken one by one
    assert {size for size, _ in cut.stepper.tried[1:]} <= {1, 2}
    assert (2, False) in cut.stepper.tried
    assert cut.stepper.micro_batches.num_retries == cut.counts["out_of_memory"] == 1


def test_one_example_that_does_not_fit_is_computed_twice_from_then_on(tmp_path):
    settings = {"max_steps": 2, "batch_size": 1}
    whole, _ = fit(tmp_path / "whole", 1, **settings)
    cut, events = fit(tmp_path / "cut", 0, 1, **settings)
    assert events[0] == 1
    assert cut.stepper.tried[:2] == [(1, False), (1, True)]
    assert cut.stepper.tried[-1] == (1, True)
    for a, b in zip(gradient_like(whole), gradient_like(cut), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_one_example_that_does_not_fit_at_all_ends_the_run_with_what_helps(
    tmp_path, checkpointing
):
    with pytest.raises(MemoryPlanError, match=r"one example does not fit.*tokens.*max_tokens"):
        fit(tmp_path, 0, gradient_checkpointing=checkpointing)


def step_of(*shapes):
    """A step of micro-batches of (rows, tokens a row, targets a row)."""
    batches, examples = [], []
    for number, (rows, tokens, targets) in enumerate(shapes):
        made = [
            Row(
                f"{number}-{row}",
                torch.ones(tokens, dtype=torch.int64),
                torch.zeros(tokens, dtype=torch.int64),
                torch.arange(tokens) >= tokens - targets,
            )
            for row in range(rows)
        ]
        examples += [Example(row.key, document=str(tokens) + " " + str(targets)) for row in made]
        batches.append(collate_rows(made))
    return StepInput(tuple(batches), tuple(examples), len(examples), 0, {})


def collate_rows(rows):
    longest = max(len(row.input_ids) for row in rows)
    return pad_rows(rows, max_tokens=longest, pad_token_id=0, token_type_name="token_type_ids")


def collate(examples):
    rows = []
    for example in examples:
        tokens, targets = map(int, example.document.split())
        ids = torch.ones(tokens, dtype=torch.int64)
        is_target = torch.arange(tokens) >= tokens - targets
        rows.append(Row(example.key, ids, torch.zeros_like(ids), is_target))
    return collate_rows(rows)


def test_each_micro_batch_takes_the_first_level_that_holds_it():
    micro = MicroBatches(CPU, collate)
    micro.follow([CheckpointingLevel(0, 1500), CheckpointingLevel(5, 4000)], target_share=0.25)
    step = step_of((2, 512, 8), (4, 512, 8), (1, 2000, 8), (3, 2000, 8), (1, 512, 400))
    seen = micro.run(lambda parts: [(len(b), b.labels.shape[1], k) for b, k in parts], step)
    assert seen == [
        (2, 512, 0),  # fits
        (2, 512, 0),  # cut in two: 1,024 tokens keep a device busy
        (2, 512, 0),
        (1, 2000, 5),  # too long to keep everything
        (2, 2000, 5),
        (1, 2000, 5),
        (1, 512, 5),  # so many targets as a row of 1,600 tokens was planned to have
    ]
    assert micro.num_retries == 0


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
