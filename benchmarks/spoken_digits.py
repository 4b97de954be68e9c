"""Does LoRA teach a model to understand people? Spoken digits, from a base that heard none.

    python -m benchmarks.spoken_digits --data FOLDER [--output runs/spoken_digits]

FOLDER holds the Free Spoken Digit Dataset, or a part of it: ``manifest.jsonl`` (``split``,
``audio``, ``prompt``, ``response`` and ``speaker``) and the recordings it names. The two splits
hold other recordings of the same people; ``--unheard theo`` takes a person out of the training
split, so that the test split has a voice that nothing was trained on.

1. The base: a small Gemma 4 E2B (1.5 million weights; towers, shared keys and values and per-layer
   embeddings as released) is trained in full, by a plain loop, on the bundled sample set of
   synthesised words in an invented language. It never hears a person or a digit.
2. The adapter: ``Trainer`` trains LoRA on decoder, audio tower and projector with the training
   recordings and changed copies of them: another speed, loudness, start and noise.
3. ``evaluate`` asks both for the word, on the test recordings as they are. Guessing one of the
   ten words would be right once in ten.

One CPU thread is enough: a quarter of an hour.
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import transformers

import gemma_tuner as gt
from gemma_tuner.batch import Batch, Row, pad_rows
from gemma_tuner.testing.models.processor import tiny_processor

# Of both tasks: a small base has read no other.
PROMPT = "Transcribe."
MEL_BINS = 40
HIDDEN = 128
TEXT = {
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "global_head_dim": 32,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 32,
    "hidden_size_per_layer_input": 8,
    "final_logit_softcapping": 30.0,
    "initializer_range": 0.06,
}
AUDIO = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    # As many channels as mel bins, which the model assumes. The tiny model of the tests keeps 4
    # channels and 32 values a token: of what tells the digits apart, little passes.
    "subsampling_conv_channels": [MEL_BINS, 16],
    "output_proj_dims": HIDDEN,
    "initializer_range": 0.06,
}


def build_base(seed: int) -> tuple[Any, Any]:
    """A small Gemma 4 with random weights, and its processor."""
    processor: Any = tiny_processor("gemma4-e2b")
    processor.feature_extractor = transformers.Gemma4AudioFeatureExtractor(feature_size=MEL_BINS)
    tokenizer = processor.tokenizer
    vocabulary = {
        "vocab_size": len(tokenizer),
        "vocab_size_per_layer_input": len(tokenizer),
    }
    config = transformers.Gemma4Config(
        text_config=TEXT | vocabulary,
        vision_config=None,
        audio_config=AUDIO,
        boi_token_id=tokenizer.boi_token_id,
        eoi_token_id=tokenizer.eoi_token_id,
        image_token_id=tokenizer.image_token_id,
        boa_token_id=tokenizer.boa_token_id,
        eoa_token_index=tokenizer.eoa_token_id,
        audio_token_id=tokenizer.audio_token_id,
        video_token_id=processor.video_token_id,
    )
    torch.manual_seed(seed)
    return transformers.Gemma4ForConditionalGeneration(config), processor


def change_sound(sound: np.ndarray, rate_hz: int, generator: np.random.Generator) -> np.ndarray:
    """The same word at another speed and loudness, later, and with noise."""
    speed = generator.uniform(0.85, 1.18)
    sound = np.interp(np.arange(0, len(sound) - 1, speed), np.arange(len(sound)), sound)
    before, after = generator.integers(0, rate_hz // 10), generator.integers(0, rate_hz // 20)
    sound = np.pad(sound, (before, after)) * 10 ** generator.uniform(-0.4, 0.4)
    return sound + generator.normal(size=len(sound)) * 10 ** generator.uniform(-4.5, -2.5)


def name_copy(row: dict[str, Any], copy: int) -> str:
    return f"{Path(row['audio']).stem}.{copy}.wav"


def write_copies(
    rows: list[dict[str, Any]], folder: Path, target: Path, num_copies: int, seed: int
) -> None:
    """Write each row's recording and changed copies of it, as a data set with one instruction."""
    generator = np.random.default_rng(seed)
    target.mkdir(parents=True, exist_ok=True)
    lines = []
    for row in rows:
        sound, rate_hz = soundfile.read(folder / row["audio"])
        for copy in range(num_copies + 1):
            name = name_copy(row, copy)
            changed = change_sound(sound, rate_hz, generator) if copy else sound
            soundfile.write(target / name, changed.clip(-1, 1), rate_hz)
            line = {"id": name, "audio": name, "prompt": PROMPT, "response": row["response"]}
            lines.append(json.dumps(line) + "\n")
    (target / "manifest.jsonl").write_text("".join(lines))


