"""A long run over examples of many lengths, watched.

``python -m tests.long_runs 10000 FOLDER`` trains so many steps on images, with held-out losses,
samples and checkpoints, and prints what is held now and then.
"""

import gc
import json
import math
import os
import random
import sys
import threading
from pathlib import Path

import torch

from gemma_tuner.collators.multimodal import MultimodalCollator
from gemma_tuner.device import memory_private_bytes
from gemma_tuner.evaluation.samples import SampleGenerations
from gemma_tuner.models.lora import LoraConfig, add_lora
from gemma_tuner.streaming.opening import stream_local
from gemma_tuner.testing import sample_data, tiny_model
from gemma_tuner.training.config import TrainConfig
from gemma_tuner.training.trainer import Trainer

STEPS = 500
_MOMENTS = 20
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


def count_tensor_bytes():
    """Bytes of all tensors that Python knows, each memory counted once."""
    gc.collect()
    held = {}
    for left in gc.get_objects():
        if issubclass(type(left), torch.Tensor):  # isinstance would wake lazy objects
            storage = left.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
    return sum(held.values())


def count_open():
    """Open files and threads of this process."""
    return len(list(Path("/proc/self/fd").iterdir())), threading.active_count()


def main(num_steps, folder):
    """Print what a run on images holds, at so many moments."""
    folder = Path(folder)

    def hold(step):
        if step % (num_steps // _MOMENTS) == 0:
            files, threads = count_open()
            written = sum(len(names) for _, _, names in os.walk(folder / "run"))
            held = {
                "step": step,
                "private_bytes": memory_private_bytes(),
                "tensor_bytes": count_tensor_bytes(),
                "objects": len(gc.get_objects()),
                "open_files": files,
                "threads": threads,
                "files_written": written,
            }
            sys.stdout.write(f"{json.dumps(held)}\n")
            sys.stdout.flush()
        return 0

    model, processor = tiny_model("gemma4-e2b")
    stream = stream_local(sample_data("image"), cache_dir=folder / "cache")
    collator = MultimodalCollator(processor)
    every = num_steps // _MOMENTS
    config = TrainConfig(
        max_steps=num_steps,
        learning_rate=1e-3,
        eval_every_steps=every,
        save_every_steps=every,
        progress=False,
        output_dir=folder / "run",
    )
    WatchedTrainer(
        add_lora(model, LoraConfig(rank=4)),
        stream,
        collator,
        config,
        eval_stream=stream.take(4),
        samples=SampleGenerations(
            collator, [stream[0], stream[1]], every_steps=every, max_new_tokens=8
        ),
        hold=hold,
    ).fit()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
