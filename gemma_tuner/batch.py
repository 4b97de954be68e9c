"""Rows of one example each, and the padded batch that they make.

Axes: ``B`` examples, ``T`` tokens (padded), ``N`` target tokens (padded), media tensors flat over
the batch in reading order.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from gemma_tuner.modalities import MEDIA

COUNTS = ("cut_rows", "cut_tokens", "split_clips")
"""The names in ``Batch.counts``."""

IGNORED = -100
"""The label of a token without loss, as in ``torch.nn.CrossEntropyLoss``."""

_VARYING = {name for medium in MEDIA if medium.varies for name in medium.inputs}

# Gemma 3n's convolutions look up to 6 frames ahead, and what they see behind the end of a tensor
# differs from what they see in padding: with this much of it behind every clip, no feature depends
# on which clips are batched together. Source: Gemma3nAudioSubSampleConvProjection in transformers
# 5.23, kernels of 3 and strides of 2, padded at the end.
_MIN_CLIP_PADDING = 8
# Of 16 frames each, the 188 soft tokens of a clip that Gemma 3n has; its forward fails beyond.
_MAX_CLIP_FRAMES = 188 * 16


@dataclass(frozen=True, slots=True)
class Row:
    """One example as tensors, before padding.

    Args:
        key: The example's key.
        input_ids: ``[T]`` int64.
        token_types: ``[T]`` int64: 0 text, 1 image, 3 audio.
        targets: ``[T]`` bool: the tokens that carry loss.
        media: What the towers read, each ``[items, ...]``.
        counts: What was cut or split to make this row, by name.
    """

    key: str
    input_ids: Tensor
    token_types: Tensor
    targets: Tensor
    media: Mapping[str, Tensor] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Batch:
    """What a collator returns: one forward pass.

    Args:
        keys: The examples' keys, in row order.
        inputs: Keyword arguments of the model: ``input_ids``, ``attention_mask`` and token types
            ``[B, T]`` int64, and media tensors.
        labels: ``[B, T]`` int64, not shifted, :data:`IGNORED` where there is no loss.
        target_rows: ``[B, M]`` int64: the positions within each row whose hidden state predicts a
            target (the position before it), padded with one of them (with the row's first token
            where it has none).
        target_slots: ``[N]`` int64: for each target of the batch, where in the flattened
            ``[B * M]`` its position lies. Padded with zeros.
        target_ids: ``[N]`` int64: the tokens to predict there, padded with :data:`IGNORED`.
        num_target_tokens: Targets, padding not counted.
        num_tokens: Tokens, padding not counted.
        counts: What was cut or split, by name (:data:`COUNTS`), over all rows.
        media_hashes: For ``image`` and ``audio``, 16 bytes for each image or clip in reading
            order, which tell its tensors from any others. What the batch pads is not in them.
    """

    keys: tuple[str, ...]
    inputs: Mapping[str, Tensor]
    labels: Tensor
    target_rows: Tensor
    target_slots: Tensor
    target_ids: Tensor
    num_target_tokens: int
    num_tokens: int
    counts: Mapping[str, int] = field(default_factory=dict)
    media_hashes: Mapping[str, tuple[bytes, ...]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def longest_key(self) -> str:
        """The key of the row with the most tokens; for batches on the CPU."""
        return self.keys[int(self.inputs["attention_mask"].sum(1).argmax())]

    @property
    def shape(self) -> tuple[object, ...]:
        """What a device that compiles for each shape tells batches apart by."""
        return (
            *((name, tuple(tensor.shape)) for name, tensor in self.inputs.items()),
            tuple(self.target_rows.shape),
            tuple(self.target_ids.shape),
        )

    def to(self, device: torch.device) -> Batch:
        """Copy the tensors to a device; on MPS, targets get one of few shapes.

        Args:
            device: Where to.

        Returns:
            The same batch there.
        """
        batch = self.with_bucketed_targets() if device.type == "mps" else self
        return replace(
            batch,
            inputs={name: tensor.to(device) for name, tensor in batch.inputs.items()},
            labels=batch.labels.to(device),
            target_rows=batch.target_rows.to(device),
            target_slots=batch.target_slots.to(device),
            target_ids=batch.target_ids.to(device),
        )

    def with_bucketed_targets(self) -> Batch:
        """The same batch with ``M`` and ``N`` padded to lengths of :func:`bucket_length`."""
        width, length = self.target_rows.shape[1], self.labels.shape[1]
        new_width = min(bucket_length(width), length)
        missing = bucket_length(len(self.target_ids)) - len(self.target_ids)
        row, rank = self.target_slots // width, self.target_slots % width
        first = self.target_rows[:, :1].expand(-1, new_width - width)
        return replace(
            self,
            target_rows=torch.cat([self.target_rows, first], dim=1),
            target_slots=pad(row * new_width + rank, (0, missing), value=0),
            target_ids=pad(self.target_ids, (0, missing), value=IGNORED),
        )


def bucket_length(length: int) -> int:
    """Round a length up to one of few."""
    # A device that compiles a graph for each new shape (MPS) then sees two shapes per octave, at
    # the cost of at most half as many positions again, a fifth on average.
    bucket = 16
    while bucket < length:
        bucket = bucket * 3 // 2 if bucket & (bucket - 1) == 0 else bucket * 4 // 3
    return bucket


def _round_up(count: int) -> int:
    """Round a number of targets up to a multiple of 8, which costs little and fits GPUs."""
    return max(8, -(-count // 8) * 8)


def pad_rows(
    rows: Sequence[Row], *, max_tokens: int, pad_token_id: int, token_type_name: str | None
) -> Batch:
    """Pad rows on the right to one bucketed length and lay out their targets."""
    longest = max(len(row.input_ids) for row in rows)
    length = min(bucket_length(longest), max_tokens)

    def stack(tensors: Sequence[Tensor], fill: int) -> Tensor:
        return torch.stack([pad(x, (0, length - len(x)), value=fill) for x in tensors])

    # A row's first token has nothing before it that could predict it.
    targets = stack([row.targets for row in rows], fill=0)
    targets[:, 0] = False
    input_ids = stack([row.input_ids for row in rows], fill=pad_token_id)
    labels = input_ids.masked_fill(~targets, IGNORED)
    target_rows, target_slots = _lay_out_by_row(targets)
    target_ids = labels[targets]
    num_targets = len(target_ids)
    target_padding = (0, _round_up(num_targets) - num_targets)
    types = [row.token_types for row in rows]
    inputs = {
        "input_ids": input_ids,
        "attention_mask": stack([torch.ones_like(row.input_ids) for row in rows], fill=0),
        **({token_type_name: stack(types, fill=0)} if token_type_name else {}),
        **_concatenate_media([row.media for row in rows]),
    }
    counts: Counter[str] = Counter()
    for row in rows:
        counts.update(row.counts)
    return Batch(
        keys=tuple(row.key for row in rows),
        inputs=inputs,
        labels=labels,
        target_rows=target_rows,
        target_slots=pad(target_slots, target_padding, value=0),
        target_ids=pad(target_ids, target_padding, value=IGNORED),
        num_target_tokens=num_targets,
        num_tokens=sum(len(row.input_ids) for row in rows),
        counts=dict(counts),
        media_hashes=_hash_media([row.media for row in rows]),
    )


def _lay_out_by_row(targets: Tensor) -> tuple[Tensor, Tensor]:
    """Table the positions before targets, row by row."""
    # targets: ``[B, T]`` bool, False at each row's first token.
    counts = targets.sum(1)
    width = min(_round_up(int(counts.max())), targets.shape[1])
    row, column = targets.nonzero(as_tuple=True)
    rank = targets.cumsum(1)[row, column] - 1
    first = (targets.int().argmax(1) - 1).clamp_min(0)
    rows = first.unsqueeze(1).repeat(1, width)
    rows[row, rank] = column - 1
    return rows, row * width + rank


def _concatenate_media(media: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Join the rows' media along their first axis; clips are padded to one bucketed length."""
    joined: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for row in media for name in row):
        tensors = [row[name] for row in media if name in row]
        if name in _VARYING:
            frames = _clip_frames(max(x.shape[1] for x in tensors))
            tensors = [pad(x, (0, 0) * (x.dim() - 2) + (0, frames - x.shape[1])) for x in tensors]
        joined[name] = torch.cat(tensors)
    return joined


def _clip_frames(longest: int) -> int:
    """Choose how many frames clips are padded to."""
    return max(longest, min(bucket_length(longest + _MIN_CLIP_PADDING), _MAX_CLIP_FRAMES))


def _hash_media(media: Sequence[Mapping[str, Tensor]]) -> dict[str, tuple[bytes, ...]]:
    """Hash each image and clip as its row has it, before any padding."""
    hashes: dict[str, list[bytes]] = {}
    for row in media:
        for medium in MEDIA:
            names = sorted(name for name in medium.inputs if name in row)
            num_items = len(row[names[0]]) if names else 0
            hashes.setdefault(medium.modality, []).extend(
                _hash_tensors({name: row[name][item] for name in names})
                for item in range(num_items)
            )
    return {modality: tuple(found) for modality, found in hashes.items() if found}


def _hash_tensors(tensors: Mapping[str, Tensor]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        # As bytes, since numpy has no bfloat16.
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.digest()
