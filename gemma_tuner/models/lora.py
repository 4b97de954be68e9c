"""LoRA adapters on chosen parts of a Gemma model, and nowhere else.

PEFT's own ways of choosing (suffix lists, ``all-linear``) reach into the towers, miss the linear
layers inside clipped ones, or depend on which towers happen to be loaded. Here each target is one
regular expression over full module names, decided from the modules that the model has.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn
from transformers import PreTrainedModel

from gemma_tuner.checks import suggest
from gemma_tuner.device import seeded
from gemma_tuner.errors import ConfigError
from gemma_tuner.log import announce
from gemma_tuner.models.adapter_names import find_saved_module, find_unsupported
from gemma_tuner.models.families import family_of
from gemma_tuner.models.few_bits.layers import PackedLayer, PackedLinear
from gemma_tuner.models.few_bits.tables import PackedHead
from gemma_tuner.models.lora_config import TARGETS
from gemma_tuner.models.lora_config import LoraConfig as LoraConfig
from gemma_tuner.models.lora_linear import (
    is_linear,
    pool_adapters,
    register_layers,
    use_lean_adapters,
)

_DECODER_LAYER = r"{decoder}\.layers\.{layers}\."
_PATTERNS = {
    "language": _DECODER_LAYER + r"(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj",
    "vision": r"model\.vision_tower\..*\.(q|k|v|o|gate|up|down)_proj{inner}",
    "audio": (
        r"model\.audio_tower\..*\."
        r"(q_proj|k_proj|v_proj|post|ffw_layer_[12]|linear_start|linear_end){inner}"
    ),
    "projectors": r"model\.embed_({towers})\.(multimodal_embedder\.)?embedding_projection",
}
# Parameters, not modules: all experts of a layer are one tensor.
_EXPERTS = _DECODER_LAYER + r"experts\.(gate_up_proj|down_proj)"


def add_lora(
    model: PreTrainedModel, config: LoraConfig | peft.LoraConfig | None = None
) -> peft.PeftModel:
    """Freeze a model and put adapters on the chosen parts.

    The adapters are float32 whatever the model's dtype, as small updates vanish in bfloat16;
    beside a bfloat16 layer they are rounded to it where they are multiplied. At first they change
    nothing. The model keeps its mode (eval, from ``load_model``).

    Args:
        model: From ``load_model``.
        config: Where adapters go; None is ``LoraConfig()``, rank 16 on the decoder. PEFT's own
            is taken as PEFT reads it; without ``target_modules`` it is for the decoder.

    Returns:
        The same model, wrapped; ``save_pretrained`` writes an adapter that stock PEFT loads.

    Raises:
        ConfigError: A target that the model does not have, one that matches nothing or something
            that is not linear, or a model that has adapters already.
    """
    refuse_adapters(check_model(model))
    seed = 0
    if isinstance(config, peft.LoraConfig):
        peft_config, counts = check_peft_config(model, config)
    elif isinstance(config, LoraConfig | None):
        config = config or LoraConfig()
        peft_config, counts = find_adapters(model, config)
        seed = config.seed
    else:
        raise ConfigError(f"config is a {type(config).__name__}; give LoraConfig(rank=16)")
    wrapped = wrap_peft(model, peft_config, seed)
    _announce_adapters(wrapped, counts)
    return wrapped


def check_model(model: Any) -> Any:
    """Refuse what is no Gemma model, wrapped by PEFT or not."""
    gemma = unwrap_peft(model)
    if isinstance(model, str | Path):
        raise ConfigError(
            "model is a name or a folder; load it first: model, processor = load_model(...), and "
            "put an adapter on with load_adapter(model, FOLDER)"
        )
    if not isinstance(gemma, PreTrainedModel):
        raise ConfigError(f"model is a {type(gemma).__name__}; give what load_model returns first")
    family_of(gemma.config)
    return model


def check_adapted(model: Any) -> None:
    """Refuse what is no model with an adapter."""
    if not isinstance(check_model(model), peft.PeftModel):
        raise ConfigError("the model has no adapter; add_lora or load_adapter puts one on")


def refuse_adapters(model: Any) -> None:
    """Refuse a model that has adapters where new ones are to be put on."""
    if isinstance(model, peft.PeftModel) or hasattr(model, "peft_config"):
        raise ConfigError(
            "the model has adapters already. To go on training one, give the model to Trainer "
            "(load_adapter(model, FOLDER, trainable=True), in PEFT is_trainable=True, loads it "
            "so); for others, load the model again, or model.unload() these"
        )


def check_peft_config(
    model: PreTrainedModel, config: peft.LoraConfig
) -> tuple[peft.LoraConfig, dict[str, int]]:
    """Refuse of PEFT's settings what this library cannot train or export."""
    config = copy.deepcopy(config)
    config.task_type = config.task_type or "CAUSAL_LM"
    if setting := find_unsupported(config.to_dict()):
        raise ConfigError(
            f"PEFT's LoraConfig has {setting}, which cannot be exported; leave it out"
        )
    if config.target_modules is None and not config.target_parameters:
        config.target_modules = _fill_pattern(model, "language", r"\d+")
    modules = dict(model.named_modules())
    saved = {"modules_to_save": config.modules_to_save}
    if config.target_modules == "all-linear":  # which PEFT itself lists, without the head
        meant = [
            name for name, module in modules.items() if is_linear(module) and name != "lm_head"
        ]
    else:
        meant = [name for name in modules if check_target_module_exists(config, name)]
        meant += [name for name in modules if find_saved_module(saved, f"{name}.") == name]
    head: Any = model.get_output_embeddings()
    for name in meant:
        if modules[name] is head:
            raise ConfigError(
                f"PEFT's LoraConfig means {name}, which shares its weight with the input "
                "embedding and whose gradient is not computed; leave it out"
            )
        if not is_linear(modules[name]) and not find_saved_module(saved, f"{name}."):
            raise ConfigError(
                f"target_modules of PEFT's LoraConfig means {name}, a "
                f"{type(modules[name]).__name__}; only linear layers can be adapted: load_model "
                "without the tower, or give a regular expression of full names"
            )
    if not meant and not config.target_parameters:
        raise ConfigError(
            f"target_modules of PEFT's LoraConfig matches nothing; this model has "
            f"{', '.join(list_targets(model))}, which gemma_tuner.LoraConfig(targets=...) takes"
        )
    return config, {"what PEFT's LoraConfig means": len(meant)}


