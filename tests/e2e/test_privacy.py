"""What users keep to themselves stays where it belongs, whatever goes wrong.

A canary stands in rows, in objects, in what looks like the signature of a URL, and in a token.
After runs with every kind of error it may be in the manifest (rows), in the parts of a table that
is being read (rows) and in the media cache (objects), and nowhere else.
"""

import base64
import datetime
import io
import json
import logging
import stat
import tarfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import google.auth.credentials
import google.auth.exceptions
import PIL.Image
import PIL.PngImagePlugin
import pyarrow
import pyarrow.parquet
import pytest
from google.api_core.client_options import ClientOptions
from google.cloud import bigquery, storage

from gemma_tuner.collators.image import ImageCollator
from gemma_tuner.errors import ConfigError, GemmaTunerError
from gemma_tuner.models.lora import LoraConfig, add_lora
from gemma_tuner.storage.config import FetchConfig
from gemma_tuner.storage.objects import AccessDeniedError
from gemma_tuner.streaming.mixing import mix
from gemma_tuner.streaming.opening import stream_bigquery, stream_gcs, stream_local
from gemma_tuner.streaming.stream import ExampleStream
from gemma_tuner.testing import tiny_model
from gemma_tuner.testing.cloud.bigquery.server import BigQueryFault, BigQueryServer
from gemma_tuner.testing.cloud.gcs.faults import (
    Effect,
    Fault,
    FlipBit,
    Overwrite,
    Refuse,
    Reset,
    Stall,
    Truncate,
)
from gemma_tuner.testing.cloud.gcs.server import GcsServer
from gemma_tuner.training.config import TrainConfig
from gemma_tuner.training.trainer import Trainer
from gemma_tuner.watch.run import open_runs

ROW, OBJECT, SIGNATURE, TOKEN = (f"CANARY-{kind}-7b1e" for kind in ("row", "obj", "sig", "tok"))
CANARY = "CANARY"
SIGNED = f"?X-Goog-Algorithm=GOOG4&X-Goog-Signature={SIGNATURE}"
NUM_GOOD = 12


class Credentials(google.auth.credentials.Credentials):
    """A token that is valid, or one that cannot be renewed."""

    def __init__(self, *, is_valid: bool = True) -> None:
        super().__init__()
        self.token = TOKEN
        now = datetime.datetime.now(datetime.UTC).replace(tzinfo=None)
        self.expiry = now + datetime.timedelta(hours=1 if is_valid else -1)

    def refresh(self, request: object) -> None:
        raise google.auth.exceptions.RefreshError(f"invalid_grant: {TOKEN}", {"token": TOKEN})


