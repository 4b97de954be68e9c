"""How a run cuts its micro-batches, kept in its state: a resumed run cuts them alike.

The gradient is the same however they are cut, but not its rounding, nor which numbers dropout
draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from gemma_tuner.log import announce
from gemma_tuner.planning.choice import CheckpointingLevel
from gemma_tuner.planning.plan import Plan
from gemma_tuner.training.config import TrainConfig


@dataclass(frozen=True, slots=True)
class Cuts:
    """What decides how micro-batches are cut and computed.

    Args:
        levels: As the plan has them, and as the run has found them to be since.
        target_share: As in :class:`Plan`, like the next two.
        loss_chunk_tokens: Target tokens whose logits exist at one time.
        query_chunk_tokens: Queries of a full-attention layer that attend at one time.
        peak_bytes: The predicted peak; 0 where none was needed.
        asked: The settings that had a say.
    """

    levels: tuple[CheckpointingLevel, ...]
    target_share: float
    loss_chunk_tokens: int
    query_chunk_tokens: int | None
    peak_bytes: int
    asked: tuple[bool | float | None, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Cuts:
        """Read what :meth:`to_dict` wrote."""
        levels = tuple(CheckpointingLevel(**level) for level in saved["levels"])
        return cls(**{**saved, "levels": levels, "asked": tuple(saved["asked"])})


def read_cuts(plan: Plan, levels: Sequence[CheckpointingLevel], config: TrainConfig) -> Cuts:
    """What a run cuts by."""
    return Cuts(
        levels=tuple(levels),
        target_share=plan.target_share,
        loss_chunk_tokens=plan.loss_chunk_tokens,
        query_chunk_tokens=plan.query_chunk_tokens,
        peak_bytes=plan.peak_bytes,
        asked=(config.gradient_checkpointing, config.loss_chunk_tokens, config.memory_gib),
    )


def cut_as_before(plan: Plan, before: Cuts, config: TrainConfig) -> Plan:
    """Let a plan of a resumed run cut as the run did before, if that fits and is still asked for.

    Args:
        plan: Made for what there is now.
        before: How the run cut when it was saved.
        config: Its settings now.

    Returns:
        The plan to follow.
    """
    now = read_cuts(plan, plan.levels, config)
    if before.asked != now.asked or replace(before, peak_bytes=now.peak_bytes) == now:
        return plan
    # Where there was so much room that nothing was tried, it must be so still.
    has_room = plan.levels[0].max_tokens >= config.batch_size * plan.max_tokens
    if before.peak_bytes > plan.usable_bytes or not (before.peak_bytes or has_room):
        announce(
            "there is less memory than when this run was saved, so micro-batches are cut anew: "
            "gradients are the same but for rounding, and dropout draws other numbers"
        )
        return plan
    return replace(
        plan,
        levels=before.levels,
        target_share=before.target_share,
        loss_chunk_tokens=before.loss_chunk_tokens,
        query_chunk_tokens=before.query_chunk_tokens,
        reasons={**plan.reasons, "micro-batch": "cut as before this run was resumed"},
    )
