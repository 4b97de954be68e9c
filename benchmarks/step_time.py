"""Time a LoRA step on the CPU at E2B's proportions: plain transformers + PEFT against ours.

    OMP_NUM_THREADS=1 python benchmarks/step_time.py [--sequence 256] [--shares 0.1 0.25 1.0]

A shrunken Gemma 4 with E2B's layers: 35, of which the last 20 share keys and values and have
double-wide MLPs, and a head as large beside the decoder as E2B's. fp32, LoRA on all language
linears. Plain is ``model(**inputs, labels=labels).loss.backward()`` with checkpointing, as HF's
Trainer does it. All steps are taken in turn within one run, so that a busy machine slows all
alike; medians are of the process's CPU seconds and of wall seconds. Loss and gradients of each
are compared with the plain step's before anything is timed.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any, Literal

import torch
import transformers
from torch import Tensor

from gemma_tuner.collators.batch import Batch, Row, pad_rows
from gemma_tuner.models.lora import LoraConfig, add_lora
from gemma_tuner.models.target_only import target_only_of
from gemma_tuner.training.loss import target_loss_sum
from gemma_tuner.training.modes import begin_training

# E2B's with every length a quarter, sequence, window and rank included, so that attention and
# adapters cost the same share as at 4 x the sequence. E2B's head is 0.22 of its decoder's weights.
SHRUNKEN = {
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 35,
    "num_kv_shared_layers": 20,
    "use_double_wide_mlp": True,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "global_head_dim": 128,
    "sliding_window": 128,
    "layer_types": [*["sliding_attention"] * 4, "full_attention"] * 7,
    "hidden_size_per_layer_input": 64,
    "final_logit_softcapping": 30.0,
}


Steps = dict[str, tuple[Callable[[], Tensor], Literal["all", "below", "none"]]]


def build(vocabulary: int) -> Any:
    config = transformers.Gemma4Config(
        text_config={
            **SHRUNKEN,
            "vocab_size": vocabulary,
            "vocab_size_per_layer_input": vocabulary,
        },
        vision_config=None,
        audio_config=None,
        image_token_id=4,
        audio_token_id=5,
        video_token_id=6,
    )
    torch.manual_seed(0)
    model = transformers.Gemma4ForConditionalGeneration(config).eval()
    model.requires_grad_(requires_grad=False)
    wrapped = add_lora(model, LoraConfig(rank=4))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    return wrapped


def make_batch(batch: int, sequence: int, share: float, vocabulary: int) -> Batch:
    generator = torch.Generator().manual_seed(1)
    rows = []
    for index in range(batch):
        ids = torch.randint(10, vocabulary, (sequence,), generator=generator)
        answer = torch.arange(sequence) >= sequence - round(share * sequence)
        rows.append(Row(str(index), ids, torch.zeros_like(ids), answer))
    return pad_rows(rows, max_tokens=sequence, pad_token_id=0, token_type_name="mm_token_type_ids")


def gradients(model: Any) -> Tensor:
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad(set_to_none=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--sequence", type=int, default=256)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1, 1.0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--chunk", type=int, default=256)
    args = parser.parse_args()

    decoder = sum(p.numel() for p in build(64).model.model.language_model.layers.parameters())
    vocabulary = round(0.22 * decoder / SHRUNKEN["hidden_size"])
    model = build(vocabulary)
    reason = target_only_of(model.get_base_model()).reason
    print(json.dumps({"decoder": decoder, "vocabulary": vocabulary, "fallback": reason}))
    for share in args.shares:
        batch = make_batch(args.batch, args.sequence, share, vocabulary)

        def plain(batch: Batch = batch) -> Tensor:
            return model(**batch.inputs, labels=batch.labels, use_cache=False).loss

        def ours(batch: Batch = batch) -> Tensor:
            loss = target_loss_sum(model, batch, chunk_tokens=args.chunk)
            return loss / batch.num_target_tokens

        steps: Steps = {
            "plain": (plain, "all"),
            "plain without checkpointing": (plain, "none"),
            "ours": (ours, "all"),
            "ours, checkpointing what runs at all positions": (ours, "below"),
            "ours without checkpointing": (ours, "none"),
        }
        compare(model, steps)
        for record in measure(model, steps, args.rounds):
            print(json.dumps({"share": share, "targets": batch.num_target_tokens, **record}))


def set_checkpointing(model: Any, layers: Literal["all", "below", "none"]) -> None:
    """Checkpoint all layers, those that run at all positions, or none."""
    begin_training(model, checkpointing=layers != "none")
    if layers == "below":
        gemma = model.get_base_model()
        for layer in gemma.model.language_model.layers[target_only_of(gemma).first_layer + 1 :]:
            layer.gradient_checkpointing = False


def compare(model: Any, steps: Steps) -> None:
    """Refuse to time steps that do not agree."""
    reference = None
    for name, (loss, layers) in steps.items():
        set_checkpointing(model, layers)
        value = loss()
        value.backward()
        found = float(value.detach()), gradients(model)
        reference = reference or found
        if abs(found[0] / reference[0] - 1) > 1e-5:
            raise SystemExit(f"{name}: loss {found[0]}, but plain {reference[0]}")
        cosine = float(torch.cosine_similarity(found[1], reference[1], dim=0))
        if cosine < 0.99999:
            raise SystemExit(f"{name}: gradients differ from plain's, cosine {cosine}")


def measure(model: Any, steps: Steps, rounds: int) -> list[dict[str, object]]:
    cpu: dict[str, list[float]] = {name: [] for name in steps}
    wall: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, (loss, layers) in steps.items():
            set_checkpointing(model, layers)
            started = time.process_time(), time.perf_counter()
            loss().backward()
            cpu[name].append(time.process_time() - started[0])
            wall[name].append(time.perf_counter() - started[1])
            model.zero_grad(set_to_none=True)
    return [
        {
            "step": name,
            "cpu_seconds": round(statistics.median(cpu[name]), 3),
            "wall_seconds": round(statistics.median(wall[name]), 3),
            "times_faster": round(
                statistics.median(cpu["plain"]) / statistics.median(cpu[name]), 2
            ),
        }
        for name in steps
    ]


if __name__ == "__main__":
    main()
