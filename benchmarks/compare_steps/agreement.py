"""No figure before the modes agree: their losses and gradients against the plain step's.

In float32 they must be equal, up to the order of summation. In bfloat16 rounding moves the plain
step itself: a mode may be as far from it as it is from its own variants.
"""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.compare_steps.models import share_weights
from benchmarks.compare_steps.modes import PLAIN_ROUNDED, Mode, make_plain
from gemma_tuner.batch import Batch
from gemma_tuner.device import empty_cache, is_out_of_memory
from gemma_tuner.models.lora import unwrap_peft

LOSS_TOLERANCE = 1e-5
COSINE = 0.99999
# What a cosine of 0.99999 leaves room for; each step's rounding lives on in the trained weights.
NORM_TOLERANCE = 4.5e-3
OPTIMIZER_STEPS = 20
LEARNING_RATE = 2e-4
# A tensor's gradient below this share of the whole one's norm has the direction of rounding.
NEGLIGIBLE = 1e-4
# Of a spread that is known from 8 batches only, within a third.
ROUNDING_BATCHES = 8
SLACK = 2
# Plain's variants must agree at least so far, or being as near as they are would say nothing.
VARIANTS_COSINE = 0.9


class Disagreement(SystemExit):
    """A mode that computes something else; nothing is measured then."""


@dataclass(frozen=True)
class Agreement:
    """How far a mode is from the plain step at most.

    Args:
        check: What was compared.
        mode: Its name.
        loss_difference: Relative.
        cosine: The smallest between gradients.
    """

    check: str
    mode: str
    loss_difference: float
    cosine: float


@dataclass(frozen=True)
class _Step:
    loss: float
    gradients: dict[str, Tensor]


def _take_step(mode: Mode, batch: Batch) -> _Step:
    loss = mode.step(batch)
    found = {name: p.grad for name, p in mode.trainable.items() if p.grad is not None}
    mode.model.zero_grad(set_to_none=True)
    return _Step(float(loss), found)


def _take_optimizer_steps(mode: Mode, batches: Iterable[Batch]) -> list[_Step]:
    """Train with AdamW and put the adapters back."""
    trainable = mode.trainable
    before = {name: p.detach().clone() for name, p in trainable.items()}
    optimizer = torch.optim.AdamW(trainable.values(), lr=LEARNING_RATE, foreach=False)
    mode.begin()
    steps = []
    for batch in batches:
        steps.append(_take_step(mode, batch))
        for name, gradient in steps[-1].gradients.items():
            trainable[name].grad = gradient
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter.copy_(before[name])
    return steps


def check_training(
    modes: Sequence[Mode], reference: Mode, batches: Sequence[Batch]
) -> list[Agreement]:
    """Compare float32 trainings of an optimizer step a batch, each on its own trajectory.

    Raises:
        Disagreement: A mode whose loss or gradients are not the reference's.
    """
    expected = _take_optimizer_steps(reference, batches)
    return [
        _compare(
            f"{len(batches)} optimizer steps", mode, _take_optimizer_steps(mode, batches), expected
        )
        for mode in modes
        if mode is not reference
    ]


def check_step(modes: Sequence[Mode], reference: Mode, batch: Batch, name: str) -> list[Agreement]:
    """Compare one float32 step at the size that will be measured.

    Raises:
        Disagreement: A mode whose loss or gradients are not the reference's.
    """
    reference.begin()
    expected = _take_step(reference, batch)
    agreements = []
    for mode in modes:
        if mode is not reference:
            mode.begin()
            agreements.append(_compare(name, mode, [_take_step(mode, batch)], [expected]))
    return agreements


def _compare(
    check: str, mode: Mode, steps: Sequence[_Step], expected: Sequence[_Step]
) -> Agreement:
    loss_difference, cosine = 0.0, 1.0
    for index, (found, plain) in enumerate(zip(steps, expected, strict=True)):
        if found.gradients.keys() != plain.gradients.keys():
            raise Disagreement(
                f"{mode.name}: {check}: step {index} has gradients of {len(found.gradients)} "
                f"tensors, plain of {len(plain.gradients)}"
            )
        loss_difference = _worst(loss_difference, abs(found.loss / plain.loss - 1))
        whole = _flatten(plain).norm()
        cosine = -_worst(-cosine, -_smallest_cosine(found, plain))
        # of all tensors, and of their lengths, which directions say nothing of
        difference = float((_flatten(found) - _flatten(plain)).norm() / whole)
        if not difference <= NORM_TOLERANCE:
            raise Disagreement(
                f"{mode.name}: {check}: step {index}: the gradient is off by {difference:.2g} of "
                "the norm of plain's"
            )
    agreement = Agreement(check, mode.name, loss_difference, cosine)
    if not loss_difference <= LOSS_TOLERANCE or not cosine >= COSINE:
        raise Disagreement(
            f"{mode.name}: {check}: loss off by {loss_difference:.2g} of plain's (at most "
            f"{LOSS_TOLERANCE:g}), gradients' cosine {cosine:.7f} (at least {COSINE})"
        )
    return agreement


