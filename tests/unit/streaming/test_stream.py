"""The stream: every format read end to end, epochs, state, subsets, and what it says of itself."""

import io
import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from gemma_tuner.errors import ConfigError, DataError, ResumeError, SourceError
from gemma_tuner.records import Audio, Image
from gemma_tuner.sources.rows import AUDIO_PROMPT, IMAGE_PROMPT
from gemma_tuner.streaming import spool as module
from gemma_tuner.streaming.opening import stream_local

CHAT = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    return tmp_path / "home"


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_pairs(path, count, **more):
    rows = [{"prompt": f"Q{i}", "response": f"A{i}", **more} for i in range(count)]
    return write_lines(path, rows)


def picture(colour=(255, 0, 0)):
    file = io.BytesIO()
    PIL.Image.new("RGB", (6, 4), colour).save(file, "PNG")
    return file.getvalue()


def sound(seconds=0.5, rate_hz=8000):
    file = io.BytesIO()
    samples = 0.3 * np.sin(np.arange(int(seconds * rate_hz)) / 10)
    soundfile.write(file, samples, rate_hz, format="WAV")
    return file.getvalue()


def texts(example):
    return [turn.text for turn in example.turns]


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_pairs_of_each_file_format(tmp_path, suffix):
    path = tmp_path / f"data.{suffix}"
    if suffix == "jsonl":
        write_lines(path, [{"question": "Q", "answer": "A"}])
    elif suffix == "csv":
        path.write_text("question,answer\nQ,A\n")
    else:
        pq.write_table(pa.table({"question": ["Q"], "answer": ["A"]}), path)
    stream = stream_local(path)
    assert texts(stream[0]) == ["Q", "A"]
    assert stream[0].key == f"data.{suffix}:1"
    assert stream.report().format == suffix


def test_chats_and_documents(tmp_path):
    row = {"messages": CHAT, "tools": [{"function": {"name": "f"}}]}
    example = stream_local(write_lines(tmp_path / "a.jsonl", [row]))[0]
    assert texts(example) == ["Q", "A"]
    assert example.tools == ({"function": {"name": "f"}},)
    assert stream_local(write_lines(tmp_path / "b.jsonl", [{"text": "T"}]))[0].document == "T"
    pq.write_table(pa.table({"messages": [CHAT, CHAT]}), tmp_path / "c.parquet")
    assert texts(stream_local(tmp_path / "c.parquet")[1]) == ["Q", "A"]


def test_media_come_decoded_whether_in_files_or_inline(tmp_path):
    (tmp_path / "a.png").write_bytes(picture())
    (tmp_path / "a.wav").write_bytes(sound())
    rows = [{"image": "a.png", "audio": ["a.wav", "a.wav"], "question": "Q", "answer": "A"}]
    example = stream_local(write_lines(tmp_path / "metadata.jsonl", rows))[0]
    image, first, second = example.media
    assert isinstance(image, Image)
    assert isinstance(image.source, PIL.Image.Image)
    assert image.source.getpixel((0, 0)) == (255, 0, 0)
    for part in (first, second):
        assert isinstance(part, Audio)
        assert isinstance(part.source, np.ndarray)
        assert part.sample_rate_hz == 16_000
        assert len(part.source) == 8_000
    table = pa.table(
        {
            "image": [{"bytes": picture((0, 255, 0)), "path": "gone.png"}],
            "caption": ["Green."],
        }
    )
    pq.write_table(table, tmp_path / "b.parquet")
    stream = stream_local(tmp_path / "b.parquet")
    (image,) = stream[0].media
    assert isinstance(image.source, PIL.Image.Image)
    assert image.source.getpixel((0, 0)) == (0, 255, 0)
    assert texts(stream[0]) == [IMAGE_PROMPT, "Green."]
    assert f"default prompt {IMAGE_PROMPT!r}: 1" in str(stream.report())
    table = pa.table({"audio": [{"array": [0.0] * 800, "sampling_rate": 8000}], "text": ["A"]})
    pq.write_table(table, tmp_path / "c.parquet")
    (audio,) = stream_local(tmp_path / "c.parquet")[0].media
    assert isinstance(audio.source, np.ndarray)
    assert len(audio.source) == 1_600


def test_the_folder_of_captions_and_of_an_imagefolder(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "pairs").mkdir(exist_ok=True)
        (tmp_path / "pairs" / f"{name}.wav").write_bytes(sound())
        (tmp_path / "pairs" / f"{name}.txt").write_text(f"Word {name}.\n")
    stream = stream_local(tmp_path / "pairs")
    assert [texts(stream[i]) for i in range(2)] == [
        [AUDIO_PROMPT, "Word a."],
        [AUDIO_PROMPT, "Word b."],
    ]
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x.png").write_bytes(picture())
    (tmp_path / "folder" / "metadata.csv").write_text("file_name,text\nx.png,Red.\n")
    example = stream_local(tmp_path / "folder")[0]
    assert example.key == "metadata.csv:1"
    assert texts(example)[1] == "Red."
    assert len(list(example.media)) == 1


