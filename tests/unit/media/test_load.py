"""Whole examples: every part decoded in its place."""

import io

import numpy as np
import PIL.Image
import pytest
import soundfile

from gemma_tuner.errors import DataError
from gemma_tuner.media.load import load_media
from gemma_tuner.records import Audio, Example, Image, Text, Turn


@pytest.fixture
def folder(tmp_path):
    PIL.Image.new("RGBA", (6, 4), (255, 0, 0, 255)).save(tmp_path / "red.png")
    (tmp_path / "clips").mkdir()
    soundfile.write(tmp_path / "clips" / "tone.wav", np.full((800, 2), 0.25, np.float32), 8_000)
    return tmp_path


def make_example(*parts) -> Example:
    return Example(
        key="set/1",
        turns=(Turn("user", parts), Turn("assistant", (Text("yes"),), {"reasoning": "because"})),
    )


def test_decodes_every_part_in_its_place(folder):
    blue = io.BytesIO()
    PIL.Image.new("L", (3, 3), 255).save(blue, "PNG")
    example = make_example(
        Text("a"), Image("red.png"), Text("b"), Audio("clips/tone.wav"), Image(blue.getvalue())
    )
    loaded = load_media(example, root=folder)
    first, red, second, tone, white = loaded.turns[0].parts
    assert (first, second) == (Text("a"), Text("b"))
    assert (red.source.mode, red.source.size) == ("RGB", (6, 4))
    assert red.source.getpixel((0, 0)) == (255, 0, 0)
    assert white.source.getpixel((0, 0)) == (255, 255, 255)
    assert tone.sample_rate_hz == 16_000
    assert tone.source.shape == (1_600,)
    assert tone.source.dtype == np.float32
    assert loaded.turns[1] is example.turns[1]
    assert loaded.key == example.key
    assert example.turns[0].parts[1] == Image("red.png")  # the original is untouched


def test_is_idempotent_and_costs_nothing_when_done(folder):
    loaded = load_media(make_example(Image("red.png"), Audio("clips/tone.wav")), root=folder)
    assert load_media(loaded) is loaded
    text = make_example(Text("only text"))
    assert load_media(text, root=folder) is text
    document = Example(key="d", document="plain")
    assert load_media(document) is document


def test_paths_are_relative_to_root_or_the_working_directory(folder, monkeypatch):
    absolute = make_example(Image(str(folder / "red.png")))
    assert load_media(absolute, root=folder / "clips").turns[0].parts[0].source.size == (6, 4)
    monkeypatch.chdir(folder)
    assert load_media(make_example(Image("red.png"))).turns[0].parts[0].source.size == (6, 4)


def test_decoded_forms_are_brought_to_the_same_shape():
    grey = PIL.Image.new("L", (2, 2), 7)
    samples = np.zeros((80, 2), np.int16)
    loaded = load_media(make_example(Image(grey), Audio(samples, sample_rate_hz=8_000)))
    assert loaded.turns[0].parts[0].source.mode == "RGB"
    assert loaded.turns[0].parts[1].source.shape == (160,)


@pytest.mark.parametrize("uri", ["gs://bucket/a", "https://host/a", "http://host/a", "s3://b/a"])
@pytest.mark.parametrize("part", [Image, Audio])
def test_fetches_nothing(uri, part, tmp_path):
    with pytest.raises(DataError, match="fetches nothing; read the example through a stream"):
        load_media(make_example(part(uri)), root=tmp_path)


def test_errors_carry_the_key(folder):
    for part in (Image("none.png"), Audio("none.wav"), Image("clips/tone.wav"), Audio("red.png")):
        with pytest.raises(DataError) as caught:
            load_media(make_example(part), root=folder)
        assert caught.value.key == "set/1"
