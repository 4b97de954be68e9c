"""Bad examples in training: each costs its slot, and nothing else moves."""

import json

import pytest

from gemma_tuner.collators.multimodal import MultimodalCollator
from gemma_tuner.errors import ConfigError, DataError
from gemma_tuner.models.lora import LoraConfig, add_lora
from gemma_tuner.streaming.opening import stream_local
from gemma_tuner.streaming.quarantine import RUN_FILE, Budget, Quarantine
from gemma_tuner.testing import tiny_model
from gemma_tuner.training.config import TrainConfig
from gemma_tuner.training.feed import read_steps
from gemma_tuner.training.trainer import Trainer

NUM_ROWS = 24
LONG, DAMAGED = 5, 11


@pytest.fixture(scope="module")
def model():
    model, processor = tiny_model("gemma4-e2b")
    return add_lora(model, LoraConfig(rank=2)), processor


@pytest.fixture
def data(tmp_path):
    """Short rows, of which one is too long for the collator and one names a damaged picture."""
    from PIL import Image as PILImage

    PILImage.new("RGB", (48, 48)).save(tmp_path / "good.png")
    (tmp_path / "damaged.png").write_bytes((tmp_path / "good.png").read_bytes()[:40])
    rows = [
        {
            "id": f"k{number}",
            "prompt": "word " * (400 if number == LONG else 2),
            "response": f"A{number}",
            "image": "damaged.png" if number == DAMAGED else "good.png",
        }
        for number in range(NUM_ROWS)
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def open_stream(data, **options):
    options = {"cache_dir": data.parent / "cache", "max_bad_fraction": 0.1, **options}
    return stream_local(data, **options)


def make_trainer(model, data, folder, stream=None, **settings):
    model, processor = model
    settings = {
        "max_steps": 6,
        "batch_size": 2,
        "gradient_accumulation": 2,
        "log_every_steps": 1,
        "progress": False,
        **settings,
    }
    return Trainer(
        model,
        stream or open_stream(data),
        MultimodalCollator(processor, max_tokens=320),
        TrainConfig(output_dir=folder, **settings),
        eval_stream=open_stream(data),
    )


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_an_epoch_is_its_slots_and_what_was_passed_over_is_logged(model, data, tmp_path):
    trainer = make_trainer(model, data, tmp_path / "run", max_steps=None, epochs=2)
    result = trainer.fit()
    assert result.step == 2 * NUM_ROWS // 4
    assert trainer.counts["passed_over"] == 4
    last = [record for record in read_log(tmp_path / "run") if record["kind"] == "step"][-1]
    assert (last["epoch"], last["counts"]["passed_over"]) == (2.0, 4)
    copied = Quarantine(tmp_path / "run" / RUN_FILE, Budget()).inspect()
    assert {(record.key, record.stage) for record in copied} == {
        (f"k{DAMAGED}", "decode"),
        (f"k{LONG}", "collate"),
    }
    held_out = result.held_out[-1]
    assert held_out.examples == NUM_ROWS - 2
    assert held_out.counts["passed_over"] == 2
    stages = {record.key: record.stage for record in trainer.stream.inspect_quarantine()}
    assert stages == {f"k{LONG}": "collate", f"k{DAMAGED}": "decode"}


def test_steps_are_the_same_slots_for_any_number_of_processes(data):
    def keys_of(num_processes, num_micro_batches, stream_factory):
        steps = []
        for index in range(num_processes):
            stream = stream_factory()
            given = []

            def collate(stream, examples, given=given):
                given.extend(example.key for example in examples)

            shares = []
            for step in read_steps(
                stream,
                collate,
                batch_size=2,
                num_micro_batches=num_micro_batches,
                num_slots=2 * NUM_ROWS + 3,
                process_index=index,
                num_processes=num_processes,
            ):
                shares.append((set(given), step.num_slots, step.stream_state))
                given.clear()
            steps.append(shares)
        return [
            (set().union(*(keys for keys, _, _ in parts)), parts[0][1], parts[0][2]["position"])
            for parts in zip(*steps, strict=True)
        ]

    one = keys_of(1, 4, lambda: open_stream(data))
    two = keys_of(2, 2, lambda: open_stream(data))
    four = keys_of(4, 1, lambda: open_stream(data))
    assert one == two == four
    assert [slots for _, slots, _ in one] == [8, 8, 8, 8, 8, 8, 3]


def test_a_step_of_nothing_but_bad_examples_changes_no_weight(model, data, tmp_path):
    trainer = make_trainer(
        model,
        data,
        tmp_path / "run",
        stream=open_stream(data, shuffle=False, max_bad_fraction=0.5),
        max_steps=LONG + 1,
        batch_size=1,
        gradient_accumulation=1,
        learning_rate=0.1,
    )
    weights = []
    train_step = trainer.train_step

    def watch(step_input):
        result = train_step(step_input)
        weights.append(float(sum(p.detach().double().sum() for p in trainer.trainable)))
        return result

    trainer.train_step = watch
    assert trainer.fit().step == LONG + 1
    assert weights[LONG] == weights[LONG - 1]
    assert weights[1] != weights[0]


def test_beyond_the_budget_the_run_ends_with_its_steps_saved(model, data, tmp_path):
    trainer = make_trainer(
        model,
        data,
        tmp_path / "run",
        stream=open_stream(data, shuffle=False, max_bad_fraction=0.05),
        batch_size=1,
        gradient_accumulation=1,
        max_steps=20,
        check_seconds=0,
    )
    with pytest.raises(DataError, match=r"resumed, .*max_bad_fraction .*new run$") as caught:
        trainer.fit()
    assert caught.value.key == f"k{DAMAGED}"
    assert trainer.step == DAMAGED
    again = make_trainer(
        model,
        data,
        tmp_path / "run",
        stream=open_stream(data, shuffle=False),
        batch_size=1,
        gradient_accumulation=1,
        max_steps=20,
    )
    assert again.fit(resume=True).step == 20
    assert again.counts["passed_over"] == 2


def test_a_held_out_stream_of_which_nothing_can_be_used_is_an_error(model, data, tmp_path):
    trainer = make_trainer(model, data, tmp_path / "run")
    trainer.collator = MultimodalCollator(model[1], max_tokens=16)
    trainer.eval_stream = open_stream(data, max_bad_fraction=1.0)
    with pytest.raises(ConfigError, match="no example of the held-out stream"):
        trainer.evaluate()
