"""Buckets of versioned objects in memory, from which ``GcsServer`` serves.

The rules are those of Cloud Storage's JSON API: generations only grow, an overwritten or deleted
version is kept only where the bucket keeps versions, and listings follow names in UTF-8 order.
"""

from __future__ import annotations

import base64
import bisect
import hashlib
import re
import threading
import time
import urllib.parse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import google_crc32c

# Sorts after every character: a listing goes on behind everything that begins with a prefix.
_LAST = "\U0010ffff"
_ANY_GENERATION = 2**63 - 1


class ApiError(Exception):
    """A request that is answered with an error; ``reason`` is what programs read."""

    def __init__(self, status: int, message: str, *, reason: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.reason = reason or REASONS.get(status, "invalid")

    def resource(self) -> dict[str, Any]:
        """The body of the answer."""
        error = {"message": self.message, "domain": "global", "reason": self.reason}
        return {"error": {"code": self.status, "message": self.message, "errors": [error]}}


# Source: https://cloud.google.com/storage/docs/json_api/v1/status-codes
REASONS = {
    304: "notModified",
    400: "invalid",
    401: "required",
    403: "forbidden",
    404: "notFound",
    408: "uploadBrokenConnection",
    409: "conflict",
    412: "conditionNotMet",
    416: "requestedRangeNotSatisfiable",
    429: "rateLimitExceeded",
    500: "backendError",
    501: "notImplemented",
    503: "backendError",
}


@dataclass(frozen=True, slots=True)
class StoredVersion:
    """One generation of one object."""

    bucket: str
    name: str
    generation: int
    data: bytes
    content_type: str
    content_encoding: str | None
    metadata: Mapping[str, str]
    created: str
    crc32c: str
    md5: str | None  # A composed object has none.

    def resource(self, endpoint: str) -> dict[str, Any]:
        """The object as the JSON API describes it."""
        path = f"b/{_quote(self.bucket)}/o/{_quote(self.name)}"
        query = f"?generation={self.generation}&alt=media"
        resource = {
            "kind": "storage#object",
            "id": f"{self.bucket}/{self.name}/{self.generation}",
            "selfLink": f"{endpoint}/storage/v1/{path}",
            "mediaLink": f"{endpoint}/download/storage/v1/{path}{query}",
            "name": self.name,
            "bucket": self.bucket,
            "generation": str(self.generation),
            "metageneration": "1",
            "contentType": self.content_type,
            "contentEncoding": self.content_encoding,
            "storageClass": "STANDARD",
            "size": str(len(self.data)),
            "md5Hash": self.md5,
            "crc32c": self.crc32c,
            "etag": base64.b64encode(str(self.generation).encode()).decode(),
            "timeCreated": self.created,
            "updated": self.created,
            "metadata": dict(self.metadata) or None,
        }
        return {key: value for key, value in resource.items() if value is not None}


@dataclass(slots=True)
class Bucket:
    """The objects of one bucket."""

    keeps_versions: bool = False  # whether overwritten and deleted versions stay readable
    names: list[str] = field(default_factory=list)  # sorted: UTF-8 order is code point order
    versions: dict[str, list[StoredVersion]] = field(default_factory=dict)
    live: dict[str, StoredVersion] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Condition:
    """What must hold of an object's live generation; 0 stands for no live object."""

    generation_match: int | None = None
    generation_not_match: int | None = None

    def check(self, version: StoredVersion | None, *, reading: bool) -> None:
        """Compare with an object."""
        generation = version.generation if version else 0
        if self.generation_match not in (None, generation):
            raise ApiError(412, "At least one of the pre-conditions you specified did not hold.")
        if self.generation_not_match == generation:
            raise ApiError(304 if reading else 412, "The object still has this generation.")


UNCONDITIONAL = Condition()


@dataclass(frozen=True, slots=True)
class Listing:
    """One page: versions and common prefixes, and where the next page begins (None: the end)."""

    versions: list[StoredVersion]
    prefixes: list[str]
    next_page_token: str | None


class Buckets:
    """Buckets and their objects; every method may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._buckets: dict[str, Bucket] = {}
        self._last_generation = 0

    def create_bucket(self, bucket: str, *, keeps_versions: bool = False) -> None:
        """Add an empty bucket."""
        with self._lock:
            if bucket in self._buckets:
                raise ApiError(409, f"The bucket {bucket} already exists.")
            self._buckets[bucket] = Bucket(keeps_versions)

    def has_bucket(self, bucket: str) -> bool:
        """Whether the bucket exists."""
        return bucket in self._buckets

    def put(
        self,
        bucket: str,
        name: str,
        data: bytes,
        *,
        content_type: str | None = None,
        content_encoding: str | None = None,
        metadata: Mapping[str, str] | None = None,
        condition: Condition = UNCONDITIONAL,
        composed: bool = False,
        generation: int | None = None,
    ) -> StoredVersion:
        """Store a new generation of an object; one that is given has to be above the last one."""
        with self._lock:
            into = self.find(bucket)
            condition.check(into.live.get(name), reading=False)
            # Like those of Cloud Storage, microseconds: a restarted server repeats none.
            now = time.time_ns() // 1000
            self._last_generation = max(self._last_generation + 1, generation or now)
            version = StoredVersion(
                bucket=bucket,
                name=name,
                generation=self._last_generation,
                data=data,
                content_type=content_type or "application/octet-stream",
                content_encoding=content_encoding,
                metadata=metadata or {},
                created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
                crc32c=encode_crc32c(data),
                md5=None if composed else encode_md5(data),
            )
            self._retire(into, name)
            if name not in into.versions:
                bisect.insort(into.names, name)
                into.versions[name] = []
            into.versions[name].append(version)
            into.live[name] = version
            return version

    def get(
        self,
        bucket: str,
        name: str,
        generation: int | None = None,
        condition: Condition = UNCONDITIONAL,
    ) -> StoredVersion:
        """Find the live version of an object, or one generation of it."""
        with self._lock:
            within = self.find(bucket)
            if generation is None:
                version = within.live.get(name)
            else:
                kept = within.versions.get(name, ())
                version = next((each for each in kept if each.generation == generation), None)
        if version is None:
            which = f"{bucket}/{name}" if generation is None else f"{bucket}/{name}#{generation}"
            raise ApiError(404, f"No such object: {which}")
        condition.check(version, reading=True)
        return version

    def delete(
        self,
        bucket: str,
        name: str,
        generation: int | None = None,
        condition: Condition = UNCONDITIONAL,
    ) -> None:
        """Remove the live version of an object, or one generation for good."""
        with self._lock:
            version = self.get(bucket, name, generation)
            within = self.find(bucket)
            condition.check(version, reading=False)
            if within.live.get(name) == version:
                self._retire(within, name)
            if generation is not None and version in within.versions.get(name, ()):
                within.versions[name].remove(version)

    def list_page(
        self,
        bucket: str,
        *,
        max_results: int = 1000,
        page_token: str | None = None,
        prefix: str = "",
        delimiter: str = "",
        start_offset: str = "",
        end_offset: str = "",
        match_glob: str | None = None,
        versions: bool = False,
    ) -> Listing:
        """List one page of a bucket: objects and prefixes count together."""
        page = Listing([], [], None)
        glob = compile_glob(match_glob) if match_glob is not None else None
        last = _decode_page_token(page_token) if page_token else ("", -1)
        with self._lock:
            start = max(prefix, start_offset, last[0])
            for version in self._walk(self.find(bucket), start, versions=versions):
                name = version.name
                if not name.startswith(prefix) or (end_offset and name >= end_offset):
                    break
                # An object overwritten between two pages is not listed twice.
                place = (name, version.generation if versions else _ANY_GENERATION)
                if place <= last or (glob and not glob.fullmatch(name)):
                    continue
                if len(page.versions) + len(page.prefixes) == max_results:
                    return Listing(page.versions, page.prefixes, _encode_page_token(*last))
                cut = name.find(delimiter, len(prefix)) if delimiter else -1
                if cut >= 0:
                    page.prefixes.append(name[: cut + len(delimiter)])
                    last = (page.prefixes[-1] + _LAST, _ANY_GENERATION)
                else:
                    page.versions.append(version)
                    last = place
        return page

    def bucket_names(self) -> list[str]:
        """The buckets, sorted."""
        with self._lock:
            return sorted(self._buckets)

    def find(self, bucket: str) -> Bucket:
        """Return a bucket."""
        if bucket not in self._buckets:
            raise ApiError(404, "The specified bucket does not exist.")
        return self._buckets[bucket]

    def _walk(self, bucket: Bucket, start: str, *, versions: bool) -> Iterator[StoredVersion]:
        for index in range(bisect.bisect_left(bucket.names, start), len(bucket.names)):
            name = bucket.names[index]
            if versions:
                yield from bucket.versions[name]
            elif name in bucket.live:
                yield bucket.live[name]

    def _retire(self, bucket: Bucket, name: str) -> None:
        """Make the live version an old one, which is gone unless the bucket keeps versions."""
        version = bucket.live.pop(name, None)
        if version and not bucket.keeps_versions:
            bucket.versions[name].remove(version)


def encode_crc32c(data: bytes) -> str:
    """The Castagnoli checksum as Cloud Storage writes it: big-endian, in base 64."""
    return base64.b64encode(google_crc32c.value(data).to_bytes(4)).decode()


def encode_md5(data: bytes) -> str:
    """The MD5 digest in base 64."""
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()


def compile_glob(pattern: str) -> re.Pattern[str]:
    """Translate a ``matchGlob``: ``*`` and ``?`` stay within a folder, ``**`` does not."""
    # Source:
    # https://cloud.google.com/storage/docs/json_api/v1/objects/list#list-objects-and-prefixes-using-glob
    tokens = re.compile(
        r"(?P<folders>\*\*/)|(?P<deep>\*\*)|(?P<star>\*)|(?P<one>\?)|(?P<set>\[[^\]]+\])"
        r"|(?P<open>\{)|(?P<close>\})|(?P<comma>,)|\\(?P<escaped>.)|(?P<plain>.)",
        re.DOTALL,
    )
    fixed = {"folders": "(?:.*/)?", "deep": ".*", "star": "[^/]*", "one": "[^/]"}
    fixed |= {"open": "(?:", "close": ")"}
    regex, depth = "", 0
    for token in tokens.finditer(pattern):
        kind, text = token.lastgroup or "", token.group(token.lastgroup or 0)
        depth += (kind == "open") - (kind == "close")
        if kind == "comma" and depth:
            regex += "|"
        elif kind == "set":
            inside = text[1:-1].replace("\\", "\\\\").replace("[", "\\[")
            regex += f"[^{inside[1:]}]" if inside[0] in "!^" else f"[{inside}]"
        else:
            regex += fixed.get(kind) or re.escape(text)
    try:
        return re.compile(regex, re.DOTALL)
    except re.error as error:
        raise ApiError(400, f"Invalid glob pattern: {pattern}") from error


def select_fields(resource: Any, fields: str) -> Any:
    """Keep the parts of a resource that a partial response asks for."""
    if isinstance(resource, list):
        return [select_fields(element, fields) for element in resource]
    if not isinstance(resource, dict):
        return resource
    selected: dict[str, Any] = {}
    # Names at the outer level, each with what follows it: "(...)", "/..." or nothing. The client's
    # masks nest one level deep.
    for name, inner, rest in re.findall(
        r"([^,()/]+)(?:\(([^()]*)\)|/([^,]+))?", fields.replace(" ", "")
    ):
        for key in resource if name == "*" else [name]:
            if key in resource:
                within = inner or rest
                value = select_fields(resource[key], within) if within else resource[key]
                selected[key] = value
    return selected


def _encode_page_token(name: str, generation: int) -> str:
    return base64.urlsafe_b64encode(f"{generation}/{name}".encode()).decode()


def _decode_page_token(token: str) -> tuple[str, int]:
    try:
        generation, _, name = base64.urlsafe_b64decode(token).decode().partition("/")
        return name, int(generation)
    except ValueError as error:
        raise ApiError(400, f"Invalid page token: {token}") from error


def _quote(text: str) -> str:
    return urllib.parse.quote(text, safe="")
