"""Fine-tune Gemma on text: conversations of several turns with system prompts, or single answers.

    python recipes/text_chat.py
    python recipes/text_chat.py --model google/gemma-4-E2B-it --data chats.jsonl --steps 500

The text recipe, from which the others differ. Every answer of a conversation is trained, no system
turn and no question. Without flags it trains a tiny random model on the bundled samples, to show
that everything works; the second answer of each chat there follows from the first.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import gemma_tuner as gt
from gemma_tuner.training import script


def main(argv: Sequence[str] | None = None) -> gt.Trainer:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="file or folder: messages, or prompt and response")
    args = script.parse_arguments(parser, argv, out="runs/text_chat")

    # 1. The model: only the language part is built and read.
    if args.model:
        model, processor = gt.load_model(args.model, modalities=("text",))
    else:
        model, processor = gt.testing.tiny_model("gemma4-e2b")
    model = gt.add_lora(model, gt.LoraConfig(rank=16, alpha=32))

    # 2. The data: the samples have a split to hold out; of yours it is --held-out, or a tenth.
    data = args.data or gt.testing.sample_data("chat")
    split = args.held_out or (None if args.data else "test")
    train, held_out = script.open_splits(partial(gt.stream_local, data), split)
    print(train.report())

    # 3. The trainer.
    collator = gt.TextCollator(processor, max_tokens=args.max_tokens)
    trainer = gt.Trainer(model, train, collator, script.make_config(args), eval_stream=held_out)
    print(trainer.preview())

    # 4. Train; the held-out loss is measured before, in between and after.
    result = script.fit(trainer, args, __file__, argv)
    adapter = trainer.save(Path(args.out) / "adapter")
    print(f"{script.show_losses(result)}\nadapter: {adapter}")

    # 5. Let it go on with one held-out conversation.
    chat = held_out[0]
    answer = gt.generate(
        trainer.model, processor, replace(chat, turns=chat.turns[:-1]), max_new_tokens=64
    )
    print(f"asked {chat.turns[-2].text!r}, it answers {answer.text!r}", end="; ")
    print(f"the data's answer is {chat.turns[-1].text!r}")
    return trainer


if __name__ == "__main__":
    script.run_script(main)
