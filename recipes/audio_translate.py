"""Fine-tune Gemma to translate what is said into the text of another language.

    python recipes/audio_translate.py
    python recipes/audio_translate.py --model google/gemma-4-E2B-it --data talks.jsonl --steps 500

Different from audio_transcribe.py: the answer is not what is heard, so the prompt must ask for it
(a column of the data, such as "Translate into English."), and character errors and exact matches
are counted: a right translation may use other words, which a word error rate would punish.
"""

from collections.abc import Sequence
from functools import partial

import gemma_tuner as gt
from gemma_tuner.cli import recipe


def main(argv: Sequence[str] | None = None) -> gt.Trainer:
    args = recipe.read_arguments(
        __file__, argv, "long_audio", *recipe.ANSWERS, data="audio, prompt and response"
    )

    # 1. The model: the language part and the audio tower are built and read.
    if args.model == "tiny":
        model, processor = gt.testing.tiny_model("gemma4-e2b")
    else:
        model, processor = gt.load_model(args.model, modalities=("text", "audio"), bits=args.bits)
    model = gt.add_lora(model, gt.LoraConfig(rank=16, alpha=32, targets=("language", "audio")))

    # 2. The data: the samples have a split to hold out; of yours it is --held-out, or a tenth.
    data = args.data or gt.testing.sample_data("translation")
    train, held_out = recipe.open_splits(partial(gt.stream_local, data), args.held_out)
    print(train.report())

    # 3. The trainer.
    collator = gt.AudioCollator(
        processor,
        max_tokens=args.max_tokens,
        long_audio=args.long_audio,
    )
    trainer = gt.Trainer(model, train, collator, args.config, eval_stream=held_out)
    print(trainer.preview())

    # 4. Train; the held-out loss is measured before, in between and after.
    result = recipe.fit(trainer, args)
    adapter = trainer.save(args.out / "adapter")
    print(f"{recipe.show_losses(result)}\nadapter: {adapter}")

    # 5. Score the translations of held-out clips, the adapter's beside the base's.
    if args.answers:
        report = gt.evaluate(
            trainer.model,
            held_out,
            collator,
            scores=("cer", "exact_match"),
            max_examples=args.answers,
            max_new_tokens=args.answer_tokens,
        )
        print(report)
    if not args.data:
        share = recipe.rate_guessing(train, held_out)
        print(f"guessing without listening is right in {share:.1%}")
    return trainer


if __name__ == "__main__":
    recipe.run(main)
