"""Plan the training of a model that is loaded, with or without trying a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gemma_tuner.batch import Batch
from gemma_tuner.checkpoints.loading import name_without_path
from gemma_tuner.models.embeddings import Placement, choose_placement, find_mapped_embedding
from gemma_tuner.models.families import loaded_modalities
from gemma_tuner.models.few_bits.grids import stored_bits
from gemma_tuner.models.lora import unwrap_peft
from gemma_tuner.models.lora_linear import is_linear
from gemma_tuner.models.meta import build_meta_copy
from gemma_tuner.planning.choice import ANY_SIZE, LOSS_CHUNKS, CheckpointingLevel, PlanRequest
from gemma_tuner.planning.plan import (
    Plan,
    add_last_resort,
    make_plan,
    margin_bytes,
    read_budget,
)
from gemma_tuner.planning.text import CHECKPOINTING, GIB

if TYPE_CHECKING:
    from peft import PeftModel


def plan_training(model: PeftModel, rows: Sequence[Batch], request: PlanRequest) -> Plan:
    """Plan the training of a model that is loaded."""
    gemma = unwrap_peft(model)
    return make_plan(
        _name_of(model),
        lambda grid: build_meta_copy(model, grid),
        max(rows, key=lambda row: (_count_media(row), row.num_tokens)),
        request,
        device=gemma.device,
        budget=read_budget(gemma.device, request.memory_gib),
        placement=_placement_of(model),
        other_bits=() if stored_bits(gemma.config) else (8, 4),
    )


def plan_without_trace(
    model: PeftModel, rows: Sequence[Batch], request: PlanRequest
) -> Plan | None:
    """Plan where the user has decided or there is ample room; None where steps must be tried."""
    gemma = unwrap_peft(model)
    num_layers = len(gemma.get_decoder().layers)
    budget_bytes, source = read_budget(gemma.device, request.memory_gib)
    margin = margin_bytes(budget_bytes, gemma.device)
    if request.checkpointing is None:
        most = _bound_bytes(gemma, rows, request)
        if most > budget_bytes - margin:
            return None
        why = f"nothing: even {most / GIB:.2f} GiB, which no step needs, would fit"
    else:
        why = "all layers, as asked" if request.checkpointing else "nothing, as asked"
    layers = num_layers if request.checkpointing else 0
    return Plan(
        name=_name_of(model),
        device=str(gemma.device),
        dtype=str(gemma.dtype).removeprefix("torch."),
        modalities=loaded_modalities(gemma),
        per_layer_embeddings=_placement_of(model),
        bits=stored_bits(gemma.config),
        levels=add_last_resort(
            (CheckpointingLevel(layers, ANY_SIZE.max_tokens),), request, num_layers
        ),
        loss_chunk_tokens=request.loss_chunk_tokens or LOSS_CHUNKS[0],
        query_chunk_tokens=None,
        max_tokens=request.max_tokens,
        target_share=request.target_share,
        budget_bytes=budget_bytes,
        margin_bytes=margin,
        footprint=None,
        reasons={"budget": f"{budget_bytes / GIB:.2f} GiB {source}", CHECKPOINTING: why},
    )


def _name_of(model: PeftModel) -> str:
    return name_without_path(unwrap_peft(model).name_or_path or "the model")


def _placement_of(model: PeftModel) -> Placement | None:
    """Where a loaded model's per-layer table is."""
    gemma = unwrap_peft(model)
    mapped = find_mapped_embedding(model) is not None
    return choose_placement(gemma.config, gemma.device, "disk" if mapped else "device")


def _count_media(row: Batch) -> int:
    return sum(x.numel() for x in row.inputs.values() if x.is_floating_point())


def _bound_bytes(gemma: Any, rows: Sequence[Batch], request: PlanRequest) -> int:
    """Bytes that no step can exceed without checkpointing, several times too many."""
    # Every layer is taken to keep three float32 copies of each of its inputs and outputs at every
    # position of text and media, and every head four of its scores.
    media = max(
        sum(x.numel() // x.shape[-1] for x in row.inputs.values() if x.is_floating_point())
        for row in rows
    )
    linears = [module for module in gemma.modules() if is_linear(module)]
    widths = sum(linear.in_features + linear.out_features for linear in linears)
    text = gemma.config.get_text_config()
    text_heads = text.num_hidden_layers * text.num_attention_heads
    vision = getattr(gemma.config, "vision_config", None)
    heads = getattr(vision, "num_attention_heads", 16) * getattr(vision, "num_hidden_layers", 32)
    scores = request.batch_size * (text_heads * request.max_tokens**2 + heads * media**2)
    positions = request.batch_size * (request.max_tokens + media)
    chunk = (request.loss_chunk_tokens or LOSS_CHUNKS[0]) * text.vocab_size * 20
    weights = sum(tensor.nbytes for tensor in (*gemma.parameters(), *gemma.buffers()))
    # A gradient and what the optimizer keeps.
    trained = sum(p.nbytes for p in gemma.parameters() if p.requires_grad)
    weights += int((1 + request.state_bytes) * trained)
    return weights + 12 * positions * widths + 16 * scores + chunk
