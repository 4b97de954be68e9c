"""Tokenizers, chat templates and processors for the tiny models, made in memory.

The turn layout is that of the released checkpoints; the wording of the templates is our own, and
they know only what training data holds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import transformers

if TYPE_CHECKING:
    from transformers import GemmaTokenizer, ProcessorMixin

# Names as in the released tokenizer_config.json; the tokenizer offers each as an attribute.
_GEMMA4_TOKENS = {
    "boi_token": "<|image>",
    "image_token": "<|image|>",
    "eoi_token": "<image|>",
    "boa_token": "<|audio>",
    "audio_token": "<|audio|>",
    "eoa_token": "<audio|>",
    "video_token": "<|video|>",
    "sot_token": "<|turn>",
    "eot_token": "<turn|>",
    "soc_token": "<|channel>",
    "eoc_token": "<channel|>",
    "think_token": "<|think|>",
    "std_token": "<|tool>",
    "etd_token": "<tool|>",
    "stc_token": "<|tool_call>",
    "etc_token": "<tool_call|>",
    "str_token": "<|tool_response>",
    "etr_token": "<tool_response|>",
    "escape_token": '<|"|>',
}
# Special but without names, so that all_special_tokens lacks them. Source: transformers'
# convert_gemma3n_weights.py, which names six media tokens.
_GEMMA3N_TURN_TOKENS = ("<start_of_turn>", "<end_of_turn>")
_GEMMA3N_TOKENS = {
    "boi_token": "<start_of_image>",
    "boa_token": "<start_of_audio>",
}
# Above the text vocabulary, in blocks of _GEMMA3N_BLOCK ids, as released: the model tells media
# tokens by where they lie.
_GEMMA3N_BLOCK = 16
_GEMMA3N_MEDIA_TOKENS = (
    {"eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"},
    {"eoa_token": "<end_of_audio>", "audio_token": "<audio_soft_token>"},
)
_WORDS = ("model", "user", "system", "thought")  # one token each, so that turn headers have three
_TEXT_VOCABULARY = 512

_GEMMA4_TEMPLATE = """\
{%- macro value(v) -%}
{%- if v is string -%}<|"|>{{ v }}<|"|>
{%- elif v is mapping -%}
{{ '{' }}{% for k, x in v | dictsort %}{{ k }}:{{ value(x) }}{{ ',' if not loop.last }}\
{% endfor %}{{ '}' }}
{%- elif v is boolean or v is none -%}{{ v | tojson }}
{%- elif v is sequence -%}
[{% for x in v %}{{ value(x) }}{{ ',' if not loop.last }}{% endfor %}]
{%- else -%}{{ v }}
{%- endif -%}
{%- endmacro -%}
{%- macro content(message) -%}
{%- if message.content is string -%}{{ message.content | trim }}
{%- else -%}
{%- for part in message.content or [] -%}
{%- if part.type == 'text' -%}{{ part.text | trim }}{%- else -%}<|{{ part.type }}|>{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{{- bos_token -}}
{%- set thinking = enable_thinking | default(false) -%}
{%- set has_system = messages[0].role in ['system', 'developer'] -%}
{%- if has_system or thinking or tools -%}
{{- '<|turn>system\n' -}}
{%- if thinking %}{{ '<|think|>\n' }}{% endif -%}
{%- if has_system %}{{ content(messages[0]) }}{% endif -%}
{%- for tool in tools or [] -%}
<|tool>declaration:{{ tool.function.name }}{{ value(tool.function.parameters or {}) }}<tool|>
{%- endfor -%}
{{- '<turn|>\n' -}}
{%- endif -%}
{%- set turns = messages[1:] if has_system else messages -%}
{%- set state = namespace(last_user=-1, open=false, tool='') -%}
{%- for message in turns -%}
{%- if message.role == 'user' %}{% set state.last_user = loop.index0 %}{% endif -%}
{%- endfor -%}
{%- for message in turns -%}
{%- if message.role == 'tool' -%}
<|tool_response>response:{{ message.name or state.tool or 'unknown' }}\
{{ '{value:' }}{{ value(content(message)) }}{{ '}' }}<tool_response|>
{%- set state.open = not loop.last and loop.nextitem.role in ['assistant', 'tool'] -%}
{%- else -%}
{%- if not state.open -%}
{{- '<|turn>' + ('model' if message.role == 'assistant' else message.role) + '\n' -}}
{%- endif -%}
{%- if message.reasoning and loop.index0 > state.last_user -%}
{{- '<|channel>thought\n' + message.reasoning + '\n<channel|>' -}}
{%- endif -%}
{%- for call in message.tool_calls or [] -%}
{%- set state.tool = call.function.name -%}
<|tool_call>call:{{ call.function.name }}{{ value(call.function.arguments) }}<tool_call|>
{%- endfor -%}
{{- content(message) -}}
{%- set state.open = message.role == 'assistant' and not loop.last
    and loop.nextitem.role in ['assistant', 'tool'] -%}
{%- if not state.open -%}
{{- '<|tool_response>' if message.tool_calls else '<turn|>\n' -}}
{%- endif -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and turns and turns[-1].role == 'user' -%}
{{- '<|turn>model\n' -}}
EMPTY_THOUGHT
{%- endif -%}
"""
# The large models' template puts an empty thought before the answer when thinking is off.
_EMPTY_THOUGHT = "{%- if not thinking -%}{{- '<|channel>thought\\n<channel|>' -}}{%- endif -%}"
_GEMMA3N_TEMPLATE = """\
{%- macro content(message) -%}
{%- if message.content is string -%}{{ message.content | trim }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'text' -%}{{ part.text | trim }}\
{%- else -%}<{{ part.type }}_soft_token>{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{{- bos_token -}}
{%- set has_system = messages[0].role == 'system' -%}
{%- for message in (messages[1:] if has_system else messages) -%}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0)
    or message.role not in ['user', 'assistant'] -%}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') -}}
{%- endif -%}
{{- '<start_of_turn>' + ('model' if message.role == 'assistant' else 'user') + '\n' -}}
{%- if has_system and loop.first %}{{ content(messages[0]) + '\n\n' }}{% endif -%}
{{- content(message) + '<end_of_turn>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif -%}
"""


def tiny_processor(family: str) -> ProcessorMixin:
    """Build a processor of the family's stock class."""
    # An image's soft token covers 12 × 12 pixels (patches of 4, pooled by 3) and the default
    # budget is 70; clips are processed as by the released processors (25 tokens a second, 128 mel
    # bins). Gemma 3n takes 64 × 64 pixels to 4 soft tokens and every clip to 188.
    if family == "gemma3n":
        tokenizer = _build_tokenizer(_GEMMA3N_TOKENS, _GEMMA3N_MEDIA_TOKENS, _GEMMA3N_TURN_TOKENS)
        tokenizer.chat_template = _GEMMA3N_TEMPLATE
        return transformers.Gemma3nProcessor(
            feature_extractor=transformers.Gemma3nAudioFeatureExtractor(),
            image_processor=transformers.SiglipImageProcessor(size={"height": 64, "width": 64}),
            tokenizer=tokenizer,
            chat_template=_GEMMA3N_TEMPLATE,
            image_seq_length=4,
        )
    large = family in {"gemma4-26b-a4b", "gemma4-31b"}
    template = _GEMMA4_TEMPLATE.replace("EMPTY_THOUGHT", _EMPTY_THOUGHT if large else "")
    kind = "Gemma4Unified" if family == "gemma4-12b" else "Gemma4"
    geometry = {"patch_size": 4, "pooling_kernel_size": 3, "max_soft_tokens": 70}
    return getattr(transformers, f"{kind}Processor")(
        feature_extractor=getattr(transformers, f"{kind}AudioFeatureExtractor")(),
        image_processor=getattr(transformers, f"{kind}ImageProcessor")(**geometry),
        video_processor=getattr(transformers, f"{kind}VideoProcessor")(**geometry),
        tokenizer=_build_tokenizer(_GEMMA4_TOKENS),
        chat_template=template,
    )


def _build_tokenizer(
    named_tokens: dict[str, str],
    media_blocks: tuple[dict[str, str], ...] = (),
    unnamed_tokens: tuple[str, ...] = (),
) -> GemmaTokenizer:
    """Bytes, printable characters and a few words; unused ids fill up to a round size."""
    vocabulary: dict[str, int] = {}

    def add(piece: str) -> None:
        vocabulary.setdefault(piece, len(vocabulary))

    def fill(size: int) -> None:
        while len(vocabulary) < size:
            add(f"<unused{len(vocabulary)}>")

    standard_tokens = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
    for piece in (*standard_tokens, *unnamed_tokens, *named_tokens.values()):
        add(piece)
    for byte in range(256):
        add(f"<0x{byte:02X}>")
    for character in ("▁", "\n", *map(chr, range(33, 127))):
        add(character)
    merges = []
    for word in _WORDS:
        for end in range(1, len(word)):
            merge = (word[:end], word[end])
            if merge not in merges:
                merges.append(merge)
            add(word[: end + 1])
    fill(_TEXT_VOCABULARY)
    for block, tokens in enumerate(media_blocks, start=1):
        for piece in tokens.values():
            add(piece)
        named_tokens = {**named_tokens, **tokens}
        fill(_TEXT_VOCABULARY + block * _GEMMA3N_BLOCK)
    tokenizer = transformers.GemmaTokenizer(
        vocab=vocabulary,
        merges=merges,
        extra_special_tokens=named_tokens,
        padding_side="right",
    )
    tokenizer.add_tokens(list(unnamed_tokens), special_tokens=True)
    return tokenizer
