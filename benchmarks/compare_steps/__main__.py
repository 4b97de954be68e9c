"""Compare LoRA steps: plain transformers + PEFT, TRL's SFTTrainer, and ours.

    python -m benchmarks.compare_steps [--shares 0.1 0.25 1.0]
    python -m benchmarks.compare_steps FOLDER --peak-tflops 989 --output results

FOLDER holds a released config.json with its processor and tokenizer: a model of that size with
random weights (which cost what trained ones do) is saved and then loaded by load_model. Without
it, a shrunken model with E2B's proportions is; its sequences are short, its targets a share of
them. Text only, LoRA on all language linears.

Before any figure every mode must compute what plain does: a tiny float32 model over 20 optimizer
steps, then the model that is measured. A mode that does not ends the run. A mode that runs out of
memory is recorded as such.

CSV and a report are written anew after each shape.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.compare_steps import agreement, models, modes, report
from benchmarks.compare_steps.measure import Record, measure_shape
from gemma_tuner.device import choose_device, choose_dtype
from gemma_tuner.models.lora import unwrap_peft
from gemma_tuner.models.target_only import target_only_of
from gemma_tuner.testing.models.processor import tiny_processor
from gemma_tuner.testing.models.tiny import tiny_model

# Rows, tokens a row, targets a row: short answers on long prompts; all text; one short example.
SHAPES = ("16x850x80", "4x2048x2047", "1x1024x64")
SHARES = (0.1, 1.0)
# Two rows, of which one is padded, longer than the tiny model's window; several turns.
TINY_ROWS = ((96, ((10, 14), (80, 96))), (70, ((50, 70),)))


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    device, _ = choose_device(options.device)
    options.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        agreements = check_tiny(Path(folder) / "tiny", device, options.modes)
        _say({"agreement": [asdict(each) for each in agreements]})
        compare(options, device, Path(folder) / "measured", agreements)


def check_tiny(
    folder: Path,
    device: torch.device,
    names: Collection[str],
    extra: Callable[[Any], Sequence[modes.Mode]] = lambda base: (),
) -> list[agreement.Agreement]:
    """Train a tiny float32 model on this device in every mode; all must be the same training.

    Args:
        folder: For its checkpoint.
        device: Where.
        names: Of the modes.
        extra: Further modes of that model.
    """
    models.save(*tiny_model("gemma4-e2b"), folder)
    base, processor, _ = models.load_timed(folder, device, torch.float32, "device")
    built = modes.build_modes(
        base, processor, folder, rank=4, chunk_tokens=16, names={*names, modes.PLAIN_KEPT}
    )
    reference = next(mode for mode in built if mode.name == modes.PLAIN_KEPT)
    batches = [
        models.make_batch(TINY_ROWS, base, seed=step) for step in range(agreement.OPTIMIZER_STEPS)
    ]
    return agreement.check_training([*built, *extra(base)], reference, batches)


def compare(
    options: argparse.Namespace,
    device: torch.device,
    folder: Path,
    agreements: list[agreement.Agreement],
) -> None:
    """Build the model that is asked for, check its modes, measure them and write it down."""
    base, processor, loads = build_base(options, device, folder)
    for load in loads:
        _say({"load": asdict(load)})
    rank = options.rank or (16 if options.config_folder else 4)
    built = modes.build_modes(
        base,
        processor,
        folder,
        rank=rank,
        chunk_tokens=options.chunk,
        names={*options.modes, modes.PLAIN},
    )
    for mode in built:
        if mode.name.startswith("ours"):
            reason = target_only_of(unwrap_peft(mode.model)).reason
            _say({"mode": mode.name, "all positions": reason})
    shapes = options.shape or _default_shapes(options)
    batches = {shape: _make_batch(shape, base) for shape in shapes}
    agreements += _check_measured(built, base, batches)
    _say({"agreement": [asdict(each) for each in agreements]})

    name = options.config_folder.name if options.config_folder else "shrunken-e2b"
    facts = report.describe_machine(device)
    _say(facts)
    settings = {
        "dtype": str(base.dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in base.parameters()),
        "LoRA rank": rank,
        "loss chunk": options.chunk,
        "rounds": options.rounds,
        "peak_tflops": options.peak_tflops,
    }
    csv_path, report_path = report.name_files(options.output, options.name or name, facts)
    records: list[Record] = []
    for shape, batch in batches.items():
        records += measure_shape(
            shape,
            batch,
            built,
            loads,
            rounds=options.rounds,
            peak_tflops=options.peak_tflops,
            report=lambda record: _say({"first": asdict(record)}),
        )
        for record in records:
            if record.shape == shape:
                _say(asdict(record))
        report.write_csv(csv_path, facts, records)
        report.write_report(
            report_path, options.name or name, facts, settings, loads, agreements, records
        )
    _say({"written": [csv_path.name, report_path.name]})


def build_base(
    options: argparse.Namespace, device: torch.device, folder: Path
) -> tuple[Any, Any, list[models.Load]]:
    """Save a random checkpoint and load it, its per-layer table on disk and on the device.

    Returns:
        The model, all on the device, its processor, and what each loading took.
    """
    if options.config_folder:
        processor: Any = transformers.AutoProcessor.from_pretrained(options.config_folder)
        config: Any = transformers.AutoConfig.from_pretrained(options.config_folder)
        dtype, _ = choose_dtype(device, options.dtype, torch.bfloat16)
    else:
        processor = tiny_processor("gemma4-e2b")
        text = models.scale_shrunken(options.quarters)
        vocabulary = models.count_head_rows(text, processor)
        config = models.shrink_config(text, processor, vocabulary)
        dtype, _ = choose_dtype(device, options.dtype, torch.float32)
    models.save(models.build_random(config, device, dtype), processor, folder)
    loads = []
    if config.get_text_config().hidden_size_per_layer_input:
        loads.append(models.load_timed(folder, device, dtype, "disk")[2])
    base, processor, load = models.load_timed(folder, device, dtype, "device")
    return base, processor, [*loads, load]


def _check_measured(
    built: Sequence[modes.Mode], base: Any, batches: dict[str, Any]
) -> list[agreement.Agreement]:
    plain = next(mode for mode in built if mode.name == modes.PLAIN)
    if base.dtype == torch.float32:
        return [
            each
            for shape, batch in batches.items()
            for each in agreement.check_step(built, plain, batch, shape)
        ]
    # long enough for sliding layers to slide
    length = 2 * base.config.get_text_config().sliding_window
    rounding = [
        models.make_batch([(length, [(length - length // 8, length)])], base, seed=seed)
        for seed in range(agreement.ROUNDING_BATCHES)
    ]
    return agreement.check_rounding(built, plain, rounding, lambda text: _say({"note": text}))


def _make_batch(shape: str, base: Any) -> Any:
    rows, tokens, targets = map(int, shape.split("x"))
    return models.make_batch([(tokens, [(tokens - targets, tokens)])] * rows, base, seed=1)


def _default_shapes(options: argparse.Namespace) -> list[str]:
    if options.config_folder:
        return list(SHAPES)
    tokens = options.tokens
    return [f"1x{tokens}x{round(share * tokens)}" for share in options.shares]


def _say(found: dict[str, Any]) -> None:
    print(json.dumps(found), flush=True)


def _shape(text: str) -> str:
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isdigit() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not ROWSxTOKENSxTARGETS")
    if int(parts[2]) > int(parts[1]):
        raise argparse.ArgumentTypeError(f"{text!r} has more targets than tokens")
    return text


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="compare_steps",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("config_folder", nargs="?", type=Path, help="a released configuration and processor")
    add("--name", help="of the model, in the files' names (default: the folder's)")
    add("--device", help="mps, cuda or cpu (default: the first that is there)")
    add("--dtype", choices=("float32", "bfloat16"), help="of the weights (default: by the device)")
    add("--shape", action="append", type=_shape, help="ROWSxTOKENSxTARGETS, may be repeated")
    add("--shares", type=float, nargs="+", default=SHARES, help="of targets, without FOLDER")
    add("--tokens", type=int, default=256, help="of the one row, without FOLDER")
    add("--quarters", type=int, default=1, help="of E2B's lengths that the shrunken model has")
    add("--modes", nargs="+", choices=modes.NAMES, default=modes.NAMES, metavar="MODE")
    add("--rank", type=int, help="of the adapters (default: 16; 4 without FOLDER)")
    add("--rounds", type=int, default=3, help="timed steps of each mode")
    add("--chunk", type=int, default=256, help="rows of the head that ours has at a time")
    add("--peak-tflops", type=float, help="of the card in bfloat16, dense: 989 for an H200")
    add("--output", type=Path, default=Path("runs/benchmarks"), help="a folder")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
