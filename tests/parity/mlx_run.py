"""Run checkpoints and adapters in real MLX; started by test_export_mlx.py in MLX's environment.

    python mlx_run.py CASES.json

Each case has ``program`` and ``model``, and may have ``adapter``; ``inputs`` (.npz); ``output``
(.npz, gets ``logits``; ``bound``, how many adapters the model has; of mlx-vlm ``embedded``, what
the decoder is given); ``quantise`` (settings) and ``quantised`` (folder, gets the quantised
checkpoint). ``dequantise`` (.safetensors) instead gets quantised tensors of every kind and what
``mx.dequantize`` makes of them.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten


class NoVision(nn.Module):
    """In the place of 3n's vision tower: mlx-vlm has only the released one, of 0.3e9 weights."""

    def __init__(self, config):
        super().__init__()

    def sanitize(self, weights):
        return {name: value for name, value in weights.items() if "vision_tower" not in name}


def mend_gemma3n():
    """Mend one of the two faults of mlx-vlm 0.7.10; the other is passed by below."""
    from mlx_vlm.models import gemma3n

    gemma3n.VisionModel = gemma3n.gemma3n.VisionModel = NoVision
    attention = gemma3n.language.Gemma3nAttention
    forward = attention.__call__

    def forward_from_start(self, x, mask=None, cache=None):
        if self.is_kv_shared_layer:  # it takes the offset after these tokens, not before
            cache = SimpleNamespace(state=cache.state, offset=0)
        return forward(self, x, mask, cache)

    attention.__call__ = forward_from_start


def load(case):
    if case["program"] == "mlx-lm":
        from mlx_lm.tuner.utils import load_adapters
        from mlx_lm.utils import load_model

        model, _ = load_model(Path(case["model"]))
    else:
        from mlx_vlm.trainer.peft.utils import load_adapters
        from mlx_vlm.utils import load_model

        mend_gemma3n()
        model = load_model(Path(case["model"]))
        tower = getattr(model, "audio_tower", None)
        for layer in getattr(tower, "layers", ()):
            # mlx-vlm 0.7.10 makes these without their constructor, and then cannot freeze them
            layer.self_attn._rel_pos._no_grad = set()
    if case.get("adapter"):
        load_adapters(model, case["adapter"])
    if "quantise" in case:
        quantise(model, case)
    model.eval()
    return model


def quantise(model, case):
    from mlx_lm.utils import quantize_model

    config = json.loads((Path(case["model"]) / "config.json").read_text())
    model, config = quantize_model(model, config, **case["quantise"])
    folder = Path(case["quantised"])
    folder.mkdir()
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))


def run(case):
    model = load(case)
    inputs = {name: mx.array(value) for name, value in np.load(case["inputs"]).items()}
    ids = inputs.pop("input_ids")
    embedded = mx.zeros(0)
    if case["program"] == "mlx-lm":
        # As generation does; without a cache, layers of 3n do not share keys and values.
        out = model(ids, cache=model.make_cache())
    else:
        embedded = model.get_input_embeddings(ids, **inputs).inputs_embeds
        if model.config.model_type == "gemma3n":
            # The whole model gives its decoder embeddings of text that it forgot to scale.
            out = model.language_model(ids, cache=model.make_cache())
        else:
            out = model(ids, inputs.pop("pixel_values", None), **inputs)
    logits = getattr(out, "logits", out)
    bound = sum(hasattr(module, "lora_a") for _, module in model.named_modules())
    np.savez(case["output"], logits=np.array(logits), bound=bound, embedded=np.array(embedded))


def dequantise(path):
    mx.random.seed(0)
    tensors = {}
    for dtype in ("float32", "bfloat16", "float16"):
        for bits in (2, 3, 4, 5, 6, 8):
            for group_size in (32, 64, 128):
                weight = mx.random.normal((24, 256)).astype(getattr(mx, dtype))
                parts = mx.quantize(weight, group_size=group_size, bits=bits)
                name = f"{dtype} {bits} {group_size}"
                for part, tensor in zip(("packed", "scales", "biases"), parts, strict=True):
                    tensors[f"{name} {part}"] = tensor
                tensors[f"{name} original"] = weight
                tensors[f"{name} weight"] = mx.dequantize(*parts, group_size=group_size, bits=bits)
    mx.save_safetensors(path, tensors)


for case in json.loads(Path(sys.argv[1]).read_text()):
    if "dequantise" in case:
        dequantise(case["dequantise"])
    else:
        run(case)
