"""What every test stands on: no Hub, no network, one thread, and the shared data when present."""

import gc
import ipaddress
import os
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# Read when torch, tokenizers and huggingface_hub are imported, which is after this file.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# One thread: on shared two-core machines two wait for each other, and tiny models take five times
# as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

# Shared two-core machines make single examples slow at random; pytest's timeout still holds.
settings.register_profile("gemma_tuner", parent=settings.default, deadline=None)
settings.load_profile("gemma_tuner")

ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_finish() -> None:
    """Let ``gc.collect()``, which training calls, look at what tests make, not at all of torch."""
    gc.collect()
    gc.freeze()


class NetworkUsedError(RuntimeError):
    """A test tried to leave the machine."""


class NetworkGuard:
    """Refuses every Python connection and name look-up beyond loopback, and remembers it.

    Remembering matters: code under test may catch the refusal, or meet it in another thread.
    """

    def __init__(self) -> None:
        self.enforced = False
        self.attempts: list[str] = []

    def audit(self, event: str, arguments: tuple) -> None:
        if not self.enforced:
            return
        if event in ("socket.connect", "socket.sendto"):
            address = arguments[1]
            host = address[0] if isinstance(address, tuple) else None  # a unix socket's is a path
        elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
            host = arguments[0]
        else:
            return
        if not is_local(host):
            self.attempts.append(f"{event} to {host!r}")
            raise NetworkUsedError(f"{event} to {host!r}: tests run without network")


def is_local(host: str | bytes | None) -> bool:
    """True for loopback, the unspecified address, and no host at all."""
    name = host.decode() if isinstance(host, bytes) else host
    if name in (None, "", "localhost"):
        return True
    try:
        address = ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


_guard = NetworkGuard()
sys.addaudithook(_guard.audit)


@pytest.fixture(autouse=True)
def network_guard(request: pytest.FixtureRequest) -> Iterator[NetworkGuard]:
    """Fail a test that tries to leave the machine, unless it is marked ``network``."""
    _guard.attempts.clear()
    _guard.enforced = request.node.get_closest_marker("network") is None
    yield _guard
    _guard.enforced = False
    if _guard.attempts:
        pytest.fail(f"the test left the machine: {_guard.attempts}", pytrace=False)


def read_process() -> dict[str, object]:
    """What tests have left changed before, which failed others much later."""
    hub = sys.modules.get("huggingface_hub.utils")
    return {
        "folder": Path.cwd(),
        "limit on files": resource.getrlimit(resource.RLIMIT_FSIZE),
        "SIGINT": signal.getsignal(signal.SIGINT),
        "SIGTERM": signal.getsignal(signal.SIGTERM),
        "the Hub's progress bars off": hub is not None and hub.are_progress_bars_disabled(),
    }


@pytest.fixture(autouse=True)
def process_guard() -> Iterator[None]:
    """Fail a test that leaves the process other than it found it."""
    before = read_process()
    yield
    after = read_process()
    changed = {name: after[name] for name in after if after[name] != before[name]}
    if changed:
        pytest.fail(f"the test left the process changed: {changed}", pytrace=False)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder ``shared/data`` beside the repository, with real data sets."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"NOT TESTED ON REAL DATA: there is no folder {folder}")
    return folder


@pytest.fixture
def model_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[object]:
    """A server that is asked for models in place of the Hub; ``tests/model_hub.py`` says how."""
    from tests.model_hub import serve_models  # which reads the environment above

    with serve_models(monkeypatch, tmp_path / "cache") as server:
        yield server
