"""The watch page for real: its server, and the page in a headless browser."""

import contextlib
import http.client
import json
import socket
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from gemma_tuner.training.reporting.metrics import EvalRecord, JsonlLog, StepRecord
from gemma_tuner.watch.page import REFRESH_SECONDS
from tests.browser import Browser
from tests.runs import build_trainer

pytestmark = pytest.mark.slow

HOSTILE = (
    "<script>window.hacked=1</script><img src=x onerror='window.hacked=1'>${hacked=1}`\\u0060"
)


@contextmanager
def serve(*arguments):
    """The page of some runs, as a process of its own: its address and the process."""
    with subprocess.Popen(
        [sys.executable, "-m", "gemma_tuner.watch", *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            url = process.stdout.readline().strip()
            wait_until(lambda: answers(url))
            yield url, process
        finally:
            process.terminate()
            process.wait(20)


def answers(url):
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False


def wait_until(is_true, seconds=30):
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.1)


def write_step(log, step, **changes):
    values = {
        "step": step,
        "loss": 3.0 / step,
        "learning_rate": 1e-4,
        "grad_norm": 1.0,
        "tokens": 100 * step,
        "target_tokens": 10 * step,
        "tokens_per_second": 100.0,
        "target_tokens_per_second": 10.0,
        "data_wait_seconds": 0.0,
        "memory_bytes": 10**9,
        "skipped_steps": 0,
        "epoch": 0.5,
    }
    log.step(StepRecord(**(values | changes)))


def write_hostile_run(folder):
    """A run in which every text that can be is an attack."""
    with JsonlLog(folder / "log.jsonl") as log:
        config = {HOSTILE: HOSTILE, ":onclick": HOSTILE}
        log.event(0, "run", max_steps=9, config=config)
        log.event(1, "plan", parts={HOSTILE: 10**9}, peak_bytes=10**9, budget_bytes=2 * 10**9,
                  summary=HOSTILE)  # fmt: skip
        log.event(1, HOSTILE, message=HOSTILE)
        log.evaluation(EvalRecord(0, 3.0, 20.0, 5, 5))
        write_step(log, 1, counts={HOSTILE: 4})
        write_step(log, 2, counts={HOSTILE: 5})
    sample = dict.fromkeys(("key", "prompt", "reference", "prediction"), HOSTILE)
    sample |= {"step": 1, "media": [f"{HOSTILE}.png", "a.html"], "tokens": [[HOSTILE, 0.5]]}
    (folder / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    bad = dict.fromkeys(("key", "origin", "stage", "error", "reason"), HOSTILE)
    bad |= {"row": 1, "objects": []}
    (folder / "quarantine.jsonl").write_text(json.dumps(bad))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A real run on pictures, with its sample answers."""
    folder = tmp_path_factory.mktemp("finished")
    samples = {"every_steps": 2, "max_new_tokens": 4}
    build_trainer(folder, modality="image", samples=samples, max_steps=4).fit()
    return folder / "run"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


def open_page(browser, url):
    """Open a page and wait until it is drawn and live."""
    browser.open("about:blank")
    browser.wait_for("location.href === 'about:blank'")
    browser.requests.clear()
    browser.problems.clear()
    browser.open(url)
    browser.wait_for("document.querySelectorAll('canvas').length === 6")


def check_origins(browser, url):
    """Everything that the page has asked for came from its own server."""
    host = url.removeprefix("http://").partition("/")[0]
    own = (f"http://{host}/", f"ws://{host}/", "data:", "blob:")
    assert len(browser.requests) > 5
    assert [each for each in browser.requests if not each.startswith(own)] == []


# --- the server ------------------------------------------------------------------------------


def test_it_listens_on_loopback_alone_and_to_its_own_pages_alone(finished):
    with serve(finished) as (url, process):
        listening = [
            connection.laddr.ip
            for each in [psutil.Process(process.pid), *psutil.Process(process.pid).children()]
            for connection in each.net_connections()
            if connection.status == psutil.CONN_LISTEN or not connection.raddr
        ]
        assert listening == ["127.0.0.1"]

        home, _, token = url.partition("/?token=")
        port = home.rpartition(":")[2]
        assert httpx.get(f"http://localhost:{port}/?token={token}").status_code == 200
        policy = httpx.get(url).headers["content-security-policy"]
        assert policy.startswith("default-src 'self';")
        # A page elsewhere whose name has come to lead to 127.0.0.1.
        evil = (f"evil.example:{port}", "evil.example", "127.0.0.1.evil.example", "", "localhost")
        for host in (
            *evil,
            "127.0.0.1:1",
            f"127.0.0.1:{port}.evil.example",
            f"a@127.0.0.1:{port}",
        ):
            assert httpx.get(url, headers={"Host": host}).status_code == 403, host
        assert httpx.get(url, headers={"Host": f"[::1]:{port}"}).status_code == 200
        # A page elsewhere that asks for it by its own name.
        for origin in ("http://evil.example", "null", "http://127.0.0.1:1"):
            assert httpx.get(url, headers={"Origin": origin}).status_code == 403, origin
        address = f"ws://127.0.0.1:{port}/_nicegui_ws/socket.io/?EIO=4&transport=websocket"
        cookie = {"Cookie": f"gemma_tuner_{port}={token}"}
        with connect(address, origin=home, additional_headers=cookie):
            pass
        for headers in (
            *({"origin": "http://evil.example"}, {"origin": "null"}),
            {"origin": home, "additional_headers": {"Cookie": f"gemma_tuner_{port}=guess"}},
        ):
            with (
                pytest.raises(InvalidStatus),
                connect(address, **{"additional_headers": cookie, **headers}),
            ):
                pass

        for path in (
            *("/media/0/../log.jsonl", "/media/0/..%2flog.jsonl", "/media/0/%2e%2e/log.jsonl"),
            *(
                "/media/0/..%2f..%2f..%2fetc%2fpasswd",
                "/media/0//etc/passwd",
                "/media/1/001-1.png",
            ),
            *("/media/-1/001-1.png", "/media/0/%00.png", "/media/0/001-1.png/..", "/log.jsonl"),
            *("/samples.jsonl", "/..%2flog.jsonl", "/docs", "/openapi.json"),
        ):
            # As it stands: httpx would resolve the dots.
            request = httpx.Request("GET", httpx.URL(url).copy_with(raw_path=path.encode()))
            with httpx.Client() as client:
                assert client.send(request).status_code == 403, path
                request.headers.update(cookie)
                found = client.send(request)
            assert found.status_code == 404, path
            assert b'"kind"' not in found.content, path
        picture = httpx.get(f"{home}/media/0/001-1.png", headers=cookie)
        assert picture.content == (finished / "samples" / "001-1.png").read_bytes()
        assert picture.headers["content-type"] == "image/png"
        assert picture.headers["x-content-type-options"] == "nosniff"

        taken = subprocess.run(
            [sys.executable, "-m", "gemma_tuner.watch", str(finished), "--port", port],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert taken.returncode == 1
        assert f"port {port} cannot be used" in taken.stderr


def test_it_ends_with_the_process_that_trains(browser, tmp_path):
    script = textwrap.dedent(
        """
        import sys
        from gemma_tuner.training.reporting.page import open_page
        print(open_page(sys.argv[1]), flush=True)
        input()
        """
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        url = parent.stdout.readline().strip()
        wait_until(lambda: answers(url))
        open_page(browser, url)
        assert "Nothing is logged yet" in browser.evaluate("document.body.innerText")
        parent.kill()
    browser.wait_for("document.body.innerText.includes('The process that trained has ended')")
    wait_until(lambda: not answers(url), seconds=20)


def test_only_who_has_the_token_reads_a_run(finished):
    # Others with an account on this machine reach the port as well.
    with serve(finished) as (url, process):
        home, _, token = url.partition("/?token=")
        assert len(token) > 40
        assert not any(token in argument for argument in psutil.Process(process.pid).cmdline())
        for path in ("/", "/?token=", "/?token=guess", "/media/0/001-1.png", "/_nicegui/x", "/x"):
            found = httpx.get(home + path)
            assert found.status_code == 403, path
            assert "token" in found.text
            assert "set-cookie" not in found.headers
        with httpx.Client() as client:
            cookie = client.get(url).headers["set-cookie"]
            assert "HttpOnly" in cookie
            assert "SameSite=Strict" in cookie
            assert client.get(f"{home}/media/0/001-1.png").status_code == 200


def test_many_readers_get_their_pages_beside_those_who_only_hold_the_line(finished):
    picture = (finished / "samples" / "001-1.png").read_bytes()
    with serve(finished) as (url, server), ExitStack() as lines:
        home, _, token = url.partition("/?token=")
        port = int(home.rpartition(":")[2])
        process = psutil.Process(server.pid)
        held_bytes = process.memory_info().rss
        silent = [
            lines.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(100)
        ]
        for i, line in enumerate(silent):
            line.settimeout(60)
            line.sendall((b"", b"GET / HTT", b"GET / HTTP/1.1\r\nHost: x\r\nA: ")[i % 3])
        endless = lines.enter_context(socket.create_connection(("127.0.0.1", port)))
        with contextlib.suppress(ConnectionError):  # it is refused, as no head is so long
            endless.sendall(b"x" * 2**26)

        def read(number):
            cookie = {"Cookie": f"gemma_tuner_{port}={token}"}
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            for path in ("/", "/media/0/001-1.png"):
                connection.request("GET", path, headers=cookie if number % 5 else {})
                found = connection.getresponse()
                content = found.read()
                assert found.status == (200 if number % 5 else 403)
                if number % 5:
                    assert (b"step 4 of 4" in content) if path == "/" else content == picture
            connection.close()
            return True

        began = time.monotonic()
        with ThreadPoolExecutor(50) as readers:
            assert all(readers.map(read, range(200)))
        assert time.monotonic() - began < 60
        assert process.num_threads() < 64
        assert process.memory_info().rss - held_bytes < 200e6
        # Whoever says nothing loses the line.
        assert [line.recv(1000) for line in silent] == [b""] * 100
        assert answers(url)


def test_a_run_opens_its_page(tmp_path, caplog):
    build_trainer(tmp_path, max_steps=2, watch=True).fit()
    (message,) = [message for message in caplog.messages if "watch this run at" in message]
    url = message.rpartition(" ")[2]
    token = url.partition("/?token=")[2]
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert token
    assert not any(token.encode() in each for each in written)
    pages = [
        child
        for child in psutil.Process().children()
        if "gemma_tuner.watch" in " ".join(child.cmdline())
    ]
    assert len(pages) == 1
    assert not any(token in argument for argument in pages[0].cmdline())
    try:
        wait_until(lambda: answers(url))
    finally:
        pages[0].terminate()
        pages[0].wait(20)


# --- the page in a browser -------------------------------------------------------------------


def test_a_live_run_is_followed(browser, tmp_path):
    with JsonlLog(tmp_path / "log.jsonl") as log:
        log.event(0, "run", max_steps=1000, config={})
        write_step(log, 1)
        with serve(tmp_path) as (url, _):
            open_page(browser, url)
            browser.wait_for("document.body.innerText.includes('step 1 of 1,000')")
            assert "no held-out loss yet" in browser.evaluate("document.body.innerText")
            for step in range(2, 9):
                write_step(log, step)
            log.evaluation(EvalRecord(8, 1.25, 3.49, 100, 10))
            log.event(8, "swap", message="the machine swaps")
            browser.wait_for("document.body.innerText.includes('step 8 of 1,000')")
            shown = browser.evaluate("document.body.innerText")
            for words in ("training", "0.3750", "1.2500", "1 warning", "the machine swaps"):
                assert words in shown, words
            drawn = browser.evaluate(
                "getElement(+document.querySelector('.chart').id.slice(1)).chart.getOption()"
                ".series.map(s => [s.name, s.data.length])"
            )
            assert drawn == [["train", 8], ["held-out", 1]]
            # Nobody sees it: what comes now is drawn when somebody looks again.
            hide = "Object.defineProperty(document, 'hidden', {value: %s, configurable: true}); "
            hide += "document.dispatchEvent(new Event('visibilitychange'))"
            browser.evaluate(hide % "true")
            time.sleep(1)
            write_step(log, 9)
            time.sleep(2 * REFRESH_SECONDS)
            assert "step 8 of 1,000" in browser.evaluate("document.body.innerText")
            browser.evaluate(hide % "false")
            browser.wait_for("document.body.innerText.includes('step 9 of 1,000')", seconds=2)
            log.event(9, "finished")
            browser.wait_for("document.querySelector('.phase').innerText === 'finished'")
            assert browser.problems == []


def test_a_finished_run_with_its_pictures(browser, finished):
    with serve(finished) as (url, _):
        open_page(browser, url)
        browser.wait_for("document.querySelector('.phase').innerText === 'finished'")
        browser.wait_for("document.querySelector('.sample-image').naturalWidth > 0")
        lines = (finished / "samples.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        last = records[-1]
        assert (
            browser.evaluate("document.querySelector('.sample-reference').innerText")
            == (last["reference"])
        )
        titles = browser.evaluate("[...document.querySelectorAll('.token')].map(t => t.title)")
        assert titles == [f"{probability:.1%}" for _, probability in last["tokens"]]
        assert "after step 4 (newest)" in browser.evaluate("document.body.innerText")
        check_origins(browser, url)
        assert browser.problems == []
        # Back to the beginning.
        browser.evaluate(
            "getElement(+document.querySelector('.steps').id.slice(1)).$emit"
            "('update:model-value', 0)"
        )
        browser.wait_for("document.body.innerText.includes('after step 0')")
        first = browser.evaluate("[...document.querySelectorAll('.token')].map(t => t.title)")
        assert first == [f"{probability:.1%}" for _, probability in records[0]["tokens"]]


def test_runs_are_compared(browser, finished, tmp_path):
    with JsonlLog(tmp_path / "log.jsonl") as log:
        log.event(0, "run", max_steps=4, config={"learning_rate": 0.5, "batch_size": 2})
        for step in range(1, 5):
            write_step(log, step)
    with serve(finished, tmp_path) as (url, _):
        open_page(browser, url)
        browser.wait_for("document.body.innerText.includes('Settings that differ')")
        rows = browser.evaluate(
            "[...document.querySelectorAll('tr')].map(r => [...r.cells].map(c => c.innerText))"
        )
        assert ["learning_rate", "0.01", "0.5"] in rows
        assert not any(row[0] == "batch_size" for row in rows)
        drawn = browser.evaluate(
            "getElement(+document.querySelector('.chart').id.slice(1)).chart.getOption()"
            ".series.map(s => s.name)"
        )
        assert drawn == ["run: train", "run: held-out", f"{tmp_path.name}: train"]
        check_origins(browser, url)
        assert browser.problems == []


def test_hostile_text_stays_text(browser, tmp_path):
    names = [tmp_path / "<script>window.hacked=1", tmp_path / "b${window.hacked=1}`<img src=x>"]
    for folder in names:
        folder.mkdir()
        write_hostile_run(folder)
    for folders in ([names[0]], names):
        with serve(*folders) as (url, _):
            open_page(browser, url)
            browser.wait_for("document.querySelectorAll('.token').length === 1")
            for selector in (
                *(".sample-key", ".sample-prompt", ".sample-prediction", ".sample-reference"),
                *(".token", ".event-message", ".setting .quiet", ".plan-legend .run-cell > div"),
            ):
                texts = browser.evaluate(
                    f"[...document.querySelectorAll({selector!r})].map(e => e.textContent)"
                )
                assert HOSTILE in texts, (selector, texts)
            # Tooltips are HTML that ECharts makes.
            box = browser.evaluate(
                "(() => { const r = document.querySelector('.wide canvas')"
                ".getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2] })()"
            )
            browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=box[0], y=box[1])
            browser.evaluate(
                "document.querySelectorAll('.chart').forEach(e => "
                "getElement(+e.id.slice(1)).chart.dispatchAction("
                "{type: 'showTip', seriesIndex: 0, dataIndex: 0}))"
            )
            time.sleep(1)
            assert browser.evaluate("window.hacked") is None
            assert browser.evaluate("document.querySelectorAll('.page script').length") == 0
            assert browser.evaluate("document.querySelectorAll('.page img').length") == len(
                [f"{HOSTILE}.png"]
            )
            check_origins(browser, url)
            failed = [each for each in browser.problems if "404" not in each]
            assert failed == []


def test_a_long_run_opens_quickly(browser, tmp_path):
    with JsonlLog(tmp_path / "log.jsonl") as log:
        write_step(log, 1)
    line = Path(tmp_path / "log.jsonl").read_text()
    with (tmp_path / "log.jsonl").open("a") as file:
        for step in range(2, 100_001):
            file.write(line.replace('"step": 1,', f'"step": {step},'))
    began = time.monotonic()
    with serve(tmp_path) as (url, _):
        open_page(browser, url)
        browser.wait_for("document.body.innerText.includes('step 100,000')")
    assert time.monotonic() - began < 60  # 5 s on an idle machine
    received = browser.evaluate("performance.getEntriesByType('navigation')[0].decodedBodySize")
    assert received < 1_000_000
