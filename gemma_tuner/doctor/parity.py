"""One training step of every tiny model on the device, against the CPU in float32.

The models are random and tiny, their structure is that of the released families: what is compared
is every layer type, tower and collator of the library, not a checkpoint.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gemma_tuner.batch import Batch
from gemma_tuner.collators.multimodal import MultimodalCollator
from gemma_tuner.doctor.checks import Check, Finding, run_check
from gemma_tuner.modalities import Modality
from gemma_tuner.models.lora import LoraConfig, add_lora, list_targets
from gemma_tuner.models.loss import target_loss_sum
from gemma_tuner.models.modes import begin_training
from gemma_tuner.streaming.opening import stream_local
from gemma_tuner.testing import sample_data, tiny_model
from gemma_tuner.testing.models.tiny import MODALITIES

_NUM_ROWS = 2
_CHUNK_TOKENS = 16
# float32: of the loss (relative), and of the cosine of each adapter's gradient from 1.
_TOLERANCE = 1e-4
# bfloat16: rounding turns the gradients of these random models by as much as their structure lets
# it (most where it changes which experts are chosen). So the device may be so many times as far
# from float32 as the CPU's own bfloat16, and by these: of the loss, and of the whole gradient.
_ROUNDING_FACTOR = 3
_LOSS_SLACK, _GRADIENT_SLACK = 1e-2, 2e-2
_DTYPES = (torch.float32, torch.bfloat16)

Step = tuple[float, dict[str, Tensor]]


def check_family(family: str, device: torch.device) -> list[Check]:
    """Compare steps of one family."""
    # Each modality, float32 and bfloat16, checkpointing on and off.
    batches = {modality: make_batch(family, modality) for modality in MODALITIES[family]}
    on_cpu = {
        dtype: {
            modality: take_step(model, batch, checkpointing=False)
            for modality, batch in batches.items()
        }
        for dtype in _DTYPES
        for model in [make_model(family, dtype)]
    }
    checks = []
    for dtype in _DTYPES:
        model = make_model(family, dtype)
        for modality, batch in batches.items():
            exact = on_cpu[torch.float32][modality]
            rounding = find_distance(on_cpu[dtype][modality], exact)
            for checkpointing in (False, True):
                name = (
                    f"{family}, {modality}, {str(dtype).removeprefix('torch.')}, "
                    f"{'with' if checkpointing else 'without'} checkpointing"
                )
                measure = partial(
                    _measure, model, batch, device, exact, rounding, checkpointing=checkpointing
                )
                checks.append(run_check("parity", name, measure))
    return checks


def make_model(family: str, dtype: torch.dtype) -> Any:
    """A tiny model with adapters that do something, on the CPU."""
    tiny: Any = tiny_model(family)[0]
    model = add_lora(tiny.to(dtype), LoraConfig(rank=4, targets=list_targets(tiny)))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # they begin at zero, and then lora_A has no gradient
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def make_batch(family: str, modality: Modality) -> Batch:
    """The first bundled samples of a modality, collated for a family, on the CPU."""
    _, processor = tiny_model(family)
    with tempfile.TemporaryDirectory() as folder:
        stream = stream_local(sample_data(modality), cache_dir=folder, shuffle=False)
        examples = [stream[index] for index in range(_NUM_ROWS)]
        return MultimodalCollator(processor)(examples)


def take_step(model: Any, batch: Batch, *, checkpointing: bool) -> Step:
    """Compute a step's mean loss and the gradients of its adapters."""
    begin_training(model, checkpointed_layers=None if checkpointing else 0)
    model.zero_grad(set_to_none=True)
    device = next(model.parameters()).device
    loss = target_loss_sum(model, batch.to(device), chunk_tokens=_CHUNK_TOKENS)
    loss = loss / batch.num_target_tokens
    loss.backward()
    gradients = {
        name: parameter.grad.detach().cpu()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return float(loss.detach()), gradients


def _measure(
    model: Any,
    batch: Batch,
    device: torch.device,
    exact: Step,
    rounding: Distance,
    *,
    checkpointing: bool,
) -> Finding:
    step = take_step(model.to(device), batch, checkpointing=checkpointing)
    return judge_step(find_distance(step, exact), rounding)


@dataclass(frozen=True, slots=True)
class Distance:
    """How far a step is from another; NaN where it holds NaN.

    Args:
        loss_difference: Relative.
        smallest_cosine: Of an adapter's gradients; 0 for one that has no gradient in one of both.
        worst: That adapter.
        whole_cosine: Of all gradients together, as one vector.
        norm_ratio: Their length over the other's.
    """

    loss_difference: float
    smallest_cosine: float
    worst: str
    whole_cosine: float
    norm_ratio: float


def find_distance(step: Step, exact: Step) -> Distance:
    """Measure how far a step is from another."""
    (loss, gradients), (exact_loss, exact_gradients) = step, exact
    cosines = {
        name: _cosine(gradients[name], exact_gradients[name])
        if name in gradients and name in exact_gradients
        else 0.0
        for name in {**exact_gradients, **gradients}
    }
    worst = min(cosines, key=lambda name: (cosines[name] == cosines[name], cosines[name]))
    found, wanted = (
        torch.cat([side[name].double().flatten() for name in exact_gradients if name in side])
        for side in (gradients, exact_gradients)
    )
    return Distance(
        loss_difference=abs(loss - exact_loss) / abs(exact_loss),
        smallest_cosine=cosines[worst],
        worst=worst,
        whole_cosine=_cosine(found, wanted) if found.shape == wanted.shape else 0.0,
        norm_ratio=float(found.norm() / wanted.norm()),
    )


def judge_step(distance: Distance, rounding: Distance) -> Finding:
    """Decide whether a step is right."""
    faults = []
    is_exact = rounding.loss_difference == 0.0 and rounding.smallest_cosine > 1 - 1e-9
    loss_tolerance = (
        _TOLERANCE if is_exact else _ROUNDING_FACTOR * rounding.loss_difference + _LOSS_SLACK
    )
    # Not the other way round: NaN is a fault.
    if not distance.loss_difference <= loss_tolerance:
        faults.append(f"the loss differs by {distance.loss_difference:.2g} of the CPU's")
    if is_exact and not distance.smallest_cosine >= 1 - _TOLERANCE:
        faults.append(
            f"the gradient of {distance.worst} has a cosine of {distance.smallest_cosine:.6g}"
        )
    for what, value, expected in (
        ("gradients point elsewhere: cosine", distance.whole_cosine, rounding.whole_cosine),
        ("gradients have another length: times", distance.norm_ratio, rounding.norm_ratio),
    ):
        slack = _TOLERANCE if is_exact else _ROUNDING_FACTOR * abs(expected - 1) + _GRADIENT_SLACK
        if not abs(value - 1) <= slack:
            faults.append(f"{what} {value:.6g} (on the CPU {expected:.6g})")
    figures = {
        **asdict(distance),
        **{f"cpu_{name}": value for name, value in asdict(rounding).items() if name != "worst"},
    }
    return ("wrong", "; ".join(faults), figures) if faults else ("ok", None, figures)


def _cosine(a: Tensor, b: Tensor) -> float:
    """Between two tensors as vectors; 1 for two of zeros, NaN where one holds NaN."""
    a, b = a.double().flatten(), b.double().flatten()
    lengths = float(a.norm() * b.norm())
    if lengths == 0.0:
        return float(torch.equal(a, b))
    return float(a @ b) / lengths
