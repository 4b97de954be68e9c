"""AdamW, its learning rate, and steps that a bad gradient cannot spoil.

Nothing here waits for the device: the gradient's norm, the decision to skip a step and the count
of skipped steps stay on it until the loop reads them back together with the loss.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import Parameter

from gemma_tuner.errors import ConfigError
from gemma_tuner.training.config import TrainConfig


def build_optimizer(
    named_parameters: Iterable[tuple[str, Parameter]],
    config: TrainConfig,
    device: torch.device,
) -> torch.optim.AdamW:
    """AdamW over the parameters that train, fused where the device can (:func:`find_fused`)."""
    trainable = [(name, p) for name, p in named_parameters if p.requires_grad]
    if not trainable:
        raise ConfigError(
            "no parameter of the model has requires_grad: wrap the model with "
            "add_lora(model, LoraConfig(...)) first"
        )
    for name, parameter in trainable:
        _check_parameter(name, parameter, device)
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


def _check_parameter(name: str, parameter: Parameter, device: torch.device) -> None:
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


def find_fused(device: torch.device) -> tuple[bool, str]:
    """Try whether the device has a fused AdamW that can skip a step by itself."""
    # It takes one step of a single number with ``found_inf`` set. Asking for a version would not
    # do: Metal's kernel ignored ``found_inf`` until pytorch#186360, and so would have trained on
    # what the step was told to skip.
    probe = torch.nn.Parameter(torch.ones(1, device=device))
    probe.grad = torch.full_like(probe, math.nan)
    try:
        optimizer = torch.optim.AdamW([probe], fused=True)
        optimizer.found_inf = torch.ones((), device=device)  # pyright: ignore[reportAttributeAccessIssue]
        optimizer.step()
    except (RuntimeError, NotImplementedError) as error:
        return False, f"{device.type} has no fused AdamW ({type(error).__name__})"
    if probe.item() != 1.0:
        return False, f"fused AdamW on {device.type} does not skip steps when told to"
    return True, f"{device.type} has a fused AdamW that skips bad steps without a host sync"


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


def clip_gradients(parameters: Iterable[Parameter], max_norm: float) -> Tensor:
    """Scale all gradients together so that their L2 norm is at most ``max_norm``, in place."""
    # A norm that is not finite makes every gradient undefined; :func:`guarded_step` then skips.
    # Returns: The norm before clipping, ``[]`` float32 on the parameters' device, not waited for.
    parameters = list(parameters)
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm, error_if_nonfinite=False)
    return norm.to(parameters[0].device)  # of no gradients at all, torch's is on the CPU


def guarded_step(optimizer: torch.optim.Optimizer, grad_norm: Tensor) -> Tensor:
    """Take the optimizer's step unless the gradient is infinite or undefined."""
    # A skipped step leaves parameters, moments and step counters as they were, bit for bit. The
    # fused kernel reads ``found_inf`` on the device, as it does for torch's GradScaler
    # (``torch/optim/adam.py``, ``_fused_adam``), so the host need not know. Without a fused kernel
    # the host has to ask: one sync a step.
    # grad_norm: ``[]`` from :func:`clip_gradients`.
    # Returns: ``[]`` float32 on the device: 1 if the step was skipped, else 0.
    skipped = grad_norm.isfinite().logical_not().to(torch.float32)
    # A first step that ran out of memory leaves counters without moments, which AdamW would take
    # as complete; the second moment is made last.
    for state in optimizer.state.values():
        if "exp_avg_sq" not in state:
            state.clear()
    if optimizer.defaults["fused"]:
        optimizer.found_inf = skipped  # pyright: ignore[reportAttributeAccessIssue]
        optimizer.step()
    elif not skipped.item():
        optimizer.step()
    return skipped


class NonfiniteGuard:
    """Count skipped steps on the device, to be read back together with the loss.

    Args:
        device: Where the counters live.
        total: Steps skipped before, by the run that this one resumes.
        consecutive: How many of them were its last ones.

    Attributes:
        total: ``[]`` float32, steps skipped in all; exact up to 2**24.
        consecutive: ``[]`` float32, steps skipped since the last one that was taken.
    """

    def __init__(self, device: torch.device, total: int = 0, consecutive: int = 0) -> None:
        self.total = torch.tensor(float(total), device=device)
        self.consecutive = torch.tensor(float(consecutive), device=device)

    def count(self, skipped: Tensor) -> None:
        """Add one step's outcome."""
        # skipped: ``[]`` float32 from :func:`guarded_step`.
        # In place, which needs no memory: here the step is taken and cannot be tried again.
        self.total.add_(skipped)
        self.consecutive.add_(skipped).mul_(skipped)
