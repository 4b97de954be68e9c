"""What ours is compared with: models as transformers and PEFT run them, and without rounding."""

from contextlib import contextmanager

import torch
from peft.tuners import lora
from torch.overrides import TorchFunctionMode

from gemma_tuner.models.attention import ATTENTION
from gemma_tuner.models.lora_linear import LoraLinear
from gemma_tuner.models.norms import LeanNorm, use_lean_norms


def use_stock_norms(model):
    """Give a model back the norms that transformers gave it."""
    for module in model.modules():
        if isinstance(module, LeanNorm):
            module.__class__ = type(module).__bases__[1]


@contextmanager
def stock_parts(model):
    """Put transformers' own attention and norms and PEFT's adapters in place of ours, for a while.

    Args:
        model: In float32, where ours change no setting of PEFT's layers.
    """
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    ours = [config for config in configs if config._attn_implementation == ATTENTION]
    adapters = [module for module in model.modules() if type(module) is LoraLinear]
    for config in ours:
        config._attn_implementation = "sdpa"
    for adapter in adapters:
        adapter.__class__ = lora.Linear
    use_stock_norms(model)
    yield
    use_lean_norms(model)
    for adapter in adapters:
        adapter.__class__ = LoraLinear
    for config in ours:
        config._attn_implementation = ATTENTION


class Float64Everywhere(TorchFunctionMode):
    """What asks for float32 in a float64 model (norms, softmax, rotations) gets float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        func = torch.Tensor.double if func is torch.Tensor.float else func
        args = [torch.float64 if value is torch.float32 else value for value in args]
        kwargs = {
            name: torch.float64 if value is torch.float32 else value
            for name, value in (kwargs or {}).items()
        }
        return func(*args, **kwargs)
