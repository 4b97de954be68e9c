"""Switch a model between training and use, changing nothing but dropout and checkpointing."""

from __future__ import annotations

from typing import Any

from transformers.modeling_layers import GradientCheckpointingLayer

from gemma_tuner.models.lora import unwrap_peft


def begin_training(model: Any, *, checkpointing: bool) -> None:
    """Turn on the adapters' dropout and, if asked, activation checkpointing.

    Everything else stays in eval mode: in train mode Gemma 3n clamps frozen AltUp weights in
    place, and batch norms of a frozen tower would drift.

    Args:
        model: A Gemma model wrapped by PEFT.
        checkpointing: Whether layers keep only their inputs.
    """
    gemma = unwrap_peft(model)
    if checkpointing:
        # Reentrant checkpointing loses the gradients of shared keys and values, silently.
        gemma.activation_checkpointing_enable({"use_reentrant": False})
    else:
        gemma.activation_checkpointing_disable()
    model.eval()
    for name, module in model.named_modules():
        # Each module's own flag: a layer checkpoints itself only while it trains.
        if "lora_dropout" in name or isinstance(module, GradientCheckpointingLayer):
            module.training = True


def end_training(model: Any) -> None:
    """Leave the model ready for use."""
    model.eval()
    unwrap_peft(model).activation_checkpointing_disable()
