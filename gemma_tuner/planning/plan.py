"""Say before a run what it will hold, and choose how it trains within a budget.

The choice is :mod:`gemma_tuner.planning.choice`'s; here it becomes a plan that names what it was
made for, what each part holds and why. :mod:`gemma_tuner.planning.loaded` plans for a model
that is loaded already.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gemma_tuner.batch import Batch
from gemma_tuner.checkpoints.formats import find_format
from gemma_tuner.checkpoints.loading import name_without_path, read_config
from gemma_tuner.checks import check_path, check_value
from gemma_tuner.device import (
    choose_device,
    choose_dtype,
    is_available,
    memory_budget_bytes,
    parse_device,
)
from gemma_tuner.errors import CheckpointError, MemoryPlanError
from gemma_tuner.modalities import Modality
from gemma_tuner.models.embeddings import Placement, choose_placement
from gemma_tuner.models.families import loaded_modalities
from gemma_tuner.models.few_bits.grids import Grid, choose_grid, stored_bits
from gemma_tuner.models.identity import active_adapter
from gemma_tuner.models.lora import LoraConfig, find_adapters, unwrap_peft, wrap_peft
from gemma_tuner.models.meta import build_meta_model
from gemma_tuner.models.restricted_layers import shares_keys
from gemma_tuner.planning.choice import CheckpointingLevel, PlanRequest, choose
from gemma_tuner.planning.notebook import write_plan
from gemma_tuner.planning.text import GIB, describe_misfit, explain, list_parts
from gemma_tuner.planning.trace import Footprint, StepTracer
from gemma_tuner.planning.worst_case import make_worst_case

if TYPE_CHECKING:
    from peft import PeftModel

# What an allocator needs beyond live tensors: a share of the budget, and as much again up to so
# many bytes. Metal keeps pooled heaps of up to 1 GiB and compiled graphs. Source: MPSAllocator.h
_MARGINS = {"mps": (0.1, 2**30), "cuda": (0.03, 2**29), "cpu": (0.05, 2**29)}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a run uses memory; ``print`` it.

    Args:
        name: The model.
        device: Where it trains.
        dtype: Of its frozen weights.
        modalities: What it was planned to read.
        per_layer_embeddings: Where the per-layer table is; None where there is none.
        bits: Of a packed weight, the fewest; None where none is packed.
        levels: From the fastest to the most sparing; a micro-batch takes the first that holds it.
        loss_chunk_tokens: Target tokens whose logits exist at one time.
        query_chunk_tokens: Queries of a full-attention layer that attend at one time; None: all.
        max_tokens: The longest row planned for.
        target_share: Target tokens of all tokens in a row, as planned for.
        budget_bytes: What the device may hold.
        margin_bytes: What of it is left to the allocator.
        footprint: What a step of the largest micro-batch holds; None where no plan was needed.
        reasons: Why each choice was made, by its name.
    """

    name: str
    device: str
    dtype: str
    modalities: tuple[Modality, ...]
    per_layer_embeddings: Placement | None
    bits: int | None
    levels: tuple[CheckpointingLevel, ...]
    loss_chunk_tokens: int
    query_chunk_tokens: int | None
    max_tokens: int
    target_share: float
    budget_bytes: int
    margin_bytes: int
    footprint: Footprint | None
    reasons: Mapping[str, str] = field(default_factory=dict)

    @property
    def usable_bytes(self) -> int:
        """The budget without the margin."""
        return self.budget_bytes - self.margin_bytes

    @property
    def peak_bytes(self) -> int:
        """Bytes held at the predicted peak; 0 where no plan was needed."""
        return self.footprint.peak_bytes if self.footprint else 0

    def __str__(self) -> str:
        """The plan as a table."""
        lines = [
            f"plan for {self.name}: {', '.join(self.modalities)} on {self.device}, {self.dtype}, "
            f"rows of up to {self.max_tokens} tokens"
        ]
        if self.footprint is not None:
            lines += [
                "",
                *list_parts(
                    self.footprint, margin_bytes=self.margin_bytes, budget_bytes=self.budget_bytes
                ),
            ]
        lines += ["", *(f"{name:<26}{reason}" for name, reason in self.reasons.items())]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return write_plan(
            f"plan for {self.name}",
            f"{', '.join(self.modalities)} on {self.device}, {self.dtype}, rows of up to "
            f"{self.max_tokens:,} tokens",
            self.footprint,
            self.reasons,
            margin_bytes=self.margin_bytes,
            budget_bytes=self.budget_bytes,
        )