def find_adapters(
    model: PreTrainedModel, config: LoraConfig
) -> tuple[peft.LoraConfig, dict[str, int]]:
    """Find the modules of a model that are meant, and say it in PEFT's terms."""
    _refuse_packed(model, config)
    modules = {name for name, module in model.named_modules() if is_linear(module)}
    layers = _choose_layers(model, config)
    patterns: list[str] = []
    linear_names: set[str] = set()
    counts: dict[str, int] = {}
    expert_parameters: list[str] = []
    for target in config.targets:
        if target == "experts":
            matched = expert_parameters = _match_experts(model, layers)
        else:
            pattern = _fill_pattern(model, target, layers)
            matched = _match(pattern, modules)
            _check_all_linear(model, target, pattern)
            patterns.append(f"(?:{pattern})")
            linear_names.update(matched)
        if not matched:
            raise ConfigError(_describe_absent(model, target, modules))
        counts[target] = len(matched)

    if config.variant == "full":
        # PEFT refuses to add nothing but by this name.
        modules = sorted(linear_names)
        return peft.LoraConfig(
            target_modules=DUMMY_TARGET_MODULES, modules_to_save=modules, task_type="CAUSAL_LM"
        ), counts
    peft_config = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType]  # any number serves
        lora_dropout=config.dropout,
        target_modules="|".join(patterns) if patterns else [],
        target_parameters=expert_parameters or None,
        use_dora=config.variant == "dora",
        use_rslora=config.variant == "rslora",
        task_type="CAUSAL_LM",
    )
    if config.variant == "qalora":
        peft_config.use_qalora = True
        peft_config.qalora_group_size = _find_group(model, sorted(linear_names))
    return peft_config, counts


