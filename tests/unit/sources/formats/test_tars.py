"""Webdataset tars: samples without unpacking, and what is said of damage."""

import io
import json
import tarfile
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_tuner.errors import DataError, SourceError
from gemma_tuner.records import Audio, Image, StoredObject
from gemma_tuner.sources.formats.files import LocalFile
from gemma_tuner.sources.formats.tars import PEEKED_SAMPLES, TarReader, list_tar_columns
from gemma_tuner.sources.local import LocalSource


def make_tar(members, tar_format=tarfile.PAX_FORMAT):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def plant(folder, name, members, **how):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(make_tar(members, **how))
    return LocalFile(path, name)


def read(file) -> tuple[list[Any], Counter[str]]:
    reader = TarReader()
    rows = list(reader.read_samples(file))
    assert [number for number, _ in rows] == list(range(1, len(rows) + 1))
    return [values for _, values in rows], reader.counts


def content_of(file, part):
    assert part.uri == file.name
    return file.path.read_bytes()[part.start : part.start + part.num_bytes]


@pytest.mark.parametrize(
    "tar_format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT]
)
def test_members_of_one_name_make_a_row_with_parts_of_the_tar(tmp_path, tar_format):
    file = plant(
        tmp_path,
        "a.tar",
        [
            ("./a/0001.jpg", b"first picture"),
            ("./a/0001.txt", b"A frog.\n"),
            ("a/0002.flac", b"sound" * 300),
            ("a/0002.json", b'{"transcript": "Quack.", "speaker": 7}'),
            ("b.c/0001.png", b"second picture"),
            ("b.c/0001.cls", b"3"),
        ],
        tar_format=tar_format,
    )
    (first, second, third), counts = read(file)
    assert first.keys() == {"id", "image", "text"}
    assert (first["id"], first["text"]) == ("a/0001", "A frog.")
    assert content_of(file, first["image"]) == b"first picture"
    assert second["id"] == "a/0002"
    assert (second["transcript"], second["speaker"]) == ("Quack.", 7)
    assert content_of(file, second["audio"]) == b"sound" * 300
    assert (third["id"], third["cls"]) == ("b.c/0001", "3")
    assert content_of(file, third["image"]) == b"second picture"
    assert counts == {}
    assert list_tar_columns([file]) == [
        *("id", "text", "image"),
        *("transcript", "speaker", "audio"),
        "cls",
    ]


def test_long_and_foreign_names(tmp_path):
    key = f"{'long/' * 40}häßlich 蛙"
    for tar_format in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        members = [(f"{key}.JPG", b"x"), (f"{key}.txt", b"t")]
        file = plant(tmp_path, "a.tar", members, tar_format=tar_format)
        ((row,), _) = read(file)
        assert row["id"] == key
        assert content_of(file, row["image"]) == b"x"


def test_the_middle_of_a_name_is_a_column_of_its_own(tmp_path):
    chat = [{"role": "user", "content": "Q"}]
    file = plant(
        tmp_path,
        "a.tar",
        [
            ("1.jpg", b"x"),
            ("1.png", b"yy"),
            ("1.depth.png", b"zzz"),
            ("1.question.txt", b"What?"),
            ("1.chat.json", json.dumps(chat).encode()),
            ("1.json", b'{"id": "own", "depth": 1, "n": null}'),
        ],
    )
    ((row,), counts) = read(file)
    assert [part.num_bytes for part in row["image"]] == [1, 2]
    assert row["depth"].num_bytes == 3
    assert (row["question"], row["chat"], row["id"], row["n"]) == ("What?", chat, "own", None)
    assert counts == {"json fields 'depth' not used beside a member of that name": 1}


def test_what_is_not_used_is_counted(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("1.npy", "1.txt", "2.npy", "2.tokens.npy", "README", "._1.txt", "d/._2.jpg"):
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"x"))
        for name, kind in (("d", tarfile.DIRTYPE), ("3.jpg", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "1.txt"
            tar.addfile(info)
    rows, counts = read(LocalFile(path, "a.tar"))
    assert rows == [{"id": "1", "text": "x"}]
    assert counts == {
        "members ending in '.npy' not used": 3,
        "members without ending not used": 1,
        "members with a hidden name not used": 2,
        "links and sparse members not used": 1,
    }


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([("2.jpg", b"")], r"its \.jpg is empty"),
        ([("2.txt", b"\xff secret")], "not UTF-8 at byte 1"),
        ([("2.json", b"[1]")], "a list and not an object"),
        ([("2.json", b'{"secret')], "not valid JSON"),
        ([("2.txt", b"a"), ("2.text", b"b")], "two of its members make the column 'text'"),
        ([("2.txt", b"x" * (17 << 20))], "17,825,792 bytes"),
    ],
)
def test_a_sample_that_cannot_be_read_comes_as_an_error_in_its_place(tmp_path, members, words):
    members = [("1.txt", b"a"), *members, ("3.txt", b"c")]
    (first, bad, last), _ = read(plant(tmp_path, "s.tar", members))
    assert (first["text"], last["text"]) == ("a", "c")
    with pytest.raises(DataError, match=words) as caught:
        raise bad  # as whoever reads on may do
    assert caught.value.key == "s.tar:2"
    assert "secret" not in str(caught.value)


