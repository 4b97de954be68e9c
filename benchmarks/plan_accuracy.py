"""Predicted against measured peak memory of a LoRA step at a checkpoint's real size, on a GPU.

    python -m benchmarks.plan_accuracy FOLDER [--shape 1x2048x512 ...] [--packed symmetric-4-32]
        [--packed-table affine-8-64]

FOLDER holds a released config.json. A model of that size with random weights takes one step for
each shape (rows x tokens x targets a row) and each number of checkpointed layers; its peak is
CUDA's ``max_memory_allocated``, its time the median of five. The prediction is
:class:`StepTracer`'s, which has no weights.
"""

import argparse
import gc
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.compare_steps.models import build_random
from gemma_tuner.batch import Batch, Row, pad_rows
from gemma_tuner.models.attention import use_attention
from gemma_tuner.models.few_bits.grids import Grid
from gemma_tuner.models.few_bits.layers import list_packable, replace_packed
from gemma_tuner.models.few_bits.tables import name_table, replace_table
from gemma_tuner.models.lora import LoraConfig, add_lora
from gemma_tuner.models.loss import target_loss_sum
from gemma_tuner.models.meta import build_meta_copy
from gemma_tuner.models.modes import begin_training
from gemma_tuner.models.norms import use_lean_norms
from gemma_tuner.planning.trace import StepTracer

SHAPES = ("1x2048x512", "4x850x80", "2x1024x1023", "8x400x40")
CHUNK = 256


def run_step(model: Any, batch: Batch) -> None:
    loss = target_loss_sum(model, batch.to(torch.device("cuda")), chunk_tokens=CHUNK)
    (loss / batch.num_target_tokens).backward()
    model.zero_grad(set_to_none=True)


def measure_step(model: Any, batch: Batch) -> tuple[int, int]:
    """Bytes that lie there between steps, and those on top of them at a step's peak."""
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    resident = torch.cuda.memory_allocated()
    run_step(model, batch)
    return resident, torch.cuda.max_memory_allocated() - resident


def measure_seconds(model: Any, batch: Batch) -> float:
    """The median of five steps."""
    seconds = []
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run_step(model, batch)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config_folder", type=Path)
    parser.add_argument("--shape", action="append", help="rows x tokens x targets, as 1x2048x512")
    parser.add_argument("--packed", type=Grid.parse, help="a grid of the decoder's weights")
    parser.add_argument("--packed-table", type=Grid.parse, help="of embedding and head")
    args = parser.parse_args()
    device = torch.device("cuda")
    config = transformers.AutoConfig.from_pretrained(args.config_folder)
    gemma = build_random(config, device, torch.bfloat16)
    grids = list_packable(gemma, args.packed) if args.packed else {}
    if args.packed_table:
        grids[name_table(config.model_type)] = args.packed_table
    if grids:
        replace_packed(gemma, replace_table(gemma, grids))
        gemma.config.packed = {name: str(grid) for name, grid in grids.items()}
    use_attention(gemma)
    use_lean_norms(gemma)
    model = add_lora(gemma, LoraConfig(rank=16))
    layers = gemma.model.language_model.layers
    own = sum(not layer.self_attn.is_kv_shared_layer for layer in layers)
    step = StepTracer(build_meta_copy(model), device, accumulates=False)
    for shape in args.shape or SHAPES:
        rows, tokens, targets = map(int, shape.split("x"))
        ids = torch.randint(10, 1000, (tokens,))
        is_target = torch.arange(tokens) >= tokens - targets
        row = Row("", ids, torch.zeros_like(ids), is_target)
        batch = pad_rows(
            [row] * rows, max_tokens=tokens, pad_token_id=0, token_type_name="mm_token_type_ids"
        )
        for count in (0, own, len(layers)):
            begin_training(model, checkpointed_layers=count)
            measure_step(model, batch)  # the first also makes workspaces
            resident, measured = measure_step(model, batch)
            found = step.measure(
                batch,
                checkpointed_layers=count,
                loss_chunk_tokens=CHUNK,
                query_chunk_tokens=None,
            )
            weights = found.resident_bytes - found.resident["moments"]
            record = {
                "shape": shape,
                "checkpointed_layers": count,
                "resident_gb": [round(x / 1e9, 3) for x in (weights, resident)],
                "step_gb": [round(x / 1e9, 3) for x in (found.step_bytes, measured)],
                "peak_ratio": round((weights + found.step_bytes) / (resident + measured), 4),
                "step_ratio": round(found.step_bytes / measured, 4),
                "seconds": round(measure_seconds(model, batch), 4),
                "packed": sorted({str(grid) for grid in grids.values()}),
            }
            print(json.dumps(record), flush=True)
    print(json.dumps({"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}))


if __name__ == "__main__":
    main()
