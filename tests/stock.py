"""A wrapped model as transformers and PEFT run it, to compare ours with."""

from contextlib import contextmanager

from peft.tuners import lora

from gemma_tuner.models.attention import ATTENTION
from gemma_tuner.models.lora_linear import LoraLinear
from gemma_tuner.models.norms import use_lean_norms, use_stock_norms


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