def test_one_iteration_is_one_epoch_in_an_order_of_its_own(tmp_path):
    stream = stream_local(write_pairs(tmp_path / "a.jsonl", 50))
    first, second = [e.key for e in stream], [e.key for e in stream]
    in_order = [f"a.jsonl:{i}" for i in range(1, 51)]
    assert sorted(first) == sorted(second) == sorted(in_order)
    assert first != second
    assert first != in_order
    assert [e.key for e in stream_local(tmp_path / "a.jsonl")] == first
    assert [e.key for e in stream_local(tmp_path / "a.jsonl", seed=1)] != first
    assert [e.key for e in stream_local(tmp_path / "a.jsonl", shuffle=False)] == in_order


def test_an_iteration_left_early_is_left_for_good(tmp_path):
    stream = stream_local(write_pairs(tmp_path / "a.jsonl", 10))
    whole = stream_local(tmp_path / "a.jsonl")
    list(whole)
    next(iter(stream))
    iter(stream)  # begins an epoch, and hands nothing out
    assert [e.key for e in stream] == [e.key for e in whole]
    assert stream.state_dict()["epoch"] == 1


def test_only_the_latest_iterator_lives(tmp_path):
    stream = stream_local(write_pairs(tmp_path / "a.jsonl", 10))
    first = iter(stream)
    next(first)
    second = iter(stream)
    next(second)
    with pytest.raises(ConfigError, match="one iterator at a time"):
        next(first)
    stream.load_state_dict(stream.state_dict())
    with pytest.raises(ConfigError, match="one iterator at a time"):
        next(second)


def test_a_state_at_the_end_of_an_epoch_begins_the_next(tmp_path):
    whole = stream_local(write_pairs(tmp_path / "a.jsonl", 7))
    epochs = [[e.key for e in whole] for _ in range(2)]
    stream = stream_local(tmp_path / "a.jsonl")
    iterator = iter(stream)
    for _ in range(7):
        next(iterator)
    state = json.loads(json.dumps(stream.state_dict()))
    assert (state["epoch"], state["position"]) == (0, 7)
    again = stream_local(tmp_path / "a.jsonl")
    again.load_state_dict(state)
    assert [e.key for e in again] == epochs[1]


def test_a_state_of_another_stream_is_refused_by_what_differs(tmp_path):
    stream = stream_local(write_pairs(tmp_path / "a.jsonl", 20))
    state = stream.state_dict()
    others = {
        "seed": stream_local(tmp_path / "a.jsonl", seed=5),
        "shuffle": stream_local(tmp_path / "a.jsonl", shuffle=False),
        "rows": stream.take(3),
        "subset": stream.split(0.5)[0],
        "fingerprint": stream_local(write_pairs(tmp_path / "b.jsonl", 20, system="S")),
    }
    for name, other in others.items():
        with pytest.raises(ResumeError, match=rf"\b{name}[\w ]*: .* → "):
            other.load_state_dict(state)
    for change, words in (
        ({"version": 0}, "version: 0 → 2"),
        ({"position": 21}, "position 21 of 20"),
        ({"position": -1}, "position -1"),
        ({"epoch": "1"}, "epoch '1'"),
    ):
        with pytest.raises(ResumeError, match=words):
            stream.load_state_dict({**state, **change})
    with pytest.raises(ResumeError, match="lacks version"):
        stream.load_state_dict({})
    with pytest.raises(ResumeError, match="not a dictionary"):
        stream.load_state_dict(None)


def test_an_example_that_fails_is_not_counted_and_comes_again(tmp_path):
    (tmp_path / "a.png").write_bytes(picture())
    (tmp_path / "b.png").write_bytes(picture())
    rows = [{"image": f"{name}.png", "caption": "C"} for name in "aba"]
    stream = stream_local(write_lines(tmp_path / "m.jsonl", rows), shuffle=False)
    (tmp_path / "b.png").write_bytes(b"not a picture")
    iterator = iter(stream)
    assert next(iterator).key == "m.jsonl:1"
    for _ in range(2):
        with pytest.raises(DataError) as caught:
            next(iterator)
        assert caught.value.key == "m.jsonl:2"
        assert stream.state_dict()["position"] == 1
    (tmp_path / "b.png").write_bytes(picture())
    assert [e.key for e in iterator] == ["m.jsonl:2", "m.jsonl:3"]


