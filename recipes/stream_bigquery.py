"""Fine-tune Gemma on rows in BigQuery whose images and speech lie in Cloud Storage.

    python recipes/stream_bigquery.py
    python recipes/stream_bigquery.py --table project.dataset.table --model google/gemma-4-E2B-it

Different from multimodal.py: rows and media are streamed, and any row may be text alone.
Without flags it serves the bundled samples from local stand-ins for both services and trains a
tiny random model on a mix of three tables; nothing leaves the machine and no credentials are
needed. With --table it reads your table with your application-default credentials
(`gcloud auth application-default login`): only the columns that are needed, once; media are
downloaded as they are needed and kept in ~/.cache/gemma_tuner.
"""

import contextlib
from collections.abc import Sequence
from functools import partial

import gemma_tuner as gt
from gemma_tuner.cli import recipe


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
    args = recipe.read_arguments(__file__, argv, "table", "held_out", "cache_dir")

    # 1. The model, with everything that rows may hold: text, images and speech.
    if args.model == "tiny":
        model, processor = gt.testing.tiny_model("gemma4-e2b")
    else:
        model, processor = gt.load_model(
            args.model, modalities=("text", "image", "audio"), bits=args.bits
        )
    targets = ("language", "vision", "audio")
    model = gt.add_lora(model, gt.LoraConfig(rank=16, alpha=32, targets=targets))

    with contextlib.ExitStack() as stack:
        # 2. The data: a table of yours, or the samples.
        if args.table:
            open_stream = partial(gt.stream_bigquery, args.table, cache_dir=args.cache_dir)
            train, held_out = recipe.open_splits(open_stream, args.held_out)
        else:
            cloud = stack.enter_context(gt.testing.LocalCloud())
            train, held_out = open_samples(cloud, args.cache_dir or f"{args.out}/cache")
        print(train.report())

        # 3. The trainer.
        collator = gt.MultimodalCollator(processor, max_tokens=args.max_tokens)
        trainer = gt.Trainer(model, train, collator, args.config, eval_stream=held_out)
        print(trainer.preview())

        # 4. Train, and tell what was fetched, repeated and passed over.
        result = recipe.fit(trainer, args)
        print(train.report().progress)
    adapter = trainer.save(args.out / "adapter")
    print(f"{recipe.show_losses(result)}\nadapter: {adapter}")
    return trainer


if __name__ == "__main__":
    recipe.run(main)
