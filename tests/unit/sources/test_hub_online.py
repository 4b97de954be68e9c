"""Data sets of a Hub, read over HTTP by the real client libraries in processes of their own."""

import io
import json
import os
import subprocess
import sys
import threading

import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.unit.sources.hub_server import HubServer, Repository

COMMIT = "0123456789abcdef0123456789abcdef01234567"
READER = """
import json, sys
from gemma_tuner.errors import GemmaTunerError
from gemma_tuner.sources.hub import HubSource
answers = {}
for case, name, arguments in json.load(sys.stdin):
    try:
        source = HubSource(name, **arguments)
        rows = [
            [origin, repr(outcome), [type(part.source).__name__ for part in outcome.media]]
            if hasattr(outcome, "media") else [origin, repr(outcome), None]
            for origin, outcome in source
        ]
        answers[case] = {"rows": rows, "notes": source.read_summary()["notes"]}
    except GemmaTunerError as error:
        answers[case] = {"error": f"{type(error).__name__}: {error}"}
json.dump(answers, sys.stdout)
"""


def parquet(**columns):
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def png():
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (8, 8)).save(buffer, "PNG")
    return buffer.getvalue()


def build_repositories(folder):
    pairs = parquet(prompt=["P", "Q"], response=["A", "B"])
    configs = "configs:\n" + "".join(
        f"- config_name: {name}\n  data_files: {name}.parquet\n" for name in ("one", "two")
    )
    names = '{"file_name": "0.png", "text": "T"}\n{"file_name": "1.png", "text": "U"}\n'
    outside = [{"bytes": None, "path": str(folder / "private.png")}]
    escape = [{"bytes": None, "path": f"hf://datasets/me/pairs@{COMMIT}/README.md"}]
    repositories = {
        "me/pairs": {
            "README.md": b"---\nlicense: apache-2.0\n---\n",
            "data/train-00000-of-00001.parquet": pairs,
            "data/test-00000-of-00001.parquet": pairs,
        },
        "me/subsets": {
            "README.md": f"---\n{configs}---\n".encode(),
            "one.parquet": pairs,
            "two.parquet": pairs,
        },
        "me/pictures": {
            "train/metadata.jsonl": names.encode(),
            "train/0.png": png(),
            "train/1.png": b"damaged",
        },
        "me/curious": {"train.parquet": parquet(image=outside + escape, text=["T", "U"])},
        "me/script": {"script.py": f"open({str(folder / 'ran')!r}, 'w')".encode()},
        "me/empty": {"README.md": b""},
    }
    built = {name: Repository(COMMIT, files) for name, files in repositories.items()}
    image = "dataset_info:\n  features:\n  - {name: image, dtype: image}\n"
    built["me/curious"].files["README.md"] = (
        f"---\n{image}  - {{name: text, dtype: string}}\n---\n".encode()
    )
    return built | {"me/gated": Repository(COMMIT, {}, is_gated=True)}


