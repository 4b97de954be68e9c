"""One LoRA step at a checkpoint's real size, plain transformers + PEFT against ours, on a GPU.

    python benchmarks/real_size.py FOLDER [--shape 16x850x80 --shape 4x2048x2047 ...]

FOLDER holds a released ``config.json`` with its processor and tokenizer. A model of that size with
random weights is saved once in bf16 and loaded by ``load_model`` (text only), so that loading at
real size is exercised too. Random weights cost what trained ones do. A shape is rows x tokens a
row x targets at each row's end. Memory is the peak over what is resident before the step; work is
what torch's flop counter counts in one step. Losses are printed to be
compared.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import gemma_tuner as gt
from gemma_tuner.collators.batch import Batch, Row, pad_rows
from gemma_tuner.models.families import family_of
from gemma_tuner.models.loading import load_model
from gemma_tuner.models.lora import unwrap_peft
from gemma_tuner.models.target_only import target_only_of
from gemma_tuner.training.loss import target_loss_sum
from gemma_tuner.training.modes import begin_training

# Rows, tokens a row, targets a row: short answers on long prompts; all text; one short example.
SHAPES = ("16x850x80", "4x2048x2047", "1x1024x64")


def save_random_checkpoint(config_folder: Path, folder: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(config_folder)
    config.vision_config = config.audio_config = None
    model_class = getattr(transformers, family_of(config).model_class)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = model_class(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder, max_shard_size="5GB")
    transformers.AutoProcessor.from_pretrained(config_folder).save_pretrained(folder)


def make_batch(batch: int, sequence: int, targets: int, vocabulary: int) -> Batch:
    generator = torch.Generator().manual_seed(1)
    rows = []
    for index in range(batch):
        ids = torch.randint(10, vocabulary, (sequence,), generator=generator)
        answer = torch.arange(sequence) >= sequence - targets
        rows.append(Row(str(index), ids, torch.zeros_like(ids), answer))
    return pad_rows(
        rows, max_tokens=sequence, pad_token_id=0, token_type_name="mm_token_type_ids"
    ).to(torch.device("cuda"))


def measure(model: Any, loss: Callable[[], Tensor], steps: int) -> dict[str, float]:
    with FlopCounterMode(display=False) as counter:
        loss().backward()
    model.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    resident = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    seconds, value = [], 0.0
    for _ in range(steps + 2):
        torch.cuda.synchronize()
        started = time.perf_counter()
        result = loss()
        result.backward()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        value = float(result.detach())
        del result
        model.zero_grad(set_to_none=True)
    median = statistics.median(seconds[2:])
    return {
        "seconds": round(median, 4),
        "extra_peak_gb": round((torch.cuda.max_memory_allocated() - resident) / 1e9, 2),
        "tflop": round(counter.get_total_flops() / 1e12, 2),
        "tflop_per_second": round(counter.get_total_flops() / 1e12 / median),
        "loss": round(value, 5),
    }


def measure_shape(model: Any, shape: str, steps: int, chunk: int) -> None:
    rows, sequence, targets = map(int, shape.split("x"))
    vocabulary = unwrap_peft(model).config.get_text_config().vocab_size
    batch = make_batch(rows, sequence, targets, vocabulary)

    def plain() -> Tensor:
        return model(**batch.inputs, labels=batch.labels, use_cache=False).loss

    def ours() -> Tensor:
        return target_loss_sum(model, batch, chunk_tokens=chunk) / batch.num_target_tokens

    plain_seconds = None
    gemma = unwrap_peft(model)
    for name, loss, checkpointing in (
        ("plain", plain, True),
        ("ours", ours, True),
        ("ours, checkpointing what runs at all positions", ours, True),
        ("ours without checkpointing", ours, False),
    ):
        begin_training(model, checkpointing=checkpointing)
        if "what runs" in name:
            first = target_only_of(gemma).first_layer + 1
            for layer in gemma.model.language_model.layers[first:]:
                layer.gradient_checkpointing = False
        result: dict[str, object] = {"shape": shape, "step": name}
        try:
            found = measure(model, loss, steps)
        except torch.OutOfMemoryError:
            model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            result["extra_peak_gb"] = "out of memory"
        else:
            plain_seconds = plain_seconds or (found["seconds"] if name == "plain" else None)
            result |= found
            if plain_seconds:
                result["of_plain_seconds"] = round(found["seconds"] / plain_seconds, 3)
        print(json.dumps(result), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config_folder", type=Path)
    parser.add_argument("--shape", action="append", help="rows x tokens x targets, as 16x850x80")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--chunk", type=int, default=256, help="rows of the head at a time")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        save_random_checkpoint(args.config_folder, Path(folder))
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        model, _ = load_model(folder)
        load_seconds = time.perf_counter() - started
    print(
        json.dumps(
            {
                "parameters": sum(p.numel() for p in model.parameters()),
                "load_seconds": round(load_seconds, 1),
                "load_peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
                "resident_gb": round(torch.cuda.memory_allocated() / 1e9, 2),
            }
        )
    )
    model = gt.add_lora(model, gt.LoraConfig(rank=16))
    print(json.dumps({"fallback": target_only_of(unwrap_peft(model)).reason}))
    for shape in args.shape or SHAPES:
        measure_shape(model, shape, args.steps, args.chunk)
    print(json.dumps({"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}))


if __name__ == "__main__":
    main()
