"""The optimizer, AdamW or one that is handed in: its rate, and what it keeps in memory."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from gemma_tuner.errors import ConfigError
from gemma_tuner.training.config import TrainConfig


def build_optimizer(
    named_parameters: Iterable[tuple[str, Parameter]],
    config: TrainConfig,
    device: torch.device,
) -> torch.optim.AdamW:
    """AdamW over the parameters that train, fused where the device can (:func:`find_fused`)."""
    trainable = _list_trainable(named_parameters, device)
    fused, _ = find_fused(device)
    return torch.optim.AdamW(
        trainable,
        lr=float(config.learning_rate),
        betas=(float(config.betas[0]), float(config.betas[1])),
        eps=float(config.epsilon),
        weight_decay=float(config.weight_decay),
        fused=fused,
        # Neither fused nor foreach: where fused is missing, foreach is the slow composite.
        foreach=False,
    )


def check_optimizer(
    optimizer: Optimizer,
    named_parameters: Iterable[tuple[str, Parameter]],
    device: torch.device,
) -> Optimizer:
    """Return an optimizer that was handed in, if a run can take and save its steps."""
    kind = type(optimizer).__name__
    if not isinstance(optimizer, Optimizer):
        raise ConfigError(f"optimizer is a {kind}; give one of torch.optim")
    trainable = {id(parameter) for _, parameter in _list_trainable(named_parameters, device)}
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if held != trainable:
        raise ConfigError(
            f"the optimizer ({kind}) holds {len(held & trainable)} of the model's "
            f"{len(trainable)} trainable parameters and {len(held - trainable)} others; make it "
            "of [p for p in model.parameters() if p.requires_grad], after add_lora"
        )
    if any(group.get("fused") for group in optimizer.param_groups):
        fused, reason = find_fused(device, type(optimizer))
        if not fused:
            raise ConfigError(f"the optimizer is fused, but {reason}; make it with fused=False")
    kept = try_step(optimizer, optimizer.param_groups[0]["params"][0])
    for name, value in kept.items():
        if not isinstance(value, Tensor):
            raise ConfigError(
                f"the optimizer ({kind}) keeps {name} as {type(value).__name__}, and a checkpoint "
                "holds tensors alone; give one of torch.optim"
            )
    return optimizer


def try_step(optimizer: Optimizer, parameter: Parameter) -> dict[str, Tensor]:
    """What an optimizer keeps of such a parameter, by a first step of a copy of both."""
    twin = copy.copy(optimizer)
    probe = Parameter(torch.zeros_like(parameter))
    probe.grad = torch.zeros_like(parameter)
    twin.state = defaultdict(dict)
    twin.param_groups = [{**optimizer.param_groups[0], "params": [probe]}]
    twin.step()
    return twin.state[probe]


def measure_state(optimizer: Optimizer) -> float:
    """Bytes that an optimizer keeps for each byte that it trains: 2 for AdamW's two moments."""
    largest = max(
        (p for group in optimizer.param_groups for p in group["params"]), key=lambda p: p.numel()
    )
    kept = try_step(optimizer, largest).values()
    return sum(value.nbytes for value in kept if value.dim()) / largest.nbytes


def _list_trainable(
    named_parameters: Iterable[tuple[str, Parameter]], device: torch.device
) -> list[tuple[str, Parameter]]:
    trainable = [(name, p) for name, p in named_parameters if p.requires_grad]
    if not trainable:
        raise ConfigError(
            "no parameter of the model has requires_grad: wrap the model with "
            "add_lora(model, LoraConfig(...)) first"
        )
    for name, parameter in trainable:
        _check_parameter(name, parameter, device)
    return trainable


def _check_parameter(name: str, parameter: Parameter, device: torch.device) -> None:
    # Updates of 1e-4 vanish in bfloat16's 8 bits. Metal kernels have written non-contiguous
    # outputs wrongly (pytorch#118115).
    if parameter.dtype != torch.float32:
        raise ConfigError(
            f"trainable parameter {name} is {parameter.dtype}; adapters train in torch.float32: "
            "call parameter.data = parameter.data.float(), or wrap the model with add_lora"
        )
    if not parameter.is_contiguous():
        raise ConfigError(
            f"trainable parameter {name} with shape {tuple(parameter.shape)} and strides "
            f"{parameter.stride()} is not contiguous: store parameter.data.contiguous()"
        )
    # A device without an index means its current one, so only the type can be compared.
    if parameter.device.type != device.type:
        raise ConfigError(
            f"trainable parameter {name} is on {parameter.device}, the run on {device}: move the "
            "model there before the optimizer is made"
        )


def find_fused(
    device: torch.device, kind: type[Optimizer] = torch.optim.AdamW
) -> tuple[bool, str]:
    """Try whether the device has a fused form of an optimizer that can skip a step by itself."""
    # It takes one step of a single number with ``found_inf`` set. Asking for a version would not
    # do: Metal's kernel ignored ``found_inf`` until pytorch#186360, and so would have trained on
    # what the step was told to skip.
    name = kind.__name__
    probe = torch.nn.Parameter(torch.ones(1, device=device))
    probe.grad = torch.full_like(probe, math.nan)
    try:
        optimizer = kind([probe], lr=1.0, fused=True)  # pyright: ignore[reportCallIssue]
        optimizer.found_inf = torch.ones((), device=device)  # pyright: ignore[reportAttributeAccessIssue]
        optimizer.step()
    except (RuntimeError, NotImplementedError) as error:
        return False, f"{device.type} has no fused {name} ({type(error).__name__})"
    if probe.item() != 1.0:
        return False, f"fused {name} on {device.type} does not skip steps when told to"
    return (
        True,
        f"{device.type} has a fused {name} that skips bad steps without a host sync",
    )


def learning_rate_at(step: int, config: TrainConfig, total_steps: int) -> float:
    """The learning rate of one optimizer step: a function of its number, so nothing to save."""
    # With ``w = warmup_steps``, ``T = total_steps`` and the peak ``r``::
    #     step <  w            r * (step + 1) / w
    #     step >= w, constant  r
    #     step >= w, linear    r * (1 - p)                       p = (step - w) / (T - w)
    #     step >= w, cosine    r * (1 + cos(pi * p)) / 2
    # The first step already learns (r / w, not 0) and so does the last (p < 1).
    # Source: after the warm-up, transformers' ``get_*_schedule_with_warmup`` at ``step``; during
    # it, the same at ``step + 1``.
    peak = float(config.learning_rate)
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    progress = min(1.0, progress)
    if config.schedule == "linear":
        return peak * (1.0 - progress)
    if config.schedule == "cosine":
        return peak * 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Give every parameter group this rate for its next step."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
