"""Media features put at their placeholders, without asking the device how many there are.

Axes: ``B`` rows, ``S`` positions, ``F`` features, ``H`` hidden size.

transformers' forward waits for the device three times for each modality: it counts placeholders,
writes the count into a message, and scatters by a mask. Here the model's own methods make the
features, a hook on the input embeddings lays them in, and the forward is given no media. The same
numbers arrive at the same places.

Relied on in transformers 5.23: the forward of Gemma 4 looks its ids up once, by calling
``get_input_embeddings()``, and lays features of media over the result before anything reads it.
Gemma 3n lays embeddings of its media tokens over it, too, so that there the forward does all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gemma_tuner.modalities import MEDIA
from gemma_tuner.models.families import family_of


@contextmanager
def merged_media_embeddings(
    gemma: Any, inputs: Mapping[str, Tensor]
) -> Iterator[Mapping[str, Tensor]]:
    """Compute the features of a batch's media and lay them in during one forward of the model."""
    # Where they are not as many as their placeholders, they become NaN, and so does the loss: to
    # compare the two on the host would mean to wait for the device.
    media = [medium for medium in MEDIA if medium.inputs[0] in inputs]
    if not media or not family_of(gemma.config).lays_features_only:
        yield inputs
        return
    laid = []
    for medium in media:
        make_features = getattr(gemma.model, medium.method)
        outputs = make_features(*(inputs[name] for name in medium.inputs), return_dict=True)
        features, valid = outputs.pooler_output, None
        if isinstance(features, Tensor):  # of clips, padded to one length
            features, valid = features.flatten(0, 1), outputs.attention_mask.flatten()
        else:
            features = torch.cat(features)
        places = inputs["input_ids"] == getattr(gemma.config, medium.token_id)
        laid.append(_lay_out(features, valid, places))
    num_lookups = 0

    def lay_in(_module: Any, _args: Any, embeddings: Tensor) -> Tensor:
        nonlocal num_lookups
        num_lookups += 1
        for features, places in laid:
            embeddings = torch.where(places, features.to(embeddings.dtype), embeddings)
        return embeddings

    handle = gemma.get_input_embeddings().register_forward_hook(lay_in)
    try:
        read = {name for medium in media for name in medium.inputs}
        yield {name: tensor for name, tensor in inputs.items() if name not in read}
    finally:
        handle.remove()
    if num_lookups != 1:
        raise RuntimeError(
            f"the model looked its ids up {num_lookups} times in one forward, not once (another "
            "transformers?), so that media were not laid in as they should be"
        )


def _lay_out(features: Tensor, valid: Tensor | None, places: Tensor) -> tuple[Tensor, Tensor]:
    """Give each placeholder its feature, in reading order."""
    # features: ``[F, H]``.
    # valid: ``[F]`` bool: which of them are some; None for all.
    # places: ``[B, S]`` bool: the placeholders.
    # Returns: ``[B, S, H]``, whose values count at placeholders only, and ``[B, S, 1]`` bool.
    rank = places.flatten().cumsum(0) - 1
    if valid is None:
        num_valid: Tensor | int = len(features)
        index = rank.clamp(0, max(len(features) - 1, 0))
    else:
        num_valid = valid.sum()
        numbers = torch.arange(len(valid), device=valid.device)
        slots = torch.where(valid, valid.cumsum(0) - 1, len(valid))  # the last one is never read
        order = numbers.new_zeros(len(valid) + 1).scatter(0, slots, numbers)
        index = order.index_select(0, rank.clamp(0, len(valid) - 1))
    features = features.index_select(0, index).view(*places.shape, -1)
    return features.masked_fill(places.sum() != num_valid, torch.nan), places.unsqueeze(-1)
