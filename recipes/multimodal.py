"""Fine-tune Gemma on images with speech: spoken questions, commented scenes.

    python recipes/multimodal.py
    python recipes/multimodal.py --model google/gemma-4-E2B-it --data scenes.jsonl --steps 500

Different from text_chat.py: both towers are loaded and adapted, and a row may hold an image, a
clip, both (the image stands first), or neither. In the samples a word asks for the colour or
the shape of what is drawn, so that neither the image nor the clip is enough.
"""

from collections.abc import Sequence
from functools import partial

import gemma_tuner as gt
from gemma_tuner.cli import recipe


def main(argv: Sequence[str] | None = None) -> gt.Trainer:
    args = recipe.read_arguments(
        __file__, argv, "image_tokens", *recipe.ANSWERS, data="image, audio, prompt and response"
    )

    # 1. The model: the language part and both towers are built and read.
    if args.model == "tiny":
        model, processor = gt.testing.tiny_model("gemma4-e2b")
    else:
        model, processor = gt.load_model(
            args.model, modalities=("text", "image", "audio"), bits=args.bits
        )
    model = gt.add_lora(
        model, gt.LoraConfig(rank=16, alpha=32, targets=("language", "vision", "audio"))
    )

    # 2. The data: the samples have a split to hold out; of yours it is --held-out, or a tenth.
    data = args.data or gt.testing.sample_data("multimodal")
    train, held_out = recipe.open_splits(partial(gt.stream_local, data), args.held_out)
    print(train.report())

    # 3. The trainer.
    collator = gt.MultimodalCollator(
        processor, max_tokens=args.max_tokens, image_tokens=args.image_tokens
    )
    trainer = gt.Trainer(model, train, collator, args.config, eval_stream=held_out)
    print(trainer.preview())

    # 4. Train; the held-out loss is measured before, in between and after.
    result = recipe.fit(trainer, args)
    adapter = trainer.save(args.out / "adapter")
    print(f"{recipe.show_losses(result)}\nadapter: {adapter}")

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
        share = recipe.rate_guessing(train, held_out)
        print(f"guessing without a look is right in {share:.1%}")
    return trainer


if __name__ == "__main__":
    recipe.run(main)
