"""Objects of Google Cloud Storage through the official client, which is imported when needed."""

from __future__ import annotations

import base64
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from gemma_tuner.errors import ConfigError, SourceError
from gemma_tuner.records import StoredObject
from gemma_tuner.storage.gcs_errors import LOG_IN, describe, explain_errors, is_transient
from gemma_tuner.storage.objects import (
    GLOB,
    AccessDeniedError,
    CorruptReadError,
    ObjectChangedError,
    StoreOptions,
    TransientReadError,
    name_folder,
)
from gemma_tuner.threads import DaemonPool

if TYPE_CHECKING:
    from google.cloud import storage

Answer = TypeVar("Answer")

_FIELDS = "items(name,size,generation,crc32c),nextPageToken"
_METADATA_TIMEOUT_SECONDS = 30.0
_RETRY_TIMEOUT_SECONDS = 120.0  # the client's own
_PIN_THREADS = 16
_WORTH_A_PAGE = 16
"""How many objects a page of a listing must find: it costs as much as some twelve single reads of
metadata, and takes as long as a few rounds of them."""
_URI = re.compile(r"gs://([a-z0-9][a-z0-9._-]*)/(.*)", re.DOTALL)


def split_uri(uri: str, *, needs_name: bool = False) -> tuple[str, str]:
    """Return the bucket and the name within it."""
    parts = _URI.fullmatch(uri if uri.count("/") > 2 else f"{uri}/")
    try:
        uri.encode()
    except UnicodeEncodeError:
        parts = None
    if parts is None or (needs_name and not parts[2]):
        raise SourceError(
            "a URI is not of the form gs://bucket/name, bucket names being of small letters, "
            "digits, dots, dashes and underscores; check it"
        )
    return parts[1], parts[2]


