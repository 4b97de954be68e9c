"""No row has a file of this machine read that lies out of its reach, whatever form it takes."""

import csv
import json
import os
import sys
from pathlib import Path

import datasets
import pandas
import pyarrow.parquet
import pytest

import gemma_tuner as gt
from gemma_tuner.records import PinnedFile, StoredObject
from gemma_tuner.testing.cloud.gcs.server import GcsServer
from tests.examples import picture

ASKED, ANSWERED = "What is it?", "a dog"


def lines(name, make):
    def write(home, source):
        (home / name).write_text(json.dumps(make(source)) + "\n")
        return gt.stream_local, home / name

    return write


def column(source):
    return {"image": source, "prompt": ASKED, "response": ANSWERED}


def message(part):
    parts = [part, {"type": "text", "text": ASKED}]
    return {
        "messages": [
            {"role": "user", "content": parts},
            {"role": "assistant", "content": ANSWERED},
        ]
    }


def write_csv(home, source):
    with (home / "rows.csv").open("w") as file:
        writer = csv.DictWriter(file, list(column(source)))
        writer.writeheader()
        writer.writerow(column(source))
    return gt.stream_local, home / "rows.csv"


def write_parquet(home, source):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([column(source)]), home / "rows.parquet")
    return gt.stream_local, home / "rows.parquet"


def write_feature(home, source):
    """As the Hub's data sets keep images: bytes, or a path."""
    row = {**column(None), "image": {"bytes": None, "path": source}}
    features = {"image": datasets.Image(decode=False)}
    features |= dict.fromkeys(("prompt", "response"), datasets.Value("string"))
    held = datasets.Dataset.from_list([row], features=datasets.Features(features))
    pyarrow.parquet.write_table(held.data.table, home / "train.parquet")
    return gt.stream_hub, str(home)


def example(source):
    asked = gt.Turn("user", (gt.Image(source), gt.Text(ASKED)))
    return gt.Example("k", (asked, gt.Turn("assistant", (gt.Text(ANSWERED),))))


FORMS = {
    "JSON lines": lines("rows.jsonl", column),
    "a list in a column": lines("rows.jsonl", lambda s: column([s])),
    "path in an object": lines("rows.jsonl", lambda s: column({"bytes": None, "path": s})),
    "url in an object": lines("rows.jsonl", lambda s: column({"url": s})),
    "a part of a message": lines("r.jsonl", lambda s: message({"type": "image", "image": s})),
    "OpenAI's part": lines(
        "r.jsonl", lambda s: message({"type": "image_url", "image_url": {"url": s}})
    ),
    "one JSON array": lines("rows.json", lambda s: [column(s)]),
    "a folder's manifest": lambda home, s: (
        gt.stream_local,
        lines("metadata.jsonl", column)(home, s)[1].parent,
    ),
    "CSV": write_csv,
    "Parquet": write_parquet,
    "a Hub data set in a folder": write_feature,
    "rows in memory": lambda home, s: (gt.stream_rows, [column(s)]),
    "parts in memory": lambda home, s: (
        gt.stream_rows,
        [message({"type": "image", "image": s})],
    ),
    "a DataFrame": lambda home, s: (gt.stream_rows, pandas.DataFrame([column(s)])),
    "an Example": lambda home, s: (gt.stream_rows, [example(s)]),
}