def _refuse_packed(model: nn.Module, config: LoraConfig) -> None:
    """Refuse what would train packed weights themselves, or adapt packed experts."""
    if list_packed(model):
        for what, is_meant in (
            ("the variant 'full'", config.variant == "full"),
            ("the target 'experts'", "experts" in config.targets),
        ):
            if is_meant:
                raise ConfigError(
                    f"{what} needs weights that are not packed; load the checkpoint in bfloat16, "
                    "or leave it out"
                )


def list_packed(model: nn.Module) -> list[str]:
    """Name the modules whose weights are packed."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, PackedLayer | PackedHead)
    ]


def _find_group(model: nn.Module, names: Sequence[str]) -> int:
    """How many weights share a bias in all of some layers."""
    groups: dict[int | None, str] = {}
    for name in names:
        layer: Any = model.get_submodule(name)
        is_affine = isinstance(layer, PackedLinear) and layer.grid.is_affine
        groups.setdefault(layer.grid.group if is_affine else None, name)
    if None in groups:
        raise ConfigError(
            f"the variant 'qalora' changes the biases of packed weights, and {groups[None]} has "
            "none; load a checkpoint of pack(..., grid='affine'), and target its layers alone"
        )
    if len(groups) > 1:
        raise ConfigError(
            f"the variant 'qalora' needs one size of groups, and {' and '.join(groups.values())} "
            f"have {' and '.join(map(str, groups))}; target the layers of one alone"
        )
    (group,) = groups
    return int(group or 0)


def list_targets(model: Any) -> list[str]:
    """Name the targets that a model has, of :data:`TARGETS`."""
    modules = {name for name, module in model.named_modules() if is_linear(module)}
    found = [name for name in _PATTERNS if _match(_fill_pattern(model, name, r"\d+"), modules)]
    return [*found, "experts"] if _match_experts(model, r"\d+") else found


def wrap_peft(model: PreTrainedModel, config: peft.PeftConfig, seed: int = 0) -> peft.PeftModel:
    """Put adapters on where PEFT's own configuration says."""
    # Returns: The model, wrapped, in the mode that it was in; what trains is float32 and
    # contiguous.
    training = model.training
    for name in list_packed(model):
        if find_saved_module(vars(config), f"{name}."):
            raise ConfigError(
                f"{name} is to be trained itself, and its weights are packed; load the checkpoint "
                "that they were packed from, or leave it out of modules_to_save"
            )
    register_layers(config)
    with seeded(model.device, seed), warnings.catch_warnings():
        # PEFT 0.21 asks for it by the name that transformers 6 will not have.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        warnings.filterwarnings("ignore", "Unsupported layer type", UserWarning)  # see LINEAR
        wrapped = peft.get_peft_model(model, config)
        if getattr(config, "use_qalora", False):
            pool_adapters(wrapped, config.to_dict()["qalora_group_size"])
    wrapped.train(training)
    for module in wrapped.modules():
        # PEFT rounds DoRA's magnitudes to the model's dtype, so that a bfloat16 model would change
        # by up to 0.4 % a row before the first step
        for magnitude in getattr(module, "lora_magnitude_vector", {}).values():
            weight: Any = module.get_submodule("base_layer").weight
            magnitude.weight.data = torch.linalg.norm(weight.float(), dim=1)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float().contiguous()
    use_lean_adapters(wrapped)
    return wrapped


