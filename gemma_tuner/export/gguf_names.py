"""What llama.cpp can run: decoders, and adapters on their weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gemma_tuner.errors import CheckpointError

# Source: the calls of build_lora_mm and build_lora_mm_id in gemma4.cpp, gemma3n.cpp and
# llama-graph.cpp of llama.cpp 0.5.0; an adapter on any other weight is loaded and not used.
_ADAPTABLE = {
    "attn_k",
    "attn_output",
    "attn_q",
    "attn_v",
    "altup_correct_coef",
    "altup_predict_coef",
    "ffn_down",
    "ffn_down_exps",
    "ffn_gate",
    "ffn_gate_inp",
    "ffn_gate_up_exps",
    "ffn_up",
    "inp_gate",
    "laurel_l",
    "laurel_r",
    "proj",
}
# What llama.cpp takes for granted: it reads none of these from a file.
# Source: llama-hparams.h, gemma4.cpp and gemma3n.cpp of llama.cpp 0.5.0.
_FIXED = {"attention_bias": False, "hidden_activation": "gelu_pytorch_tanh"}
_FIXED_3N = {
    "altup_active_idx": 0,
    "altup_correct_scale": True,
    "altup_num_inputs": 4,
    "final_logit_softcapping": 30.0,
    "hidden_size_per_layer_input": 256,
    "laurel_rank": 64,
}
_OWN_KV_LAYERS_3N = 20
_SPARSE_LAYERS_3N = 10


def is_adaptable(name: str) -> bool:
    """Tell whether llama.cpp uses an adapter on a weight."""
    return name.startswith("blk.") and name.split(".")[2] in _ADAPTABLE


def check_runs(model_type: str, text: Mapping[str, Any]) -> None:
    """Refuse what llama.cpp would load and compute differently."""
    found = dict(text)
    num_layers, num_shared = text["num_hidden_layers"], text["num_kv_shared_layers"]
    fixed: dict[str, Any] = dict(_FIXED)
    for kind, rope in text["rope_parameters"].items():
        is_partial = model_type != "gemma3n" and kind == "full_attention"
        fixed[f"rope_type of {kind}"] = "proportional" if is_partial else "default"
        found[f"rope_type of {kind}"] = rope["rope_type"]
        fixed[f"rope factor of {kind}"] = 1.0
        found[f"rope factor of {kind}"] = rope.get("factor", 1.0)
    if num_shared:
        # A layer that shares takes keys and values of the last of its kind that has its own.
        num_own = num_layers - num_shared
        fixed["last layer_types before sharing"] = ["sliding_attention", "full_attention"]
        found["last layer_types before sharing"] = text["layer_types"][num_own - 2 : num_own]
    if model_type == "gemma3n":
        fixed |= _FIXED_3N
        fixed["num_kv_shared_layers"] = num_layers - _OWN_KV_LAYERS_3N
        fixed["activation_sparsity_pattern"] = [
            0.95 if layer < _SPARSE_LAYERS_3N else 0.0 for layer in range(num_layers)
        ]
    others = [name for name, value in fixed.items() if found.get(name) != value]
    if others:
        raise CheckpointError(
            "llama.cpp would run this checkpoint, but as another model: "
            + ", ".join(f"{name} is {found.get(name)}, there {fixed[name]}" for name in others)
            + "; use export_merged and another program"
        )
