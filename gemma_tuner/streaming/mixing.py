"""Several streams as one, slot by slot in proportion to their weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import combinations

import numpy as np

from gemma_tuner.checks import is_number
from gemma_tuner.errors import ConfigError
from gemma_tuner.streaming.manifest import hash_keys
from gemma_tuner.streaming.stream import ExampleStream
from gemma_tuner.streaming.view import DatasetView

_FINEST = 1_000_000  # Weights are fractions with denominators up to it.


def mix(streams: Mapping[ExampleStream, float]) -> ExampleStream:
    """Mix streams slot by slot, each in proportion to its weight.

    The proportions are kept as evenly as whole numbers can be at every place of the mix. Each
    stream keeps its own order and starts again when it is through, so that no row of it is
    left out; an epoch of the mix is as long as all streams together.

    Args:
        streams: The weight of each stream, above 0; only the proportions count.

    Returns:
        The mix, at its beginning; where the streams themselves stand does not matter.

    Raises:
        ConfigError: No streams, a mix or a shard among them, a weight that is not a number above
            0, or a key that would stand twice: of two data sets, or of one whose parts overlap.

    Example:
        >>> import gemma_tuner as gt
        >>> text = gt.stream_local(gt.testing.sample_data("text"), split="train")
        >>> clips = gt.stream_local(gt.testing.sample_data("audio"), split="train")
        >>> both = gt.mix({text: 0.7, clips: 0.3})
        >>> len(both) == len(text) + len(clips)
        True
    """
    if not isinstance(streams, Mapping) or not streams:
        raise ConfigError("mix() takes a dictionary of streams and weights: {stream: weight, ...}")
    weights = []
    for stream, weight in streams.items():
        if not isinstance(stream, ExampleStream) or not stream.is_whole:
            raise ConfigError(
                f"mix() was given {stream!r}; give streams from stream_local, stream_gcs, "
                "stream_bigquery or stream_hub, and shard the mix"
            )
        if not is_number(weight) or not 1 / _FINEST <= weight < math.inf:
            raise ConfigError(
                f"mix() was given the weight {weight!r}; give a number of {1 / _FINEST:g} or more"
            )
        weights.append(Fraction(weight).limit_denominator(_FINEST))
    views = [view for stream in streams for view in stream.views]
    _refuse_shared_keys(views)
    return ExampleStream(views, weights, fetch=next(iter(streams)).fetch)


def _refuse_shared_keys(views: Sequence[DatasetView]) -> None:
    """Refuse a key that stands twice in the mix, be it of different data or of the same row."""
    if len(views) < 2:
        return
    hashes = [hash_keys(part.manifest.read_keys())[np.asarray(part.rows)] for part in views]
    for (one, its), (other, others) in combinations(zip(views, hashes, strict=True), 2):
        _, places, other_places = np.intersect1d(its, others, return_indices=True)
        for place, other_place in zip(places, other_places, strict=True):
            key = one.manifest.read_key(int(one.rows[place]))
            if key == other.manifest.read_key(int(other.rows[other_place])):
                raise ConfigError(
                    f"mix() was given two streams with an example {key!r} each, and a key is of "
                    "one example alone; "
                    + (
                        "they are of the same data: give parts that share no row, as split() "
                        "makes them, or one of them with a greater weight"
                        if one.manifest.fingerprint == other.manifest.fingerprint
                        else "name a column of unique keys by id=, or number the rows (id=False) "
                        "of files or tables with different names"
                    )
                )