def margin_bytes(budget_bytes: int, device: torch.device) -> int:
    """What of a budget is left to the device's allocator."""
    share, most = _MARGINS[device.type]
    return int(share * budget_bytes + min(most, share * budget_bytes))


def plan(
    name_or_path: str | Path,
    *,
    memory_gib: float | None = None,
    modalities: Sequence[Modality] = ("text",),
    max_tokens: int = 2048,
    batch_size: int = 1,
    target_share: float = 0.25,
    lora: LoraConfig | None = None,
    image_tokens: int | None = None,
    max_seconds: float = 30.0,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    per_layer_embeddings: Placement | None = None,
    bits: int | None = None,
    revision: str | None = None,
) -> Plan:
    """Plan a run from a checkpoint's configuration; no weight is read.

    Args:
        name_or_path: A folder, or a model's name on the Hugging Face Hub; of it the configuration
            and, for media, the processor are read.
        memory_gib: What the device may hold, in GiB: on a Mac about two thirds of its memory, up
            to 32 GiB of it, and three quarters beyond. None asks the device.
        modalities: What the data holds; each row has one image, one clip, or both.
        max_tokens: The longest row, media included.
        batch_size: Rows of the largest micro-batch.
        target_share: Tokens of the answers of all tokens in a row.
        lora: Where adapters go.
        image_tokens: As in ``ImageCollator``.
        max_seconds: As in ``AudioCollator``.
        device: Where training will run; with ``memory_gib`` it need not be there. By default what
            ``load_model`` would choose here.
        dtype: As in ``load_model``.
        per_layer_embeddings: As in ``load_model``.
        bits: As in ``load_model``. Where nothing fits, 8 and 4 are tried for the error to name.
        revision: As in ``load_model``.

    Returns:
        The plan; ``load_model(plan=...)`` takes it.

    Raises:
        MemoryPlanError: Nothing fits; the error names the nearest plans that would, with
            ``bits=8`` or ``bits=4`` first.
        ConfigError: A setting that cannot work, or a device that is not there and no budget;
            other bits than those of a checkpoint that is packed.
        CheckpointError: A configuration or processor that cannot be read.
    """
    chosen, budget = _choose_budget(device, memory_gib)
    check_path("name_or_path", name_or_path)
    name = name_without_path(str(name_or_path))
    config = read_config(str(name_or_path), revision)
    if (found := find_format(config.to_dict(), Path(name_or_path))) is not None:
        raise CheckpointError(
            f"{name} is quantised by {found}; write it as a checkpoint of packed weights with "
            "gt.pack or `gemma-tuner convert`, and plan for that folder"
        )
    asked = choose_grid(name, config, bits)
    placement = choose_placement(config, chosen, per_layer_embeddings)
    if dtype is None and not is_available(chosen):
        dtype = "bfloat16"

    def build(grid: Grid | None) -> PeftModel:
        meta_model = build_meta_model(
            config,
            modalities=modalities,
            dtype=choose_dtype(chosen, dtype, config.dtype)[0],
            per_layer_embeddings=placement,
            grid=grid,
        )
        return wrap_peft(meta_model, find_adapters(meta_model, lora or LoraConfig())[0])

    example = make_worst_case(
        str(name_or_path), config, modalities, max_tokens, image_tokens, max_seconds, revision
    )
    return make_plan(
        name,
        lambda grid: build(grid or asked),
        example,
        PlanRequest(batch_size, max_tokens, target_share),
        device=chosen,
        budget=budget,
        placement=placement,
        other_bits=() if stored_bits(config) else [b for b in (8, 4) if b < (bits or 16)],
    )


