"""Fine-tune Gemma on text: conversations of several turns with system prompts, or single answers.

    python recipes/text_chat.py
    python recipes/text_chat.py --model google/gemma-4-E2B-it --data chats.jsonl --steps 500

The text recipe, from which the others differ. Every answer of a conversation is trained, no system
turn and no question. Without flags it trains a tiny random model on the bundled samples, to show
that everything works; the second answer of each chat there follows from the first.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import gemma_tuner as gt
from gemma_tuner.cli import recipe


def main(argv: Sequence[str] | None = None) -> gt.Trainer:
    args = recipe.read_arguments(__file__, argv, data="messages, or prompt and response")

    # 1. The model: only the language part is built and read.
    if args.model == "tiny":
        model, processor = gt.testing.tiny_model("gemma4-e2b")
    else:
        model, processor = gt.load_model(args.model, modalities=("text",), bits=args.bits)
    model = gt.add_lora(model, gt.LoraConfig(rank=16, alpha=32))

    # 2. The data: the samples have a split to hold out; of yours it is --held-out, or a tenth.
    data = args.data or gt.testing.sample_data("chat")
    train, held_out = recipe.open_splits(partial(gt.stream_local, data), args.held_out)
    print(train.report())

    # 3. The trainer.
    collator = gt.TextCollator(processor, max_tokens=args.max_tokens)
    trainer = gt.Trainer(model, train, collator, args.config, eval_stream=held_out)
    print(trainer.preview())

    # 4. Train; the held-out loss is measured before, in between and after.
    result = recipe.fit(trainer, args)
    adapter = trainer.save(args.out / "adapter")
    print(f"{recipe.show_losses(result)}\nadapter: {adapter}")

    # 5. Let it go on with one held-out conversation.
    chat = held_out[0]
    answer = gt.generate(
        trainer.model, processor, replace(chat, turns=chat.turns[:-1]), max_new_tokens=64
    )
    print(f"asked {chat.turns[-2].text!r}, it answers {answer.text!r}", end="; ")
    print(f"the data's answer is {chat.turns[-1].text!r}")
    return trainer


if __name__ == "__main__":
    recipe.run(main)