class GcsStore:
    """Objects of Google Cloud Storage, for any number of threads."""

    def __init__(self, options: StoreOptions) -> None:
        self._given_client: storage.Client | None = options.gcs_client
        self._num_connections = options.num_connections
        self._total_seconds = options.fetch.total_timeout_seconds
        self._wait_seconds = min(_METADATA_TIMEOUT_SECONDS, options.fetch.attempt_timeout_seconds)
        self._retry_seconds = min(_RETRY_TIMEOUT_SECONDS, self._total_seconds)
        self._client: storage.Client | None = None
        self._opening = threading.Lock()
        self._unlistable: set[str] = set()
        # Requests that were given up hold a thread until their sockets end.
        self._requests = DaemonPool("gemma-tuner-gcs", 4 * _PIN_THREADS)

    def list_objects(self, uri: str) -> Iterator[StoredObject]:
        """Find the objects that a URI, a prefix ending in ``/`` or a glob means, by name."""
        bucket, name = split_uri(uri)
        is_folder = not name or name.endswith("/")
        if not is_folder and not GLOB.search(name):
            yield self._find(uri)
            return
        how = {"prefix": name} if is_folder else {"match_glob": name}
        num_found = 0
        last, last_news = "", time.monotonic()
        page, token = self._list_page(bucket, **how)
        while True:
            seconds = 0.0 if page else time.monotonic() - last_news
            if seconds > self._total_seconds or (page and page[0].uri <= last):
                raise SourceError(
                    f"the listing of {describe(bucket)} comes to no end: after {num_found:,} "
                    "objects its pages are empty or come again; start again, or name a prefix"
                )
            for stored in page:
                if not stored.uri.endswith("/"):
                    num_found += 1
                    yield stored
            if token is None:
                break
            if page:
                last, last_news = page[-1].uri, time.monotonic()
            page, token = self._list_page(bucket, page_token=token, **how)
        if not num_found:
            raise ObjectChangedError(
                f"no object in the bucket {bucket!r} "
                f"{'lies under that prefix' if is_folder else 'matches that glob'}; check the URI"
            )

    def pin_objects(self, uris: Sequence[str]) -> list[StoredObject | SourceError]:
        """Find each URI's present version, size and checksum, or why there is none."""
        # Where many lie in one folder most are found by listing it, a page from one that is wanted
        # on at a time; the rest is asked for one by one, 16 at a time.
        found: dict[str, StoredObject | SourceError] = {}
        folders: dict[tuple[str, str], list[str]] = {}
        for uri in dict.fromkeys(uris):
            try:
                bucket, name = split_uri(uri, needs_name=True)
            except SourceError as error:
                found[uri] = error
            else:
                folders.setdefault((bucket, name_folder(name)), []).append(name)
        if folders:
            self._open_client()  # what is wrong with the client is wrong with none of the URIs
        for (bucket, folder), names in folders.items():
            found |= self._pin_by_listing(bucket, folder, sorted(names))
        rest = [uri for uri in dict.fromkeys(uris) if uri not in found]
        if rest:
            executor = ThreadPoolExecutor(min(_PIN_THREADS, len(rest)), "gcs-pin")
            try:
                found |= zip(rest, executor.map(self._pin, rest), strict=True)
            finally:
                executor.shutdown(wait=False, cancel_futures=True)
        return [found[uri] for uri in uris]

    def read_object(
        self,
        stored: StoredObject,
        start: int,
        num_bytes: int | None,
        *,
        timeout_seconds: float,
    ) -> bytes:
        """Read bytes of the pinned version as they are stored, in one attempt."""
        if num_bytes == 0:
            return b""
        bucket, name = split_uri(stored.uri)
        is_whole = start == 0 and num_bytes is None
        blob = self._open_blob(bucket, name, stored.generation)
        try:
            with explain_errors(bucket, name):
                content: bytes = blob.download_as_bytes(
                    start=None if is_whole else start,
                    end=None if num_bytes is None else start + num_bytes - 1,
                    raw_download=True,  # checksums are of the bytes as they are stored
                    timeout=timeout_seconds,
                    checksum="crc32c" if is_whole else None,
                    retry=None,
                )
        except ObjectChangedError:
            raise self._explain_change(stored, timeout_seconds) from None
        if num_bytes is not None and len(content) != num_bytes:
            raise CorruptReadError(
                f"{describe(bucket, name)} gave {len(content):,} bytes of the {num_bytes:,} "
                "asked; look for a proxy on the way"
            )
        return content

    def _explain_change(self, stored: StoredObject, timeout_seconds: float) -> ObjectChangedError:
        """Tell deleted from overwritten, which one more request knows."""
        bucket, name = split_uri(stored.uri)
        what = describe(bucket, name)
        blob = self._open_blob(bucket, name)
        try:
            with explain_errors(bucket, name):
                blob.reload(timeout=timeout_seconds, retry=None)
        except ObjectChangedError as error:
            if "no bucket" in str(error):
                return error
            return ObjectChangedError(
                f"{what} was deleted after it was found; upload it again, and as that is another "
                "version, read the source anew (refresh=True)"
            )
        except SourceError:
            return ObjectChangedError(
                f"{what} was overwritten or deleted after it was found; read the source anew "
                "(refresh=True)"
            )
        return ObjectChangedError(
            f"{what} was overwritten after it was found (generation {stored.generation} then, "
            f"{blob.generation} now); read the source anew (refresh=True)"
        )

    def _find(self, uri: str) -> StoredObject:
        bucket, name = split_uri(uri)
        blob = self._open_blob(bucket, name)

        def reload() -> StoredObject:
            blob.reload(timeout=self._wait_seconds, retry=_make_retry(self._retry_seconds))
            return _describe_blob(blob)

        return self._ask(reload, bucket, name)

    def _pin(self, uri: str) -> StoredObject | SourceError:
        try:
            return self._find(uri)
        except (AccessDeniedError, TransientReadError):
            raise
        except SourceError as error:
            return error

    def _pin_by_listing(
        self, bucket: str, folder: str, names: list[str]
    ) -> dict[str, StoredObject | SourceError]:
        """Find many names of one folder, sorted, as long as the pages of a listing hold many."""
        found: dict[str, StoredObject | SourceError] = {}
        while len(names) >= _WORTH_A_PAGE and bucket not in self._unlistable:
            try:
                page, token = self._list_page(
                    bucket,
                    prefix=folder,
                    delimiter="/",
                    start_offset=names[0],
                    end_offset=f"{names[-1]} ",  # which is left out; the last name is not
                )
            except AccessDeniedError:
                self._unlistable.add(bucket)  # reading may be allowed without listing
                break
            present = {split_uri(stored.uri)[1]: stored for stored in page}
            last = max(present, default="")
            listed = [name for name in names if token is None or name <= last]
            for name in listed:
                found[f"gs://{bucket}/{name}"] = present.get(name) or ObjectChangedError(
                    f"{describe(bucket, name)} does not exist"
                )
            names = names[len(listed) :]
            if sum(name in present for name in listed) < _WORTH_A_PAGE:
                break
        return found

    def _list_page(self, bucket: str, **how: Any) -> tuple[list[StoredObject], str | None]:
        """Return a page of a listing, and the token of the next one."""
        client: Any = self._open_client()  # whose hints know no other timeouts than whole ones

        def read_page() -> tuple[list[StoredObject], str | None]:
            blobs = client.list_blobs(
                bucket,
                fields=_FIELDS,
                timeout=self._wait_seconds,
                retry=_make_retry(self._retry_seconds),
                **how,
            )
            page = [_describe_blob(blob) for blob in next(blobs.pages)]
            return page, blobs.next_page_token

        return self._ask(read_page, bucket)

    def _ask(self, request: Callable[[], Answer], bucket: str, name: str = "") -> Answer:
        """Ask for metadata, which no server can draw out by answering byte by byte."""
        # The client's timeout is of a wait for bytes; its retry looks at the clock in between.
        seconds = min(self._retry_seconds + self._wait_seconds, self._total_seconds)
        try:
            with explain_errors(bucket, name):
                return self._requests.submit(request).result(seconds)
        except TransientReadError as error:
            raise TransientReadError(
                f"{error}, nor looked up within {seconds:g} s; check the network, or a proxy on "
                "the way, and start again"
            ) from None

    def _open_blob(self, bucket: str, name: str, generation: int | None = None) -> Any:
        return self._open_client().bucket(bucket).blob(name, generation=generation)

    def _open_client(self) -> storage.Client:
        with self._opening:
            if self._client is None:
                self._client = _prepare_client(self._given_client, self._num_connections)
            return self._client