def read_manifest(folder: Path, split: str) -> list[dict[str, Any]]:
    lines = (folder / "manifest.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["split"] == split]


def draw_batches(rows: list[Row], num_batches: int, size: int, seed: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_batches):
        chosen = torch.randint(len(rows), (size,), generator=generator).tolist()
        yield pad_rows(
            [rows[index] for index in chosen],
            max_tokens=2048,
            pad_token_id=0,
            token_type_name="mm_token_type_ids",
        )


def train_in_full(model: Any, rows: list[Row], num_steps: int, seed: int) -> None:
    """Every weight, with plain transformers and AdamW: what the library itself never does.

    The learning rate decides. At 2e-3 and above the model goes on ignoring the sound.
    """
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.98))
    for step, batch in enumerate(draw_batches(rows, num_steps, 32, seed)):
        rate = 7e-4 * min(1.0, (step + 1) / 20) * (1 - step / num_steps)
        optimizer.param_groups[0]["lr"] = rate
        loss = model(**batch.inputs, labels=batch.labels, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()


def make_base(output: Path, num_steps: int, seed: int) -> Path:
    """Train the base on the bundled synthesised words, and save it as a checkpoint."""
    words = gt.testing.sample_data("audio")
    write_copies(read_manifest(words, "train"), words, output / "words", 10, seed)
    model, processor = build_base(seed)
    collator = gt.AudioCollator(processor)
    stream = gt.stream_local(output / "words", cache_dir=output / "cache")
    rows = [collator.encode(stream[index]) for index in range(len(stream))]
    train_in_full(model, rows, num_steps, seed)
    model.save_pretrained(output / "base")
    processor.save_pretrained(output / "base")
    return output / "base"


def share_exact(report: gt.Report, speakers: dict[str, str], system: str) -> dict[str, float]:
    """The share of answers that are right, by speaker."""
    hits: dict[str, list[bool]] = {}
    for example in report.examples:
        right = example.answers[system].text.strip() == example.references[0]
        hits.setdefault(speakers[example.key], []).append(right)
    return {speaker: round(sum(right) / len(right), 2) for speaker, right in sorted(hits.items())}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("runs/spoken_digits"))
    parser.add_argument("--unheard", nargs="*", default=[], help="speakers not trained on")
    parser.add_argument("--base", type=Path, help="a base that an earlier run saved")
    parser.add_argument("--targets", nargs="+", default=["language", "audio", "projectors"])
    parser.add_argument("--base-steps", type=int, default=300)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--copies", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    started = time.perf_counter()

    base = args.base or make_base(args.output, args.base_steps, args.seed)
    base_seconds = time.perf_counter() - started

    heard = [
        row for row in read_manifest(args.data, "train") if row["speaker"] not in args.unheard
    ]
    write_copies(heard, args.data, args.output / "digits", args.copies, args.seed)
    cache = args.output / "cache"
    train = gt.stream_local(args.output / "digits", cache_dir=cache, seed=args.seed)
    asked = read_manifest(args.data, "test")
    write_copies(asked, args.data, args.output / "test", 0, args.seed)
    test = gt.stream_local(args.output / "test", cache_dir=cache)

    words = gt.testing.sample_data("audio")
    write_copies(read_manifest(words, "test"), words, args.output / "words-test", 0, args.seed)
    spoken_words = gt.stream_local(args.output / "words-test", cache_dir=cache)

    model, processor = gt.load_model(str(base), modalities=("text", "audio"), device="cpu")
    collator = gt.AudioCollator(processor)
    of_base = gt.evaluate(model, spoken_words, collator, max_new_tokens=8)
    model = gt.add_lora(model, gt.LoraConfig(rank=16, targets=tuple(args.targets)))
    config = gt.TrainConfig(
        max_steps=args.steps,
        batch_size=32,
        gradient_accumulation=1,
        learning_rate=3e-3,
        warmup_steps=20,
        weight_decay=0.01,
        betas=(0.9, 0.98),
        gradient_checkpointing=False,
        seed=args.seed,
        output_dir=args.output / "run",
    )
    gt.Trainer(model, train, collator, config).fit()
    report = gt.evaluate(
        model, test, collator, language="en", max_new_tokens=8, batch_size=50,
        scores=["exact_match", "wer"], output=args.output / "report",
    )  # fmt: skip
    speakers = {name_copy(row, 0): row["speaker"] for row in asked}
    result = {
        "recordings": {"train": len(heard), "test": len(test)},
        "unheard": args.unheard,
        "targets": args.targets,
        "base_on_synthesised_words": of_base["exact_match"].values["model"],
        "exact_match": report["exact_match"].values,
        "interval_of_the_difference": report["exact_match"].interval,
        "wer": report["wer"].values,
        "held_out_loss": {system: record.loss for system, record in report.held_out.items()},
        "by_speaker": share_exact(report, speakers, "adapter"),
        "base_seconds": round(base_seconds),
        "seconds": round(time.perf_counter() - started),
        "torch": torch.__version__,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
