"""Fine-tune Gemma on questions about images.

    python recipes/image_vqa.py
    python recipes/image_vqa.py --model google/gemma-4-E2B-it --data charts.jsonl --steps 500

Different from image_caption.py: each image comes with a question of its own, and answers are
scored as the VQA challenge does (case, articles and number words do not count), and by ANLS.
"""

from collections.abc import Sequence
from functools import partial

import gemma_tuner as gt
from gemma_tuner.cli import recipe


def main(argv: Sequence[str] | None = None) -> gt.Trainer:
    args = recipe.read_arguments(
        __file__, argv, "image_tokens", *recipe.ANSWERS, data="image, question and answer"
    )

    # 1. The model: the language part and the vision tower are built and read.
    if args.model == "tiny":
        model, processor = gt.testing.tiny_model("gemma4-e2b")
    else:
        model, processor = gt.load_model(args.model, modalities=("text", "image"), bits=args.bits)
    model = gt.add_lora(model, gt.LoraConfig(rank=16, alpha=32, targets=("language", "vision")))

    # 2. The data: the samples have a split to hold out; of yours it is --held-out, or a tenth.
    data = args.data or gt.testing.sample_data("vqa")
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

    # 5. Score the answers to held-out questions, the adapter's beside the base's.
    if args.answers:
        report = gt.evaluate(
            trainer.model,
            held_out,
            collator,
            scores=("exact_match", "vqa_accuracy", "anls"),
            max_examples=args.answers,
            max_new_tokens=args.answer_tokens,
        )
        print(report)
    if not args.data:
        share = recipe.rate_guessing(train, held_out)
        print(f"guessing from the question alone is right in {share:.1%}")
    return trainer


if __name__ == "__main__":
    recipe.run(main)
