"""A part of a recording: the same samples as of the whole, and nothing else is decoded."""

import io

import numpy as np
import pytest
import soundfile

from gemma_tuner.errors import DataError
from gemma_tuner.media import audio
from gemma_tuner.media.audio import decode_audio
from gemma_tuner.media.load import load_media
from gemma_tuner.records import Audio, Example, Text, Turn
from gemma_tuner.streaming.opening import stream_local

RATE = 16_000
SAMPLES = np.random.default_rng(0).normal(0, 0.1, 4 * RATE).astype(np.float32)


def encode(container, subtype=None, rate_hz=RATE, samples=SAMPLES):
    content = io.BytesIO()
    soundfile.write(content, samples, rate_hz, format=container, subtype=subtype)
    return content.getvalue()


@pytest.mark.parametrize(
    ("container", "subtype", "tolerance"),
    [
        ("WAV", "PCM_16", 0),
        ("WAV", "FLOAT", 0),
        ("FLAC", "PCM_16", 0),
        ("AIFF", "PCM_16", 0),
        ("MP3", None, 1e-3),
        ("OGG", "VORBIS", 1e-3),
        ("OGG", "OPUS", 2e-2),
    ],
)
@pytest.mark.parametrize(("start", "duration"), [(0.0, 1.0), (1.5, 0.25), (3.0, 1.0)])
def test_a_segment_is_what_the_whole_holds_there(container, subtype, tolerance, start, duration):
    content = encode(container, subtype)
    whole = decode_audio(content, key="k")
    part = decode_audio(content, key="k", start_seconds=start, duration_seconds=duration)
    expected = whole[round(start * RATE) : round((start + duration) * RATE)]
    assert len(part) == len(expected) == round(duration * RATE)
    np.testing.assert_allclose(part, expected, atol=tolerance, rtol=0)


def test_nothing_but_the_segment_is_decoded(monkeypatch):
    read, num_frames = soundfile.SoundFile.read, []

    def count(self, frames=-1, *args, **keywords):
        num_frames.append(frames)
        return read(self, frames, *args, **keywords)

    monkeypatch.setattr(soundfile.SoundFile, "read", count)
    decode_audio(encode("FLAC"), key="k", start_seconds=2.0, duration_seconds=0.5)
    assert num_frames == [RATE // 2]


def test_a_segment_of_a_recording_that_is_too_long_itself(monkeypatch):
    monkeypatch.setattr(audio, "MAX_SECONDS", 3.0)
    with pytest.raises(DataError, match="cut it into clips"):
        decode_audio(encode("WAV"), key="k")
    part = decode_audio(encode("WAV"), key="k", start_seconds=1, duration_seconds=2)
    assert len(part) == 2 * RATE


@pytest.mark.parametrize(
    ("start", "duration"), [(3.5, 1.0), (5.0, 1.0), (-1.0, 1.0), (1.0, 0.0), (None, 2.0)]
)
@pytest.mark.parametrize("is_encoded", [True, False])
def test_what_lies_outside_is_the_error_of_its_row(start, duration, is_encoded):
    source, rate = (encode("WAV"), None) if is_encoded else (SAMPLES, RATE)
    with pytest.raises(DataError, match=r"has 4\.00 seconds, and its row") as caught:
        decode_audio(
            source,
            key="k",
            sample_rate_hz=rate,
            start_seconds=start,
            duration_seconds=duration,
        )
    assert caught.value.key == "k"


@pytest.mark.parametrize("duration", [4.0, 3.95, 4.04])
def test_a_length_that_is_rounded_is_the_length(duration):
    assert len(decode_audio(encode("WAV"), key="k", duration_seconds=duration)) == 4 * RATE


def test_ends_that_are_rounded_up_end_with_the_recording():
    part = decode_audio(encode("WAV"), key="k", start_seconds=3.0, duration_seconds=1.05)
    assert len(part) == RATE


def test_loading_cuts_once():
    turns = (Turn("user", (Audio(encode("WAV"), None, 1.0, 0.5), Text("Q"))),)
    loaded = load_media(Example("k", (*turns, Turn("assistant", (Text("A"),)))))
    (clip,) = loaded.media
    assert (len(clip.source), clip.start_seconds) == (RATE // 2, None)
    assert load_media(loaded) is loaded


def test_segments_pass_through_the_manifest(tmp_path):
    soundfile.write(tmp_path / "a.wav", SAMPLES, RATE)
    path = tmp_path / "a.jsonl"
    path.write_text('{"audio": "a.wav", "offset": 1, "duration": 0.5, "text": "A"}\n')
    stream = stream_local(path, cache_dir=tmp_path / "cache")
    (kept,) = stream.views[0].manifest.read_example(0).media
    assert (kept.start_seconds, kept.duration_seconds) == (1.0, 0.5)
    (clip,) = stream[0].media
    assert len(clip.source) == RATE // 2
