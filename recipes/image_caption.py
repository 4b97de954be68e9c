"""Fine-tune Gemma to describe images: captions, or what is written on receipts and forms.

    python recipes/image_caption.py
    python recipes/image_caption.py --model google/gemma-4-E2B-it --data photos/ --steps 500

Different from text_chat.py: the vision tower is loaded, the adapter reaches it as well as the
language part, ``--image-tokens`` says how closely the model looks, and afterwards the captions of
adapter and base are scored side by side: equal to the data's, and how nearly (ANLS).
"""

from collections.abc import Sequence
from functools import partial

import gemma_tuner as gt
from gemma_tuner.cli import recipe


def main(argv: Sequence[str] | None = None) -> gt.Trainer:
    args = recipe.read_arguments(
        __file__, argv, "image_tokens", *recipe.ANSWERS, data="image and caption"
    )

    # 1. The model: the language part and the vision tower are built and read.
    if args.model == "tiny":
        model, processor = gt.testing.tiny_model("gemma4-e2b")
    else:
        model, processor = gt.load_model(args.model, modalities=("text", "image"), bits=args.bits)
    model = gt.add_lora(model, gt.LoraConfig(rank=16, alpha=32, targets=("language", "vision")))

    # 2. The data: the samples have a split to hold out; of yours it is --held-out, or a tenth.
    data = args.data or gt.testing.sample_data("image")
    train, held_out = recipe.open_splits(partial(gt.stream_local, data), args.held_out)
    print(train.report())

    # 3. The trainer.
    collator = gt.ImageCollator(
        processor, max_tokens=args.max_tokens, image_tokens=args.image_tokens
    )
    trainer = gt.Trainer(model, train, collator, args.config, eval_stream=held_out)
    print(trainer.preview())

    # 4. Train; the held-out loss is measured before, in between and after.
    result = recipe.fit(trainer, args)
    adapter = trainer.save(args.out / "adapter")
    print(f"{recipe.show_losses(result)}\nadapter: {adapter}")

    # 5. Score the captions of held-out images, the adapter's beside the base's.
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
