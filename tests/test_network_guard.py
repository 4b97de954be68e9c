"""The guard of conftest.py refuses what leaves the machine and lets loopback through."""

import socket
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest

OUTSIDE = "192.0.2.1"  # reserved for documentation (RFC 5737): nobody answers there


def connect_ex(host: str, port: int) -> None:
    with socket.socket() as stream:
        stream.connect_ex((host, port))


def send_datagram(host: str, port: int) -> None:
    with socket.socket(type=socket.SOCK_DGRAM) as datagrams:
        datagrams.sendto(b"", (host, port))


@pytest.mark.parametrize(
    "leave",
    [
        lambda: socket.create_connection((OUTSIDE, 80), timeout=1),
        lambda: connect_ex(OUTSIDE, 80),
        lambda: send_datagram(OUTSIDE, 53),
        lambda: socket.getaddrinfo("example.invalid", 443),
        lambda: urllib.request.urlopen(f"http://{OUTSIDE}/", timeout=1),
    ],
    ids=["connect", "connect_ex", "sendto", "getaddrinfo", "urlopen"],
)
def test_leaving_the_machine_is_refused_and_remembered(leave, network_guard):
    with pytest.raises(RuntimeError, match="without network"):
        leave()
    assert network_guard.attempts
    network_guard.attempts.clear()


def test_an_attempt_in_a_thread_is_remembered(network_guard):
    def leave() -> None:
        with pytest.raises(RuntimeError):
            socket.create_connection((OUTSIDE, 80), timeout=1)

    thread = Thread(target=leave)
    thread.start()
    thread.join()
    assert network_guard.attempts
    network_guard.attempts.clear()


def test_a_server_on_this_machine_is_reachable():
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(418)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = Thread(target=server.handle_request)
        thread.start()
        with pytest.raises(urllib.error.HTTPError, match="418") as caught:
            urllib.request.urlopen(f"http://localhost:{server.server_port}/", timeout=5)
        caught.value.close()
        thread.join()
