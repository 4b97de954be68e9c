"""Names of a Gemma decoder's weights in llama.cpp."""

from __future__ import annotations

import re

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
