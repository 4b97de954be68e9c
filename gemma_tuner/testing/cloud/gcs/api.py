"""The calls of Cloud Storage's JSON API that the Python client makes, answered from buckets.

What a call asks and this module cannot do is refused with 501, never ignored.
"""

from __future__ import annotations

import gzip
import json
import re
import threading
import urllib.parse
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.message import Message
from typing import Any

from gemma_tuner.testing.cloud.gcs.buckets import (
    ApiError,
    Buckets,
    Condition,
    StoredVersion,
    encode_crc32c,
    encode_md5,
    select_fields,
)
from gemma_tuner.testing.cloud.gcs.faults import Operation

# Source: https://cloud.google.com/storage/docs/json_api/v1/objects/list
_MAX_PAGE_SIZE = 1000
_PERMISSIONS: dict[Operation, str] = {
    "read": "storage.objects.get",
    "stat": "storage.objects.get",
    "list": "storage.objects.list",
    "upload": "storage.objects.create",
    "copy": "storage.objects.create",
    "delete": "storage.objects.delete",
    "bucket": "storage.buckets.get",
}
# Parameters that change what is done or returned. Others (projection, prettyPrint) do not.
_HONOURED_CONDITIONS = {"ifGenerationMatch", "ifGenerationNotMatch"}
_REFUSED_PARAMETERS = {
    "filter",
    "includeFoldersAsPrefixes",
    "includeTrailingDelimiter",
    "rewriteToken",
    "softDeleted",
}


@dataclass(frozen=True, slots=True)
class Call:
    """One request, taken apart."""

    operation: Operation  # ``read`` is a download
    method: str
    bucket: str = ""  # empty for a call about all buckets
    name: str = ""  # the object's; a listing's prefix
    action: str = ""  # ``compose``, ``rewriteTo``, ``copyTo``, or an upload's type
    target: tuple[str, str] = ("", "")  # a copy's bucket and object
    parameters: Mapping[str, str] = field(default_factory=dict)
    headers: Message[str, str] = field(default_factory=Message)
    metadata: Mapping[str, Any] = field(default_factory=dict)  # the JSON that came along
    body: bytes = b""  # an upload's

    def number(self, parameter: str) -> int | None:
        """Read a parameter that is a whole number."""
        text = self.parameters.get(parameter)
        if text is None:
            return None
        if not text.isdecimal():
            raise ApiError(400, f"Invalid value for {parameter}: {text}")
        return int(text)

    @property
    def condition(self) -> Condition:
        """The preconditions, of which there are two."""
        return Condition(self.number("ifGenerationMatch"), self.number("ifGenerationNotMatch"))


@dataclass(frozen=True, slots=True)
class Answer:
    """A response; ``chunked`` where its length is not sent before it."""

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    chunked: bool = False


@dataclass(slots=True)
class _ResumableUpload:
    call: Call
    data: bytearray = field(default_factory=bytearray)
    version: StoredVersion | None = None