class Ears:
    """Hears all that a program says, or could print."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self._caplog = caplog
        self._heard: list[str] = []
        self.errors: list[BaseException] = []

    def note(self, what: object) -> None:
        self._heard.append(what if isinstance(what, str) else f"{what!r} {what}")

    def attempt(self, call: Callable[[], Any]) -> Any:
        """Call, and note the result; or the error with all that is printed with it."""
        try:
            result = call()
        except (GemmaTunerError, RuntimeError, ValueError, OSError) as error:
            self.errors.append(error)
            self.note("".join(traceback.format_exception(error)))
            link: BaseException | None = error
            while link is not None:
                self.note(f"{link!r} {link.args!r} {getattr(link, '__notes__', '')}")
                link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
            return None
        self.note(repr(result))
        return result

    def listen_to(self, stream: ExampleStream | None) -> None:
        """Read two epochs as far as they go, and note all that a stream says of itself."""
        if stream is None:
            return
        for _ in range(2):
            self.attempt(lambda: len(list(stream)))
            self.note(json.dumps(stream.state_dict()))
        self.attempt(stream.retry_quarantine)
        self.attempt(lambda: stream[0] and None)
        self.note(stream)
        self.note(stream.report())
        for record in stream.inspect_quarantine():
            self.note(record)

    @property
    def heard(self) -> str:
        formatter = logging.Formatter("%(name)s %(message)s %(args)s")
        logs = [formatter.format(record) for record in self._caplog.records]
        return "\n".join([*self._heard, *logs])


@pytest.fixture(name="ears")
def _ears(caplog: pytest.LogCaptureFixture) -> Iterator[Ears]:
    caplog.set_level(logging.DEBUG, "gemma_tuner")
    logging.getLogger("gemma_tuner").setLevel(logging.DEBUG)
    ears = Ears(caplog)
    yield ears
    assert CANARY not in ears.heard, show(ears.heard)


def show(heard: str) -> str:
    places = [line.strip()[:400] for line in heard.splitlines() if CANARY in line]
    return "\n".join(dict.fromkeys(places))


@pytest.fixture(name="gcs")
def _gcs() -> Iterator[GcsServer]:
    with GcsServer(seed=1) as server:
        yield server


@pytest.fixture(name="tables")
def _tables() -> Iterator[BigQueryServer]:
    with BigQueryServer(rows_per_message=5) as server:
        yield server


def open_gcs_client(server: GcsServer, *, is_valid: bool = True) -> storage.Client:
    return storage.Client(
        project="project",
        credentials=Credentials(is_valid=is_valid),
        client_options={"api_endpoint": server.endpoint},
    )


def open_tables_client(server: BigQueryServer, *, is_valid: bool = True) -> bigquery.Client:
    return bigquery.Client(
        project="project",
        credentials=Credentials(is_valid=is_valid),
        client_options=ClientOptions(api_endpoint=server.endpoint),
    )


def options(folder: Path, **fetch: Any) -> dict[str, Any]:
    fetch = {"attempt_timeout_seconds": 0.2, "total_timeout_seconds": 0.6, **fetch}
    config = FetchConfig(min_free_disk_bytes=0, window_examples=8, **fetch)
    return {"cache_dir": folder / "cache", "max_bad_fraction": 0.95, "fetch": config}


def draw_picture(number: int) -> bytes:
    """A picture that says the canary in its metadata."""
    file, words = io.BytesIO(), PIL.PngImagePlugin.PngInfo()
    words.add_text("Comment", OBJECT)
    PIL.Image.new("RGB", (9, 9), (number, 0, 0)).save(file, "PNG", pnginfo=words)
    return file.getvalue()


def make_row(number: object, **columns: Any) -> dict[str, Any]:
    return {"id": f"k{number}", "prompt": f"Q {ROW}", "response": f"A {ROW}", **columns}


def join(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def check_files(folder: Path, *, has_rows: bool = True, has_objects: bool = False) -> None:
    """The canaries of rows and objects are where they belong; and everything is the user's own."""
    places = Counter()
    for path in sorted((folder / "cache").rglob("*")):
        try:
            found = path.stat().st_mode
            content = path.read_bytes() if stat.S_ISREG(found) else None
        except FileNotFoundError:  # it was listed half-written, and has been renamed since
            continue
        mode = stat.S_IMODE(found)
        assert mode == (0o700 if content is None else 0o600), f"{path}: {mode:o}"
        if content is None:
            continue
        room = path.relative_to(folder / "cache").parts[0]
        assert TOKEN.encode() not in content, path
        assert SIGNATURE.encode() not in content, path
        if ROW.encode() in content:
            assert (room, path.suffix) in (("manifests", ".arrow"), ("parts", ".arrow")), path
            places["row"] += 1
        if OBJECT.encode() in content:
            assert room == "media", path
            places["object"] += 1
    assert bool(places["row"]) == has_rows
    assert bool(places["object"]) == has_objects


# --- rows ------------------------------------------------------------------------------------

