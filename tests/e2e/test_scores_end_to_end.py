"""Real pictures and sounds, trained and evaluated end to end: scores that rise by learning.

A base with random weights cannot be adapted: LoRA moves little, and its vision part sees nothing
yet. So the tiny base is first trained in full on the training split, to name handwritten digits
by their numerals ("7"). LoRA then teaches it the data's own answers, the words ("seven"). Both are
evaluated on the test split, which neither has seen; guessing would be right once in ten.

Spoken digits take a quarter of an hour to learn: `benchmarks/RESULTS.md` has the figures, and here
their script runs for a few steps.
"""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import spoken_digits
from gemma_tuner.batch import pad_rows
from gemma_tuner.collators.multimodal import MultimodalCollator
from gemma_tuner.evaluation.evaluate import evaluate
from gemma_tuner.evaluation.generation import generate
from gemma_tuner.evaluation.scores import word_error_rate
from gemma_tuner.models.lora import LoraConfig, add_lora
from gemma_tuner.records import Text, Turn
from gemma_tuner.streaming.opening import stream_local
from gemma_tuner.testing import tiny_model
from gemma_tuner.training.config import TrainConfig
from gemma_tuner.training.trainer import Trainer

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
BASE_STEPS, LORA_STEPS = 110, 200  # of 16 and 8 examples


def answer_with_numeral(example):
    numeral = str(WORDS.index(example.turns[-1].text))
    return replace(example, turns=(*example.turns[:-1], Turn("assistant", (Text(numeral),))))


def train_in_full(model, collator, stream):
    """Every weight, with plain transformers and AdamW: what the library itself never does."""
    rows = [collator.encode(answer_with_numeral(stream[index])) for index in range(len(stream))]
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.01)
    generator = torch.Generator().manual_seed(0)
    for step in range(BASE_STEPS):
        rate = 3e-3 * min(1, (step + 1) / 10) * (1 - step / BASE_STEPS)
        optimizer.param_groups[0]["lr"] = rate
        chosen = torch.randint(len(rows), (16,), generator=generator).tolist()
        batch = pad_rows(
            [rows[index] for index in chosen],
            max_tokens=2048,
            pad_token_id=0,
            token_type_name=collator.family.token_type_name,
        )
        loss = model(**batch.inputs, labels=batch.labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.requires_grad_(False)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # three minutes of one free core
def test_exact_match_rises_far_above_chance(shared_data, tmp_path):
    train, test = (
        stream_local(shared_data / "optdigits", split=split, cache_dir=tmp_path / "cache")
        for split in ("train", "test")
    )
    model, processor = tiny_model("gemma4-12b")
    collator = MultimodalCollator(processor, image_tokens=70)

    untrained = evaluate(
        model, test, collator, scores=["wer"], max_examples=10, max_new_tokens=8, progress=False
    )
    assert untrained["wer"].values["model"] > 0.5

    train_in_full(model, collator, train)
    model = add_lora(model, LoraConfig(rank=16))
    config = TrainConfig(
        max_steps=LORA_STEPS,
        batch_size=8,
        gradient_accumulation=1,
        learning_rate=3e-3,
        gradient_checkpointing=False,
        progress=False,
        output_dir=tmp_path / "run",
    )
    Trainer(model, train, collator, config).fit()
    report = evaluate(
        model,
        test,
        collator,
        scores=["exact_match", "wer"],
        language="en",
        max_new_tokens=8,
        batch_size=16,
        output=tmp_path / "report",
        progress=False,
    )

    match = report["exact_match"]
    assert match.values["adapter"] > 0.7  # 0.84 where this was written
    assert match.values["base"] < 0.1  # it answers, but not in words
    assert match.interval[0] > 0.5
    loss = {system: record.loss for system, record in report.held_out.items()}
    assert loss["adapter"] < loss["base"] - 1

    # The report says what the model does when it is asked by itself.
    example = report.examples[0]
    picture = next(iter(test[0].media))
    answer = generate(
        model, processor, test[0].turns[0].text, image=picture, max_new_tokens=8, do_sample=False
    )
    assert answer == example.answers["adapter"]
    rows = report.examples
    assert (
        word_error_rate().measure(
            [row.references[0] for row in rows], [row.references for row in rows]
        )
        == 0.0
    )
    assert len(list((tmp_path / "report" / "media").iterdir())) == 20


@pytest.mark.slow
def test_spoken_digits_begin_to_be_learned(shared_data, tmp_path, capsys):
    recordings = shared_data / "fsdd"
    rows = [
        row | {"audio": str(recordings / row["audio"])}
        for split in ("train", "test")
        for row in spoken_digits.read_manifest(recordings, split)[::5]
    ]
    (tmp_path / "manifest.jsonl").write_text("\n".join(map(json.dumps, rows)))
    steps = ["--base-steps", "4", "--steps", "25", "--copies", "1", "--unheard", "theo"]
    where = ["--data", str(tmp_path), "--output", str(tmp_path)]
    spoken_digits.main([*where, *steps])

    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["recordings"] == {"train": 50, "test": 60}
    assert result["exact_match"]["base"] == 0.0
    assert result["held_out_loss"]["adapter"] < result["held_out_loss"]["base"] / 2
    assert result["by_speaker"].keys() >= {"george", "theo"}
    # So few steps teach how the ten words are spelt; what hears them is on its way too.
    (saved,) = tmp_path.glob("run/checkpoints/*/adapter_model.safetensors")
    heard = [b for name, b in load_file(saved).items() if "audio_tower" in name and "_B" in name]
    assert len(heard) == 20
    assert all(b.abs().max() > 1e-3 for b in heard)