class GcsApi:
    """Takes requests apart and answers them."""

    def __init__(self, buckets: Buckets) -> None:
        self.endpoint = ""
        self.forbidden: set[str] = set()
        self._buckets = buckets
        self._uploads: dict[str, _ResumableUpload] = {}
        self._uploads_lock = threading.Lock()

    def parse(self, method: str, url: str, headers: Message[str, str], body: bytes) -> Call:
        """Take a request apart."""
        parts = urllib.parse.urlsplit(url)
        parameters = dict(urllib.parse.parse_qsl(parts.query, keep_blank_values=True))
        found = re.fullmatch(r"(?:/resumable)?(/upload|/download)?/storage/v1/(.*)", parts.path)
        kind, rest = (found[1] or "", found[2]) if found else ("", "")
        # A name's slashes are quoted: only the API's own separate.
        words = [urllib.parse.unquote(word) for word in rest.split("/")]
        shared: dict[str, Any] = {"method": method, "parameters": parameters, "headers": headers}
        if kind == "/upload" and len(words) == 3:
            return self._parse_upload(words[1], body, shared)
        shared["metadata"] = _read_json(body)
        match words:
            case ["b"]:
                return Call("bucket", bucket=shared["metadata"].get("name", ""), **shared)
            case ["b", bucket]:
                return Call("bucket", bucket=bucket, **shared)
            case ["b", bucket, "o"]:
                return Call("list", bucket=bucket, name=parameters.get("prefix", ""), **shared)
            case ["b", bucket, "o", name]:
                usual: Operation = "read" if parameters.get("alt") == "media" else "stat"
                operation: Operation = "delete" if method == "DELETE" else usual
                return Call(operation, bucket=bucket, name=name, **shared)
            case ["b", bucket, "o", name, "compose"]:
                return Call("copy", bucket=bucket, name=name, action="compose", **shared)
            case ["b", bucket, "o", name, ("rewriteTo" | "copyTo") as action, "b", to, "o", at]:
                shared |= {"action": action, "target": (to, at)}
                return Call("copy", bucket=bucket, name=name, **shared)
        return Call("other", **shared)

    def _parse_upload(self, bucket: str, body: bytes, shared: dict[str, Any]) -> Call:
        parameters = shared["parameters"]
        action = parameters.get("uploadType", "")
        metadata: dict[str, Any] = {}
        if upload_id := parameters.get("upload_id"):
            with self._uploads_lock:
                upload = self._uploads.get(upload_id)
            metadata = dict(upload.call.metadata) if upload else {}
            action = "chunk"
        elif action == "multipart":
            metadata, body = _split_multipart(shared["headers"].get("Content-Type", ""), body)
        elif action == "resumable":
            metadata, body = _read_json(body), b""
        name = parameters.get("name") or metadata.get("name", "")
        shared |= {"action": action, "metadata": metadata, "body": body}
        return Call("upload", bucket=bucket, name=name, **shared)

    def answer(self, call: Call) -> Answer:
        """Do what a call asks; errors are answers too."""
        try:
            return self._answer(call)
        except ApiError as error:
            return self.refuse(call, error.status, error=error)

    def refuse(
        self,
        call: Call,
        status: int,
        *,
        retry_after_seconds: int | None = None,
        error: ApiError | None = None,
    ) -> Answer:
        """An answer with an error: the one given, or the usual one of the status."""
        headers = {"Content-Type": "application/json; charset=UTF-8"}
        if retry_after_seconds is not None:
            headers["Retry-After"] = str(retry_after_seconds)
        body = b""
        if error and call.operation == "read":
            # Downloads fail in plain text, unlike everything else.
            headers["Content-Type"] = "text/html; charset=UTF-8"
            body = error.message.encode()
        elif status != 304:
            resource = (error or ApiError(status, _usual_message(call, status))).resource()
            body = json.dumps(resource).encode()
        return Answer(status, body, headers)

    def _answer(self, call: Call) -> Answer:
        asked = {name for name, value in call.parameters.items() if value.lower() != "false"}
        refused = {name for name in asked if name.startswith("if")} - _HONOURED_CONDITIONS
        refused |= asked & _REFUSED_PARAMETERS
        if refused or call.operation == "other":
            what = ", ".join(sorted(refused)) or "this call"
            raise ApiError(501, f"gemma_tuner's local server does not do {what}")
        if {call.bucket, call.target[0]} & self.forbidden:
            raise ApiError(403, _usual_message(call, 403))
        does = {
            ("GET", "read"): self._read,
            ("GET", "stat"): self._stat,
            ("GET", "list"): self._list,
            ("DELETE", "delete"): self._delete,
            ("GET", "bucket"): self._show_bucket,
            ("POST", "bucket"): self._create_bucket,
            ("PATCH", "bucket"): self._change_bucket,
            ("POST", "copy"): self._compose if call.action == "compose" else self._copy,
            ("POST", "upload"): self._upload,
            ("PUT", "upload"): self._take_chunk,
        }.get((call.method, call.operation))
        if does is None:
            raise ApiError(501, f"gemma_tuner's local server does not do {call.method} here")
        return does(call)

    def _json(self, call: Call, resource: dict[str, Any]) -> Answer:
        if fields := call.parameters.get("fields"):
            resource = select_fields(resource, fields)
        headers = {"Content-Type": "application/json; charset=UTF-8"}
        return Answer(200, json.dumps(resource).encode(), headers)

    def _show(self, call: Call, version: StoredVersion) -> Answer:
        return self._json(call, version.resource(self.endpoint))

    def _stat(self, call: Call) -> Answer:
        return self._show(call, self._find(call))

    def _find(self, call: Call) -> StoredVersion:
        generation = call.number("generation")
        return self._buckets.get(call.bucket, call.name, generation, call.condition)

    def _read(self, call: Call) -> Answer:
        version = self._find(call)
        hashes = f"crc32c={version.crc32c}" + (f",md5={version.md5}" if version.md5 else "")
        headers = {
            "Content-Type": version.content_type,
            "x-goog-generation": str(version.generation),
            "x-goog-metageneration": "1",
            "x-goog-hash": hashes,
            "x-goog-stored-content-encoding": version.content_encoding or "identity",
            "x-goog-stored-content-length": str(len(version.data)),
        }
        takes_gzip = "gzip" in call.headers.get("Accept-Encoding", "")
        is_gzip = version.content_encoding == "gzip" and version.data.startswith(b"\x1f\x8b")
        if is_gzip and not takes_gzip:
            # Decompressive transcoding: no length, and a range is ignored.
            # Source: https://cloud.google.com/storage/docs/transcoding
            headers["Warning"] = "214 UploadServer gunzipped"
            return Answer(200, gzip.decompress(version.data), headers, chunked=True)
        if version.content_encoding:
            headers["Content-Encoding"] = version.content_encoding
        headers["Accept-Ranges"] = "bytes"
        num_bytes = len(version.data)
        part = _read_range(call.headers.get("Range", ""), num_bytes)
        if part is None:
            return Answer(200, version.data, headers)
        headers["Content-Range"] = f"bytes {part.start}-{part.stop - 1}/{num_bytes}"
        return Answer(206, version.data[part.start : part.stop], headers)

    def _list(self, call: Call) -> Answer:
        parameters = call.parameters
        asked = call.number("maxResults")
        listing = self._buckets.list_page(
            call.bucket,
            max_results=min(asked or _MAX_PAGE_SIZE, _MAX_PAGE_SIZE),
            page_token=parameters.get("pageToken"),
            prefix=parameters.get("prefix", ""),
            delimiter=parameters.get("delimiter", ""),
            start_offset=parameters.get("startOffset", ""),
            end_offset=parameters.get("endOffset", ""),
            match_glob=parameters.get("matchGlob"),
            versions=parameters.get("versions", "").lower() == "true",
        )
        resource: dict[str, Any] = {"kind": "storage#objects"}
        if listing.versions:
            resource["items"] = [each.resource(self.endpoint) for each in listing.versions]
        if listing.prefixes:
            resource["prefixes"] = listing.prefixes
        if listing.next_page_token:
            resource["nextPageToken"] = listing.next_page_token
        return self._json(call, resource)

    def _delete(self, call: Call) -> Answer:
        generation = call.number("generation")
        self._buckets.delete(call.bucket, call.name, generation, call.condition)
        return Answer(204)

    def _show_bucket(self, call: Call) -> Answer:
        if call.bucket:
            return self._json(call, self._bucket_resource(call.bucket))
        buckets = [self._bucket_resource(name) for name in self._buckets.bucket_names()]
        return self._json(call, {"kind": "storage#buckets", "items": buckets})

    def _create_bucket(self, call: Call) -> Answer:
        self._buckets.create_bucket(call.bucket)
        return self._change_bucket(call)

    def _change_bucket(self, call: Call) -> Answer:
        versioning = call.metadata.get("versioning") or {}
        if "enabled" in versioning:
            self._buckets.find(call.bucket).keeps_versions = versioning["enabled"]
        return self._json(call, self._bucket_resource(call.bucket))

    def _bucket_resource(self, bucket: str) -> dict[str, Any]:
        return {
            "kind": "storage#bucket",
            "id": bucket,
            "name": bucket,
            "metageneration": "1",
            "location": "US",
            "storageClass": "STANDARD",
            "versioning": {"enabled": self._buckets.find(bucket).keeps_versions},
        }

    def _upload(self, call: Call) -> Answer:
        if not call.name:
            raise ApiError(400, "Required parameter: name", reason="required")
        if call.action == "resumable":
            upload_id = uuid.uuid4().hex
            with self._uploads_lock:
                self._uploads[upload_id] = _ResumableUpload(call)
            path = f"b/{urllib.parse.quote(call.bucket, safe='')}/o"
            query = f"uploadType=resumable&upload_id={upload_id}"
            return Answer(
                200, headers={"Location": f"{self.endpoint}/upload/storage/v1/{path}?{query}"}
            )
        return self._show(call, self._store_upload(call, call.body))

    def _store_upload(self, call: Call, data: bytes) -> StoredVersion:
        metadata = call.metadata
        for key, value in (("crc32c", encode_crc32c(data)), ("md5Hash", encode_md5(data))):
            if metadata.get(key) not in (None, value):
                raise ApiError(400, f"Provided {key} does not match the one that was calculated.")
        content_type = metadata.get("contentType") or call.headers.get("X-Upload-Content-Type")
        if call.action == "media":
            content_type = call.headers.get("Content-Type")
        return self._buckets.put(
            call.bucket,
            call.name,
            data,
            content_type=content_type,
            content_encoding=metadata.get("contentEncoding"),
            metadata=metadata.get("metadata"),
            condition=call.condition,
        )

    def _take_chunk(self, call: Call) -> Answer:
        with self._uploads_lock:
            upload = self._uploads.get(call.parameters.get("upload_id", ""))
            if upload is None:
                raise ApiError(404, "No such upload.")
            pattern = r"bytes (?:\*|(\d+)-(\d+))/(?:\*|(\d+))"
            found = re.fullmatch(pattern, call.headers.get("Content-Range", ""))
            start, _, total = found.groups() if found else ("0", None, str(len(call.body)))
            if start is not None:
                # A chunk that is sent again overlaps; one after a gap is not taken.
                missing = len(upload.data) - int(start)
                upload.data += call.body[missing:] if missing >= 0 else b""
            if upload.version is None and total is not None and len(upload.data) >= int(total):
                upload.version = self._store_upload(upload.call, bytes(upload.data))
            if upload.version is not None:
                return self._show(call, upload.version)
        headers = {"Range": f"bytes=0-{len(upload.data) - 1}"} if upload.data else {}
        return Answer(308, headers=headers)

    def _compose(self, call: Call) -> Answer:
        sources = [
            self._buckets.get(
                call.bucket, source["name"], int(source.get("generation") or 0) or None
            )
            for source in call.metadata.get("sourceObjects", ())
        ]
        destination = call.metadata.get("destination") or {}
        version = self._buckets.put(
            call.bucket,
            call.name,
            b"".join(source.data for source in sources),
            content_type=destination.get("contentType"),
            condition=call.condition,
            composed=True,
        )
        return self._show(call, version)

    def _copy(self, call: Call) -> Answer:
        source = self._buckets.get(call.bucket, call.name, call.number("sourceGeneration"))
        bucket, name = call.target
        copied = self._buckets.put(
            bucket,
            name,
            source.data,
            content_type=call.metadata.get("contentType") or source.content_type,
            content_encoding=call.metadata.get("contentEncoding") or source.content_encoding,
            metadata=call.metadata.get("metadata") or source.metadata,
            condition=call.condition,
        )
        if call.action == "copyTo":
            return self._show(call, copied)
        num_bytes = str(len(source.data))
        resource = {
            "kind": "storage#rewriteResponse",
            "totalBytesRewritten": num_bytes,
            "objectSize": num_bytes,
            "done": True,
            "resource": copied.resource(self.endpoint),
        }
        return self._json(call, resource)


