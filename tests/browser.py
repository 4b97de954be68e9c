"""A headless Chromium, driven over its DevTools protocol."""

import base64
import json
import shutil
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from websockets.sync.client import connect

NAMES = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
)


def find_chromium():
    """Its executable; skips the test where there is none."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip("THE PAGE IS NOT TESTED IN A BROWSER: there is no chromium on this machine")
    return found


class Browser:
    """One window of a headless Chromium with a profile of its own; use as a context manager.

    ``requests`` lists every address that the page has asked for, ``problems`` what its console
    has complained of.
    """

    def __init__(self, profile, *, size=(1440, 900)):
        self.requests = []
        self.problems = []
        self._next_id = 0
        self._stack = ExitStack()
        self._process = subprocess.Popen(
            [
                find_chromium(),
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-background-networking",
                "--disable-component-update",
                "--no-first-run",
                "--mute-audio",
                "--remote-debugging-port=0",
                f"--user-data-dir={profile}",
                f"--window-size={size[0]},{size[1]}",
                "about:blank",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            port = self._read_port(Path(profile) / "DevToolsActivePort")
            pages = httpx.get(f"http://127.0.0.1:{port}/json").json()
            url = next(page["webSocketDebuggerUrl"] for page in pages if page["type"] == "page")
            self._socket = self._stack.enter_context(
                connect(url, max_size=None, ping_interval=None)
            )
            for domain in ("Page", "Network", "Runtime", "Log"):
                self.call(f"{domain}.enable")
        except BaseException:
            self._process.kill()
            self._process.wait()
            raise

    def _read_port(self, path):
        for _ in range(300):
            if path.exists() and (lines := path.read_text().split()):
                return lines[0]
            time.sleep(0.1)
        raise TimeoutError("chromium did not start within 30 s")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._stack.close()
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    @property
    def pid(self):
        """The browser's process, whose children draw the page."""
        return self._process.pid

    def call(self, method, **parameters):
        """Call a method of the protocol and return its result."""
        self._next_id += 1
        self._socket.send(
            json.dumps({"id": self._next_id, "method": method, "params": parameters})
        )
        while True:
            message = json.loads(self._socket.recv(timeout=60))
            self._note(message)
            if message.get("id") == self._next_id:
                assert "error" not in message, f"{method}: {message['error']}"
                return message["result"]

    def _note(self, message):
        match message.get("method"):
            case "Network.requestWillBeSent":
                self.requests.append(message["params"]["request"]["url"])
            case "Network.webSocketCreated":
                self.requests.append(message["params"]["url"])
            case "Runtime.exceptionThrown":
                self.problems.append(str(message["params"]["exceptionDetails"]))
            case "Log.entryAdded" if message["params"]["entry"]["level"] == "error":
                self.problems.append(str(message["params"]["entry"]))
            case "Page.javascriptDialogOpening":
                self.problems.append(f"a dialog: {message['params']}")

    def open(self, url):
        """Go to an address."""
        self.call("Page.navigate", url=url)

    def evaluate(self, script):
        """The value of an expression in the page."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait_for(self, script, seconds=30):
        """Wait until an expression is true; until then it may also fail."""
        deadline = time.monotonic() + seconds
        while not self.evaluate(f"(() => {{ try {{ return {script} }} catch {{}} }})()"):
            assert time.monotonic() < deadline, (
                f"{script} was not true within {seconds} s; the page:\n"
                f"{self.evaluate('document.body.innerText')}\n{self.problems}"
            )
            time.sleep(0.1)

    def prefer(self, scheme):
        """Ask for "light" or "dark", as the system does."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.call("Emulation.setEmulatedMedia", features=[feature])

    def screenshot(self, path, *, full=True):
        """Write what is shown, or the whole page, as a PNG."""
        found = self.call("Page.captureScreenshot", captureBeyondViewport=full, format="png")
        Path(path).write_bytes(base64.b64decode(found["data"]))
