"""One LoRA step at a checkpoint's real size, plain transformers + PEFT against ours, on a GPU.

    python benchmarks/real_size.py FOLDER [--batch 16] [--sequence 850] [--targets 80]

FOLDER holds a released ``config.json`` with its processor and tokenizer. A model of that size with
random weights is saved once in bf16 and loaded by ``load_model`` (text only), so that loading at
real size is exercised too. Random weights cost what trained ones do. Memory is the peak over what
is resident before the step.
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

import gemma_tuner as gt
from gemma_tuner.collators.batch import Batch, Row, pad_rows
from gemma_tuner.models.families import family_of
from gemma_tuner.models.loading import load_model
from gemma_tuner.models.lora import unwrap_peft
from gemma_tuner.training.loss import target_loss_sum


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
    return {
        "seconds": round(statistics.median(seconds[2:]), 4),
        "extra_peak_gb": round((torch.cuda.max_memory_allocated() - resident) / 1e9, 2),
        "loss": round(value, 5),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config_folder", type=Path)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--sequence", type=int, default=850)
    parser.add_argument("--targets", type=int, default=80)
    parser.add_argument("--steps", type=int, default=5)
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
    model.train()
    gemma = unwrap_peft(model)
    vocabulary = gemma.config.get_text_config().vocab_size
    batch = make_batch(args.batch, args.sequence, args.targets, vocabulary)
    for checkpointing in (True, False):
        if checkpointing:
            gemma.activation_checkpointing_enable({"use_reentrant": False})
        else:
            gemma.activation_checkpointing_disable()
        for name, loss in (
            ("plain", lambda: model(**batch.inputs, labels=batch.labels, use_cache=False).loss),
            (
                "ours",
                lambda: target_loss_sum(model, batch, chunk_tokens=256) / batch.num_target_tokens,
            ),
        ):
            result = {"step": name, "checkpointing": checkpointing}
            try:
                result |= measure(model, loss, args.steps)
            except torch.OutOfMemoryError:
                model.zero_grad(set_to_none=True)
                torch.cuda.empty_cache()
                result["extra_peak_gb"] = "out of memory"
            print(json.dumps(result), flush=True)
    print(json.dumps({"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}))


if __name__ == "__main__":
    main()