def _usual_message(call: Call, status: int) -> str:
    permission = _PERMISSIONS.get(call.operation, "storage.objects.get")
    whole = call.operation in ("list", "bucket", "upload", "copy")
    what = f"{permission} access to the Google Cloud Storage {'bucket' if whole else 'object'}."
    denied = f"{what} Permission '{permission}' denied on resource (or it may not exist)."
    messages = {
        401: f"Anonymous caller does not have {denied}",
        403: f"local-user@example.test does not have {denied}",
        429: f"The object {call.bucket}/{call.name} exceeded the rate limit. "
        "Please reduce your request rate.",
        500: "We encountered an internal error. Please try again.",
        503: "We encountered an internal error. Please try again.",
    }
    return messages.get(status, f"A fault of the local server: {status}.")


def _read_json(body: bytes) -> dict[str, Any]:
    try:
        return json.loads(body) if body.strip() else {}
    except ValueError as error:
        raise ApiError(400, "Parse Error", reason="parseError") from error


def _split_multipart(content_type: str, body: bytes) -> tuple[dict[str, Any], bytes]:
    """Take the metadata and the bytes from a body of two parts."""
    found = re.search(r'boundary="?([^";]+)"?', content_type)
    parts = body.split(b"--" + found[1].encode()) if found else []
    if len(parts) != 4:
        raise ApiError(400, "Malformed multipart body.", reason="badContent")
    (_, metadata), (header, data) = (part.split(b"\r\n\r\n", 1) for part in parts[1:3])
    fields = _read_json(metadata)
    media_type = re.search(rb"content-type: *([^\r\n]+)", header, re.IGNORECASE)
    if media_type:
        fields.setdefault("contentType", media_type[1].decode())
    return fields, data.removesuffix(b"\r\n")


def _read_range(header: str, num_bytes: int) -> range | None:
    """The bytes that a ``Range`` header means; None for all, also where it cannot be read."""
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", header)
    if not found or not (found[1] or found[2]):
        return None
    if found[1]:
        start = int(found[1])
        stop = min(int(found[2]) + 1, num_bytes) if found[2] else num_bytes
        if found[2] and int(found[2]) < start:
            return None
    else:
        start, stop = max(num_bytes - int(found[2]), 0), num_bytes
    if start >= stop:
        raise ApiError(416, "The requested range cannot be satisfied.")
    return range(start, stop)
