"""The ways to take a step that are compared: the same weights, the same adapters, the same data.

Each is a model of its own over shared frozen weights: adapters are wrapped differently, and TRL
replaces the model's forward.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor

from benchmarks.compare_steps.models import Placement, share_weights
from gemma_tuner.batch import Batch
from gemma_tuner.models.embeddings import map_per_layer_embeddings
from gemma_tuner.models.lora import LoraConfig, add_lora, unwrap_peft
from gemma_tuner.models.loss import target_loss_sum
from gemma_tuner.models.modes import begin_training
from gemma_tuner.models.norms import LeanNorm
from gemma_tuner.models.target_only import target_only_of

PLAIN = "plain"
PLAIN_KEPT = "plain, no checkpointing"
PLAIN_ROUNDED = "plain, bfloat16 adapters"
TRL = "trl"
NAMES = (
    PLAIN,
    PLAIN_KEPT,
    PLAIN_ROUNDED,
    TRL,
    "ours",
    "ours, partly checkpointed",
    "ours, no checkpointing",
    "ours, table on disk",
)


@dataclass(frozen=True)
class Mode:
    """One way to take a step.

    Args:
        name: One of :data:`NAMES`.
        model: With adapters.
        begin: Makes the model ready for it; to be called whenever another mode had the model.
        step: Goes forward and backward; returns the mean loss, detached, and leaves gradients.
        per_layer_embeddings: Where its per-layer table is.
    """

    name: str
    model: Any
    begin: Callable[[], None]
    step: Callable[[Batch], Tensor]
    per_layer_embeddings: Placement = "device"

    @property
    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """The adapters' weights by name, which is the same in all modes."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}


def build_modes(
    base: Any,
    processor: Any,
    folder: Path,
    *,
    rank: int,
    chunk_tokens: int,
    names: Collection[str] = NAMES,
) -> list[Mode]:
    """Put the same adapters on copies of a model.

    Args:
        base: From ``load_model``; it is left as it was, and its weights are used.
        processor: Its processor.
        folder: Its checkpoint; TRL is given a folder in it, though it writes nothing there.
        rank: Of the adapters.
        chunk_tokens: Rows of the vocabulary head that ours has alive at a time.
        names: Which modes to build. Those that make no sense here are left out, which is said.
    """
    ours = add_lora(share_weights(base), LoraConfig(rank=rank))
    plain = _wrap_plainly(base, ours)
    # Before anything shares them: lora_B is zero at first, which hides lora_A's gradients.
    for model in (plain, ours):
        set_adapters(model)
    built = [
        make_plain(PLAIN, plain, checkpointing=True),
        make_plain(PLAIN_KEPT, plain, checkpointing=False),
    ]
    if PLAIN_ROUNDED in names and base.dtype != torch.float32:
        rounded = _wrap_plainly(base, ours, float32_adapters=False)
        set_adapters(rounded)
        built.append(make_plain(PLAIN_ROUNDED, rounded, checkpointing=True))
    if TRL in names and (mode := _trl_mode(base, ours, processor, folder)):
        built.append(mode)
    step = partial(_take_our_step, ours, chunk_tokens)
    # The last that runs at all positions makes keys and values there, and all else at targets.
    num_everywhere = target_only_of(unwrap_peft(ours)).first_layer + 1
    built += [
        Mode(name, ours, partial(begin_training, ours, checkpointed_layers=count), step)
        for name, count in (
            ("ours", None),
            ("ours, partly checkpointed", num_everywhere),
            ("ours, no checkpointing", 0),
        )
    ]
    if base.config.get_text_config().hidden_size_per_layer_input:
        mapped = share_weights(ours)
        map_per_layer_embeddings(unwrap_peft(mapped), partial(_find, folder), base.dtype)
        begin = partial(begin_training, mapped, checkpointed_layers=None)
        step = partial(_take_our_step, mapped, chunk_tokens)
        built.append(Mode("ours, table on disk", mapped, begin, step, "disk"))
    return [mode for mode in built if mode.name in names]


def _find(folder: Path, name: str) -> Path | None:
    path = folder / name
    return path if path.exists() else None


def set_adapters(model: Any, seed: int = 1) -> None:
    """Give adapters weights that depend on the seed alone, and none of which is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                scale = 0.01 if "lora_B" in name else parameter.shape[-1] ** -0.5
                values = torch.randn(parameter.shape, generator=generator) * scale
                parameter.copy_(values)


def _wrap_plainly(base: Any, ours: Any, *, float32_adapters: bool = True) -> Any:
    """PEFT's own wrapping of stock transformers, with the adapters that ours has."""
    model = share_weights(base)
    model.set_attn_implementation("sdpa")
    for module in model.modules():
        if isinstance(module, LeanNorm):
            module.__class__ = type(module).__bases__[1]  # transformers' own
    return peft.get_peft_model(
        model,
        copy.deepcopy(ours.peft_config["default"]),
        autocast_adapter_dtype=float32_adapters,  # True is PEFT's default
    )


def make_plain(name: str, model: Any, *, checkpointing: bool) -> Mode:
    """As HF's Trainer does it: train mode, non-reentrant checkpointing, the model's own loss."""

    def begin() -> None:
        gemma = unwrap_peft(model)
        if checkpointing:
            gemma.activation_checkpointing_enable({"use_reentrant": False})
        else:
            gemma.activation_checkpointing_disable()
        model.train()

    def step(batch: Batch) -> Tensor:
        loss = model(**batch.inputs, labels=batch.labels, use_cache=False).loss
        loss.backward()
        return loss.detach()

    return Mode(name, model, begin, step)


def _take_our_step(model: Any, chunk_tokens: int, batch: Batch) -> Tensor:
    loss = target_loss_sum(model, batch, chunk_tokens=chunk_tokens) / batch.num_target_tokens
    loss.backward()
    return loss.detach()


def _trl_mode(base: Any, ours: Any, processor: Any, folder: Path) -> Mode | None:
    """TRL's trainer with its documented defaults; None, said aloud, where it is not installed."""
    try:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        sys.stderr.write(f"NOT COMPARED WITH TRL: it cannot be imported ({error})\n")
        return None
    model = _wrap_plainly(base, ours)
    set_adapters(model)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(folder / "trl"),
            bf16=base.dtype == torch.bfloat16,  # its default; fp32 is compared with fp32
            use_cpu=base.device.type == "cpu",
            report_to="none",
            max_length=None,  # ours and plain cut nothing
        ),
        # Its steps are taken with the batches that the others get.
        train_dataset=Dataset.from_dict({"input_ids": [[1, 2]], "labels": [[1, 2]]}),
        processing_class=processor.tokenizer,
    )
    # What its train() does before the first step.
    kwargs = trainer.args.activation_checkpointing_kwargs
    model.activation_checkpointing_enable(kwargs or {"use_reentrant": False})
    prepared = trainer.accelerator.prepare(model)  # autocast
    trainer.current_gradient_accumulation_steps = 1

    def step(batch: Batch) -> Tensor:
        inputs = {**batch.inputs, "labels": batch.labels}
        targets = torch.tensor(batch.num_target_tokens, device=batch.labels.device)
        return trainer.training_step(prepared, inputs, targets)

    return Mode(TRL, model, model.train, step)
