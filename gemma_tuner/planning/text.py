"""A plan in words: what each part holds, why each choice was made, what would fit instead."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from gemma_tuner.batch import Batch
from gemma_tuner.models.embeddings import Placement
from gemma_tuner.planning.choice import PlanChoice, PlanRequest, widen
from gemma_tuner.planning.trace import Footprint, StepTracer

GIB = 2**30
CHECKPOINTING = "activation checkpointing"
"""The name, among a plan's reasons, of how many layers are checkpointed."""


def list_parts(footprint: Footprint, *, margin_bytes: int, budget_bytes: int) -> Iterator[str]:
    """The bytes of a plan, largest first within what stays and what comes and goes."""
    for kind, parts in (("stays", footprint.resident), ("at the peak", footprint.step)):
        for name, held in sorted(parts.items(), key=lambda part: -part[1]):
            if held >= 0.0005 * GIB:
                yield f"{name:<32}{held / GIB:>8.3f} GiB  {kind}"
    yield f"{'predicted peak':<32}{footprint.peak_bytes / GIB:>8.3f} GiB"
    yield f"{'left to the allocator':<32}{margin_bytes / GIB:>8.3f} GiB"
    yield f"{'budget':<32}{budget_bytes / GIB:>8.3f} GiB"


def explain(
    choice: PlanChoice, request: PlanRequest, placement: Placement | None, num_layers: int
) -> dict[str, str]:
    """Say why each choice was made."""
    whole = request.batch_size * request.max_tokens
    first, last = choice.levels[0], choice.levels[-1]
    steps = []
    for level in choice.levels:
        layers = level.checkpointed_layers
        what = f"the first {layers} of {num_layers} layers" if layers else "nothing"
        what = "all layers" if layers == num_layers else what
        steps.append(f"{what} up to {level.max_tokens:,} tokens at a time")
    chosen = "as asked" if request.checkpointing is not None else "the fastest that fits"
    reasons = {CHECKPOINTING: f"{', '.join(steps)}: {chosen}"}
    if last.max_tokens < whole:
        reasons["micro-batch"] = (
            f"{last.max_tokens:,} tokens of the {whole:,} of {request.batch_size} rows: more do "
            "not fit; the step and its gradient stay the same"
        )
    elif first.max_tokens >= whole:
        reasons["micro-batch"] = (
            f"{request.batch_size} rows of {request.max_tokens} tokens, all fit"
        )
    chunk = choice.loss_chunk_tokens
    reasons["loss"] = f"{chunk} target tokens at a time" + (
        " as asked" if request.loss_chunk_tokens else ": fewer would read the head more often"
    )
    reasons["attention"] = (
        "within the band of sliding layers, scores of full layers computed once"
        if choice.query_chunk_tokens is None
        else f"{choice.query_chunk_tokens} queries at a time, checkpointed, as more do not fit"
    )
    if placement is not None:
        reasons["per-layer embeddings"] = {
            "disk": "read from the checkpoint's file: a step needs few of their rows",
            "device": "on the device, as there is room",
        }[placement]
    return reasons


def describe_misfit(
    name: str,
    step: StepTracer,
    example: Batch,
    request: PlanRequest,
    usable: int,
    num_layers: int,
    packed: Mapping[int, Callable[[], StepTracer]],  # of weights in other bits, the most first
) -> str:
    """Say what is missing, and which plans near the one asked for would fit."""

    def hold(tokens: int, share: float, trained_layers: int = num_layers) -> int:
        return step.measure_least(
            widen(example, rows=1, tokens=tokens, target_share=share),
            frozen_layers=num_layers - trained_layers,
        )

    tokens, share = request.max_tokens, request.target_share
    needed = hold(tokens, share)
    if needed <= usable:
        settings = {
            "gradient_checkpointing": request.checkpointing,
            "loss_chunk_tokens": request.loss_chunk_tokens,
        }
        asked = [f"{setting}={value}" for setting, value in settings.items() if value is not None]
        return (
            f"{name} does not fit with {' and '.join(asked)}: one row of {tokens} tokens then "
            f"needs more than the {usable / GIB:.2f} GiB that may be used. What would fit: None "
            f"for these, which leaves them to the plan and needs {needed / GIB:.2f} GiB"
        )
    text = (
        f"{name} does not fit: one row of {tokens} tokens needs {needed / GIB:.2f} GiB, and "
        f"{usable / GIB:.2f} GiB may be used"
    )
    near, in_bits = [], ""
    row = widen(example, rows=1, tokens=tokens, target_share=share)
    for bits, make in packed.items():
        held = make().measure_least(row)
        in_bits = f" (bits={bits} would need {held / GIB:.2f} GiB)"
        if held <= usable:
            near.append(f"bits={bits}")
            break
    shorter = (tokens // 2, tokens // 4, tokens // 8)
    if found := next((n for n in shorter if n >= 64 and hold(n, share) <= usable), None):
        near.append(f"max_tokens={found}")
    fewer = (num_layers // 2, num_layers // 4)
    if found := next((n for n in fewer if n and hold(tokens, share, n) <= usable), None):
        near.append(f"LoraConfig(layers={found})")
    answers = (share / 2, share / 4)
    if found := next((s for s in answers if hold(tokens, s) <= usable), None):
        near.append(f"answers of at most {round(found * tokens)} tokens a row")
    if near:
        return f"{text}. What would fit: {', or '.join(near)}"
    resident = step.resident_bytes
    return (
        f"{text}, nor does a shorter row or fewer adapters: weights, adapters and their moments "
        f"alone hold {resident / GIB:.2f} GiB{in_bits}. What would help: a smaller model, or a "
        f"budget of {needed / GIB:.1f} GiB beside the allocator's share"
    )