def _smallest_cosine(found: _Step, plain: _Step) -> float:
    """Over the tensors whose gradients are not negligible."""
    pairs = [(found.gradients[name], gradient) for name, gradient in plain.gradients.items()]
    cosines = torch.stack([_cosine(one, other) for one, other in pairs])
    norms = torch.stack([other.norm() for _, other in pairs])
    return float(cosines[norms > NEGLIGIBLE * norms.norm()].min())


def _flatten(step: _Step) -> Tensor:
    return torch.cat([step.gradients[name].float().flatten() for name in sorted(step.gradients)])


def _cosine(one: Tensor, other: Tensor) -> Tensor:
    one, other = one.flatten().double(), other.flatten().double()
    return torch.dot(one, other) / (one.norm() * other.norm())


def _worst(one: float, other: float) -> float:
    """The larger, and NaN if either is."""
    return math.nan if math.isnan(one) or math.isnan(other) else max(one, other)


def check_rounding(
    modes: Sequence[Mode], plain: Mode, batches: Sequence[Batch], report: Callable[[str], None]
) -> list[Agreement]:
    """Compare bfloat16 steps with the spread of the plain step's own variants.

    The variants are: adapters in bfloat16, eager attention, everything in float32. A mode's
    distance is the root mean square of its relative loss differences over the batches, and the
    mean of its gradients' cosines.

    Raises:
        Disagreement: A mode that is :data:`SLACK` times as far from plain as its farthest variant,
            or variants that are too far for that to say anything.
    """
    expected = [_take_begun(plain, batch) for batch in batches]
    variants = [
        found
        for build in (_eager, _float32)
        if (found := _measure_variant(build, plain, batches, expected, report))
    ]
    found = [_measure(mode, batches, expected) for mode in modes if mode is not plain]
    variants += [each for each in found if each.mode == PLAIN_ROUNDED]
    most = SLACK * max((each.loss_difference for each in variants), default=0.0)
    least = 1 - SLACK * max((1 - each.cosine for each in variants), default=0.0)
    for each in variants:
        if not each.cosine >= VARIANTS_COSINE:
            raise Disagreement(
                f"{each.mode}: its gradients' cosine with plain's is {each.cosine:.5f}: rounding "
                "decides the bfloat16 gradients of this model, and nothing can be compared"
            )
    for each in found:
        if not each.loss_difference <= most or not each.cosine >= least:
            raise Disagreement(
                f"{each.mode}: in bfloat16, loss off by {each.loss_difference:.2g} of plain's "
                f"and gradients' cosine {each.cosine:.5f}; {SLACK} times the spread of plain's "
                f"own variants is {most:.2g} and {least:.5f}"
            )
    return [*variants, *(each for each in found if each.mode != PLAIN_ROUNDED)]


def _take_begun(mode: Mode, batch: Batch) -> _Step:
    mode.begin()
    return _take_step(mode, batch)


def _measure(mode: Mode, batches: Sequence[Batch], expected: Sequence[_Step]) -> Agreement:
    losses, cosines = [], []
    for batch, plain in zip(batches, expected, strict=True):
        found = _take_begun(mode, batch)
        losses.append((found.loss / plain.loss - 1) ** 2)
        cosines.append(float(_cosine(_flatten(found), _flatten(plain))))
    count = len(batches)
    return Agreement(
        f"{count} batches in bfloat16",
        mode.name,
        math.sqrt(sum(losses) / count),
        sum(cosines) / count,
    )


def _measure_variant(
    build: Callable[[Mode], Mode],
    plain: Mode,
    batches: Sequence[Batch],
    expected: Sequence[_Step],
    report: Callable[[str], None],
) -> Agreement | None:
    """Measure a variant of the plain step, if there is memory for it."""
    agreement = None
    try:
        agreement = _measure(build(plain), batches, expected)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    if agreement is None:
        report(f"no memory for plain's variant {build.__name__.removeprefix('_')}")
    gc.collect()  # a model may refer to itself, and the largest is twice the size of the original
    empty_cache(plain.model.device)
    return agreement


def _eager(plain: Mode) -> Mode:
    model = share_weights(plain.model)
    unwrap_peft(model).set_attn_implementation("eager")
    return make_plain("plain, eager attention", model, checkpointing=True)


def _float32(plain: Mode) -> Mode:
    model = copy.deepcopy(plain.model).float()
    return make_plain("plain, all in float32", model, checkpointing=True)
