"""What users meet on the Hub, from a server on this machine that answers as the Hub does."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
from huggingface_hub import constants

from gemma_tuner.errors import CheckpointError
from gemma_tuner.models.loading import load_model

TOKEN = "hf_secretsecretsecret"


class Hub(BaseHTTPRequestHandler):
    """Answers each model as its name says; ``files/model`` serves a folder."""

    folder = None

    def do_GET(self):
        self.server.requests.append((self.path, self.headers.get("Authorization")))
        name, _, filename = self.path.lstrip("/").partition("/resolve/")
        revision, _, filename = filename.partition("/")
        code = {
            "gated/model": (403, "GatedRepo"),
            "absent/model": (401, "RepoNotFound"),
            "files/model": (404, "EntryNotFound"),
        }[name]
        path = self.server.folder / filename if self.server.folder else None
        if revision == "no-such":
            code = (404, "RevisionNotFound")
        elif name == "files/model" and path is not None and path.is_file():
            content = path.read_bytes()
            self.send_response(200)
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("ETag", f'"{filename}"')
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)
            return
        self.send_response(code[0])
        self.send_header("X-Error-Code", code[1])
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.requests = []
    server.folder = None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    huggingface_hub.close_session()
    yield server
    huggingface_hub.close_session()
    server.shutdown()
    server.server_close()


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


def test_a_model_is_downloaded_at_its_revision(hub, checkpoints, monkeypatch):
    hub.folder = checkpoints["gemma4-e2b"]
    model, processor = load_model("files/model", device="cpu", revision="release")
    assert model.config.model_type == "gemma4"
    assert processor.chat_template
    assert all("/resolve/release/" in path for path, _ in hub.requests if "resolve" in path)
