"""Fine-tune Gemma on rows in BigQuery whose pictures and speech lie in Cloud Storage.

    python recipes/stream_bigquery.py
    python recipes/stream_bigquery.py --table project.dataset.table --model google/gemma-4-E2B-it

Without flags it serves the bundled samples from local stand-ins for both services and trains a
tiny random model on a mix of three tables; nothing leaves the machine and no credentials are
needed. With --table it reads your table with your application-default credentials
(`gcloud auth application-default login`): only the columns that are needed, once; media are
downloaded as they are needed and kept in ~/.cache/gemma_tuner.
"""

import argparse
import contextlib
from collections.abc import Sequence
from pathlib import Path

import gemma_tuner as gt
from gemma_tuner.training.script import exit_if_stopped, run_script


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--table", help="project.dataset.table (default: samples, local servers)")
    parser.add_argument("--model", help="Hub name or folder (default: a tiny random model)")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps")
    parser.add_argument(
        "--out", default="runs/bigquery", help="folder for checkpoints and adapter"
    )
    parser.add_argument("--learning-rate", type=float, help="default: 2e-4; tiny model: 5e-3")
    parser.add_argument("--max-tokens", type=int, default=1024, help="longest example")
    parser.add_argument("--cache-dir", help="default: ~/.cache/gemma_tuner; samples: --out/cache")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    return parser.parse_args(argv)


def open_samples(
    cloud: gt.testing.LocalCloud, cache_dir: str
) -> tuple[gt.ExampleStream, gt.ExampleStream]:
    """Mix the three sample tables; their column `split` says what is held out."""
    streams = {
        (modality, split): gt.stream_bigquery(
            table, split=split, cache_dir=cache_dir, **cloud.clients()
        )
        for modality, table in cloud.tables.items()
        for split in ("train", "test")
    }
    weights = {"text": 0.4, "image": 0.3, "audio": 0.3}
    train, held_out = (
        gt.mix({streams[modality, split]: weight for modality, weight in weights.items()})
        for split in ("train", "test")
    )
    return train, held_out


def main(argv: Sequence[str] | None = None) -> gt.Trainer:
    args = parse_arguments(argv)

    # 1. The model, with everything that rows may hold: text, pictures and speech.
    if args.model:
        model, processor = gt.load_model(args.model, modalities=("text", "image", "audio"))
    else:
        model, processor = gt.testing.tiny_model("gemma4-e2b")
    targets = ("language", "vision", "audio")
    model = gt.add_lora(model, gt.LoraConfig(rank=16, alpha=32, targets=targets))

    with contextlib.ExitStack() as stack:
        # 2. The data: a table of yours, of which a tenth is held out, or the samples.
        if args.table:
            stream = gt.stream_bigquery(args.table, cache_dir=args.cache_dir)
            train, held_out = stream.split(0.1)
        else:
            cloud = stack.enter_context(gt.testing.LocalCloud())
            train, held_out = open_samples(cloud, args.cache_dir or f"{args.out}/cache")
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
        collator = gt.MultimodalCollator(processor, max_tokens=args.max_tokens)
        trainer = gt.Trainer(model, train, collator, config, eval_stream=held_out)
        print(trainer.preview())

        # 4. Train, and tell what was fetched, repeated and passed over.
        result = trainer.fit(resume=args.resume)
        print(train.report().progress)
    exit_if_stopped(result, __file__, argv)
    adapter = trainer.save(Path(args.out) / "adapter")
    losses = " → ".join(f"{record.loss:.4f} (step {record.step})" for record in result.held_out)
    print(f"held-out loss: {losses}\nadapter: {adapter}")
    return trainer


if __name__ == "__main__":
    run_script(main)
