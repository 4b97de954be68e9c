"""What the names in a PEFT adapter mean: modules of whichever class it was trained on."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.other import get_pattern_key

from gemma_tuner.modalities import MEDIA

if TYPE_CHECKING:
    from gemma_tuner.models.families import Family

PREFIX = "base_model.model."
BASE_COPY = ".base_layer.weight"
"""How the name ends of a frozen weight that PEFT saves beside an adapter on embedding or head."""
# Settings of PEFT's LoRA that change what an adapter computes, with the value that does not.
_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "kasa_config": (None,),
    "layer_replication": (None,),
    "lora_bias": (False, None),
    "monteclora_config": (None,),
    "trainable_token_indices": (None, {}, []),
    "use_bdlora": (None, False),
    "use_qalora": (False, None),
    "velora_config": (None,),
}
# Others change the base's weights when they begin, which the adapter's file does not say.
_NEUTRAL_INITS = (True, False, None, "gaussian", "orthogonal", "eva")

_LORA = re.compile(r"(.+?)\.(lora_(?:A|B|embedding_A|embedding_B|magnitude_vector))(?:\..+)?")
_TOWERS = {part for medium in MEDIA for part in (medium.tower, medium.projector)}


def find_unsupported(config: Mapping[str, Any]) -> str | None:
    """Name a setting of PEFT's LoRA with which an adapter is more than weights to be added."""
    for setting, neutral in (*_UNSUPPORTED.items(), ("init_lora_weights", _NEUTRAL_INITS)):
        if config.get(setting) not in neutral:
            value = str(config[setting])
            return f"{setting}={value if len(value) < 40 else '...'}"
    return None


def full_name(name: str, family: Family) -> str:
    """Name a module as the class with all parts does, of whatever class or program it was."""
    # model.layers.0 of a class for text alone; language_model.model.layers.0 of MLX
    rest = re.sub(r"^(model\.)?(language_model\.)?(model\.)?", "", name)
    first = rest.partition(".")[0]
    if first == "lm_head":
        return rest
    return f"model.{rest}" if first in _TOWERS else f"{family.decoder}.{rest}"


def find_saved_module(config: Mapping[str, Any], name: str) -> str | None:
    """The module that ``modules_to_save`` means, to which a weight belongs; None if to none."""
    suffixes: tuple[str, ...] = tuple(config.get("modules_to_save") or ())
    if suffixes and config.get("ensure_weight_tying"):  # names one of both, and saves both
        suffixes = (*suffixes, "embed_tokens", "lm_head")
    parts = name.split(".")
    paths = (".".join(parts[:end]) for end in range(1, len(parts)))
    return next((path for path in paths if path.endswith(suffixes)), None)  # as PEFT matches


def split_parameter(config: Mapping[str, Any], path: str) -> tuple[str, str]:
    """Return the module and the parameter that an adapter's path means."""
    # PEFT wraps a module once for each of its adapted parameters, in the order in which the module
    # has them (``gate_up_proj`` first, so innermost); each wrapper inside another is a
    # ``base_layer``.
    module = path.replace(".base_layer", "")
    adapted = {
        target.rpartition(".")[2]
        for target in config.get("target_parameters") or ()
        if f".{module}.{target.rpartition('.')[2]}".endswith(f".{target}")
    }
    if not adapted:
        return module, "weight"
    depth = path.count(".base_layer")
    from_outside = [name for name in ("down_proj", "gate_up_proj") if name in adapted]
    return module, from_outside[depth]


def rank_and_alpha(config: Mapping[str, Any], module: str) -> tuple[int, float]:
    """Tell an adapter's rank and alpha."""
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    rank = ranks.get(get_pattern_key(list(ranks), module), config["r"])
    return rank, alphas.get(get_pattern_key(list(alphas), module), config["lora_alpha"])


def rank_and_scale(config: Mapping[str, Any], module: str) -> tuple[int, float]:
    """Tell an adapter's rank and what ``b @ a`` is multiplied by."""
    rank, alpha = rank_and_alpha(config, module)
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def pin_config(config: Mapping[str, Any], keys: Iterable[str], family: Family) -> dict[str, Any]:
    """PEFT's settings that mean the modules which have weights, by full names, and no others."""
    # Suffixes and regular expressions were meant for the class that was trained: of text alone
    # there, they would reach into the towers here.
    modules: set[str] = set()
    parameters: set[str] = set()
    saved: set[str] = set()
    patterns: dict[str, dict[str, Any]] = {"rank_pattern": {}, "alpha_pattern": {}}
    for key in keys:
        name = key.removeprefix(PREFIX)
        match = _LORA.fullmatch(name)
        if match is None:
            if module := find_saved_module(config, name):
                saved.add(full_name(module, family))
            continue
        module, parameter = split_parameter(config, match[1])
        own = module if parameter == "weight" else f"{module}.{parameter}"
        (modules if parameter == "weight" else parameters).add(full_name(own, family))
        defaults = config["r"], config["lora_alpha"]
        for kind, value, default in zip(
            patterns, rank_and_alpha(config, own), defaults, strict=True
        ):
            if value != default:
                patterns[kind][full_name(own, family)] = value
    nothing = [] if parameters else DUMMY_TARGET_MODULES
    return {
        **config,
        **patterns,
        "target_modules": sorted(modules) or nothing,
        "target_parameters": sorted(parameters) or None,
        "modules_to_save": sorted(saved) or None,
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "ensure_weight_tying": False,
    }


_TOKENS = re.compile(
    r"\\.|\[\^?\]?(?:\\.|[^\]])*\]|\((?:\?<?[:=!]|\?P<\w*>)?|[)|]|(?:[*+?]|\{\d*,?\d*\})[?+]?",
    re.DOTALL,
)
_MAX_REPEATS, _MAX_CHOICES = 5, 10  # of no bound; of any kind: unsloth's patterns have five


def is_endless(pattern: object) -> bool:
    """Whether matching a regular expression may take for ever: of repeats in repeats, or many."""
    # Patterns of an adapter's settings come from whoever made it, and Python cannot stop a match.
    varies = [False]  # whether each open group has more than one way to match
    closed, closed_at, num_open, num_all = False, -1, 0, 0
    for token in _TOKENS.finditer(pattern if isinstance(pattern, str) else ""):
        text = token[0]
        if text.startswith("("):
            varies.append(False)
        elif text == ")" and len(varies) > 1:
            closed, closed_at = varies.pop(), token.end()
            varies[-1] |= closed
        elif text == "|":
            varies[-1] = True
        elif text[0] in "*+?{":
            if text[0] != "?" and closed and token.start() == closed_at:
                return True
            num_all += 1
            num_open += text[0] in "*+{"
            varies[-1] = True
    return num_open > _MAX_REPEATS or num_all > _MAX_CHOICES
