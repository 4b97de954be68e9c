"""Tiny Gemma models with random weights: every family's structure, at a size for tests.

Stock transformers classes throughout. What the real checkpoints have, the tiny ones have:
shared keys and values, double-wide MLPs, per-layer embeddings, clipped linears, keys used as
values, bidirectional vision attention, experts, AltUp and Laurel. Weights, buffers and norm scales
are spread wide enough that a weight which fails to load, or an adapter, changes the result.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers.utils import logging

from gemma_tuner.errors import ConfigError
from gemma_tuner.modalities import Modality
from gemma_tuner.models.building import finish_model
from gemma_tuner.models.families import family_of_processor
from gemma_tuner.testing.models.processor import tiny_processor

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

MODALITIES: dict[str, tuple[Modality, ...]] = {
    "gemma4-e2b": ("text", "image", "audio"),
    "gemma4-12b": ("text", "image", "audio"),
    "gemma4-26b-a4b": ("text", "image"),
    "gemma4-31b": ("text", "image"),
    "gemma3n": ("text", "image", "audio"),
}
FAMILIES = tuple(MODALITIES)

_HIDDEN = 64
_MEDIA_HIDDEN = 32
# The widest image at 1120 soft tokens, in patches: 1120 tokens in one row, 3 patches each.
_MAX_PATCHES_PER_SIDE = 3 * 1120

_TEXT = {
    "hidden_size": _HIDDEN,
    "intermediate_size": 2 * _HIDDEN,
    "num_attention_heads": 4,
    "head_dim": 16,
    "sliding_window": 32,
    "max_position_embeddings": 8192,
}
_GEMMA4_TEXT = {**_TEXT, "global_head_dim": 32, "final_logit_softcapping": 30.0}
_E2B_TEXT = {
    **_GEMMA4_TEXT,
    "num_hidden_layers": 8,
    "layer_types": [*["sliding_attention"] * 3, "full_attention"] * 2,
    "num_key_value_heads": 1,
    "num_kv_shared_layers": 4,
    "use_double_wide_mlp": True,
    "hidden_size_per_layer_input": 8,
}
_LARGE_TEXT = {
    **_GEMMA4_TEXT,
    "num_hidden_layers": 6,
    "layer_types": [*["sliding_attention"] * 2, "full_attention"] * 2,
    "num_key_value_heads": 2,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "use_bidirectional_attention": "vision",
}
_MOE_TEXT = {
    **_LARGE_TEXT,
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 32,
}
_GEMMA3N_TEXT = {
    **_TEXT,
    "num_hidden_layers": 8,
    "layer_types": [*["sliding_attention"] * 3, "full_attention"] * 2,
    "num_key_value_heads": 2,
    "num_kv_shared_layers": 4,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 4,
    "activation_sparsity_pattern": [0.95] * 2 + [0.0] * 6,
}


def tiny_model(
    family: str, seed: int = 0, processor_from: str | Path | None = None
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Build a tiny model and its processor in memory, without a network.

    Args:
        family: One of :data:`FAMILIES`.
        seed: Decides every weight. The global random state is left as it was.
        processor_from: Folder with a real checkpoint's processor, tokenizer and chat template
            (weights are not needed); the processor is then that folder's own. The model takes
            its vocabulary (262,144 rows), token ids, patch size, pooling and mel bins, and
            everything else stays tiny. For tests of prompts and token counts as released.

    Returns:
        ``(model, processor)``: float32, on the CPU, frozen, in eval mode; both can be saved with
        ``save_pretrained`` and loaded with ``load_model``.

    Raises:
        ConfigError: An unknown family, or a folder of another kind of model.
    """
    if family not in FAMILIES:
        raise ConfigError(f"family is {family!r}; it may be one of {', '.join(FAMILIES)}")
    processor: Any = tiny_processor(family)
    kind = family_of_processor(processor)
    if processor_from is not None:
        processor = transformers.AutoProcessor.from_pretrained(processor_from)
        found = family_of_processor(processor)
        if found.model_type != kind.model_type:
            raise ConfigError(
                f"processor_from holds a processor for model_type {found.model_type!r}, but "
                f"{family!r} is {kind.model_type!r}; give a folder of the same kind"
            )
        processor.tokenizer.padding_side = "right"
    config = (
        _gemma3n_config(processor) if family == "gemma3n" else _gemma4_config(family, processor)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, kind.model_class)(config)
        with torch.no_grad():
            _spread_weights(model)
    return finish_model(model), processor


