"""What a change of structure must not change, recorded and compared bit for bit.

    python -m benchmarks.trajectory record before.json
    python -m benchmarks.trajectory compare before.json

Of every family and modality: losses, gradient norms, checkpoints and the adapter's bytes of a
short run with dropout that is stopped and resumed; of streams: keys and states at every place; of
plans: their text; of exports: every file. On the CPU, on one thread and with public names only,
so that one version's record can be held against another's on the same machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers.utils import logging

import gemma_tuner as gt

TARGETS = {
    "gemma4-e2b": ("language", "vision", "audio", "projectors"),
    "gemma4-12b": ("language", "projectors"),
    "gemma4-26b-a4b": ("language", "vision", "projectors", "experts"),
    "gemma4-31b": ("language", "vision", "projectors"),
    "gemma3n": ("language", "audio", "projectors"),
}
WITHOUT_AUDIO = ("gemma4-26b-a4b", "gemma4-31b")
EXPORTS: dict[str, Callable[[Path, Path, Path], object]] = {
    "merged": lambda run, base, out: gt.export_merged(run, out, base=base),
    "mlx-vlm": lambda run, base, out: gt.export_mlx(run, out, base=base, program="mlx-vlm"),
    "gguf": lambda run, base, out: gt.export_gguf(run, out, base=base),
    "gguf q8_0": lambda run, base, out: gt.export_gguf(run, out, base=base, file_type="q8_0"),
}
LANGUAGE_EXPORTS: dict[str, Callable[[Path, Path, Path], object]] = {
    "mlx-lm": lambda run, base, out: gt.export_mlx(run, out, base=base),
    "gguf adapter": lambda run, base, out: gt.export_gguf_adapter(run, out, base=base),
}
LOGGED = ("kind", "step", "loss", "grad_norm", "learning_rate", "tokens", "target_tokens")


def hash_path(path: Path) -> str | dict[str, str]:
    """Hash a file, or each file of a folder."""
    if path.is_dir():
        return {
            str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()[:24]
            for file in sorted(path.rglob("*"))
            if file.is_file()
        }
    return hashlib.sha256(path.read_bytes()).hexdigest()[:24]


def record_run(family: str, modality: Any, folder: Path) -> dict[str, Any]:
    """Train three steps, resume for two more."""
    for max_steps in (3, 5):
        model, processor = gt.testing.tiny_model(family)
        targets = TARGETS[family]
        dropout = 0.0 if "experts" in targets else 0.1  # which adapters on experts do not know
        model = gt.add_lora(model, gt.LoraConfig(rank=4, dropout=dropout, targets=targets))
        stream = gt.stream_local(
            gt.testing.sample_data(modality), ignore="split", cache_dir=folder / "cache"
        )
        rest, held_out = stream.split(0.2)
        config = gt.TrainConfig(
            max_steps=max_steps,
            batch_size=2,
            gradient_accumulation=2,
            learning_rate=1e-2,
            log_every_steps=1,
            progress=False,
            output_dir=folder / "run",
        )
        collator = gt.MultimodalCollator(processor)
        trainer = gt.Trainer(model, rest, collator, config, eval_stream=held_out.take(4))
        # Every tower has adapters, so that all are compared; a run on other data is refused that.
        with mock.patch("gemma_tuner.training.data_check.check_media_kinds"):
            trainer.fit(resume=max_steps == 5)
    trainer.save(folder / "adapter")
    lines = (folder / "run" / "log.jsonl").read_text().splitlines()
    states = sorted((folder / "run").rglob("trainer_state.json"))
    return {
        "log": [
            {name: record[name] for name in LOGGED if name in record}
            for record in map(json.loads, lines)
            if record["kind"] in ("step", "eval")
        ],
        "checkpoints": {path.parent.name: json.loads(path.read_text()) for path in states},
        "adapter": hash_path(folder / "adapter"),
        "preview": str(trainer.preview()),
    }


def record_stream(stream: gt.ExampleStream, count: int = 40) -> list[Any]:
    """The key handed out at each place, and the state after it."""
    found: list[Any] = []
    while len(found) < count:
        for example in stream:
            found.append([example.key, json.loads(json.dumps(stream.state_dict()))])
            if len(found) == count:
                break
    return found


def record_streams(folder: Path) -> dict[str, Any]:
    streams = {
        name: gt.stream_local(
            gt.testing.sample_data(name), ignore="split", cache_dir=folder / "cache", seed=3
        )
        for name in ("text", "image", "audio")
    }
    found = {name: record_stream(stream) for name, stream in streams.items()}
    found["split"] = record_stream(streams["image"].split(0.3)[0].take(7).shard(1, 2))
    found["mix"] = record_stream(gt.mix({s: 1 + i for i, s in enumerate(streams.values())}))
    with gt.testing.LocalCloud() as cloud:
        for name, table in cloud.tables.items():
            stream = gt.stream_bigquery(
                table, ignore="split", cache_dir=folder / "cloud", **cloud.clients()
            )
            found[f"bigquery {name}"] = record_stream(stream)
        rows = b'{"id": "a", "prompt": "See", "response": "A", "image": "images/a.png"}\n'
        picture = next(Path(gt.testing.sample_data("image")).rglob("*.png")).read_bytes()
        cloud.gcs.put("data", "set/rows.jsonl", rows, generation=901)
        cloud.gcs.put("data", "set/images/a.png", picture, generation=902)
        stream = gt.stream_gcs(
            "gs://data/set/rows.jsonl", cache_dir=folder / "cloud", gcs_client=cloud.gcs.client()
        )
        found["gcs"] = record_stream(stream, 3)
    return found


def record_exports(family: str, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    base = folder / "base"
    every = ("text", "image", "audio") if family not in WITHOUT_AUDIO else ("text", "image")
    gt.testing.save_tiny_model(family, base)
    if family != "gemma4-26b-a4b":  # torch traces its experts' products in bfloat16 alone
        found["plan"] = str(gt.plan(base, memory_gib=8, modalities=every, max_tokens=2048))
    for targets in (("language",), TARGETS[family]):
        model, processor = gt.load_model(base, modalities=every, device="cpu", dtype="float32")
        model = gt.add_lora(model, gt.LoraConfig(rank=4, alpha=8, targets=targets))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.02, generator=generator)
        name = " ".join(targets)
        adapter = gt.export_adapter(model, folder / f"adapter {name}", processor=processor)
        found[f"adapter {name}"] = hash_path(adapter)
        exports = LANGUAGE_EXPORTS if targets == ("language",) else EXPORTS
        for kind, export in exports.items():
            out = folder / f"{kind} {name}.gguf" if "gguf" in kind else folder / f"{kind} {name}"
            try:
                export(adapter, base, out)
            except gt.GemmaTunerError as error:  # what a format cannot hold is refused
                found[f"{kind} {name}"] = type(error).__name__
            else:
                found[f"{kind} {name}"] = hash_path(out)
    return found


def record() -> dict[str, Any]:
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found["streams"] = record_streams(folder / "streams")
        for family in TARGETS:
            for modality in ("text", "image", "audio"):
                if modality == "audio" and family in WITHOUT_AUDIO:
                    continue
                run = f"{family} {modality}"
                found[run] = record_run(family, modality, folder / run)
                print(run, file=sys.stderr)
            found[f"{family} exports"] = record_exports(family, folder / f"exports {family}")
    return json.loads(json.dumps(found))


def list_changes(before: Any, after: Any, path: str = "") -> list[str]:
    """Name every place at which two records differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        return [
            change
            for name in sorted(before.keys() | after.keys())
            for change in list_changes(before.get(name), after.get(name), f"{path}/{name}")
        ]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = enumerate(zip(before, after, strict=True))
        return [c for i, (b, a) in pairs for c in list_changes(b, a, f"{path}/{i}")]
    return [] if before == after else [f"{path}: {str(before)[:60]} -> {str(after)[:60]}"]


def count_values(found: Any) -> int:
    if isinstance(found, dict):
        return sum(map(count_values, found.values()))
    return sum(map(count_values, found)) if isinstance(found, list) else 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=("record", "compare"))
    parser.add_argument("file", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    found = record()
    if arguments.action == "record":
        arguments.file.write_text(json.dumps(found, indent=1))
        return
    changes = list_changes(json.loads(arguments.file.read_text()), found)
    print("\n".join(changes) or f"{count_values(found):,} recorded values are equal")
    sys.exit(bool(changes))


if __name__ == "__main__":
    main()