def test_rows_by_index(tmp_path):
    stream = stream_local(write_pairs(tmp_path / "a.jsonl", 5))
    assert [stream[i].key for i in (0, 4, -1, -5)] == [f"a.jsonl:{i}" for i in (1, 5, 5, 1)]
    index: Any = np.int64(1)
    assert stream[index].key == "a.jsonl:2"
    for index in (5, -6):
        with pytest.raises(IndexError):
            stream[index]
    assert stream.state_dict()["position"] == 0


def test_take_keeps_the_first_rows(tmp_path):
    stream = stream_local(write_pairs(tmp_path / "a.jsonl", 9), seed=3)
    taken = stream.take(4)
    assert len(taken) == 4
    assert {e.key for e in taken} == {f"a.jsonl:{i}" for i in range(1, 5)}
    assert taken.report().seed == 3
    assert len(stream.take(100)) == 9
    bad: Any
    for bad in (0, -1, 2.0, True):
        with pytest.raises(ConfigError, match="take"):
            stream.take(bad)


def test_split_divides_by_keys_and_stays_when_rows_are_added(tmp_path):
    def sides(path, fraction=0.3):
        rest, held_out = stream_local(path, seed=2).split(fraction)
        assert rest.report().seed == held_out.report().seed == 2
        return [{e.key for e in side} for side in (rest, held_out)]

    rows = [{"id": f"k{i}", "prompt": "Q", "response": "A"} for i in range(400)]
    rest, held_out = sides(write_lines(tmp_path / "a.jsonl", rows[:200]))
    assert rest | held_out == {f"k{i}" for i in range(200)}
    assert not rest & held_out
    assert 35 < len(held_out) < 85
    more_rest, more_held_out = sides(write_lines(tmp_path / "b.jsonl", rows[::-1]))
    assert rest < more_rest
    assert held_out < more_held_out
    _, larger = sides(tmp_path / "a.jsonl", 0.5)
    assert held_out < larger


def test_a_split_of_a_split_divides_anew(tmp_path):
    rest, _ = stream_local(write_pairs(tmp_path / "a.jsonl", 400)).split(0.5)
    again, held_out = rest.split(0.25)
    assert 0.15 < len(held_out) / len(rest) < 0.35
    assert len(again) + len(held_out) == len(rest)
    assert held_out.report().subset == "all, split 0.5 rest, split 0.25 held out"
    assert len(rest.take(10).split(0.5)[0]) < 10


def test_splits_that_cannot_be(tmp_path):
    stream = stream_local(write_pairs(tmp_path / "a.jsonl", 2))
    fraction: Any
    for fraction in (0, 1, 0.0, 1.5, -1, float("nan"), "0.1", True):
        with pytest.raises(ConfigError, match="between 0 and 1"):
            stream.split(fraction)
    with pytest.raises(SourceError, match="leaves none held out"):
        stream.split(1e-6)
    with pytest.raises(SourceError, match="leaves none rest"):
        stream.split(1 - 1e-6)


def test_settings_that_cannot_work(tmp_path):
    path = write_pairs(tmp_path / "a.jsonl", 2)
    settings: dict[str, Any]
    wrong = ({"seed": 1.5}, {"seed": True}, {"shuffle": 1}, {"locality": "file"})
    for settings in (*wrong, {"prompt": 3}, {"id": True}):
        for place in (path, tmp_path / "absent.jsonl"):  # told before anything is looked for
            with pytest.raises(ConfigError, match=next(iter(settings))):
                stream_local(place, **settings)


def test_the_manifest_is_reused_until_the_data_change(tmp_path, home, monkeypatch):
    path = write_pairs(tmp_path / "a.jsonl", 3)
    first = stream_local(path)
    (file,) = (home / ".cache" / "gemma_tuner" / "manifests").iterdir()
    assert first.report().manifest == file
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_manifest", None)  # would fail if it were called
        again = stream_local(path, seed=4, shuffle=False)
    assert [e.key for e in again] == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3"]
    assert again.report().columns == first.report().columns
    assert len(stream_local(write_pairs(path, 4))) == 4
    assert len(stream_local(path, cache_dir=tmp_path / "cache")) == 4
    assert len(list((tmp_path / "cache" / "manifests").iterdir())) == 1


def test_a_damaged_manifest_is_written_anew(tmp_path, caplog):
    path = write_pairs(tmp_path / "a.jsonl", 30)
    stream = stream_local(path)
    state = stream.state_dict()
    file = stream.report().manifest
    content = bytearray(file.read_bytes())
    content[content.index(b"Q7")] ^= 1
    file.unlink()  # the stream above still reads the old file
    file.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        again = stream_local(path)
    assert "written anew" in caplog.text
    again.load_state_dict(state)
    assert [e.key for e in again] == [e.key for e in stream]


def test_moving_the_data_moves_nothing_else(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").write_bytes(picture())
    rows = [{"image": "x.png", "caption": str(i)} for i in range(9)]
    write_lines(tmp_path / "a" / "metadata.jsonl", rows)
    stream = stream_local(tmp_path / "a")
    next(iter(stream))
    state = stream.state_dict()
    shutil.move(tmp_path / "a", tmp_path / "b")
    moved = stream_local(tmp_path / "b")
    moved.load_state_dict(state)
    assert len(list(moved)) == 8


def test_double_keys_are_an_error_with_both_remedies(tmp_path):
    rows = [{"id": 1, "text": "a"}, {"id": 2, "text": "b"}, {"id": 1, "text": "c"}]
    path = write_lines(tmp_path / "a.jsonl", rows)
    with pytest.raises(SourceError, match=r"'1' stands for two rows, a\.jsonl:1 and a\.jsonl:3"):
        stream_local(path)
    assert len(stream_local(path, id=False)) == 3


def test_faults_leave_no_manifest(tmp_path, home):
    path = write_lines(tmp_path / "a.jsonl", [{"prompt": "Q", "response": ""}])
    with pytest.raises(DataError):
        stream_local(path)
    assert list((home / ".cache" / "gemma_tuner" / "manifests").iterdir()) == []


def test_the_report_says_what_was_chosen_and_how_far_it_is(tmp_path):
    rows = [
        {"prompt": "Q", "response": "A", "split": split, "note": "n"}
        for split in ("train", "train", "test")
    ]
    stream = stream_local(write_lines(tmp_path / "a.jsonl", rows), seed=5)
    next(iter(stream))
    report = stream.report()
    assert report.rows_by_split == {"train": 2, "test": 1}
    assert report.unused_columns == ("note",)
    assert (report.rows, report.files, report.position, report.handed_out) == (2, 1, 1, 1)
    assert report.manifest_bytes == report.manifest.stat().st_size
    text = str(report)
    for words in (
        "2 rows (all) of 1 jsonl file, read as prompt and response",
        "prompt = 'prompt'",
        "columns not used: 'note'",
        "by split: train 2, test 1",
        "rows of other splits not read (test): 1",
        "shuffled with seed 5; manifest",
        "epoch 0, 1 of 2 handed out",
    ):
        assert words in text


def test_the_preview_shows_keys_roles_text_and_sizes_and_moves_nothing(tmp_path):
    (tmp_path / "a.png").write_bytes(picture())
    (tmp_path / "a.wav").write_bytes(sound())
    rows = [
        {"image": "a.png", "audio": "a.wav", "prompt": "word " * 200, "response": "A"},
        {"image": "a.png", "audio": None, "prompt": "Q", "response": "B"},
    ]
    stream = stream_local(write_lines(tmp_path / "m.jsonl", rows))
    text = str(stream.preview())
    assert "m.jsonl:1\n  user: [image 6x4] [audio 0.50 s] word word" in text
    assert "(1,000 characters)" in text
    assert "m.jsonl:2\n  user: [image 6x4] Q\n  assistant: B" in text
    assert "m.jsonl:2" not in str(stream.preview(1))
    assert stream.state_dict()["position"] == 0


def test_a_run_continues_in_a_new_process(tmp_path):
    path = write_pairs(tmp_path / "a.jsonl", 40)
    cache = tmp_path / "cache"
    whole = stream_local(path, cache_dir=cache)
    expected = [e.key for _ in range(2) for e in whole]
    stream = stream_local(path, cache_dir=cache)
    iterator = iter(stream)
    begun = [next(iterator).key for _ in range(13)]
    code = (
        "import json, sys\n"
        "from gemma_tuner.streaming.opening import stream_local\n"
        f"stream = stream_local({str(path)!r}, cache_dir={str(cache)!r})\n"
        "stream.load_state_dict(json.load(sys.stdin))\n"
        "print(json.dumps([e.key for _ in range(2) for e in stream]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(stream.state_dict()),
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).resolve().parents[3],
    )
    assert begun + json.loads(done.stdout) == expected


@pytest.mark.parametrize("name", ["fsdd", "optdigits", "tuxpaint", "wikisql-mlx"])
def test_real_data_stream_through_decoding(shared_data, tmp_path, name):
    pair = {"prompt": "prompt", "response": "response"}  # tuxpaint has captions besides
    stream = stream_local(shared_data / name, cache_dir=tmp_path, split="test", **pair).take(60)
    examples = list(stream)
    assert len({e.key for e in examples}) == 60
    for part in (part for example in examples for part in example.media):
        assert not isinstance(part.source, str | bytes)
    assert "rows of the data by split" in str(stream.report())
