"""How much memory does a training step need over what is resident, plain and ours?

    python -m benchmarks.loss_memory [--sequence 512] [--targets 32]

One shrunken Gemma 4 with the real vocabulary (262,144), LoRA on the decoder, checkpointing on,
fp32 on the CPU. Plain is ``model(**inputs, labels=labels).loss.backward()``; ours is the trainer's
loss. The peak is that of live tensor bytes, counted at every operator, so it is exact and does not
depend on an allocator. Both steps must give the same loss and gradients.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import Gemma4Config, Gemma4ForConditionalGeneration

from benchmarks.live_bytes import LiveBytes
from gemma_tuner.batch import Batch, Row, pad_rows
from gemma_tuner.models.loss import target_loss_sum

VOCABULARY = 262_144
SHRUNKEN = {
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size": 256,
    "hidden_size_per_layer_input": 16,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_kv_shared_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "global_head_dim": 128,
    "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 4,
    "final_logit_softcapping": 30.0,
}
LANGUAGE = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"


def build_model() -> Any:
    torch.manual_seed(0)
    config = Gemma4Config(text_config=SHRUNKEN, vision_config=None, audio_config=None)
    model: Any = get_peft_model(
        Gemma4ForConditionalGeneration(config), LoraConfig(r=16, target_modules=LANGUAGE)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    return model.train()


def build_batch(sequence: int, targets: int) -> Batch:
    ids = torch.randint(10, VOCABULARY, (sequence,), generator=torch.Generator().manual_seed(1))
    row = Row(
        key="benchmark",
        input_ids=ids,
        token_types=torch.zeros_like(ids),
        targets=torch.arange(sequence) >= sequence - targets,
    )
    return pad_rows(
        [row], max_tokens=sequence, pad_token_id=0, token_type_name="mm_token_type_ids"
    )


def measure(model: Any, step: Callable[[], Tensor]) -> tuple[float, Tensor, int, float]:
    model.zero_grad(set_to_none=True)
    started = time.perf_counter()
    with LiveBytes() as live:
        loss = step()
        loss.backward()
    seconds = time.perf_counter() - started
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return float(loss.detach()), gradient, live.peak_bytes, seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--targets", type=int, default=32)
    parser.add_argument("--chunk-tokens", type=int, default=256)
    args = parser.parse_args()

    model, batch = build_model(), build_batch(args.sequence, args.targets)
    plain = measure(
        model, lambda: model(**batch.inputs, labels=batch.labels, use_cache=False).loss
    )
    ours = measure(
        model,
        lambda: (
            target_loss_sum(model, batch, chunk_tokens=args.chunk_tokens) / batch.num_target_tokens
        ),
    )
    result = {
        "sequence": args.sequence,
        "targets": args.targets,
        "plain_extra_peak_mb": round(plain[2] / 1e6, 1),
        "ours_extra_peak_mb": round(ours[2] / 1e6, 1),
        "peak_ratio": round(plain[2] / ours[2], 2),
        "time_ratio": round(plain[3] / ours[3], 2),
        "loss_relative_difference": abs(plain[0] - ours[0]) / plain[0],
        "gradient_relative_difference": float((plain[1] - ours[1]).norm() / plain[1].norm()),
        "torch": torch.__version__,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
