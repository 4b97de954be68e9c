"""The Hub's models, as a server on this machine answers for them."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants, hf_api
from transformers.utils import hub as transformers_hub

TOKEN = "hf_secretsecretsecret"


class Hub(BaseHTTPRequestHandler):
    """Answers each model as its name says; ``files/model`` serves a folder."""

    @property
    def hub(self) -> HubServer:
        if not isinstance(self.server, HubServer):
            raise TypeError(type(self.server))
        return self.server

    def do_GET(self):
        self.hub.requests.append((self.path, self.headers.get("Authorization")))
        if self.path.startswith("/api/"):
            self.answer_api(self.path.partition("?")[0].partition("/files/model/")[2])
            return
        name, _, filename = self.path.lstrip("/").partition("/resolve/")
        revision, _, filename = filename.partition("/")
        code = {
            "gated/model": (403, "GatedRepo"),
            "absent/model": (401, "RepoNotFound"),
            "files/model": (404, "EntryNotFound"),
        }[name]
        path = self.hub.folder / filename if self.hub.folder else None
        if revision == "no-such":
            code = (404, "RevisionNotFound")
        elif name == "files/model" and path is not None and path.is_file():
            self.answer(200, {"ETag": f'"{filename}"'}, path.read_bytes())
            return
        self.answer(code[0], {"X-Error-Code": code[1]})

    def answer_api(self, question):
        names = [path.name for path in self.hub.folder.iterdir()] if self.hub.folder else []
        match question.split("/"):
            case [_, "no-such"]:
                self.answer(404, {"X-Error-Code": "RevisionNotFound"})
                return
            case ["revision", _]:
                files = [{"rfilename": name} for name in names]
                answer = {"id": "files/model", "sha": "0" * 40, "siblings": files}
            case ["tree", _]:
                answer = [{"type": "file", "path": n, "size": 1, "oid": n} for n in names]
            case _:
                self.answer(404, {"X-Error-Code": "EntryNotFound"})
                return
        self.answer(200, {"Content-Type": "application/json"}, json.dumps(answer).encode())

    def answer(self, status, headers, content=b""):
        self.send_response(status)
        headers |= {"X-Repo-Commit": "0" * 40, "Content-Length": str(len(content))}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, format, *args):
        pass


class HubServer(ThreadingHTTPServer):
    """What is served, and what was asked: (path, authorization)."""

    folder: Path | None = None

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Hub)
        self.requests: list[tuple[str, str | None]] = []


@contextmanager
def serve_models(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[HubServer]:
    """A Hub that this process asks in place of the real one, with a token."""
    with HubServer() as server:
        thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01))
        thread.start()
        address = f"http://127.0.0.1:{server.server_port}"
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(hf_api.api, "endpoint", address)
        monkeypatch.setattr(transformers_hub, "_hf_api", None)  # it remembers an address
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        huggingface_hub.close_session()
        yield server
        huggingface_hub.close_session()
        server.shutdown()
        thread.join()
