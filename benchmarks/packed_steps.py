"""Time of a LoRA step on a packed base beside the same step on its bfloat16 base, in one run.

    python -m benchmarks.packed_steps FOLDER [--layers 8] [--grid symmetric-4-32] [--shape 4x2048]

FOLDER holds a released config.json; the weights are random. For the CPU ``--layers`` takes that
many of its layers (a multiple of 4), half of them sharing keys and values, and a small vocabulary;
its seconds are the process's own. Shapes are rows x tokens, of which the last quarter are targets.
The two steps alternate, and Python collects no garbage meanwhile; ratios are of the medians, of
the quickest, and of each pair. Unpacking alone is measured too: each matrix as it is done in
training, and by torch's operators.
"""

import argparse
import gc
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.compare_steps.models import build_random
from gemma_tuner.batch import Batch, Row, pad_rows
from gemma_tuner.device import choose_device, synchronize
from gemma_tuner.models.attention import use_attention
from gemma_tuner.models.few_bits.grids import Grid
from gemma_tuner.models.few_bits.layers import PackedLinear, list_packable, replace_packed
from gemma_tuner.models.few_bits.unpacking import unpack_plainly
from gemma_tuner.models.lora import LoraConfig, add_lora
from gemma_tuner.models.loss import target_loss_sum
from gemma_tuner.models.modes import begin_training
from gemma_tuner.models.norms import use_lean_norms

CHUNK = 256


def read_config(folder: Path, layers: int | None) -> Any:
    if layers is None:
        return transformers.AutoConfig.from_pretrained(folder)
    document = json.loads((folder / "config.json").read_text())
    kinds = ["sliding_attention", "full_attention"] * (layers // 2)
    document["text_config"] |= {
        "num_hidden_layers": layers,
        "num_kv_shared_layers": layers // 2,
        "layer_types": kinds,
        "vocab_size": 4096,
        "vocab_size_per_layer_input": 4096,
    }
    document["text_config"].pop("per_layer_config", None)
    with tempfile.TemporaryDirectory() as shrunken:
        (Path(shrunken) / "config.json").write_text(json.dumps(document))
        return transformers.AutoConfig.from_pretrained(shrunken)


def build(config: Any, device: torch.device, grid: Grid | None) -> Any:
    gemma = build_random(config, device, torch.bfloat16)
    if grid is not None:
        replace_packed(gemma, list_packable(gemma, grid))
    use_attention(gemma)
    use_lean_norms(gemma)
    return add_lora(gemma, LoraConfig(rank=16))


def make_batch(rows: int, tokens: int) -> Batch:
    ids = torch.randint(10, 1000, (tokens,), generator=torch.Generator().manual_seed(0))
    row = Row("", ids, torch.zeros_like(ids), torch.arange(tokens) >= tokens - tokens // 4)
    return pad_rows(
        [row] * rows, max_tokens=tokens, pad_token_id=0, token_type_name="mm_token_type_ids"
    )


def read_clock(device: torch.device) -> float:
    synchronize(device)
    return time.process_time() if device.type == "cpu" else time.perf_counter()


def time_step(model: Any, batch: Batch, device: torch.device) -> float:
    start = read_clock(device)
    loss = target_loss_sum(model, batch.to(device), chunk_tokens=CHUNK)
    (loss / batch.num_target_tokens).backward()
    model.zero_grad(set_to_none=True)
    return read_clock(device) - start


def compare(models: dict[str, Any], batch: Batch, device: torch.device, repeats: int) -> Any:
    for model in models.values():
        time_step(model, batch, device)
    gc.collect()
    gc.disable()
    try:
        times = [
            {name: time_step(model, batch, device) for name, model in models.items()}
            for _ in range(repeats)
        ]
    finally:
        gc.enable()

    def summarise(take: Any) -> dict[str, float]:
        found = {name: take(each[name] for each in times) for name in models}
        ratio = found["packed"] / found["dense"]
        return {name: round(value, 4) for name, value in (found | {"ratio": ratio}).items()}

    return {
        "median": summarise(statistics.median),
        "quickest": summarise(min),
        "pairs": sorted(round(each["packed"] / each["dense"], 3) for each in times),
    }


def time_unpacking(model: Any, device: torch.device) -> dict[str, float]:
    """Seconds of unpacking every matrix once."""
    layers = [module for module in model.modules() if isinstance(module, PackedLinear)]

    def run(unpack: Any) -> float:
        seconds = []
        for _ in range(5):
            start = read_clock(device)
            for layer in layers:
                unpack(layer)
            seconds.append(read_clock(device) - start)
        return round(statistics.median(seconds), 5)

    return {
        "chosen": run(lambda layer: layer.weight),
        "torch's operators": run(lambda layer: unpack_plainly(layer._find(""), layer.grid.bits)),
        "matrices": len(layers),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config_folder", type=Path)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--grid", type=Grid.parse, default=Grid(4, 32))
    parser.add_argument("--shape", action="append", help="rows x tokens, as 4x2048")
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    device, _ = choose_device()
    models = {
        name: build(read_config(args.config_folder, args.layers), device, grid)
        for name, grid in (("dense", None), ("packed", args.grid))
    }
    print(json.dumps({"device": str(device), "torch": torch.__version__, "grid": str(args.grid)}))
    print(json.dumps({"unpacking": time_unpacking(models["packed"], device)}), flush=True)
    for shape in args.shape or ("4x2048", "1x1024"):
        batch = make_batch(*map(int, shape.split("x")))
        for checkpointed in (None, 0):
            for model in models.values():
                begin_training(model, checkpointed_layers=checkpointed)
            found = compare(models, batch, device, args.repeats)
            layers = "all" if checkpointed is None else "none"
            print(json.dumps({"shape": shape, "checkpointed": layers, **found}), flush=True)


if __name__ == "__main__":
    main()
