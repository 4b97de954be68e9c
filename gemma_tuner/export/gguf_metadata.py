"""Sizes and tokenizer as llama.cpp reads them from a GGUF file, beside the weights.

Source: ``convert_hf_to_gguf.py`` of llama.cpp 0.5.0, Gemma4Model and Gemma3NModel.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFWriter, SpecialVocab, TokenType

from gemma_tuner.checkpoints.weights import read_json
from gemma_tuner.errors import CheckpointError

# Byte-pair merges of tokenizer.json over text in which "▁" stands for spaces, without words, with
# <0x00> to <0xFF> for bytes: Gemma 3n's tokenizer is of this kind, too.
_TOKENIZER = "gemma4"
# llama.cpp hides control tokens, and its parser of Gemma 4's answers must see these.
_VISIBLE = {
    "<|channel>",
    "<channel|>",
    "<|tool_call>",
    "<tool_call|>",
    "<|tool_response>",
    "<tool_response|>",
    '<|"|>',
}
_NO_SCORE = -1000.0
_SUPPRESSED = "tokenizer.ggml.suppress_tokens"


def add_sizes(writer: GGUFWriter, model_type: str, text: Mapping[str, Any]) -> None:
    """Write the decoder's settings."""
    rope = text["rope_parameters"]
    writer.add_context_length(text["max_position_embeddings"])
    writer.add_embedding_length(text["hidden_size"])
    writer.add_block_count(text["num_hidden_layers"])
    writer.add_head_count(text["num_attention_heads"])
    writer.add_layer_norm_rms_eps(text["rms_norm_eps"])
    writer.add_rope_freq_base(rope["full_attention"]["rope_theta"])
    writer.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])
    writer.add_sliding_window(text["sliding_window"])
    writer.add_sliding_window_pattern(
        [kind == "sliding_attention" for kind in text["layer_types"]]
    )
    writer.add_shared_kv_layers(text["num_kv_shared_layers"])
    writer.add_embedding_length_per_layer_input(text.get("hidden_size_per_layer_input") or 0)
    if text.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(text["final_logit_softcapping"])
    if model_type == "gemma3n":
        _add_gemma3n(writer, text)
    else:
        _add_gemma4(writer, text)


def _add_gemma3n(writer: GGUFWriter, text: Mapping[str, Any]) -> None:
    writer.add_feed_forward_length(text["intermediate_size"])
    writer.add_head_count_kv(text["num_key_value_heads"])
    writer.add_key_length(text["head_dim"])
    writer.add_value_length(text["head_dim"])
    writer.add_altup_active_idx(text["altup_active_idx"])
    writer.add_altup_num_inputs(text["altup_num_inputs"])
    sparsity = torch.tensor(text["activation_sparsity_pattern"], dtype=torch.float32)
    writer.add_activation_sparsity_scale(torch.special.ndtri(sparsity).tolist())


def _add_gemma4(writer: GGUFWriter, text: Mapping[str, Any]) -> None:
    num_layers, width = text["num_hidden_layers"], text["intermediate_size"]
    if text.get("use_double_wide_mlp"):
        num_own = num_layers - text["num_kv_shared_layers"]
        writer.add_feed_forward_length(
            [width if layer < num_own else 2 * width for layer in range(num_layers)]
        )
    else:
        writer.add_feed_forward_length(width)
    sliding, full = text["num_key_value_heads"], text.get("num_global_key_value_heads")
    writer.add_head_count_kv(
        [
            sliding if kind == "sliding_attention" else full or sliding
            for kind in text["layer_types"]
        ]
    )
    size = full_head_size(text)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)  # rope_factors says which of them turn
    writer.add_key_length_swa(text["head_dim"])
    writer.add_value_length_swa(text["head_dim"])
    writer.add_rope_dimension_count_swa(text["head_dim"])
    if text.get("enable_moe_block"):
        writer.add_expert_count(text["num_experts"])
        writer.add_expert_used_count(text["top_k_experts"])
        writer.add_expert_feed_forward_length(text["moe_intermediate_size"])


def full_head_size(text: Mapping[str, Any]) -> int:
    """Return the size of a head in Gemma 4's full attention."""
    return text.get("global_head_dim") or text["head_dim"]


def rope_factors(text: Mapping[str, Any]) -> torch.Tensor:
    """Return what Gemma 4's full attention divides rotary frequencies by."""
    # The first pairs of a head turn; an endless factor holds the others still.
    # Returns: ``[head_size / 2]`` float32.
    size = full_head_size(text)
    share = text["rope_parameters"]["full_attention"].get("partial_rotary_factor", 1.0)
    factors = torch.ones(size // 2)
    factors[int(size * share / 2) :] = 1e30
    return factors


def add_tokenizer(
    writer: GGUFWriter, folder: Path, num_tokens: int, template: str | None = None
) -> None:
    """Write vocabulary, merges, special tokens and chat template of ``tokenizer.json``."""
    tokenizer = read_json(folder / "tokenizer.json")
    model = tokenizer.get("model", {})
    if model.get("type") != "BPE" or not model.get("byte_fallback") or not model.get("merges"):
        raise CheckpointError(
            f"tokenizer.json of {folder.resolve().name} is not of Gemma's kind (byte-pair merges "
            "with bytes to fall back on), which llama.cpp could not read; take the one of the "
            "original checkpoint"
        )
    pieces: dict[str, int] = dict(model["vocab"])
    added = {token["content"]: token for token in tokenizer.get("added_tokens", ())}
    pieces |= {content: token["id"] for content, token in added.items()}
    if max(pieces.values()) >= num_tokens:
        raise CheckpointError(
            f"tokenizer.json of {folder.resolve().name} has ids up to {max(pieces.values())}, and "
            f"the model has {num_tokens} embeddings; take the tokenizer of this checkpoint"
        )
    tokens = [f"[PAD{index}]" for index in range(num_tokens)]
    types = [TokenType.UNUSED] * num_tokens
    for piece, index in pieces.items():
        tokens[index] = piece
        types[index] = _token_type(piece, added.get(piece))
    writer.add_tokenizer_model(_TOKENIZER)
    writer.add_token_list(tokens)
    writer.add_token_scores([_NO_SCORE] * num_tokens)
    writer.add_token_types(types)
    writer.add_add_space_prefix(value=False)
    special = SpecialVocab(folder, load_merges=True, n_vocab=num_tokens)
    special.add_special_token = {"bos": True}
    special.chat_template = template or special.chat_template
    special.add_to_gguf(writer, quiet=True)
    generation = folder / "generation_config.json"
    if generation.is_file() and (suppressed := read_json(generation).get("suppress_tokens")):
        writer.add_array(_SUPPRESSED, suppressed)


def _token_type(piece: str, added: Mapping[str, Any] | None) -> TokenType:
    if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", piece):
        return TokenType.BYTE
    if added is None:
        return TokenType.NORMAL
    if added["special"] and piece not in _VISIBLE:
        return TokenType.CONTROL
    return TokenType.USER_DEFINED
