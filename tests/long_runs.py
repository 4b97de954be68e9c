"""A long run over examples of many lengths, watched."""

import json
import math
import random

from gemma_tuner.collators.multimodal import MultimodalCollator
from gemma_tuner.models.lora import LoraConfig, add_lora
from gemma_tuner.streaming.opening import stream_local
from gemma_tuner.testing import tiny_model
from gemma_tuner.training.config import TrainConfig
from gemma_tuner.training.trainer import Trainer

STEPS = 500
WORDS = ("green", "lamp", "door", "house", "river", "open", "today", "seven", "birds", "sing")


def write_mixed_lengths(path, num_rows, seed=0):
    """Rows whose questions and answers have 1 to 50 words, evenly on a log scale."""
    draw = random.Random(seed)

    def text():
        num_words = round(math.exp(draw.uniform(0, math.log(50))))
        return " ".join(draw.choice(WORDS) for _ in range(num_words))

    rows = [json.dumps({"prompt": text(), "response": text()}) for _ in range(num_rows)]
    path.write_text("\n".join(rows) + "\n")


class WatchedTrainer(Trainer):
    """Notes after each step what is held, and how many shapes there have been."""

    def __init__(self, *args, hold, **settings):
        super().__init__(*args, **settings)
        self.hold = hold
        self.held: list[int] = []
        self.shapes_by_step: list[int] = []

    def train_step(self, step_input):
        result = super().train_step(step_input)
        self.shapes_by_step.append(len(self.stepper.monitor.shapes))
        self.held.append(self.hold(self.step))
        return result


def run_long(folder, hold, *, device="cpu", steps=STEPS, family="gemma4-e2b"):
    """Train on twice as many examples as there are steps, evaluating and saving now and then."""
    folder.mkdir(parents=True, exist_ok=True)
    write_mixed_lengths(folder / "rows.jsonl", 2 * steps)
    model, processor = tiny_model(family)
    stream = stream_local(folder / "rows.jsonl", cache_dir=folder / "cache")
    trainer = WatchedTrainer(
        add_lora(model.to(device), LoraConfig(rank=4)),
        stream,
        MultimodalCollator(processor),
        TrainConfig(
            max_steps=steps,
            batch_size=2,
            gradient_accumulation=1,
            learning_rate=1e-3,
            eval_every_steps=max(1, steps // 5),
            save_every_steps=max(1, steps // 5),
            progress=False,
            output_dir=folder / "run",
        ),
        eval_stream=stream.take(8),
        hold=hold,
    )
    trainer.fit()
    return trainer
