"""Fine-tune Gemma to write down what is said.

    python recipes/audio_transcribe.py
    python recipes/audio_transcribe.py --model google/gemma-4-E2B-it --data calls/ --language en

Different from text_chat.py: the audio tower is loaded, the adapter reaches it as well as the
language part, ``--long-audio`` says what happens to clips of more than 30 seconds, and afterwards
the transcripts of adapter and base are scored side by side: word and character error rate.
"""

from collections.abc import Sequence
from functools import partial

import gemma_tuner as gt
from gemma_tuner.cli import recipe


def main(argv: Sequence[str] | None = None) -> gt.Trainer:
    args = recipe.read_arguments(
        __file__, argv, "long_audio", "language", *recipe.ANSWERS, data="audio and transcript"
    )

    # 1. The model: the language part and the audio tower are built and read.
    if args.model == "tiny":
        model, processor = gt.testing.tiny_model("gemma4-e2b")
    else:
        model, processor = gt.load_model(args.model, modalities=("text", "audio"), bits=args.bits)
    model = gt.add_lora(model, gt.LoraConfig(rank=16, alpha=32, targets=("language", "audio")))

    # 2. The data: the samples have a split to hold out; of yours it is --held-out, or a tenth.
    data = args.data or gt.testing.sample_data("audio")
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

    # 5. Score the transcripts of held-out clips, the adapter's beside the base's.
    if args.answers:
        report = gt.evaluate(
            trainer.model,
            held_out,
            collator,
            scores=("wer", "cer", "exact_match"),
            language=args.language,
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
