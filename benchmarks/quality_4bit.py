"""What bases of 8 and 4 bits cost in quality: LoRA of a real pretrained model, over several grids.

    python benchmarks/quality_4bit.py MODEL MANIFEST OUT.jsonl [GRID ...] [--rank 8] [--seeds 3]

MODEL is the folder of a causal language model of transformers, MANIFEST WikiSQL's rows (JSON
lines with split, prompt, response). Each line of OUT holds the mean loss of held-out target tokens
before training, after it, and after the adapter was merged: into the values that were trained on,
into the original weights, into values that are quantised anew, and for QA-LoRA into biases of two
dtypes. The layers are the library's; the family is not, so the model is transformers' own. NF4's
values are bitsandbytes', made here (``--check-nf4`` compares them with the package, where it is).
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import peft
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from gemma_tuner.models.few_bits.grids import Grid, Packed
from gemma_tuner.models.few_bits.layers import PackedLinear, replace_packed
from gemma_tuner.models.lora import wrap_peft

GRIDS: dict[str, Any] = {
    "base": None,
    "affine-8-64": Grid(8, 64, is_affine=True),
    "affine-4-64": Grid(4, 64, is_affine=True),
    "symmetric-4-32": Grid(4, 32),
    "nf4-64": None,
    "qalora-4-64": Grid(4, 64, is_affine=True),
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Source: QLoRA, arXiv 2305.14314, appendix E.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


class Rows:
    """Questions and answers, as ids of a tokenizer."""

    def __init__(self, folder: str, manifest: str, steps: int, device: str):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        rows = [json.loads(line) for line in Path(manifest).read_text().splitlines()]

        def encode(row: Any):
            prompt = tokenizer(row["prompt"] + "\nA: ").input_ids
            answer = [*tokenizer(row["response"], add_special_tokens=False).input_ids, 1]
            return prompt, answer

        of = {
            split: [row for row in rows if row["split"] == split] for split in ("train", "valid")
        }
        self.train = [encode(row) for row in of["train"][: 4 * steps]]
        self.valid = sorted(map(encode, of["valid"][:100]), key=lambda row: len(row[0]))
        self.device = device

    def loss_sum(self, model: Any, rows: Any):
        """Sum the losses of the answers' tokens; return how many there are."""
        length = max(len(prompt) + len(answer) for prompt, answer in rows)
        ids, labels, mask = (torch.zeros(len(rows), length, dtype=torch.long) for _ in range(3))
        labels -= 100
        for i, (prompt, answer) in enumerate(rows):
            end = len(prompt) + len(answer)
            ids[i, :end], mask[i, :end] = torch.tensor(prompt + answer), 1
            labels[i, len(prompt) : end] = torch.tensor(answer)
        ids, labels, mask = (part.to(self.device) for part in (ids, labels, mask))
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        hidden = inner.model(input_ids=ids, attention_mask=mask).last_hidden_state
        at = labels[:, 1:] != -100
        scores = inner.lm_head(hidden[:, :-1][at]).float()
        return F.cross_entropy(scores, labels[:, 1:][at], reduction="sum"), int(at.sum())

    @torch.no_grad()
    def evaluate(self, model: Any):
        """Mean loss of a held-out target token."""
        parts = [self.loss_sum(model, self.valid[i : i + 10]) for i in range(0, 100, 10)]
        return round(sum(float(loss) for loss, _ in parts) / sum(n for _, n in parts), 4)


def round_nf4(weight: torch.Tensor):
    """The values that bitsandbytes keeps in blocks of 64, steps in float32."""
    table = torch.tensor(NF4, device=weight.device)
    middles = (table[1:] + table[:-1]) / 2
    grouped = weight.float().unflatten(-1, (-1, 64))
    top = grouped.abs().amax(-1, keepdim=True)
    return (table[torch.bucketize(grouped / top, middles)] * top).flatten(-2).to(weight.dtype)


def list_layers(model: Any):
    """The decoder's linear layers by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | PackedLinear) and name.endswith(tuple(TARGETS))
    }


def requantise(name: str, weight: torch.Tensor):
    """What a grid makes of a weight."""
    if name == "nf4-64":
        return round_nf4(weight)
    return GRIDS[name].unpack(GRIDS[name].pack(weight))


def set_dense(model: Any, weights: Any):
    """Give each layer a weight of its own, in the model's dtype."""
    for name, weight in weights.items():
        layer = nn.Linear(*weight.T.shape, bias=False, device="meta")
        layer.weight = nn.Parameter(weight.to(torch.bfloat16), requires_grad=False)
        model.set_submodule(name, layer)


