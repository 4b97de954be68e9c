"""Models with random weights at a real or shrunken size, and the batches they are fed."""

from __future__ import annotations

import copy
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import nn

from benchmarks.live_bytes import storages
from gemma_tuner.batch import Batch, Row, pad_rows
from gemma_tuner.checkpoints.loading import load_model
from gemma_tuner.device import empty_cache, synchronize
from gemma_tuner.models.families import family_of

# E2B's with every length a quarter, sequence, window and rank included, so that attention and
# adapters cost the same share as at 4 x the sequence.
SHRUNKEN = {
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 35,
    "num_kv_shared_layers": 20,
    "use_double_wide_mlp": True,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "global_head_dim": 128,
    "sliding_window": 128,
    "layer_types": [*["sliding_attention"] * 4, "full_attention"] * 7,
    "hidden_size_per_layer_input": 64,
    "final_logit_softcapping": 30.0,
}
_LENGTHS = (
    *("hidden_size", "intermediate_size", "head_dim", "global_head_dim", "sliding_window"),
    "hidden_size_per_layer_input",
)
# E2B's head has 0.22 of its decoder's weights.
HEAD_SHARE = 0.22
# Token ids below are special or bytes, in the real vocabulary and in the tiny one.
FIRST_ID = 300

Placement = Literal["device", "disk"]


def scale_shrunken(quarters: int) -> dict[str, Any]:
    """The shrunken model's settings with so many quarters of E2B's lengths."""
    return SHRUNKEN | {name: quarters * SHRUNKEN[name] for name in _LENGTHS}


def count_head_rows(text: Mapping[str, Any], processor: Any) -> int:
    """How large a vocabulary gives a shrunken model E2B's ratio of head to decoder."""
    with torch.device("meta"):
        model: Any = transformers.Gemma4ForConditionalGeneration(
            shrink_config(text, processor, 1024)
        )
    decoder = sum(p.numel() for p in model.model.language_model.layers.parameters())
    return round(HEAD_SHARE * decoder / text["hidden_size"])


def shrink_config(text: Mapping[str, Any], processor: Any, vocabulary: int) -> Any:
    """A configuration without towers whose special tokens are the processor's."""
    tokenizer = processor.tokenizer
    return transformers.Gemma4Config(
        text_config={
            **text,
            "vocab_size": vocabulary,
            "vocab_size_per_layer_input": vocabulary,
        },
        vision_config=None,
        audio_config=None,
        image_token_id=tokenizer.image_token_id,
        audio_token_id=tokenizer.audio_token_id,
        video_token_id=processor.video_token_id,
    )


def build_random(config: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A frozen model of a configuration's text part, its weights drawn from seed 0.

    Queries are scaled as trained ones are. Gemma divides no attention score by the square root of
    the head's size: its query norms learn to. At norms of one, attention takes a maximum, and
    through 35 layers rounding alone decides the gradient, so that bfloat16 could not be checked.
    """
    family = family_of(config)
    if family.towers_optional:
        config.vision_config = config.audio_config = None
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = getattr(transformers, family.model_class)(config)
    finally:
        torch.set_default_dtype(torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("q_norm.weight"):
            parameter.data.fill_(parameter.numel() ** -0.5)
    return model.eval().requires_grad_(requires_grad=False)


def save(model: Any, processor: Any, folder: Path) -> None:
    """Save a checkpoint, which ``load_model`` takes for a released one."""
    model.save_pretrained(folder, max_shard_size="5GB")
    processor.save_pretrained(folder)


@dataclass(frozen=True)
class Load:
    """What loading a checkpoint took.

    Args:
        per_layer_embeddings: Where the per-layer table was put.
        seconds: Wall time.
        peak_bytes: The most that was allocated on the device meanwhile; on the CPU, how far the
            process's own memory grew, without what is mapped from files (Linux alone tells).
        resident_bytes: Weights on the device afterwards.
    """

    per_layer_embeddings: Placement
    seconds: float
    peak_bytes: int | None
    resident_bytes: int


def load_timed(
    folder: Path, device: torch.device, dtype: torch.dtype, placement: Placement
) -> tuple[Any, Any, Load]:
    """Load by ``load_model``; return the model, the processor and what it took."""
    empty_cache(device)
    with _memory_peak(device) as peak:
        started = time.perf_counter()
        model, processor = load_model(
            folder, device=device, dtype=dtype, per_layer_embeddings=placement
        )
        synchronize(device)
        seconds = time.perf_counter() - started
    return model, processor, Load(placement, seconds, peak.num_bytes, count_resident(model))


def count_resident(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers, those that share memory counted once."""
    found = storages([*model.parameters(), *model.buffers()])
    return sum({storage.data_ptr(): storage.nbytes() for storage in found}.values())


def share_weights(model: Any) -> Any:
    """Copy a model's modules and configuration, but none of its weights."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def make_batch(
    rows: Sequence[tuple[int, Sequence[tuple[int, int]]]], model: Any, *, seed: int
) -> Batch:
    """Make a batch of random tokens.

    Args:
        rows: Of each, its length and the spans of its targets.
        model: Whose vocabulary and device they are for.
        seed: Decides the tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    # Between the special tokens, which come first, and the media tokens of a real vocabulary.
    media = (config.image_token_id, config.audio_token_id)
    stop_id = min([config.get_text_config().vocab_size, *(x for x in media if x > FIRST_ID)])
    made = []
    for index, (length, spans) in enumerate(rows):
        ids = torch.randint(FIRST_ID, stop_id, (length,), generator=generator)
        targets = torch.zeros(length, dtype=torch.bool)
        for start, stop in spans:
            targets[start:stop] = True
        made.append(Row(str(index), ids, torch.zeros_like(ids), targets))
    longest = max(length for length, _ in rows)
    name = family_of(model.config).token_type_name
    batch = pad_rows(made, max_tokens=longest, pad_token_id=0, token_type_name=name)
    return batch.to(model.device)


@dataclass
class _Peak:
    num_bytes: int | None = None


@contextmanager
def _memory_peak(device: torch.device) -> Iterator[_Peak]:
    """Find the peak of what is allocated on a CUDA device, or of this process's own memory."""
    peak = _Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        peak.num_bytes = torch.cuda.max_memory_allocated(device) - before
        return
    status = Path("/proc/self/status")
    if device.type != "cpu" or not status.exists():
        yield peak
        return

    def read_own_bytes() -> int:
        found = re.search(r"RssAnon:\s+(\d+) kB", status.read_text())
        return int(found[1]) * 1024 if found else 0

    before, highest, done = read_own_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.002):
            highest = max(highest, read_own_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()
    peak.num_bytes = max(highest, read_own_bytes()) - before
