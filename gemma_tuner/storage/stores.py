"""Stores of objects by the scheme of their URIs, each opened when the first of its URIs is met.

A further scheme is a module with a function ``open_store(options)`` and one line of the table.
"""

from __future__ import annotations

import importlib
import threading

from gemma_tuner.errors import SourceError
from gemma_tuner.storage.objects import ObjectStore, StoreOptions

SCHEMES: dict[str, str] = {
    "gs": "gemma_tuner.storage.gcs",
}
"""The module of each scheme, imported when it is needed first."""


class Stores:
    """The stores that URIs name; none is opened before it is needed: it may want credentials."""

    def __init__(self, options: StoreOptions) -> None:
        self._options = options
        self._opened: dict[str, ObjectStore] = {}
        self._opening = threading.Lock()

    def find(self, uri: str) -> ObjectStore:
        """Return the store of a URI."""
        scheme, _, _ = split_uri(uri)
        with self._opening:
            if scheme not in self._opened:
                module = importlib.import_module(SCHEMES[scheme])
                self._opened[scheme] = module.open_store(self._options)
            return self._opened[scheme]


def is_stored(uri: str) -> bool:
    """Tell whether a store is known for the scheme of a URI; a path has none."""
    scheme, is_uri, _ = uri.partition("://")
    return bool(is_uri) and scheme in SCHEMES


def split_uri(uri: str) -> tuple[str, str, str]:
    """Return the scheme, the bucket and the name within it."""
    if not is_stored(uri):
        raise SourceError(
            f"a URI is not of the form {list_schemes('bucket/name')}; check it, or name local "
            "files by their paths"
        )
    scheme, _, rest = uri.partition("://")
    bucket, _, name = rest.partition("/")
    return scheme, bucket, name


def list_schemes(rest: str = "") -> str:
    """Name the schemes that are known, in a message: ``gs://``."""
    return " or ".join(f"{scheme}://{rest}" for scheme in SCHEMES)