def read_deltas(model: Any, names: Any):
    """What each adapter adds to its layer's weight, in float32; and the same where pooled."""
    deltas, pooled = {}, {}
    for name in names:
        adapter = model.get_base_model().get_submodule(name)
        a, b = adapter.lora_A["default"], adapter.lora_B["default"].weight.detach()
        spread = (a.spread() if hasattr(a, "spread") else a.weight).detach()
        deltas[name] = b @ spread * adapter.scaling["default"]
        if hasattr(a, "group"):
            pooled[name] = deltas[name][:, :: a.group]
    return deltas, pooled


def run(folder: str, rows: Any, grid: str, seed: int, steps: int, rank: int, device: str):
    """Train and merge once."""
    torch.manual_seed(seed)
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="eager"
    )
    model.to(device)
    model.requires_grad_(requires_grad=False)
    kept = {name: layer.weight.data for name, layer in list_layers(model).items()}
    packed_on: Grid | None = GRIDS[grid]
    if packed_on is not None:
        replace_packed(model, dict.fromkeys(kept, packed_on))
    elif grid == "nf4-64":
        set_dense(model, {name: round_nf4(weight) for name, weight in kept.items()})
    layers = list_layers(model)
    trained_on = {name: layer.weight.detach() for name, layer in layers.items()}
    squares = [
        sum(float(part.float().square().sum()) for part in parts)
        for parts in ((trained_on[name] - kept[name] for name in kept), kept.values())
    ]
    row = {
        "grid": grid,
        "rank": rank,
        "seed": seed,
        "weight_error": round((squares[0] / squares[1]) ** 0.5, 4),
    }
    row["before"] = rows.evaluate(model)

    config = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=sorted(kept), task_type="CAUSAL_LM"
    )
    if grid.startswith("qalora"):
        config.use_qalora, config.qalora_group_size = True, GRIDS[grid].group
    wrapped = wrap_peft(model, config, seed)
    trainable = [p for p in wrapped.parameters() if p.requires_grad]
    row["trainable"] = sum(p.numel() for p in trainable)
    optimizer = torch.optim.AdamW(trainable, lr=2e-4, weight_decay=0.0)
    order = list(rows.train)
    random.Random(seed).shuffle(order)
    start = time.time()
    for step in range(steps):
        loss, count = rows.loss_sum(wrapped, order[4 * step : 4 * step + 4])
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    row["seconds"] = round(time.time() - start)
    row["after"] = rows.evaluate(wrapped)

    deltas, pooled = read_deltas(wrapped, kept)
    for what, weights in (
        ("merged", trained_on),
        ("merged_into_original", kept),
        ("requantised", trained_on),
    ):
        if what == "requantised" and grid == "base":
            continue
        merged = {name: (weights[name].float() + deltas[name]).bfloat16() for name in kept}
        if what == "requantised":
            key = grid.replace("qalora", "affine")
            merged = {name: requantise(key, weight) for name, weight in merged.items()}
        set_dense(model, merged)
        row[what] = rows.evaluate(model)
    for dtype in (torch.float16, torch.bfloat16) if pooled else ():
        for name, each in layers.items():
            layer: Any = each
            biases = (layer.biases.float() + pooled[name]).to(dtype)
            packed = Packed(layer.numbers, layer.scales.to(dtype), biases)
            model.set_submodule(name, PackedLinear(packed, layer.grid))
        if dtype != torch.bfloat16:
            set_dense(model, {name: layer.weight for name, layer in list_layers(model).items()})
        row[f"merged_in_4_bits_{str(dtype)[6:]}"] = rows.evaluate(model)
    return row


def check_nf4():
    """Compare the table here with bitsandbytes, bit for bit."""
    from bitsandbytes.functional import (  # pyright: ignore[reportMissingImports]
        dequantize_4bit,
        quantize_4bit,
    )

    weight = torch.randn(640, 2048, generator=torch.Generator().manual_seed(0)).bfloat16()
    peer = dequantize_4bit(*quantize_4bit(weight, blocksize=64, quant_type="nf4"))
    difference = (peer.float() - round_nf4(weight).float()).abs()
    print(
        f"nf4: {int((difference > 0).sum())} of {weight.numel()} values differ from "
        f"bitsandbytes', by at most {float(difference.max())}"
    )


def main():
    if "--check-nf4" in sys.argv:
        check_nf4()
        return
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("manifest")
    parser.add_argument("out")
    parser.add_argument("grids", nargs="*", default=list(GRIDS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    rows = Rows(options.model, options.manifest, options.steps, options.device)
    for seed in range(options.seeds):
        for grid in options.grids or list(GRIDS):
            row = run(options.model, rows, grid, seed, options.steps, options.rank, options.device)
            with Path(options.out).open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(row, flush=True)


if __name__ == "__main__":
    main()
