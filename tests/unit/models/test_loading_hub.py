"""What users meet on the Hub, from a server on this machine that answers as the Hub does."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants, hf_api
from transformers.utils import hub as transformers_hub

from gemma_tuner.errors import CheckpointError
from gemma_tuner.models.loading import load_model

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


@pytest.fixture(scope="module")
def server():
    with HubServer() as server:
        thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def hub(server, monkeypatch, tmp_path):
    server.requests.clear()
    server.folder = None
    address = f"http://127.0.0.1:{server.server_port}"
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(hf_api.api, "endpoint", address)
    monkeypatch.setattr(transformers_hub, "_hf_api", None)  # it remembers an address
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    huggingface_hub.close_session()
    yield server
    huggingface_hub.close_session()


@pytest.mark.parametrize(
    ("name", "hints"),
    [
        ("gated/model", ["licence", "https://huggingface.co/gated/model", "hf auth login"]),
        ("absent/model", ["no such model", "https://huggingface.co/absent/model"]),
    ],
)
def test_locked_and_absent_models(hub, name, hints, capfd):
    with pytest.raises(CheckpointError) as caught:
        load_model(name, device="cpu")
    for hint in hints:
        assert hint in str(caught.value)
    assert hub.requests, "the Hub was never asked"
    assert any(TOKEN in (authorization or "") for _, authorization in hub.requests)
    printed = capfd.readouterr()
    assert TOKEN not in str(caught.value) + printed.out + printed.err


def test_an_unknown_revision_is_named(hub):
    with pytest.raises(CheckpointError, match="no-such"):
        load_model("files/model", device="cpu", revision="no-such")


def test_an_adapter_on_the_hub(hub, tmp_path):
    hub.folder = tmp_path / "adapter"
    hub.folder.mkdir()
    (hub.folder / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds an adapter"):
        load_model("files/model", device="cpu")


def test_a_model_is_downloaded_at_its_revision(hub, checkpoints):
    hub.folder = checkpoints["gemma4-e2b"]
    model, processor = load_model("files/model", device="cpu", revision="release")
    assert model.config.model_type == "gemma4"
    assert processor.chat_template
    asked = {path.split("/")[4] for path, _ in hub.requests if "/resolve/" in path}
    assert asked <= {"release", "0" * 40}  # the branch, and the commit that it was found to be
