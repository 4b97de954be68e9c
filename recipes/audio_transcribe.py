"""Fine-tune Gemma on speech: transcripts, translations, or questions about what is heard.

    python recipes/audio.py
    python recipes/audio.py --model google/gemma-4-E2B-it --data calls.jsonl --steps 500

Different from text.py: the audio tower is loaded, the adapter reaches it as well as the language
part, and ``--split-long`` says what happens to clips of more than 30 seconds.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import gemma_tuner as gt
from gemma_tuner.training.script import exit_if_stopped, run_script


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", help="Hub name or folder (default: a tiny random model)")
    parser.add_argument("--data", help="JSONL, CSV or Parquet file, or folder (default: samples)")
    parser.add_argument(
        "--held-out", help="name of the held-out split (default: a tenth, by hash)"
    )
    parser.add_argument("--steps", type=int, default=240, help="optimizer steps")
    parser.add_argument("--out", default="runs/audio", help="folder for checkpoints and adapter")
    parser.add_argument("--learning-rate", type=float, help="default: 2e-4; tiny model: 5e-3")
    parser.add_argument("--max-tokens", type=int, default=1024, help="longest example")
    parser.add_argument("--split-long", action="store_true", help="split clips over 30 seconds")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> gt.Trainer:
    args = parse_arguments(argv)

    # 1. The model: the language part and the audio tower are built and read.
    if args.model:
        model, processor = gt.load_model(args.model, modalities=("text", "audio"))
    else:
        model, processor = gt.testing.tiny_model("gemma4-e2b")
    model = gt.add_lora(model, gt.LoraConfig(rank=16, alpha=32, targets=("language", "audio")))

    # 2. The data: the samples and --held-out have a split column; else a tenth is held out.
    if args.data and not args.held_out:
        train, held_out = gt.stream_local(args.data).split(0.1)
    else:
        data, name = args.data or gt.testing.sample_data("audio"), args.held_out or "test"
        train, held_out = (gt.stream_local(data, split=split) for split in ("train", name))
    print(train.report())

    # 3. The trainer.
    config = gt.TrainConfig(
        max_steps=args.steps,
        batch_size=4,
        gradient_accumulation=2,
        learning_rate=args.learning_rate or (2e-4 if args.model else 5e-3),
        warmup_steps=min(10, args.steps // 10),
        eval_every_steps=max(1, args.steps // 4),
        output_dir=args.out,
    )
    collator = gt.AudioCollator(
        processor,
        max_tokens=args.max_tokens,
        long_audio="split" if args.split_long else "error",
    )
    trainer = gt.Trainer(model, train, collator, config, eval_stream=held_out)
    print(trainer.preview())

    # 4. Train; the held-out loss is measured before, in between and after.
    result = trainer.fit(resume=args.resume)
    exit_if_stopped(result, __file__, argv)
    adapter = trainer.save(Path(args.out) / "adapter")
    losses = " → ".join(f"{record.loss:.4f} (step {record.step})" for record in result.held_out)
    print(f"held-out loss: {losses}\nadapter: {adapter}")
    return trainer


if __name__ == "__main__":
    run_script(main)