def _choose_budget(
    device: str | torch.device | None, memory_gib: float | None
) -> tuple[torch.device, tuple[int, str]]:
    """Choose the device to plan for, which need not be here if its memory is given."""
    if memory_gib is None or device is None:
        chosen, _ = choose_device(device)
    else:
        chosen = parse_device(device)
    return chosen, read_budget(chosen, memory_gib)


def read_budget(device: torch.device, memory_gib: float | None) -> tuple[int, str]:
    """Bytes that a device may hold, and in words where the number is from."""
    if memory_gib is None:
        return memory_budget_bytes(device)
    check_value("memory_gib", memory_gib, float, above=0, below=2**20)
    return int(memory_gib * 2**30), "as given"


def add_last_resort(
    levels: tuple[CheckpointingLevel, ...], request: PlanRequest, num_layers: int
) -> tuple[CheckpointingLevel, ...]:
    """Let all layers be checkpointed after all, where nothing else holds a single row."""
    if request.checkpointing is not None or levels[-1].checkpointed_layers == num_layers:
        return levels
    return (*levels, CheckpointingLevel(num_layers, 0))


def make_plan(
    name: str,
    build: Callable[[Grid | None], PeftModel],
    example: Batch,
    request: PlanRequest,
    *,
    device: torch.device,
    budget: tuple[int, str],
    placement: Placement | None,
    other_bits: Sequence[int],
) -> Plan:
    """Try steps of a model without weights, and choose how to train."""
    # build: Makes the model, as it is or packed on a grid.
    # other_bits: In which it could be packed, the most first.
    meta_model = build(None)
    gemma = unwrap_peft(meta_model)
    dtype, modalities = gemma.dtype, loaded_modalities(gemma)
    layers = gemma.get_decoder().layers
    num_layers = len(layers)
    # Layers that share keys and values run at targets only: others cost more to keep.
    sharing = sum(shares_keys(layer) for layer in layers)
    middle = num_layers - sharing if sharing else num_layers // 2

    def trace(model: PeftModel) -> StepTracer:
        return StepTracer(
            model, device, accumulates=True, state_bytes=request.state_bytes, loss=request.loss
        )

    step = trace(meta_model)
    budget_bytes, source = budget
    margin = margin_bytes(budget_bytes, device)
    usable = budget_bytes - margin
    layer_counts = (0, middle, num_layers)
    choice = choose(step, example, request, layer_counts=layer_counts, usable=usable)
    if choice is None:
        adapter: Any = meta_model.peft_config[active_adapter(meta_model)]
        if adapter.modules_to_save or adapter.target_parameters:  # not of packed weights
            other_bits = ()
        packed = {bits: lambda bits=bits: trace(build(Grid.choose(bits))) for bits in other_bits}
        raise MemoryPlanError(
            describe_misfit(name, step, example, request, usable, num_layers, packed)
        )
    return Plan(
        name=name,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        modalities=modalities,
        per_layer_embeddings=placement,
        bits=stored_bits(gemma.config),
        levels=add_last_resort(choice.levels, request, num_layers),
        loss_chunk_tokens=choice.loss_chunk_tokens,
        query_chunk_tokens=choice.query_chunk_tokens,
        max_tokens=request.max_tokens,
        target_share=request.target_share,
        budget_bytes=budget_bytes,
        margin_bytes=margin,
        footprint=choice.footprint,
        reasons={
            "budget": f"{budget_bytes / GIB:.2f} GiB {source}, {margin / GIB:.2f} GiB of it left "
            "to the allocator",
            **explain(choice, request, placement, num_layers),
        },
    )
