"""A Hub on loopback for tests: repositories of data files, over the HTTP that real clients speak.

It knows what `datasets` asks for: files with ranges, the commit of a revision, listings of
folders, and the error codes by which clients tell a gated repository from one that is not there.
"""

import json
import re
from dataclasses import dataclass
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import cast
from urllib.parse import unquote, urlsplit

_PATH = re.compile(
    r"/(?:api/)?datasets/(?P<name>[^/]+/[^/]+)"
    r"(?:/(?P<what>resolve|tree|revision)/(?P<revision>[^/]+)(?:/(?P<inner>.*))?)?$"
)


@dataclass(frozen=True)
class Repository:
    """One commit of a data set."""

    commit: str
    files: dict[str, bytes]
    is_gated: bool = False


class HubServer(ThreadingHTTPServer):
    """Serves repositories by name."""

    daemon_threads = True

    def __init__(self, repositories: dict[str, Repository]) -> None:
        super().__init__(("localhost", 0), _Handler)
        self.repositories = repositories
        self.requested: list[str] = []


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> HubServer:
        return cast(HubServer, self.server)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.hub.requested.append(self.path)
        asked = _PATH.match(unquote(urlsplit(self.path).path))
        repository = self.hub.repositories.get(asked["name"]) if asked else None
        if asked is None or repository is None:
            self._answer(404, code="RepoNotFound")
        elif repository.is_gated:
            self._answer(401, code="GatedRepo")
        elif asked["revision"] not in (None, "main", repository.commit):
            self._answer(404, code="RevisionNotFound")
        elif asked["what"] == "resolve":
            self._send_file(repository, asked["inner"])
        elif asked["what"] == "tree":
            self._send_json(_list_folder(repository.files, (asked["inner"] or "").strip("/")))
        else:
            self._send_json({"id": asked["name"], "sha": repository.commit, "siblings": []})

    def _send_json(self, document: object) -> None:
        self._answer(200, json.dumps(document).encode(), {"Content-Type": "application/json"})

    def _send_file(self, repository: Repository, path: str) -> None:
        headers = {"X-Repo-Commit": repository.commit}
        if path not in repository.files:
            self._answer(404, b"", headers, code="EntryNotFound")
            return
        content = repository.files[path]
        headers |= {"ETag": f'"{sha256(content).hexdigest()}"', "Accept-Ranges": "bytes"}
        part = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if part is None:
            self._answer(200, content, headers)
            return
        first, last = int(part[1]), int(part[2] or len(content) - 1)
        body = content[first : last + 1]
        headers["Content-Range"] = f"bytes {first}-{first + len(body) - 1}/{len(content)}"
        self._answer(206, body, headers)

    def _answer(
        self,
        status: int,
        body: bytes = b"",
        headers: dict[str, str] | None = None,
        code: str | None = None,
    ) -> None:
        self.send_response(status)
        named = {"X-Error-Code": code} if code else {}
        for name, value in {**(headers or {}), **named, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _list_folder(files: dict[str, bytes], folder: str) -> list[dict[str, object]]:
    entries: dict[str, dict[str, object]] = {}
    prefix = f"{folder}/" if folder else ""
    for path, content in files.items():
        if path.startswith(prefix):
            name, _, below = path.removeprefix(prefix).partition("/")
            entry = {"type": "directory"} if below else {"type": "file", "size": len(content)}
            entries[name] = {**entry, "path": f"{prefix}{name}", "oid": "0" * 40}
    return list(entries.values())