def save_tiny_model(
    family: str, folder: str | Path, seed: int = 0, max_shard_size: str = "10GB"
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Write a tiny model and its processor as a checkpoint folder, without progress bars.

    Args:
        family: One of :data:`FAMILIES`.
        folder: Where; ``load_model`` reads it from there.
        seed: Decides every weight.
        max_shard_size: Largest file of weights, as transformers takes it; ``"300KB"`` makes some.

    Returns:
        What :func:`tiny_model` returns.

    Raises:
        ConfigError: An unknown family.
    """
    model, processor = tiny_model(family, seed)
    had_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # over a megabyte; huggingface_hub's go with them
    try:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        processor.save_pretrained(folder)
    finally:
        if had_bars:
            logging.enable_progress_bar()
    return model, processor


def _gemma4_config(family: str, processor: Any) -> PreTrainedConfig:
    tokenizer, images = processor.tokenizer, processor.image_processor
    vocabulary = {"vocab_size": len(tokenizer)}
    geometry = {
        "patch_size": images.patch_size,
        "pooling_kernel_size": images.pooling_kernel_size,
    }
    token_ids = {
        "boi_token_id": tokenizer.boi_token_id,
        "eoi_token_id": tokenizer.eoi_token_id,
        "image_token_id": tokenizer.image_token_id,
        "boa_token_id": tokenizer.boa_token_id,
        "eoa_token_index": tokenizer.eoa_token_id,
        "audio_token_id": tokenizer.audio_token_id,
        "video_token_id": processor.video_token_id,
    }
    if family == "gemma4-12b":
        return transformers.Gemma4UnifiedConfig(
            text_config={**_LARGE_TEXT, **vocabulary},
            vision_config={
                **geometry,
                "mm_embed_dim": _MEDIA_HIDDEN,
                "mm_posemb_size": 1120,
                "output_proj_dims": _MEDIA_HIDDEN,
            },
            audio_config={"audio_embed_dim": processor.feature_extractor.feature_size},
            **token_ids,
        )
    large = family != "gemma4-e2b"
    text = {"gemma4-26b-a4b": _MOE_TEXT, "gemma4-31b": _LARGE_TEXT}.get(family, _E2B_TEXT)
    per_layer = {"hidden_size_per_layer_input": 0} if large else {}
    return transformers.Gemma4Config(
        text_config={
            **text,
            **vocabulary,
            **per_layer,
            "vocab_size_per_layer_input": len(tokenizer),
        },
        vision_config={
            **geometry,
            "hidden_size": _MEDIA_HIDDEN,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 8,
            "position_embedding_size": _MAX_PATCHES_PER_SIDE,
            "use_clipped_linears": not large,
            "standardize": large,
        },
        audio_config=None
        if large
        else {
            "hidden_size": _MEDIA_HIDDEN,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            # the model assumes as many channels as mel bins
            "subsampling_conv_channels": [processor.feature_extractor.feature_size, 4],
            "output_proj_dims": 24,
        },
        **token_ids,
    )


def _gemma3n_config(processor: Any) -> PreTrainedConfig:
    tokenizer = processor.tokenizer
    # Media tokens lie in blocks above the text vocabulary, each opened by its end token.
    vision_offset, audio_offset = tokenizer.eoi_token_id, tokenizer.eoa_token_id
    block = audio_offset - vision_offset
    return transformers.Gemma3nConfig(
        text_config={
            **_GEMMA3N_TEXT,
            "vocab_size": audio_offset + block,
            "vocab_size_per_layer_input": vision_offset,
        },
        # timm's smallest network whose features are [batch, channels, height, width]; with the
        # RMS norms of the real tower, as batch norms would differ between train and eval mode
        vision_config={
            "architecture": "test_efficientnet",
            "model_args": {"norm_layer": "rmsnorm2d"},
            "hidden_size": 256,
            "vocab_size": block,
            "vocab_offset": vision_offset,
            "do_pooling": False,
            "num_labels": 2,
        },
        audio_config={
            "vocab_size": block,
            "vocab_offset": audio_offset,
            "input_feat_size": processor.feature_extractor.feature_size,
            "hidden_size": _MEDIA_HIDDEN,
            "conf_num_attention_heads": 4,
            "conf_num_hidden_layers": 2,
            "sscp_conv_channel_size": (16, 8),
        },
        audio_soft_tokens_per_image=processor.audio_seq_length,
        vision_soft_tokens_per_image=processor.image_seq_length,
        boi_token_id=tokenizer.boi_token_id,
        eoi_token_id=tokenizer.eoi_token_id,
        image_token_id=tokenizer.image_token_id,
        boa_token_id=tokenizer.boa_token_id,
        eoa_token_id=tokenizer.eoa_token_id,
        audio_token_id=tokenizer.audio_token_id,
    )


def _spread_weights(model: PreTrainedModel) -> None:
    """Give every weight and buffer a value of its own, sized so that activations keep theirs."""
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "per_dim_scale")):
            parameter.normal_(std=0.02)
        elif parameter.ndim == 1:
            parameter.uniform_(0.8, 1.2)
        elif "embed_tokens" in name or "embedding." in name or "position" in name:
            parameter.normal_(std=0.25)
        else:
            fan_in = parameter.shape[-1] if "experts" in name else parameter[0].numel()
            parameter.normal_(std=fan_in**-0.5)
    for name, buffer in model.named_buffers():
        match name.rpartition(".")[2]:
            case "layer_scalar" | "std_scale":
                buffer.uniform_(0.8, 1.2)
            case "std_bias":
                buffer.normal_(std=0.1)
            case "input_max" | "output_max":
                buffer.uniform_(2.0, 6.0)
            case "input_min" | "output_min":
                buffer.uniform_(-6.0, -2.0)
            case _:
                pass