MEMBERS = [(f"{n:04}.{ending}", b"%d" % n * 700) for n in range(3) for ending in ("jpg", "txt")]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tar: tar[:1700], r"cut off after the member '0000\.jpg'"),
        (lambda tar: tar[:2100], r"cut off after the member '0000\.jpg'"),
        (lambda tar: tar[:1536], r"after the member '0000\.jpg' \(there is no end mark\)"),
        (lambda tar: tar[:5000] + b"x" + tar[5001:], r"after the member '0001\.jpg'"),
        (lambda tar: tar + tar, "two tars joined"),
        (lambda tar: tar[:2048] + bytes(3 << 20), r"after the member '0000\.txt' \(more follows"),
        (lambda tar: b"x" * 3000, "at its first member"),
        (lambda tar: b"", "at its first member"),
        (lambda tar: b"\x1f\x8b" + tar, "is compressed.*plain .tar"),
        (lambda tar: b"\x28\xb5\x2f\xfd" + tar, "is compressed.*plain .tar"),
    ],
)
def test_a_tar_that_is_damaged_is_told_with_the_place(tmp_path, change, words):
    path = tmp_path / "shard.tar"
    path.write_bytes(change(make_tar(MEMBERS, tarfile.USTAR_FORMAT)))
    with pytest.raises(SourceError, match=f"'shard.tar' .*{words}"):
        read(LocalFile(path, "x/shard.tar"))


@settings(max_examples=300)
@given(
    st.lists(st.tuples(st.integers(0, 10_239), st.integers(0, 255)), min_size=1, max_size=8),
    st.integers(0, 10_240),
)
def test_no_damage_passes_for_the_end_of_the_tar(tmp_path_factory, changes, length):
    """Whatever bytes are changed or cut: all samples come, or the tar is refused."""
    whole = make_tar(MEMBERS, tarfile.PAX_FORMAT)
    assert len(whole) == 10_240
    damaged = bytearray(whole)
    for place, value in changes:
        damaged[place] = value
    path = tmp_path_factory.getbasetemp() / "damaged.tar"
    path.write_bytes(damaged[:length])
    try:
        rows, counts = read(LocalFile(path, "damaged.tar"))
    except SourceError:
        return
    assert len(rows) + sum(counts.values()) >= 3


def test_a_tar_without_samples_is_told(tmp_path):
    file = plant(tmp_path, "a.tar", [("1.npy", b"x"), ("2.npy", b"x")])
    with pytest.raises(SourceError, match=r"no samples \(members ending in '\.npy' not used: 2\)"):
        list_tar_columns([file])
    with pytest.raises(SourceError, match="nothing at all"):
        list_tar_columns([plant(tmp_path, "b.tar", [])])
    with pytest.raises(SourceError, match="cannot be read"):
        list_tar_columns([LocalFile(tmp_path / "none.tar", "none.tar")])


def test_local_tars_are_read_as_examples(tmp_path):
    for name in ("train-000.tar", "train-001.tar", "val-000.tar"):
        members = [
            (f"{name[:-4]}/{n}.{ending}", content)
            for n in range(3)
            for ending, content in (("jpg", b"x" * n or b"y"), ("txt", b"A frog."), ("npy", b"z"))
        ]
        plant(tmp_path, name, members)
    source = LocalSource(tmp_path)
    examples = [example for _, example in source]
    assert [example.key for example in examples] == [
        f"train-{shard:03}/{n}" for shard in range(2) for n in range(3)
    ]
    (picture,) = examples[5].media
    assert picture == Image(StoredObject("train-001.tar", start=picture.source.start, num_bytes=2))
    content = (source.root / picture.source.uri).read_bytes()
    assert content[picture.source.start :][:2] == b"xx"
    assert examples[0].turns[-1].text == "A frog."
    summary = source.read_summary()
    assert (summary["format"], summary["num_files"]) == ("webdataset", 2)
    assert "members ending in '.npy' not used: 6" in summary["notes"]
    assert "files of other splits not read (validation): 1" in summary["notes"]
    assert [origin for origin, _ in source][:2] == ["train-000.tar:1", "train-000.tar:2"]


def test_sounds_and_conversations_in_tars(tmp_path):
    messages = [
        {"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "Quack."},
    ]
    record = {"messages": messages}
    plant(tmp_path, "a.tar", [("1.wav", b"RIFF"), ("1.json", json.dumps(record).encode())])
    ((_, example),) = LocalSource(tmp_path / "a.tar")
    assert Counter(type(part) for part in example.media) == {Audio: 1}
    assert example.turns[0].parts[1].text == "What?"


def test_of_many_tars_three_are_looked_into(tmp_path):
    for number in range(7):
        plant(tmp_path, f"{number}.tar", [("1.txt", b"A"), (f"1.m{number}.txt", b"B")])
    files = [LocalFile(tmp_path / f"{number}.tar", f"{number}.tar") for number in range(7)]
    assert list_tar_columns(files) == ["id", "text", "m0", "m3", "m6"]
    assert len(list(LocalSource(tmp_path, keywords={"text": "text"}))) == 7


def test_a_column_that_comes_late_and_matters_is_refused(tmp_path):
    pairs = [(f"{n}.json", b'{"prompt": "Q", "response": "A"}') for n in range(PEEKED_SAMPLES)]
    plant(tmp_path, "a.tar", [*pairs, ("z.jpg", b"x"), ("z.json", pairs[0][1])])
    with pytest.raises(DataError, match="columns 'image' come first here"):
        list(LocalSource(tmp_path))