BAD_VALUES: dict[str, dict[str, Any]] = {
    "empty answer": {"response": ""},
    "answer of another type": {"response": {"secret": ROW}},
    "prompt of another type": {"prompt": [ROW, 7]},
    "half a character": {"prompt": f"{ROW} \ud800"},
    "missing picture": {"image": "missing.png"},
    "signed path": {"image": f"picture.png{SIGNED}"},
    "signed https": {"image": f"https://storage.googleapis.com/b/picture.png{SIGNED}"},
    "signed gs": {"image": f"gs://media/picture.png{SIGNED}"},
    "signed gs without a name": {"image": f"gs://media/{SIGNED}"},
    "signed gs of a bad bucket": {"image": f"gs://{ROW}/picture.png{SIGNED}"},
    "data URI": {"image": f"data:image/png;base64,{ROW}"},
    "picture of another type": {"image": {"secret": ROW}},
    "list of pictures": {"image": ["picture.png", {"secret": ROW}]},
    "text as a picture": {"image": f"A text, {ROW} in it."},
    "text as a stored picture": {"image": f"gs://media/A text, {ROW} in it."},
    "base64 as a picture": {"image": f"{ROW}{'QUJD' * 200}"},
    "base64 in an object": {"image": {"data": f"{ROW}!"}},
    "URI of a scheme": {"image": f"{ROW}://picture.png"},
}
BAD_MESSAGES: dict[str, Any] = {
    "no list": ROW,
    "unknown role": [{"role": "stranger", "content": "x"}, {"role": "assistant", "content": "y"}],
    "no answer": [{"role": "user", "content": ROW}],
    "no content": [{"role": "user", "said": ROW}, {"role": "assistant", "content": ROW}],
    "unknown part": [
        {"role": "user", "content": [{"type": "unheard", "text": ROW}]},
        {"role": "assistant", "content": ROW},
    ],
    "signed part": [
        {"role": "user", "content": [{"type": "image", "url": f"https://x/a.png{SIGNED}"}]},
        {"role": "assistant", "content": ROW},
    ],
    "number": [{"role": "user", "content": 7}, {"role": "assistant", "content": [ROW]}],
    "role of the data": [{"role": ROW, "content": ROW}, {"role": "assistant", "content": ROW}],
    "part of the data": [
        {"role": "user", "content": [{"type": ROW, ROW: ROW}]},
        {"role": "assistant", "content": ROW},
    ],
    "call of the data": [
        {"role": "user", "content": ROW},
        {
            "role": "assistant",
            "tool_calls": [{"function": {"name": ROW, "arguments": f"{{{ROW}"}}],
        },
    ],
}


def test_bad_rows_say_what_is_wrong_and_nothing_of_what_they_hold(ears, gcs, tmp_path):
    gcs.create_bucket("media")
    (tmp_path / "picture.png").write_bytes(draw_picture(1))
    (tmp_path / "broken.png").write_bytes(draw_picture(1)[:60] + OBJECT.encode())
    rows = [make_row(n, image="picture.png") for n in range(NUM_GOOD)]
    rows += [make_row(name, **values) for name, values in BAD_VALUES.items()]
    rows += [make_row("broken", image="broken.png")]
    (tmp_path / "rows.jsonl").write_bytes(join(rows))
    client = open_gcs_client(gcs)
    stream = stream_local(tmp_path / "rows.jsonl", gcs_client=client, **options(tmp_path))
    ears.listen_to(stream)
    assert stream.report().bad_rows == len(BAD_VALUES)
    assert stream.report().handed_out == 2 * NUM_GOOD

    talks = [{"id": f"m{n}", "messages": value} for n, value in enumerate(BAD_MESSAGES.values())]
    good = [{"role": "user", "content": ROW}, {"role": "assistant", "content": ROW}]
    talks += [{"id": "good", "messages": good}]
    (tmp_path / "talks.jsonl").write_bytes(join(talks))
    stream = stream_local(tmp_path / "talks.jsonl", **options(tmp_path))
    ears.listen_to(stream)
    assert stream.report().bad_rows >= len(BAD_MESSAGES) - 1
    check_files(tmp_path)


@pytest.mark.parametrize("max_bad_fraction", [0.0, 0.9])
def test_files_that_cannot_be_read_say_nothing_of_what_they_hold(ears, tmp_path, max_bad_fraction):
    header = f"id,prompt,response\n1,{ROW},{ROW}\n".encode()
    parquet = io.BytesIO()
    pyarrow.parquet.write_table(
        pyarrow.table({"prompt": [ROW] * 99, "response": [ROW] * 99}),
        parquet,
        compression="NONE",
        use_dictionary=False,
    )
    whole = parquet.getvalue()
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        for name, content in (("a.png", draw_picture(1)), ("a.json", f"{{{ROW}".encode())):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    for name, content in {
        "cut.jsonl": join([make_row(1)]) + f'{{"prompt": "{ROW}", "response"'.encode(),
        "list.jsonl": join([make_row(1)]) + f'["{ROW}"]\n'.encode(),
        "latin.jsonl": join([make_row(1)]) + f'{{"prompt": "{ROW} \xe9"}}\n'.encode("latin-1"),
        "deep.jsonl": b'{"prompt": ' + b"[" * 100_000 + f'"{ROW}"'.encode(),
        "double.jsonl": join([make_row(1), make_row(1)]),
        "other.jsonl": join([{"x": ROW, "y": ROW}]),
        "late.jsonl": join([make_row(1), {**make_row(2), "image": ROW, "messages": ROW}]),
        "long.csv": header + f"2,{ROW},{ROW},{ROW},{ROW}\n".encode(),
        "short.csv": header + f"2,{ROW}\n".encode(),
        "quote.csv": header + f'2,"{ROW},{ROW}\n'.encode(),
        "latin.csv": header + f"2,{ROW} \xe9,{ROW}\n".encode("latin-1"),
        "nul.csv": header + f"2,{ROW}\0,{ROW}\n".encode(),
        "cut.parquet": whole[: len(whole) // 2],
        "flip.parquet": whole[:200] + b"\xff" * 300 + whole[500:],
        "none.parquet": ROW.encode() * 9,
        "cut.tar": tar.getvalue()[:700],
        "json.tar": tar.getvalue(),
        "none.json": f"[{ROW}".encode(),
        "headless.csv": f"LJ1|{ROW}, of it|{ROW}\nLJ2|{ROW}, of it|{ROW}\n".encode(),
        "sentences.csv": f"{ROW} is what it says,9\n{ROW} is another,7\n".encode(),
        "keys.jsonl": join([{f"{ROW}, a text": ROW}]),
    }.items():
        (tmp_path / name).write_bytes(content)
        how = {**options(tmp_path), "max_bad_fraction": max_bad_fraction}
        ears.listen_to(
            ears.attempt(lambda name=name, how=how: stream_local(tmp_path / name, **how))
        )
    ears.attempt(lambda: stream_local(f"https://host/rows.jsonl{SIGNED}", **options(tmp_path)))
    ears.attempt(lambda: stream_gcs(f"https://host/rows.jsonl{SIGNED}", **options(tmp_path)))
    assert len(ears.errors) > 10
    check_files(tmp_path)


# --- objects ---------------------------------------------------------------------------------

EFFECTS: dict[str, Effect] = {
    "503": Refuse(503),
    "429": Refuse(429, retry_after_seconds=60),
    "400": Refuse(400),
    "401": Refuse(401),
    "403": Refuse(403),
    "404": Refuse(404),
    "stall": Stall(2.0),
    "stall in the middle": Stall(2.0, after_bytes=30),
    "truncate": Truncate(),
    "flip": FlipBit(),
    "reset": Reset(),
    "reset in the middle": Reset(after_bytes=30),
    "overwrite": Overwrite(b"other " + OBJECT.encode()),
}


def fill_bucket(gcs: GcsServer) -> None:
    for number in range(NUM_GOOD):
        gcs.put("media", f"{number}.png", draw_picture(number))
    gcs.put("media", "broken.png", draw_picture(1)[:60] + OBJECT.encode())
    zipped = b"\x1f\x8b\x08 damaged " + OBJECT.encode()
    gcs.put("media", "zipped.png", zipped, content_encoding="gzip")
    names = [*map(str, range(NUM_GOOD)), "broken", "zipped", "missing"]
    rows = [make_row(name, image=f"gs://media/{name}.png") for name in names]
    rows += [make_row("signed", image=f"gs://media/0.png{SIGNED}")]
    gcs.put("rows", "data.jsonl", join(rows))


def open_bucket(gcs: GcsServer, folder: Path, **more: Any) -> ExampleStream:
    client = open_gcs_client(gcs)
    return stream_gcs("gs://rows/data.jsonl", gcs_client=client, **{**options(folder), **more})


@pytest.mark.slow
@pytest.mark.parametrize("name", EFFECTS)
def test_objects_that_cannot_be_read_say_nothing_of_what_they_hold(ears, gcs, tmp_path, name):
    fill_bucket(gcs)
    stream = open_bucket(gcs, tmp_path)
    # One object always; and later all of them.
    gcs.add_fault(Fault(EFFECTS[name], name="3.png"))
    ears.listen_to(stream)
    gcs.clear_faults()
    gcs.add_fault(Fault(EFFECTS[name]))
    ears.listen_to(open_bucket(gcs, tmp_path, **options(tmp_path, cache_bytes=0)))
    for operation in ("read", "stat", "list"):
        if isinstance(EFFECTS[name], Refuse) and EFFECTS[name].status < 429:
            gcs.clear_faults()
            gcs.add_fault(Fault(EFFECTS[name], operation=operation))
            ears.attempt(lambda: open_bucket(gcs, tmp_path / "other"))
            ears.attempt(lambda: stream_gcs("gs://rows/", gcs_client=open_gcs_client(gcs)))
    assert gcs.requests
    assert len(ears.errors) > 0
    check_files(tmp_path, has_objects=True)


def test_signed_uris_and_tokens_are_not_repeated(ears, gcs, tmp_path):
    fill_bucket(gcs)
    how = options(tmp_path)
    client = open_gcs_client(gcs)
    for uri in (
        f"gs://rows/none.jsonl{SIGNED}",
        f"gs://none/rows.jsonl{SIGNED}",
        f"gs://rows/data.jsonl{SIGNED}",
        f"gs://rows/{SIGNED}/",
        f"gs://rows{SIGNED}",
    ):
        assert ears.attempt(lambda uri=uri: stream_gcs(uri, gcs_client=client, **how)) is None
    gcs.forbid("rows")
    uri = f"gs://rows/data.jsonl{SIGNED}"
    assert ears.attempt(lambda: stream_gcs(uri, gcs_client=client, **how)) is None
    gcs.allow("rows")
    expired = open_gcs_client(gcs, is_valid=False)
    ears.attempt(lambda: stream_gcs("gs://rows/data.jsonl", gcs_client=expired, **how))
    assert isinstance(ears.errors[-1], AccessDeniedError)
    open_bucket(gcs, tmp_path)
    stream = stream_gcs("gs://rows/data.jsonl", gcs_client=expired, **how)
    ears.listen_to(stream)
    assert isinstance(ears.errors[-1], AccessDeniedError)
    one, (_, other) = stream.split(0.5)[0], open_bucket(gcs, tmp_path).split(0.5)
    ears.listen_to(mix({one: 1, other: 1}))
    check_files(tmp_path, has_objects=True)


# --- tables ----------------------------------------------------------------------------------

TABLE = "project.dataset.table"
SELECT = f"SELECT * FROM `{TABLE}`"


def fill_table(tables: BigQueryServer) -> None:
    file = io.BytesIO()
    PIL.Image.new("RGB", (9, 9)).save(file, "PNG")
    picture = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    rows = [make_row(n, image=picture, unused=ROW) for n in range(NUM_GOOD)]
    rows += [make_row("https", image=f"https://host/a.png{SIGNED}", unused=ROW)]
    rows += [make_row("gs", image=f"gs://{SIGNED}", unused=ROW)]
    rows += [make_row("empty", image=None, unused=ROW) | {"response": ""}]
    tables.put_table(TABLE, pyarrow.Table.from_pylist(rows))


def open_table(
    tables: BigQueryServer, folder: Path, *, is_valid: bool = True, **more: Any
) -> ExampleStream:
    client = open_tables_client(tables, is_valid=is_valid)
    table = None if "query" in more else TABLE
    return stream_bigquery(
        table,
        bigquery_client=client,
        bigquery_read_client=tables.read_client(),
        **{**options(folder), **more},
    )


def test_tables_that_cannot_be_read_say_nothing_of_what_they_hold(ears, tables, tmp_path):
    pytest.importorskip("duckdb", reason="NOT TESTED: SQL needs the package duckdb")
    fill_table(tables)
    faults: list[tuple[str, Any, dict[str, Any]]] = [
        ("ReadRows", "PERMISSION_DENIED", {"after_rows": 5}),
        ("ReadRows", "INTERNAL", {}),
        ("ReadRows", "RESOURCE_EXHAUSTED", {}),
        ("CreateReadSession", "PERMISSION_DENIED", {}),
        ("tables.get", "PERMISSION_DENIED", {}),
        ("jobs.getQueryResults", "PERMISSION_DENIED", {}),
    ]
    for number, (method, code, how) in enumerate(faults):
        message = f"Bad value: {ROW} at {SIGNED} with {TOKEN}"
        nth = None if code == "PERMISSION_DENIED" else 1
        folder = tmp_path / str(number)
        with BigQueryServer(rows_per_message=5) as server:
            fill_table(server)
            server.add_fault(BigQueryFault(method, code, nth=nth, message=message, **how))
            for more in ({}, {"query": SELECT, "max_bytes_billed": False}):
                ears.listen_to(
                    ears.attempt(lambda s=server, f=folder, m=more: open_table(s, f, **m))
                )
        if (folder / "cache").exists():
            check_files(folder, has_rows=any((folder / "cache").rglob("*.arrow")))
    assert len(ears.errors) >= 5

    for wrong in (
        {"query": f"SELECT CAST('{ROW}' AS INT64) AS prompt", "max_bytes_billed": False},
        {"query": f"SELECT ERROR('{ROW}') AS text", "max_bytes_billed": False},
        {"prompt": "id", "response": "nothing"},
        {"is_valid": False},
    ):
        ears.attempt(lambda w=wrong: open_table(tables, tmp_path / "wrong", **w))
    ears.listen_to(open_table(tables, tmp_path))
    check_files(tmp_path)


# --- access and cost -------------------------------------------------------------------------


def test_a_run_says_nothing_of_what_its_rows_hold(ears, tmp_path, capfd):
    """Rows that the collator refuses, within the budget and beyond, held out and trained on."""
    bad = {
        "too long": {"prompt": ROW * 200},
        "control token": {"prompt": f"<|turn>{ROW}"},
        "media token": {"response": f"<|image>{ROW}"},
        "broken picture": {"image": "broken.png"},
    }
    (tmp_path / "broken.png").write_bytes(draw_picture(1)[:60] + OBJECT.encode())
    (tmp_path / "picture.png").write_bytes(draw_picture(1))
    rows = [make_row(name, **{"image": "picture.png", **values}) for name, values in bad.items()]
    rows += [make_row(n, image="picture.png") for n in range(NUM_GOOD)]
    (tmp_path / "rows.jsonl").write_bytes(join(rows))
    model, processor = tiny_model("gemma4-e2b")
    model = add_lora(model, LoraConfig(rank=1))
    collator = ImageCollator(processor, image_tokens=70, max_tokens=200)
    for name, max_bad_fraction in (("run", 0.5), ("failed", 0.0)):
        given = {**options(tmp_path), "max_bad_fraction": max_bad_fraction}
        stream = stream_local(tmp_path / "rows.jsonl", **given)
        config = TrainConfig(epochs=1, batch_size=2, output_dir=tmp_path / name, log_every_steps=1)
        held_out = stream_local(tmp_path / "rows.jsonl", **given) if name == "run" else None
        trainer = Trainer(model, stream, collator, config, held_out)
        ears.note(str(ears.attempt(trainer.fit)))
        for path in (tmp_path / name).rglob("*"):
            assert path.is_dir() or CANARY.encode() not in path.read_bytes(), path
        (run,) = open_runs([tmp_path / name])
        run.refresh()
        assert run.find_phase().name == {"run": "finished", "failed": "failed"}[name]
        if name == "run":
            assert len(run.quarantine) == len(bad)
    ears.note("".join(capfd.readouterr()))
    assert len(ears.errors) == 1
    check_files(tmp_path)


def test_a_forbidden_bucket_stops_at_once(ears, gcs, tmp_path):
    fill_bucket(gcs)
    gcs.forbid("rows")
    for uri, permission in (
        ("gs://rows/data.jsonl", "storage.objects.get"),
        ("gs://rows/", "storage.objects."),
        ("gs://rows/*.jsonl", "storage.objects.list"),
    ):
        gcs.clear_requests()
        client = open_gcs_client(gcs)
        ears.attempt(lambda u=uri, c=client: stream_gcs(u, gcs_client=c, **options(tmp_path)))
        error = ears.errors[-1]
        assert isinstance(error, AccessDeniedError)
        assert permission in str(error)
        assert "'rows'" in str(error)
        asked = Counter((one.operation, one.name) for one in gcs.requests)
        assert set(asked.values()) == {1}, asked
        assert sum(one.operation != "bucket" for one in gcs.requests) <= 5  # not once per try
    gcs.allow("rows")

    gcs.forbid("media")
    gcs.clear_requests()
    ears.attempt(lambda: open_bucket(gcs, tmp_path))
    assert isinstance(ears.errors[-1], AccessDeniedError)
    assert "'media'" in str(ears.errors[-1])
    asked = Counter((one.operation, one.name) for one in gcs.requests if one.bucket == "media")
    assert max(asked.values()) == 1
    gcs.allow("media")

    stream = open_bucket(gcs, tmp_path, **options(tmp_path, total_timeout_seconds=20))
    gcs.forbid("media")
    gcs.clear_requests()
    assert ears.attempt(lambda: list(stream)) is None
    error = ears.errors[-1]
    assert isinstance(error, AccessDeniedError)
    assert "storage.objects.get" in str(error)
    assert "'media'" in str(error)
    asked = Counter(one.name for one in gcs.requests if one.operation == "read")
    assert max(asked.values()) == 1
    assert len(asked) <= 8  # what the window had begun
    assert stream.report().fetched.retries == 0
    assert {one.stage for one in stream.inspect_quarantine()} == {"row"}
    assert stream.state_dict()["position"] == 0
    gcs.allow("media")
    assert len(list(stream)) == NUM_GOOD


def test_a_forbidden_table_stops_at_once(ears, tables, tmp_path):
    fill_table(tables)
    for resource, permission in (
        (TABLE, "bigquery.tables.getData"),
        ("project", "bigquery.readsessions.create"),
    ):
        with BigQueryServer() as server:
            fill_table(server)
            server.deny(resource, permission)
            ears.attempt(lambda s=server: open_table(s, tmp_path))
            assert isinstance(ears.errors[-1], AccessDeniedError)
            assert permission in str(ears.errors[-1])
            calls = Counter(call.method for call in server.calls)
            assert max(calls.values()) == 1, calls


def test_only_mapped_columns_are_read(gcs, tables, tmp_path):
    fill_table(tables)
    open_table(tables, tmp_path, response="response", image=False)
    (session,) = [call for call in tables.calls if call.method == "CreateReadSession"]
    assert sorted(session.selected_fields) == ["id", "prompt", "response"]
    assert not [call for call in tables.calls if call.method == "tabledata.list"]

    wide = [bytes([n % 251]) * 4_000_000 for n in range(6)]
    table = pyarrow.table(
        {
            "prompt": ["Q"] * 6,
            "unused": [bytes(value) for value in wide],
            "response": ["A"] * 6,
        }
    )
    file = io.BytesIO()
    pyarrow.parquet.write_table(
        table,
        file,
        row_group_size=2,
        compression="NONE",
        use_dictionary=False,
        write_batch_size=1,  # so that a page, which is read whole, holds one value
    )
    gcs.put("rows", "wide.parquet", file.getvalue())
    metadata = pyarrow.parquet.ParquetFile(file).metadata
    num_all = 0
    # Of a column that nobody named, a first value tells whether media would be passed over.
    for ignore, num_peeked in ((("unused",), 0), ((), 1)):
        stream = stream_gcs(
            "gs://rows/wide.parquet",
            gcs_client=gcs.client(),
            ignore=ignore,
            **options(tmp_path, total_timeout_seconds=20),
        )
        assert len(stream) == 6
        manifest = stream.views[0].manifest.path.read_bytes()
        assert not any(value[:64] in manifest for value in wide[1:])
        reads = [one for one in gcs.requests if one.operation == "read"][num_all:]
        num_all += len(reads)
        overlaps = [
            measure_overlap(reads, len(file.getvalue()), metadata.row_group(group).column(1))
            for group in range(metadata.num_row_groups)
        ]
        assert overlaps[1:] == [0, 0]
        peeked = num_peeked * (4_000_000 + (64 << 10))
        assert overlaps[0] <= peeked
        assert sum(one.num_bytes for one in reads) < 200_000 + peeked


def measure_overlap(reads, num_bytes, column):
    """How many bytes of a column were read of a Parquet file of so many."""
    ranges = [one.byte_range.removeprefix("bytes=").split("-") for one in reads]
    read = [range(int(start), int(end) + 1) for start, end in ranges]
    # pyarrow finds the footer in the last 64 KiB; that part of the last column is unavoidable.
    read = [one for one in read if one.stop != num_bytes]
    start = column.data_page_offset
    stop = start + column.total_compressed_size
    return sum(max(0, min(each.stop, stop) - max(each.start, start)) for each in read)


def test_a_query_without_a_limit_is_refused_with_its_bytes(tables, tmp_path):
    pytest.importorskip("duckdb", reason="NOT TESTED: SQL needs the package duckdb")
    fill_table(tables)
    query = f"SELECT id, prompt, response FROM `{TABLE}`"
    job = tables.client("project").query(query, job_config=bigquery.QueryJobConfig(dry_run=True))
    num_bytes = job.total_bytes_processed
    assert num_bytes > 100
    with pytest.raises(ConfigError, match=rf"{num_bytes:,} bytes.*max_bytes_billed=") as caught:
        open_table(tables, tmp_path, query=query)
    assert "max_bytes_billed=False" in str(caught.value)
    assert all(call.dry_run for call in tables.calls if call.method == "jobs.insert")
    assert tables.bytes_billed == 0
    with pytest.raises(ConfigError, match="max_bytes_billed=1 "):
        open_table(tables, tmp_path, query=query, max_bytes_billed=1)
    assert tables.bytes_billed == 0
    assert len(open_table(tables, tmp_path, query=query, max_bytes_billed=20 << 20)) > 0
