"""The main job from end to end: train on text, images and speech, and check what was saved.

    make demo

A tiny random Gemma 4 E2B is saved once, then three recipes load it as they would load the real
checkpoint, train on the bundled samples, and save an adapter each. Each is opened again by
stock transformers and peft, and must give the same logits as the model that was trained. The last
column but two is the loss of guessing answers by their frequency: a model below it has looked.
"""

import argparse
import importlib
import json
import math
import shutil
import sys
import time
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText
from transformers.utils import logging

import gemma_tuner as gt
from gemma_tuner.cli import recipe

LOGIT_TOLERANCE = 1e-5
# The last step is saved, as it is what the model in memory holds.
FLAGS = ("--learning-rate", "5e-3", "--steps", "160", "--no-keep-best")
RECIPES = {
    "text_chat": FLAGS,
    "image_caption": (*FLAGS, "--answers", "0"),
    "audio_transcribe": (*FLAGS, "--answers", "0"),
}


def load_recipe(name: str) -> ModuleType:
    sys.path.insert(0, str(Path(__file__).parent))
    return importlib.import_module(name)


def largest_logit_difference(trainer: gt.Trainer, base: Path, adapter: Path) -> float:
    """Compare the trained model with the adapter in stock transformers and peft."""
    reloaded = PeftModel.from_pretrained(
        AutoModelForImageTextToText.from_pretrained(base), adapter
    ).eval()
    batch = trainer.collator([trainer.stream[index] for index in range(4)])
    trainer.model.eval()
    with torch.no_grad():
        ours = trainer.model(**batch.to(trainer.device).inputs).logits.cpu()
        theirs = reloaded(**batch.inputs).logits
    is_token = batch.inputs["attention_mask"].bool()  # nobody reads what padding becomes
    return float((ours - theirs)[is_token].abs().max())


def loss_of_guessing(trainer: gt.Trainer) -> float:
    """The held-out loss of guessing without a look: how often each answer is given."""
    answers = Counter(example.turns[-1].text for example in trainer.stream)
    held_out = [example.turns[-1].text for example in trainer.eval_stream or ()]
    nats = sum(math.log(answers.total() / answers[answer]) for answer in held_out)
    return nats / trainer.evaluate().target_tokens


def run(name: str, base: Path, out: Path) -> dict[str, Any]:
    print(f"\n=== {name} " + "=" * (70 - len(name)), flush=True)
    started = time.perf_counter()
    trainer = load_recipe(name).main(["--model", str(base), "--out", str(out), *RECIPES[name]])
    seconds = time.perf_counter() - started
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    held_out = [record["loss"] for record in records if record["kind"] == "eval"]
    speeds = sorted(r["tokens_per_second"] for r in records if r["kind"] == "step")
    adapter = out / "adapter"
    return {
        "recipe": name,
        "loss before": held_out[0],
        "loss after": held_out[-1],
        # Text has nothing to look at but the question itself.
        "guess": math.nan if name == "text_chat" else loss_of_guessing(trainer),
        "tokens/s": speeds[len(speeds) // 2],
        "seconds": seconds,
        "logit difference": largest_logit_difference(trainer, base, adapter),
        "adapter": adapter,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    out = parser.parse_args().out.expanduser()
    torch.set_num_threads(1)  # so small a model gains nothing from more, and busy machines lose
    base = out / "tiny-gemma-4-e2b"
    for folder in (base, *(out / name for name in RECIPES)):  # what else is in out stays
        shutil.rmtree(folder, ignore_errors=True)
    gt.testing.save_tiny_model("gemma4-e2b", base)

    results = [run(name, base, out / name) for name in RECIPES]
    heads = "held-out loss       before    after  guessing   tokens/s"
    print(f"\n{heads}  in stock transformers + peft")
    failed = False
    for result in results:
        same = result["logit difference"] <= LOGIT_TOLERANCE
        guess = "–" if math.isnan(result["guess"]) else f"{result['guess']:.4f}"
        learned = result["loss after"] < result["loss before"] / 2
        learned &= not result["loss after"] >= result["guess"]
        failed |= not (same and learned)
        print(
            f"{result['recipe']:<16} {result['loss before']:9.4f}{result['loss after']:9.4f}"
            f"{guess:>10}{result['tokens/s']:11.0f}"
            f"  {'same logits' if same else 'LOGITS DIFFER'}"
            f" (max difference {result['logit difference']:.1e}), {result['adapter']}"
        )
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    logging.disable_progress_bar()  # of loading what is so small
    recipe.run(main)
