"""Bases, adapters and inputs for the tests of exports."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import gemma_tuner as gt
from gemma_tuner.checkpoints.writing import complete_config
from gemma_tuner.testing import save_tiny_model

TARGETS = {
    "gemma4-e2b": ("language", "vision", "audio", "projectors"),
    "gemma4-12b": ("language", "projectors"),
    "gemma4-26b-a4b": ("language", "vision", "projectors", "experts"),
    "gemma4-31b": ("language", "vision", "projectors"),
    "gemma3n": ("language", "audio", "projectors"),
}


def save_base(family, folder, *, seed=0):
    """A checkpoint as released: with the keys that transformers no longer writes."""
    model, processor = save_tiny_model(family, folder, seed=seed)
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(complete_config(config)))
    if family == "gemma3n":
        # Released checkpoints of 3n have keys and values of the layers that share them, too;
        # transformers passes over them, mlx-lm wants them.
        weights = Path(folder) / "model.safetensors"
        tensors = load_file(weights)
        prefix = "model.language_model.layers"
        for layer in range(4, 8):
            for name in ("k_proj.weight", "v_proj.weight", "k_norm.weight"):
                tensors[f"{prefix}.{layer}.self_attn.{name}"] = tensors[
                    f"{prefix}.0.self_attn.{name}"
                ].clone()
        save_file(tensors, weights, metadata={"format": "pt"})
    return model, processor


def add_trained_lora(model, *, seed=1, **settings):
    """Adapters that look trained: none of their matrices is zero."""
    wrapped = gt.add_lora(model, gt.LoraConfig(rank=4, alpha=8, **settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02, generator=generator)
            elif "modules_to_save" in name:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
            elif "magnitude" in name:
                parameter.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))
    return wrapped


def text_inputs(num_tokens=24):
    """Ids ``[1, num_tokens]`` that are no media tokens in any tiny tokenizer."""
    ids = torch.randint(300, 500, (1, num_tokens), generator=torch.Generator().manual_seed(2))
    return {"input_ids": ids, "mm_token_type_ids": torch.zeros_like(ids)}


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits
