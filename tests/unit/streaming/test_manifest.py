"""The manifest keeps every example as it is, knows its content, and notices damage."""

import stat
from pathlib import Path

import numpy as np
import pyarrow
import pytest

from gemma_tuner.errors import DataError, SourceError
from gemma_tuner.records import Audio, Example, Image, PinnedFile, Text, Turn
from gemma_tuner.streaming import manifest as module
from gemma_tuner.streaming.manifest import Manifest, hash_keys, write_manifest

SUMMARY = {"format": "jsonl"}


def answer(key, *parts, **more):
    turns = (Turn("user", parts or (Text("Q"),)), Turn("assistant", (Text("A"),)))
    return Example(key, turns, **more)


def pin(path, number):
    return PinnedFile(path, num_bytes=number << 40, crc32c=(1 << 32) - number)


def write(path, *examples, root="/data"):
    write_manifest(
        path,
        ((f"file:{number}", example) for number, example in enumerate(examples, 1)),
        root=Path(root),
        read_summary=lambda: SUMMARY,
    )
    return Manifest(path)


def test_every_kind_of_example_comes_back_as_it_was(tmp_path):
    examples = [
        answer("pair"),
        Example("document", document="Ünïcode \u2028 text \0 and all"),
        answer("paths", Image(pin("a/b.png", 1)), Audio(pin("c.wav", 2)), Text("Q")),
        answer("bytes", Image(b"\x89PNG"), Text(""), Audio(b"RIFF")),
        Example(
            "tools",
            (
                Turn("assistant", (), {"tool_calls": [{"function": {"name": "f"}}]}),
                Turn("tool", (Text("2"),), {"name": "f"}),
                Turn("assistant", (Text("A"),), {"reasoning": "R"}),
            ),
            tools=({"name": "f", "parameters": {"b": 1, "a": None}},),
        ),
    ]
    manifest = write(tmp_path / "m.arrow", *examples)
    assert len(manifest) == 5
    assert [manifest.read_example(row) for row in range(5)] == examples
    assert list(manifest.read_keys()) == [example.key for example in examples]
    assert manifest.read_origin(4) == "file:5"
    assert (str(manifest.root), manifest.summary) == ("/data", SUMMARY)


def test_samples_come_back_as_they_were(tmp_path):
    samples = np.linspace(-1, 1, 101, dtype=np.float32)
    manifest = write(tmp_path / "m.arrow", answer("k", Image(b"1"), Audio(samples, 8000)))
    _, audio = manifest.read_example(0).media
    assert isinstance(audio, Audio)
    assert audio.sample_rate_hz == 8000
    assert isinstance(audio.source, np.ndarray)
    np.testing.assert_array_equal(audio.source, samples)


def test_many_rows_and_much_inline_media_make_several_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_BATCH_ROWS", 7)
    monkeypatch.setattr(module, "_BATCH_BYTES", 5000)
    examples = [answer(f"k{i}", Image(bytes([i]) * (i * 50))) for i in range(1, 60)]
    manifest = write(tmp_path / "m.arrow", *examples)
    assert [manifest.read_example(row) for row in range(59)] == examples
    monkeypatch.undo()
    assert write(tmp_path / "n.arrow", *examples).fingerprint == manifest.fingerprint


def test_the_fingerprint_is_of_the_content_and_not_of_the_place(tmp_path):
    base = [answer("a"), answer("b", Image(pin("x.png", 1)), Image(b"1"))]
    fingerprint = write(tmp_path / "1", *base).fingerprint
    assert write(tmp_path / "2", *base, root="/elsewhere").fingerprint == fingerprint
    for other in (
        [base[1], base[0]],
        base[:1],
        [answer("c"), base[1]],
        [base[0], answer("b", Image(pin("x.png", 1)), Image(b"2"))],
        [base[0], answer("b", Image(pin("y.png", 1)), Image(b"1"))],
    ):
        assert write(tmp_path / "3", *other).fingerprint != fingerprint
    mended = [base[0], answer("b", Image(pin("x.png", 2)), Image(b"1"))]
    assert write(tmp_path / "4", *mended).fingerprint == fingerprint


def test_manifests_are_for_the_user_alone_and_leave_nothing_behind(tmp_path):
    path = tmp_path / "new" / "m.arrow"
    write(path, answer("a"))
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [DataError("bad row", key="k"), KeyboardInterrupt()])
def test_a_writing_that_fails_leaves_the_old_manifest(tmp_path, error):
    path = tmp_path / "m.arrow"
    write(path, answer("old"))

    def failing():
        yield "file:1", answer("new")
        raise error

    with pytest.raises(type(error)):
        write_manifest(path, failing(), root=tmp_path, read_summary=dict)
    assert list(Manifest(path).read_keys()) == ["old"]
    assert list(tmp_path.iterdir()) == [path]


def test_no_byte_may_be_missing_or_changed(tmp_path):
    path = tmp_path / "m.arrow"
    manifest = write(path, *(answer(f"key {i}", Text("some text")) for i in range(20)))
    content = path.read_bytes()
    for cut in (0, 1, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:cut])
        with pytest.raises(SourceError, match="damaged"):
            Manifest(path)
    for needle in (b"key 7", b"some text", manifest.fingerprint.encode()[:8]):
        place = content.index(needle)
        path.write_bytes(content[:place] + b"X" + content[place + 1 :])
        with pytest.raises(SourceError, match="damaged"):
            Manifest(path)
    path.write_bytes(content)
    assert len(Manifest(path)) == 20


def test_another_version_is_not_read(tmp_path, monkeypatch):
    write(tmp_path / "m.arrow", answer("a"))
    monkeypatch.setattr(module, "FORMAT_VERSION", 99)
    with pytest.raises(SourceError, match="another version"):
        Manifest(tmp_path / "m.arrow")


def test_columns_of_another_version_are_not_read(tmp_path, monkeypatch):
    for field in module._SCHEMA:
        columns = [each for each in module._SCHEMA if each.name != field.name]
        with monkeypatch.context() as older:
            older.setattr(module, "_SCHEMA", pyarrow.schema(columns))
            older.setattr(module, "_refuse_double_keys", lambda manifest: None)
            write(tmp_path / "m.arrow", answer("a"))
        with pytest.raises(SourceError, match="another version"):
            Manifest(tmp_path / "m.arrow")


def test_two_rows_with_one_key_are_named(tmp_path):
    rows = [answer(f"k{i}") for i in range(30)]
    with pytest.raises(SourceError, match=r"'k7' stands for two rows, file:8 and file:31.*id="):
        write(tmp_path / "m.arrow", *rows, answer("k7"))
    assert list(tmp_path.iterdir()) == []


def test_no_rows_are_an_error(tmp_path):
    with pytest.raises(SourceError, match="no rows"):
        write(tmp_path / "m.arrow")


@pytest.mark.parametrize(
    ("example", "words"),
    [
        (answer("k", Text("half \ud83d")), "unpaired surrogate"),
        (answer("\ud83d"), "unpaired surrogate"),
        (answer("k", tools=({"when": b"1"},)), "JSON has no form"),
    ],
)
def test_what_cannot_be_kept_is_told_with_the_key(tmp_path, example, words):
    with pytest.raises(DataError, match=words) as caught:
        write(tmp_path / "m.arrow", example)
    assert caught.value.key == example.key


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SourceError, match="cache_dir="):
        write(tmp_path / "file" / "m.arrow", answer("a"))


def test_hashes_of_keys_are_pinned_and_salted():
    # Held-out rows stay held out between versions of this library.
    assert hash_keys(["a", "b"]).tolist() == [1173887007685966508, 705892731516543733]
    assert hash_keys(["a"], salt="x").tolist() != [1173887007685966508]