# What leads to the secret: from the folder of the data, and its home.
WAYS = {
    "an absolute path": "{secret}",
    "a parent": "../private/secret.png",
    "a parent behind a folder": "inner/../../private/secret.png",
    "a link": "link.png",
    "a linked folder": "linked/secret.png",
    "a link to a link": "again.png",
    "a parent behind a linked folder": "linked/../private/secret.png",
    "the home": "~/private/secret.png",
    "a file URL": "file://{secret}",
    "a file URL in capitals": "FILE://{secret}",
    "a file URL with a host": "file://localhost{secret}",
    "a file URL of one slash": "file:{secret}",
    "two slashes": "/{secret}",
    "this process's folder": "/proc/self/cwd/../private/secret.png",
    "a NUL character": "{secret}\0.png",
}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder of data, beside one that is private, with links that a hostile archive may hold."""
    data, private = tmp_path / "data", tmp_path / "private"
    (data / "inner").mkdir(parents=True)
    private.mkdir()
    picture().save(private / "secret.png")
    picture().save(data / "own.png")
    (data / "link.png").symlink_to("../private/secret.png")
    (data / "linked").symlink_to(private)
    (data / "again.png").symlink_to("link.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(data)
    return data


opened: list[list[str]] = []  # by each that looks on; a hook stays for good


def note_opened(event, arguments):
    if event == "open" and opened and isinstance(arguments[0], str | bytes):
        opened[-1].append(os.path.realpath(os.fsdecode(arguments[0])))


sys.addaudithook(note_opened)


def refuse(open_stream, given, home, **keywords):
    """The error of a stream, which neither opened the secret nor says where it is."""
    opened.append([])
    try:
        with pytest.raises(gt.GemmaTunerError) as caught:
            open_stream(given, cache_dir=home.parent / "cache", **keywords)
    finally:
        seen = opened.pop()
    assert not [path for path in seen if "private" in path]
    assert str(home.parent) not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("form", FORMS)
def test_no_row_reads_a_file_elsewhere(home, form, way):
    source = WAYS[way].format(secret=home.parent / "private" / "secret.png")
    error = refuse(*FORMS[form](home, source), home)
    if "://" not in source:
        assert "media_root=" in error


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("form", FORMS)
def test_a_media_root_is_not_left_either(home, form, way):
    source = WAYS[way].format(secret=home.parent / "private" / "secret.png")
    (home / "root").mkdir()
    refuse(*FORMS[form](home, source), home, media_root=home / "root")


@pytest.mark.parametrize("root", ["../private", "/"])
@pytest.mark.parametrize(
    "way", [way for way, path in WAYS.items() if path[0] not in "f~F" and "\0" not in path]
)
@pytest.mark.parametrize("form", FORMS)
def test_who_says_so_has_them_read(home, form, way, root):
    source = WAYS[way].format(secret=home.parent / "private" / "secret.png")
    open_stream, given = FORMS[form](home, source)
    stream = open_stream(given, cache_dir=home.parent / "cache", media_root=root)
    (image,) = stream[0].media
    assert image.source.size == picture().size


@pytest.mark.parametrize("root", [None, "."])
@pytest.mark.parametrize("source", ["own.png", "./inner/../own.png", "{home}/own.png"])
@pytest.mark.parametrize("form", FORMS)
def test_own_files_are_read_however_they_are_named(home, form, source, root):
    open_stream, given = FORMS[form](home, source.format(home=home))
    stream = open_stream(given, cache_dir=home.parent / "cache", media_root=root)
    assert len([*stream[0].media]) == 1


def test_a_snapshot_of_the_hub_is_read_through_its_links(tmp_path):
    blobs, data = tmp_path / "blobs", tmp_path / "snapshots" / "abc" / "data"
    blobs.mkdir()
    data.mkdir(parents=True)
    picture().save(blobs / "1.png")
    (data / "a.png").symlink_to("../../../blobs/1.png")
    (blobs / "2").write_text(json.dumps(column("a.png")))
    (data / "rows.jsonl").symlink_to("../../../blobs/2")
    stream = gt.stream_local(data / "rows.jsonl", cache_dir=tmp_path / "c")
    assert len([*stream[0].media]) == 1


def test_data_in_a_linked_folder_have_their_media_there(home):
    elsewhere = home.parent / "elsewhere"
    elsewhere.mkdir()
    picture().save(elsewhere / "1.png")
    (elsewhere / "rows.jsonl").write_text(json.dumps(column("1.png")))
    (home / "more").symlink_to(elsewhere)
    stream = gt.stream_local(f"{home}/*/*.jsonl", cache_dir=home.parent / "cache")
    assert len([*stream[0].media]) == 1


@pytest.mark.parametrize("beside", [(), ("own.png",)])
def test_texts_that_lie_elsewhere_are_not_trained_on(home, beside):
    """Documents, and captions of the images beside them."""
    (home.parent / "private" / "id_rsa").write_text("KEY")
    folder = home / "texts"
    folder.mkdir()
    for name in beside:
        picture().save(folder / name)
    (folder / "own.txt").symlink_to("../../private/id_rsa")
    assert "leads out of its folder" in refuse(gt.stream_local, folder, home)


@pytest.mark.parametrize("way", WAYS)
def test_rows_of_a_bucket_read_no_file(home, way):
    source = WAYS[way].format(secret=home.parent / "private" / "secret.png")
    with GcsServer() as server:
        server.put("b", "rows.jsonl", json.dumps(column(source)).encode())
        refuse(gt.stream_gcs, "gs://b/rows.jsonl", home, gcs_client=server.client())


@pytest.mark.parametrize("kind", [StoredObject, PinnedFile])
def test_examples_in_memory_bring_no_pins_of_their_own(home, kind):
    path = str(home.parent / "private" / "secret.png")
    source = PinnedFile(path, 1, 1) if kind is PinnedFile else StoredObject(path, None, 9, None, 0)
    refuse(gt.stream_rows, [example(source)], home)


def test_every_way_leads_there(home):
    """Else its refusal would prove nothing."""
    secret = home.parent / "private" / "secret.png"
    ways = [way.format(secret=secret) for way in WAYS.values()]
    paths = [Path(way).expanduser() for way in ways if ":" not in way and "\0" not in way]
    assert all(path.samefile(secret) for path in paths if not str(path).startswith("/proc"))
