"""Fine-tune Gemma to translate what is said into the text of another language.

    python recipes/audio_translate.py
    python recipes/audio_translate.py --model google/gemma-4-E2B-it --data talks.jsonl --steps 500

Different from audio_transcribe.py: the answer is not what is heard, so the prompt must ask for it
(a column of the data, such as "Translate into English."), and character errors and exact matches
are counted: a right translation may use other words, which a word error rate would punish.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import gemma_tuner as gt
from gemma_tuner.training import script


def main(argv: Sequence[str] | None = None) -> gt.Trainer:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="file or folder: audio, prompt and response")
    parser.add_argument(
        "--long-audio",
        choices=("error", "split"),
        default="error",
        help="what becomes of clips over 30 seconds (default: %(default)s)",
    )
    script.add_answer_flags(parser)
    args = script.parse_arguments(parser, argv, out="runs/audio_translate")

    # 1. The model: the language part and the audio tower are built and read.
    if args.model:
        model, processor = gt.load_model(args.model, modalities=("text", "audio"))
    else:
        model, processor = gt.testing.tiny_model("gemma4-e2b")
    model = gt.add_lora(model, gt.LoraConfig(rank=16, alpha=32, targets=("language", "audio")))

    # 2. The data: the samples have a split to hold out; of yours it is --held-out, or a tenth.
    data = args.data or gt.testing.sample_data("translation")
    split = args.held_out or (None if args.data else "test")
    train, held_out = script.open_splits(partial(gt.stream_local, data), split)
    print(train.report())

    # 3. The trainer.
    collator = gt.AudioCollator(
        processor,
        max_tokens=args.max_tokens,
        long_audio=args.long_audio,
    )
    trainer = gt.Trainer(model, train, collator, script.make_config(args), eval_stream=held_out)
    print(trainer.preview())

    # 4. Train; the held-out loss is measured before, in between and after.
    result = script.fit(trainer, args, __file__, argv)
    adapter = trainer.save(Path(args.out) / "adapter")
    print(f"{script.show_losses(result)}\nadapter: {adapter}")

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
        share = script.rate_guessing(train, held_out)
        print(f"guessing without listening is right in {share:.1%}")
    return trainer


if __name__ == "__main__":
    script.run_script(main)