def unwrap_peft(model: Any) -> Any:
    """The transformers model inside a PEFT wrapper (its adapters stay active), or the model."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _choose_layers(model: Any, config: LoraConfig) -> str:
    """The decoder layers as a regular expression over their numbers."""
    num_layers = len(model.get_decoder().layers)
    if config.layers is None:
        return r"\d+"
    if not {"language", "experts"} & set(config.targets):
        raise ConfigError(
            f"layers is {config.layers!r}, but no target has decoder layers; leave layers out, or "
            "add 'language'"
        )
    if isinstance(config.layers, int):
        first, last = num_layers - config.layers, num_layers - 1
    else:
        first, last = config.layers
    if first < 0 or last >= num_layers:
        raise ConfigError(
            f"layers is {config.layers!r}, but the model has {num_layers} layers; give at most so "
            "many, or leave layers out"
        )
    return f"({'|'.join(map(str, range(first, last + 1)))})"


def _fill_pattern(model: Any, target: str, layers: str) -> str:
    """The regular expression of a target, as this model's modules are named."""
    if target not in _PATTERNS:
        return target
    inner = model.model
    towers = [
        kind
        for kind in ("vision", "audio")
        # Gemma 3n keeps its projectors when a tower is left out; no training signal reaches them
        if getattr(inner, f"{kind}_tower", True) is not None
    ]
    tower = getattr(inner, f"{target}_tower", None)
    clippable = tower is not None and any(
        name.endswith("_proj.linear") for name, _ in tower.named_modules()
    )
    return _PATTERNS[target].format(
        decoder=_decoder_pattern(model),
        layers=layers,
        towers="|".join(towers) or "none",
        inner=r"\.linear" if clippable else "",
    )


def _decoder_pattern(model: Any) -> str:
    return re.escape(family_of(model.config).decoder)


def _match_experts(model: Any, layers: str) -> list[str]:
    pattern = _EXPERTS.format(decoder=_decoder_pattern(model), layers=layers)
    return _match(pattern, [name for name, _ in model.named_parameters()])


def _match(pattern: str, names: Sequence[str] | set[str]) -> list[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            f"the target {pattern!r} is no regular expression ({error}), and none of "
            f"{', '.join(TARGETS)}"
        ) from error
    return sorted(name for name in names if compiled.fullmatch(name))


def _check_all_linear(model: nn.Module, target: str, pattern: str) -> None:
    """Refuse a regular expression that reaches further than linear layers, or the tied head."""
    for name, module in model.named_modules():
        if not re.fullmatch(pattern, name):
            continue
        if not is_linear(module):
            raise ConfigError(
                f"the target {target!r} matches {name or 'the whole model'}, a "
                f"{type(module).__name__}; only linear layers can be adapted, so match those alone"
            )
        if module is model.get_output_embeddings():  # pyright: ignore[reportCallIssue]
            raise ConfigError(
                f"the target {target!r} matches {name}, which shares its weight with the input "
                "embedding; merging such an adapter changes the model, so leave it out"
            )


def _describe_absent(model: Any, target: str, modules: set[str]) -> str:
    """Say why the model does not have a target, and what it has."""
    present = list_targets(model)
    if target not in TARGETS:
        hint = suggest(target, TARGETS)
        if target == "all-linear":
            hint = " (PEFT's name for what 'language' means here)"
        elif any(name.endswith(f".{target}") for name in modules):
            inner = family_of(model.config).decoder.rpartition(".")[2]
            hint = f" by its full name; write the regular expression r'.*{inner}.*\\.{target}'"
        return (
            f"the target {target!r} matches no linear layer{hint}; this model has "
            f"{', '.join(present)}"
        )
    if getattr(model.model, f"{target}_tower", None) is not None:
        reason = f"its {target} tower has no linear layers of that kind (it is convolutional)"
    else:
        reason = (
            "it was loaded without that part, or its family has none; pass the modality to "
            "load_model(modalities=...) if the checkpoint offers it"
        )
    return f"the target {target!r} is not in this model: {reason}. It has {', '.join(present)}"


def _announce_adapters(model: nn.Module, counts: dict[str, int]) -> None:
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    where = ", ".join(f"{count} in {target}" for target, count in counts.items())
    announce(
        f"adapters: {where}; {trainable:,} trainable parameters, "
        f"{trainable / total:.2%} of {total:,}"
    )
