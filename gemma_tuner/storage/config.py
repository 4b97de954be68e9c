"""FetchConfig: how media are fetched and kept; nothing of it changes which example comes next."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gemma_tuner.errors import ConfigError

_MIB = 1 << 20
_GIB = 1 << 30
_LONGEST_SECONDS = 86_400.0


@dataclass(frozen=True, kw_only=True, slots=True)
class FetchConfig:
    """How a stream fetches and keeps media, and how far it runs ahead.

    Args:
        io_threads: Reads under way at one time.
        decode_threads: Images and clips decoded at one time.
        window_bytes: Media fetched or decoded ahead of the consumer; one example larger than
            this is still handed out, alone.
        window_examples: Examples ahead of the consumer.
        cache_bytes: Media kept on disk, least recently used out first; 0 keeps none.
        min_free_disk_bytes: What the cache leaves free on its disk.
        attempt_timeout_seconds: How long one attempt at a read may take.
        total_timeout_seconds: How long all attempts at one read may take.
        hedged_fraction: Reads that last three times the running median are begun a second time,
            and the first answer counts; at most this fraction of all reads. 0 never does.

    Raises:
        ConfigError: A value out of its range or of another type.
    """

    io_threads: int = 16
    decode_threads: int = 2
    window_bytes: int = 256 * _MIB
    window_examples: int = 256
    cache_bytes: int = 10 * _GIB
    min_free_disk_bytes: int = 5 * _GIB
    attempt_timeout_seconds: float = 30.0
    total_timeout_seconds: float = 300.0
    hedged_fraction: float = 0.1

    def __post_init__(self) -> None:
        for name in ("io_threads", "decode_threads", "window_bytes", "window_examples"):
            _check(name, getattr(self, name), smallest=1, is_whole=True)
        for name in ("cache_bytes", "min_free_disk_bytes"):
            _check(name, getattr(self, name), smallest=0, is_whole=True)
        for name in ("attempt_timeout_seconds", "total_timeout_seconds"):
            _check(name, getattr(self, name), smallest=0.001, largest=_LONGEST_SECONDS)
        _check("hedged_fraction", self.hedged_fraction, smallest=0, largest=1)


def _check(
    name: str, value: object, *, smallest: float, largest: float = math.inf, is_whole: bool = False
) -> None:
    is_number = isinstance(value, int if is_whole else int | float)
    if not is_number or isinstance(value, bool) or not smallest <= value <= largest:
        what = "a whole number" if is_whole else "a number"
        limit = " up" if largest == math.inf else f" to {largest:g}"
        raise ConfigError(f"{name}={value!r}; give {what} from {smallest:g}{limit}")
