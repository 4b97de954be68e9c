"""FetchConfig: how media are fetched and kept; nothing of it changes which example comes next."""

from __future__ import annotations

from dataclasses import dataclass, field

from gemma_tuner.checks import bounds, check_fields

_MIB = 1 << 20
_GIB = 1 << 30
_COUNT = bounds(at_least=1)
_SECONDS = bounds(at_least=0.001, at_most=86_400)


@dataclass(frozen=True, kw_only=True, slots=True)
class FetchConfig:
    """How a stream fetches and keeps media, and how far it runs ahead.

    Args:
        io_threads: Reads under way at one time.
        decode_threads: Rarely needed: images and clips decoded at one time.
        window_bytes: Media fetched or decoded ahead of the consumer; one example larger than
            this is still handed out, alone.
        window_examples: Rarely needed: examples ahead of the consumer.
        cache_bytes: Media kept on disk, least recently used out first; 0 keeps none.
        min_free_disk_bytes: Rarely needed: what the cache leaves free on its disk.
        attempt_timeout_seconds: Rarely needed: how long one attempt at a read may take.
        total_timeout_seconds: Rarely needed: how long all attempts at one read, or at one
            question for metadata, may take; of BigQuery, for how long a stream of rows may bring
            nothing, and how long a query is waited for: a later start goes on waiting.
        hedged_fraction: Reads that last three times the running median are begun a second time,
            and the first answer counts; at most this fraction of all reads. 0 never does.

    Raises:
        ConfigError: A value out of its range or of another type.
    """

    io_threads: int = field(default=16, metadata=_COUNT)
    decode_threads: int = field(default=2, metadata=_COUNT)
    window_bytes: int = field(default=256 * _MIB, metadata=_COUNT)
    window_examples: int = field(default=256, metadata=_COUNT)
    cache_bytes: int = field(default=10 * _GIB, metadata=bounds(at_least=0))
    min_free_disk_bytes: int = field(default=5 * _GIB, metadata=bounds(at_least=0))
    attempt_timeout_seconds: float = field(default=30.0, metadata=_SECONDS)
    total_timeout_seconds: float = field(default=300.0, metadata=_SECONDS)
    hedged_fraction: float = field(default=0.1, metadata=bounds(at_least=0, at_most=1))

    def __post_init__(self) -> None:
        check_fields(self)
