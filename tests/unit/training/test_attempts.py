"""What an attempt leaves behind: after errors, after longer runs, after the end."""

import gc
import threading
import time
from collections import Counter

import pytest
import torch

from gemma_tuner.errors import CheckpointError, ConfigError, ResumeError
from gemma_tuner.models.lora import LoraConfig, add_lora, unwrap_peft
from gemma_tuner.models.loss import FrozenHeadCrossEntropy, target_loss_sum
from gemma_tuner.testing import tiny_model
from gemma_tuner.training.feed import Prefetch, read_steps
from gemma_tuner.training.reporting.reports import Reports
from gemma_tuner.training.trainer import Trainer
from tests.examples import example, picture, sound
from tests.runs import build_trainer, read_trace


def adapter(trainer):
    return torch.cat([p.detach().flatten().clone() for p in trainer.trainable])


def fail_halfway(trainer, *, step, error):
    """Raise within a step, after the backward pass of its first micro-batch."""
    calls = Counter()

    def count(gradient):
        calls[trainer.step] += 1
        if trainer.step == step and calls[step] == 2:
            raise error
        return gradient

    return trainer.trainable[0].register_hook(count)


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), OSError("unplugged")])
def test_any_error_keeps_the_steps_before_it_and_the_next_attempt_is_exact(tmp_path, error):
    whole = build_trainer(tmp_path / "whole", dropout=0.1)
    whole.fit()
    trainer = build_trainer(tmp_path / "broken", dropout=0.1)
    hook = fail_halfway(trainer, step=3, error=error)
    with pytest.raises(type(error)):
        trainer.fit()
    hook.remove()
    assert (tmp_path / "broken/run/checkpoints/step-00000003").is_dir()
    trainer.fit(resume=True)  # in the same process: half a gradient must not be left
    assert torch.equal(adapter(trainer), adapter(whole))
    assert read_trace(tmp_path / "broken") == read_trace(tmp_path / "whole")


@pytest.mark.parametrize("step", [0, 2])
def test_the_next_attempt_is_exact_without_a_checkpoint(tmp_path, step):
    whole = build_trainer(tmp_path / "whole")
    whole.fit()
    trainer = build_trainer(tmp_path / "broken")
    hook = fail_halfway(trainer, step=step, error=KeyboardInterrupt())  # a second Ctrl-C
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    hook.remove()
    assert not (tmp_path / "broken/run/checkpoints").exists()
    trainer.fit()
    assert torch.equal(adapter(trainer), adapter(whole))


def follow(trainer, seen):
    """Count the examples that are trained on."""
    step = trainer.train_step

    def train_step(step_input):
        seen.update(key for batch in step_input.micro_batches for key in batch.keys)
        return step(step_input)

    trainer.train_step = train_step
    return trainer


def test_a_run_made_longer_by_epochs_reads_every_example_as_often(tmp_path):
    seen = Counter()
    # 11 examples, 4 a step: the first run's last step has 3.
    options = {"rows": 11, "max_steps": None}
    assert follow(build_trainer(tmp_path, epochs=1, **options), seen).fit().step == 3
    longer = follow(build_trainer(tmp_path, epochs=2, **options), seen)
    assert longer.fit(resume=True).step == 6
    assert set(seen.values()) == {2}
    assert len(seen) == 11
    assert [record["epoch"] for record in read_trace(tmp_path)][2:] == [
        pytest.approx(epoch) for epoch in (1, 15 / 11, 19 / 11, 2)
    ]


def test_a_glance_at_the_stream_costs_no_example(tmp_path):
    trainer, seen = build_trainer(tmp_path, max_steps=None, epochs=1), Counter()
    next(iter(trainer.stream))
    trainer = Trainer(trainer.model, trainer.stream, trainer.collator, trainer.config)
    next(iter(trainer.stream))
    follow(trainer, seen).fit()
    assert set(seen.values()) == {1}
    assert len(seen) == 10


def test_fit_leaves_a_model_that_is_ready_for_use(tmp_path):
    trainer = build_trainer(tmp_path, max_steps=1, dropout=0.5)
    trainer.evaluate()
    assert not any(module.training for module in trainer.model.modules())
    trainer.fit()
    gemma = unwrap_peft(trainer.model)
    assert not any(module.training for module in trainer.model.modules())
    assert not any(getattr(module, "gradient_checkpointing", False) for module in gemma.modules())
    assert trainer.evaluate().loss == trainer.evaluate().loss


def test_fit_trains_in_train_mode_after_each_evaluation(tmp_path):
    trainer = build_trainer(tmp_path, eval_every_steps=1, max_steps=3)
    modes = []
    trainer.trainable[0].register_hook(
        lambda _: modes.append(unwrap_peft(trainer.model).model.language_model.layers[0].training)
    )
    trainer.fit()
    assert modes
    assert all(modes)


def test_a_refused_resume_changes_nothing(tmp_path):
    build_trainer(tmp_path, max_steps=2).fit()
    for changed in ({"learning_rate": 1.0}, {"rows": 9}):
        trainer = build_trainer(tmp_path, **changed)
        before, state = adapter(trainer), trainer.stream.state_dict()
        with pytest.raises(ResumeError):
            trainer.fit(resume=True)
        assert torch.equal(adapter(trainer), before)
        assert trainer.step == 0
        assert trainer.stream.state_dict() == state


def test_a_failed_save_is_not_tried_again(tmp_path):
    trainer = build_trainer(tmp_path, save_every_steps=2)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoints").write_text("in the way")
    with pytest.raises(CheckpointError) as raised:
        trainer.fit()
    assert raised.value.__context__ is None or not isinstance(
        raised.value.__context__, CheckpointError
    )


