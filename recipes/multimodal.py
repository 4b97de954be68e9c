"""Fine-tune Gemma on pictures with speech: spoken questions, commented scenes.

    python recipes/multimodal.py
    python recipes/multimodal.py --model google/gemma-4-E2B-it --data scenes.jsonl --steps 500

Different from text_chat.py: both towers are loaded and adapted, and a row may hold a picture, a
sound, both (the picture stands first), or neither. In the samples a word asks for the colour or
the shape of what is drawn, so that neither the picture nor the sound is enough.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import gemma_tuner as gt
from gemma_tuner.training import script


def main(argv: Sequence[str] | None = None) -> gt.Trainer:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="file or folder: image, audio, prompt and response")
    parser.add_argument("--image-tokens", type=int, help="70, 140, 280, 560 or 1120 a picture")
    script.add_answer_flags(parser)
    args = script.parse_arguments(parser, argv, out="runs/multimodal")

    # 1. The model: the language part and both towers are built and read.
    if args.model:
        model, processor = gt.load_model(args.model, modalities=("text", "image", "audio"))
    else:
        model, processor = gt.testing.tiny_model("gemma4-e2b")
    model = gt.add_lora(
        model, gt.LoraConfig(rank=16, alpha=32, targets=("language", "vision", "audio"))
    )

    # 2. The data: the samples have a split to hold out; of yours it is --held-out, or a tenth.
    data = args.data or gt.testing.sample_data("multimodal")
    split = args.held_out or (None if args.data else "test")
    train, held_out = script.open_splits(partial(gt.stream_local, data), split)
    print(train.report())

    # 3. The trainer.
    collator = gt.MultimodalCollator(
        processor, max_tokens=args.max_tokens, image_tokens=args.image_tokens
    )
    trainer = gt.Trainer(model, train, collator, script.make_config(args), eval_stream=held_out)
    print(trainer.preview())

    # 4. Train; the held-out loss is measured before, in between and after.
    result = script.fit(trainer, args, __file__, argv)
    adapter = trainer.save(Path(args.out) / "adapter")
    print(f"{script.show_losses(result)}\nadapter: {adapter}")

    # 5. Score the answers to held-out rows, the adapter's beside the base's.
    if args.answers:
        report = gt.evaluate(
            trainer.model,
            held_out,
            collator,
            scores=("exact_match", "anls"),
            max_examples=args.answers,
            max_new_tokens=args.answer_tokens,
        )
        print(report)
    if not args.data:
        share = script.rate_guessing(train, held_out)
        print(f"guessing without a look is right in {share:.1%}")
    return trainer


if __name__ == "__main__":
    script.run_script(main)
