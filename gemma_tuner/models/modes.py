"""Switch a model between training and use, changing nothing but dropout and checkpointing."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from gemma_tuner.device import random_generators, replayed
from gemma_tuner.models.lora import unwrap_peft
from gemma_tuner.models.lora_linear import use_lean_adapters


def begin_training(model: Any, *, checkpointed_layers: int | None = None) -> None:
    """Turn on the adapters' dropout and activation checkpointing."""
    # Everything else stays in eval mode: in train mode Gemma 3n clamps frozen AltUp weights in
    # place, and batch norms of a frozen tower would drift.
    use_lean_adapters(model)  # those that PEFT put on compute as add_lora's do
    gemma = unwrap_peft(model)
    gemma.activation_checkpointing_enable(checkpointing_options(gemma.device))
    if checkpointed_layers is not None:
        checkpoint_layers(model, checkpointed_layers)
    model.eval()
    for name, module in model.named_modules():
        # Each module's own flag: a layer checkpoints itself only while it trains.
        if "lora_dropout" in name or isinstance(module, GradientCheckpointingLayer):
            module.training = True


def checkpointing_options(device: torch.device) -> dict[str, Any]:
    """The options of ``torch.utils.checkpoint`` with which gradients are right."""
    # Reentrant checkpointing loses the gradients of shared keys and values, silently.
    options: dict[str, Any] = {"use_reentrant": False}
    if device.type == "mps":
        options["context_fn"] = partial(replayed, random_generators(device)["mps"])
    return options


def checkpoint_layers(model: Any, count: int) -> None:
    """Choose the layers with activation checkpointing: the first so many of the decoder."""
    gemma = unwrap_peft(model)
    layers = gemma.get_decoder().layers
    if all(layer.gradient_checkpointing == (i < count) for i, layer in enumerate(layers)):
        return  # asked for every micro-batch, and a walk over all modules takes a millisecond
    for module in gemma.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.gradient_checkpointing = count > 0
    for layer in layers[count:]:
        layer.gradient_checkpointing = False


def end_training(model: Any) -> None:
    """Leave the model ready for use."""
    model.eval()
    unwrap_peft(model).activation_checkpointing_disable()