def test_a_stream_without_examples_is_refused(tmp_path):
    class Empty(list):
        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            pass

    trainer = build_trainer(tmp_path)
    parts = (trainer.model, trainer.collator, trainer.config)
    with pytest.raises(ConfigError, match="eval_stream has no examples"):
        Trainer(parts[0], trainer.stream, *parts[1:], eval_stream=Empty())
    with pytest.raises(ConfigError, match="stream has no examples"):
        Trainer(parts[0], Empty(), *parts[1:])


def test_fit_works_beside_the_main_thread(tmp_path):
    trainer, results = build_trainer(tmp_path, max_steps=2), []
    thread = threading.Thread(target=lambda: results.append(trainer.fit()))
    thread.start()
    thread.join()
    assert [result.step for result in results] == [2]


def test_steps_leave_no_tensor_behind(tmp_path):
    trainer = build_trainer(tmp_path, max_steps=30, log_every_steps=10)
    counts = []
    step = trainer.train_step

    def count(step_input):
        result = step(step_input)
        if trainer.step in (10, 29):
            gc.collect()
            counts.append(sum(issubclass(type(item), torch.Tensor) for item in gc.get_objects()))
        return result

    trainer.train_step = count
    trainer.fit()
    # The feed holds zero to two steps of some twelve tensors.
    assert abs(counts[1] - counts[0]) <= 40, counts


def test_leaving_the_feed_early_ends_its_thread(tmp_path):
    trainer = build_trainer(tmp_path)
    steps = read_steps(
        trainer.stream,
        lambda stream, examples: trainer.collator(examples),
        batch_size=1,
        num_micro_batches=1,
        num_slots=100,
    )
    with Prefetch(steps, lambda seconds: None) as feed:
        next(iter(feed))
    (thread,) = [t for t in threading.enumerate() if t.name == "gemma-tuner-feed"] or [None]
    if thread is not None:
        thread.join(timeout=5)
        assert not thread.is_alive()


def test_the_clock_counts_all_waits_and_no_evaluation(tmp_path):
    def slow():
        for value in range(2):
            time.sleep(0.05)
            yield value

    with (
        Reports(tmp_path, total_steps=1, step=0, show=False, is_main_process=True) as reports,
        Prefetch(slow(), reports.note_wait) as feed,
    ):
        for value in feed:
            if value == 0:
                reports.restart_clock(100, 10)  # an evaluation between two log records
        tokens_per_second, _, waited = reports.read_clock(200, 20)
    assert waited >= 0.1
    assert 100 / 1 < tokens_per_second < 100 / 0.05


# --- the loss ----------------------------------------------------------------------------------


@pytest.mark.parametrize("num_targets", [255, 347, 1001])
def test_the_scale_of_the_gradient_is_not_rounded_to_bfloat16(num_targets):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 32, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(70_000, 32, generator=generator).bfloat16()  # three blocks
    targets = torch.randint(0, 70_000, (64,), generator=generator)
    loss = FrozenHeadCrossEntropy.apply(hidden, weight, targets, 30.0, 16)
    whole = torch.autograd.grad(loss, hidden, retain_graph=True)[0].double()
    scaled = torch.autograd.grad(loss / num_targets, hidden)[0].double() * num_targets
    bias = float((scaled * whole).sum() / (whole * whole).sum()) - 1
    assert abs(bias) < 2e-4


@pytest.mark.parametrize("family", ["gemma4-e2b", "gemma3n"])
def test_padding_changes_neither_loss_nor_gradient(family):
    from gemma_tuner.collators.multimodal import MultimodalCollator

    model, processor = tiny_model(family)
    model = add_lora(model, LoraConfig(rank=4)).eval()
    collator = MultimodalCollator(processor)
    short, long = example("Hi", answer="Yo"), example("Hello there " * 60, answer="Well " * 50)

    def step(*groups):
        loss = sum(target_loss_sum(model, collator(group), chunk_tokens=7) for group in groups)
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
        model.zero_grad(set_to_none=True)
        return float(loss.detach()), gradient

    loss, gradient = step([short, long])
    split_loss, split = step([short], [long])
    assert gradient.isfinite().all()
    assert loss == pytest.approx(split_loss, rel=1e-5)
    assert float((gradient - split).norm()) <= 1e-4 * float(split.norm())


@pytest.mark.parametrize("family", ["gemma4-e2b", "gemma4-12b", "gemma3n"])
def test_a_collator_serves_several_threads(family):
    from gemma_tuner.collators.multimodal import MultimodalCollator

    # The feed collates in its thread while evaluate() collates in the main one.
    _, processor = tiny_model(family)
    collator = MultimodalCollator(processor)
    groups = [
        [example("Hello " * 40, answer="Yes"), example(picture(1), "What?", answer="A dog")],
        [example(sound(16_000), picture(2), "Both?", answer="Yes, both")],
    ]
    expected = [collator(group) for group in groups]
    problems = []

    def collate(group, reference):
        for _ in range(10):
            batch = collator(group)
            problems.extend(
                name
                for name, x in reference.inputs.items()
                if not torch.equal(batch.inputs[name], x)
            )

    def work(*arguments):
        try:
            collate(*arguments)
        except RuntimeError as error:  # a tokenizer in use by another thread
            problems.append(error)

    threads = [
        threading.Thread(target=work, args=pair)
        for pair in zip(groups * 2, expected * 2, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
