"""Fine-tune Gemma to write down what is said.

    python recipes/audio_transcribe.py
    python recipes/audio_transcribe.py --model google/gemma-4-E2B-it --data calls/ --language en

Different from text_chat.py: the audio tower is loaded, the adapter reaches it as well as the
language part, ``--long-audio`` says what happens to clips of more than 30 seconds, and afterwards
the transcripts of adapter and base are scored side by side: word and character error rate.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import gemma_tuner as gt
from gemma_tuner.training import script


def main(argv: Sequence[str] | None = None) -> gt.Trainer:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="file or folder: audio and transcript")
    parser.add_argument(
        "--long-audio",
        choices=("error", "split"),
        default="error",
        help="what becomes of clips over 30 seconds (default: %(default)s)",
    )
    parser.add_argument("--language", help="of the transcripts, such as en: how scores normalise")
    script.add_answer_flags(parser)
    args = script.parse_arguments(parser, argv, out="runs/audio_transcribe")

    # 1. The model: the language part and the audio tower are built and read.
    if args.model:
        model, processor = gt.load_model(args.model, modalities=("text", "audio"))
    else:
        model, processor = gt.testing.tiny_model("gemma4-e2b")
    model = gt.add_lora(model, gt.LoraConfig(rank=16, alpha=32, targets=("language", "audio")))

    # 2. The data: the samples have a split to hold out; of yours it is --held-out, or a tenth.
    data = args.data or gt.testing.sample_data("audio")
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
        share = script.rate_guessing(train, held_out)
        print(f"guessing without listening is right in {share:.1%}")
    return trainer


if __name__ == "__main__":
    script.run_script(main)