def open_store(options: StoreOptions) -> GcsStore:
    """Open Google Cloud Storage."""
    return GcsStore(options)


def _make_retry(seconds: float) -> Any:
    from google.api_core.retry import Retry

    return Retry(predicate=is_transient, initial=min(1.0, seconds / 8), timeout=seconds)


def _prepare_client(client: storage.Client | None, num_connections: int) -> storage.Client:
    """Make a client where none is given, and let it keep that many connections."""
    # Its session keeps ten, and discards the connections of further threads.
    # Source: https://github.com/googleapis/python-storage/issues/253
    try:
        from google.auth.exceptions import GoogleAuthError
        from google.cloud import storage
        from requests.adapters import HTTPAdapter
    except ImportError:
        raise SourceError(
            "gs:// is read with the package google-cloud-storage, which is not there; install it"
        ) from None
    if client is None:
        try:
            client = storage.Client(project=None)  # reading asks for no project
        except GoogleAuthError as error:
            raise AccessDeniedError(
                "there are no Google Cloud credentials on this machine that can be used "
                f"({type(error).__name__}); {LOG_IN}"
            ) from None
    if not isinstance(client, storage.Client):
        raise ConfigError(
            f"the storage client is a {type(client).__name__}; give a google.cloud.storage.Client"
        )
    session = client._http  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
    for scheme in ("https://", "http://"):
        if type(session.get_adapter(scheme)) is HTTPAdapter:  # not one with certificates
            session.mount(scheme, HTTPAdapter(pool_maxsize=num_connections))
    return client


def _describe_blob(blob: storage.Blob) -> StoredObject:
    checksum = blob.crc32c
    if blob.generation is None or blob.size is None or blob.size < 0:
        raise ValueError("a description without generation or size")
    return StoredObject(
        f"gs://{blob.bucket.name}/{blob.name}",
        generation=blob.generation,
        num_bytes=blob.size,
        crc32c=int.from_bytes(base64.b64decode(checksum), "big") if checksum else None,
    )
