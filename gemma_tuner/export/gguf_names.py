"""Names of a Gemma decoder's weights in llama.cpp, and the decoders that it can run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import gguf

from gemma_tuner.errors import CheckpointError
from gemma_tuner.models.families import FAMILIES

# What gguf's own table does not have, by the end of the name within a layer.
_SCALES = {
    "router.scale": "ffn_gate_inp.scale",
    "router.per_expert_scale": "ffn_down_exps.scale",
}
# Parameters that are no module's weight get the suffix of one.
_NAMELESS = (
    "altup.correct_output_scale",
    "experts.down_proj",
    "experts.gate_up_proj",
    "layer_scalar",
)
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


class Names:
    """Names of the decoder's weights in llama.cpp.

    Raises:
        CheckpointError: llama.cpp does not have such a model.
    """

    def __init__(self, model_type: str, num_layers: int) -> None:
        known = {family.model_type: family for family in FAMILIES if family.gguf is not None}
        if model_type not in known:
            raise CheckpointError(
                f"llama.cpp has no architecture for model_type {model_type!r}; it has "
                f"{', '.join(known)}"
            )
        self.architecture: str = known[model_type].gguf or ""
        self._decoder = f"{known[model_type].decoder}."
        kind = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == self.architecture)
        self._names = gguf.get_tensor_name_map(kind, num_layers)

    def translate(self, name: str) -> str | None:
        """Translate the name of a weight."""
        if name != "lm_head.weight" and not name.startswith(self._decoder):
            return None
        for end, own in _SCALES.items():
            if name.endswith(f".{end}"):
                return f"blk.{name.removeprefix(self._decoder).split('.')[1]}.{own}"
        key = re.sub(
            r"(altup_(unembed_)?projections)\.\d+", r"\1", name.replace(self._decoder, "model.")
        )
        if key.endswith(_NAMELESS):
            key += ".weight"
        found = self._names.get_name(key, (".weight",))
        if found is None:
            raise CheckpointError(
                f"llama.cpp's {self.architecture} has no weight for {name}; this checkpoint "
                "cannot be a GGUF file"
            )
        return found


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