ONLINE = [
    ("pairs", "me/pairs", {}),
    ("streamed pairs", "me/pairs", {"streaming": True}),
    ("pictures", "me/pictures", {}),
    ("streamed pictures", "me/pictures", {"streaming": True}),
    ("curious", "me/curious", {}),
    ("streamed curious", "me/curious", {"streaming": True}),
    ("two", "me/subsets", {"subset": "two"}),
    ("one", "me/subsets", {"subset": "one"}),
    ("no subset", "me/subsets", {}),
    ("wrong subset", "me/subsets", {"subset": "three"}),
    ("wrong split", "me/pairs", {"split": "validation"}),
    ("wrong revision", "me/pairs", {"revision": "v9"}),
    ("gated", "me/gated", {}),
    ("missing", "me/missing", {}),
    ("empty", "me/empty", {}),
    ("script", "me/script", {}),
]
OFFLINE = [
    ("pairs", "me/pairs", {}),
    ("same commit", "me/pairs", {"revision": COMMIT}),
    ("branch", "me/pairs", {"revision": "main"}),
    ("no subset", "me/subsets", {}),
    ("wrong subset", "me/subsets", {"subset": "three"}),
    ("missing", "me/missing", {}),
]


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    (folder / "private.png").write_bytes(png())

    def read(cases, **environment):
        ended = subprocess.run(
            [sys.executable, "-c", READER],
            check=False,
            input=json.dumps(cases),
            env={**os.environ, "HF_HOME": str(folder / "home"), **environment},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert ended.returncode == 0, ended.stderr
        return {**json.loads(ended.stdout), "printed": ended.stderr}

    with HubServer(build_repositories(folder)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        endpoint = f"http://localhost:{server.server_port}"
        try:
            online = read(ONLINE, HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="0")
        finally:
            server.shutdown()
            thread.join()
    offline = read(OFFLINE, HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="1")
    return {
        "online": online,
        "offline": offline,
        "ran": (folder / "ran").exists(),
        "endpoint": endpoint,
    }


def test_rows_of_the_hub_are_the_same_streamed_or_not(answers):
    online = answers["online"]
    assert online["pairs"] == online["streamed pairs"]
    assert [row[0] for row in online["pairs"]["rows"]] == [
        "me/pairs/default/train:1",
        "me/pairs/default/train:2",
    ]
    assert "Text(text='P')" in online["pairs"]["rows"][0][1]
    assert online["pairs"]["notes"] == [
        f"commit on the Hub: {COMMIT}",
        "licence of the data set: apache-2.0",
    ]
    assert [row[0] for row in online["two"]["rows"]] == [
        "me/subsets/two/train:1",
        "me/subsets/two/train:2",
    ]


def test_pictures_in_files_are_paths_or_streamed_as_bytes_damaged_ones_too(answers):
    downloaded, streamed = answers["online"]["pictures"], answers["online"]["streamed pictures"]
    assert [row[2] for row in downloaded["rows"]] == [["str"], ["str"]]
    assert [row[2] for row in streamed["rows"]] == [["bytes"], ["bytes"]]
    assert "b'damaged'" in streamed["rows"][1][1]


def test_rows_from_the_hub_name_no_file_outside_of_their_data_set(answers):
    for case in ("curious", "streamed curious"):
        rows = answers["online"][case]["rows"]
        assert [row[2] for row in rows] == [None, None], "a DataError each"
        assert "do not hold" in rows[0][1]
    assert "outside of the data set" in answers["online"]["streamed curious"]["rows"][1][1]


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("no subset", "'me/subsets' has several subsets; choose by subset= one of: one, two"),
        ("wrong subset", "'me/subsets' has no subset 'three'; its subsets are: one, two"),
        ("wrong split", "'me/pairs' has no split 'validation'; its splits are: test, train"),
        ("wrong revision", "'me/pairs' has no revision 'v9'; give a branch, a tag"),
        ("gated", "'me/gated' is gated: accept its terms"),
        ("missing", "'me/missing' is neither a folder nor a data set on the Hub that you may"),
        ("empty", "'me/empty' holds no data files that datasets can read"),
        ("script", "'me/script' needs a loading script of its own, and such code is never run"),
    ],
)
def test_errors_name_the_remedy(answers, case, expected):
    error = answers["online"][case]["error"]
    assert error.startswith(f"SourceError: {expected}")
    assert "://" not in error


def test_a_loading_script_is_not_run(answers):
    assert not answers["ran"]


def test_offline_the_copy_is_read_and_the_summary_says_so(answers):
    offline = answers["offline"]
    assert offline["pairs"]["rows"] == answers["online"]["pairs"]["rows"]
    assert (
        "read from the copy on this machine, as the Hub did not give it"
        in (offline["pairs"]["notes"])
    )
    assert offline["same commit"]["rows"] == offline["pairs"]["rows"]
    assert (
        f"is of commit {COMMIT}, which may not be the revision 'main'"
        in (offline["branch"]["error"])
    )
    assert "subset= one of: one, two" in offline["no subset"]["error"]
    assert "its subsets are: one, two" in offline["wrong subset"]["error"]
    assert "HF_HUB_OFFLINE forbids" in offline["missing"]["error"]


def test_the_libraries_print_nothing(answers):
    assert answers["online"]["printed"] == answers["offline"]["printed"] == ""
