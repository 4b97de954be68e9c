"""The questions that a store of objects answers, and how it can fail.

A store makes one attempt at each read; :mod:`gemma_tuner.storage.fetch` repeats, hedges and
checks them. The four errors differ in what follows: try again, pass over the object, or stop.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from gemma_tuner.errors import SourceError
from gemma_tuner.records import StoredObject
from gemma_tuner.storage.config import FetchConfig

GLOB = re.compile(r"[*?\[{]")
"""Characters that make a URI a glob."""
OTHER_FORM = (AttributeError, LookupError, TypeError, ValueError)  # of an answer, to clients


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """What stores are opened with.

    Args:
        gcs_client: A ``google.cloud.storage.Client``; None makes one with the application-default
            credentials when the first object is asked for.
        num_connections: How many connections are kept open; as many as there are threads.
        fetch: How long a wait for metadata and a question for them may take.
    """

    gcs_client: Any = None
    num_connections: int = 64
    fetch: FetchConfig = FetchConfig()  # noqa: RUF009 - it is frozen


class TransientReadError(SourceError):
    """An attempt that may succeed when it is repeated: too many requests, a lost connection."""

    def __init__(self, message: str, *, retry_after_seconds: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class CorruptReadError(SourceError):
    """Bytes that do not have the length or checksum that they should have."""


class ObjectChangedError(SourceError):
    """An object that is no longer what it was when it was found: overwritten or deleted."""


class AccessDeniedError(SourceError):
    """Credentials or a permission that are missing; nothing but the user can mend it."""


class ObjectStore(Protocol):
    """A store of objects under URIs."""

    def list_objects(self, uri: str) -> Iterator[StoredObject]:
        """Find the objects that a URI, a prefix ending in ``/`` or a glob means, by name."""
        ...

    def pin_objects(self, uris: Sequence[str]) -> list[StoredObject | SourceError]:
        """Find each URI's present version, size and checksum, or why there is none."""
        # Raises AccessDeniedError for the whole call: the next ones would fail as well.
        ...

    def read_object(
        self,
        stored: StoredObject,
        start: int,
        num_bytes: int | None,
        *,
        timeout_seconds: float,
    ) -> bytes:
        """Read bytes of the pinned version, in one attempt."""
        # num_bytes=None reads to the end and checks the store's own checksum. The timeout is of
        # connecting and of each wait for bytes: whoever trickles may take longer.
        ...


def name_folder(name: str) -> str:
    """Return what comes before the last part of a name or URI, with its slash."""
    return name[: name.rfind("/") + 1]
