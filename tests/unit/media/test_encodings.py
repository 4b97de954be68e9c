"""Encodings of sound that people keep: the seconds heard are those that were recorded."""

import io
import sys

import av
import numpy as np
import PIL.Image
import pytest
import soundfile

from gemma_tuner.errors import DataError
from gemma_tuner.media.audio import SAMPLE_RATE_HZ, decode_audio
from gemma_tuner.media.image import decode_image
from gemma_tuner.media.mp3 import _find_frames
from tests.examples import picture

TOLERANCE = 0.020 * SAMPLE_RATE_HZ
# name -> how libsndfile writes it, and the most channels
ENCODINGS = {
    "mp3, constant": ({"format": "MP3", "bitrate_mode": "CONSTANT"}, 2),
    "mp3, variable": ({"format": "MP3", "bitrate_mode": "VARIABLE"}, 2),
    "mp3, average": ({"format": "MP3", "bitrate_mode": "AVERAGE"}, 2),
    "wav, 8 bits": ({"format": "WAV", "subtype": "PCM_U8"}, 6),
    "wav, 16 bits": ({"format": "WAV", "subtype": "PCM_16"}, 6),
    "wav, 24 bits": ({"format": "WAVEX", "subtype": "PCM_24"}, 6),
    "wav, float": ({"format": "WAV", "subtype": "FLOAT"}, 6),
    "wav, µ-law": ({"format": "WAV", "subtype": "ULAW"}, 2),
    "wav, GSM": ({"format": "WAV", "subtype": "GSM610"}, 1),
    "wav, ADPCM": ({"format": "WAV", "subtype": "MS_ADPCM"}, 2),
    "flac": ({"format": "FLAC"}, 6),
    "ogg, Vorbis": ({"format": "OGG", "subtype": "VORBIS"}, 6),
    "ogg, Opus": ({"format": "OGG", "subtype": "OPUS"}, 6),
    "aiff": ({"format": "AIFF"}, 6),
    "au": ({"format": "AU"}, 6),
    "caf": ({"format": "CAF"}, 6),
    "w64": ({"format": "W64"}, 6),
}
MP3_RATES_HZ = (8_000, 11_025, 16_000, 22_050, 44_100, 48_000)
OPUS_RATES_HZ = (8_000, 12_000, 16_000, 24_000, 48_000)
RATES_HZ = (8_000, 16_000, 22_050, 44_100, 48_000, 96_000)


def list_recordings(seconds):
    for name, (how, max_channels) in ENCODINGS.items():
        rates_hz = MP3_RATES_HZ if "mp3" in name else OPUS_RATES_HZ if "Opus" in name else RATES_HZ
        for rate_hz in rates_hz:
            for num_channels in (1, 2, 6):
                if num_channels <= max_channels:
                    yield name, how, rate_hz, num_channels, seconds


def record(how, rate_hz, num_channels, seconds):
    samples = np.random.default_rng(0).normal(0, 0.1, (round(rate_hz * seconds), num_channels))
    stream = io.BytesIO()
    soundfile.write(stream, samples, rate_hz, **how)
    return stream.getvalue()


def without_header(name, content, rate_hz):
    """What pipes leave: an MP3 without its first frame, others with sizes that say nothing."""
    if "mp3" in name:
        start, length = next(_find_frames(content))
        return content[start + length :], (1152 if rate_hz >= 32_000 else 576) * 2 / rate_hz
    for container in ("wav", "aiff"):
        if container in name:
            return content[:4] + b"\xff" * 4 + content[8:], 0.0
    return None, 0.0


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.007, 0.4, 3.0])
def test_the_seconds_heard_are_those_recorded(seconds):
    wrong = []
    for name, how, rate_hz, num_channels, _ in list_recordings(seconds):
        whole = record(how, rate_hz, num_channels, seconds)
        bare, lost = without_header(name, whole, rate_hz)
        # What no header tells is the encoder's delay and the rest of the last frame.
        for content, slack, kind in ((whole, 0.0, ""), (bare, 0.15 + lost, "without header")):
            if content is None:
                continue
            try:
                heard = len(decode_audio(content, key="clip")) / SAMPLE_RATE_HZ
            except DataError as error:
                wrong.append(f"{name} {kind} {rate_hz} Hz x{num_channels}: {error}")
                continue
            if abs(heard - seconds) > 0.020 + (slack if "mp3" in name else 0.0):
                wrong.append(f"{name} {kind} {rate_hz} Hz x{num_channels}: {heard:.3f} s")
    assert not wrong, "\n".join(wrong)


def encode(codec, container, seconds=1.0, rate_hz=48_000, layout="mono", loud=(0,)):
    """Encode through FFmpeg, with sound in some channels alone."""
    stream = io.BytesIO()
    num_channels = len(av.AudioLayout(layout).channels)
    samples = np.zeros((num_channels, round(rate_hz * seconds)), np.float32)
    samples[list(loud)] = np.sin(np.arange(samples.shape[1]) * 2 * np.pi * 300 / rate_hz) / 2
    with av.open(stream, "w", format=container) as opened:
        track = opened.add_stream(codec, rate=rate_hz, layout=layout, bit_rate=96_000)
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout=layout)
        frame.sample_rate = rate_hz
        context = track.codec_context
        resampler = av.AudioResampler(
            context.format, layout, rate_hz, frame_size=context.frame_size or 1024
        )
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            opened.mux(track.encode(part))
        opened.mux(track.encode(None))
    return stream.getvalue()


CONTAINERS = [
    ("aac", "mp4"),
    ("aac", "adts"),
    ("libopus", "webm"),
    ("libopus", "matroska"),
    ("wmav2", "asf"),
]


@pytest.mark.parametrize(("codec", "container"), CONTAINERS)
@pytest.mark.parametrize("seconds", [0.25, 2.0])
def test_containers_are_heard_whole_through_av(codec, container, seconds):
    heard = decode_audio(encode(codec, container, seconds), key="clip")
    # The encoder's own silence at both ends, of which its muxer tells nothing here.
    slack = 0.15 if container == "asf" else 0.03
    assert abs(len(heard) / SAMPLE_RATE_HZ - seconds) <= slack
    assert np.abs(heard).max() > 0.3


@pytest.mark.parametrize(("codec", "container"), [("aac", "mp4"), ("libopus", "webm")])
def test_a_container_that_is_cut_short_is_refused(codec, container):
    content = encode(codec, container, 3.0)
    with pytest.raises(DataError, match="truncated or damaged"):
        decode_audio(content[: len(content) * 2 // 3], key="clip")


def test_what_is_not_installed_is_named_with_the_remedy(monkeypatch):
    clip = encode("aac", "mp4")
    stream = io.BytesIO()
    import pillow_heif

    pillow_heif.from_pillow(picture(1, (40, 30))).save(stream)
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.delitem(PIL.Image.OPEN, "HEIF", raising=False)
    with pytest.raises(DataError, match=r"package av: pip install 'gemma_tuner\[media\]'"):
        decode_audio(clip, key="clip")
    with pytest.raises(
        DataError, match=r"package pillow-heif: pip install 'gemma_tuner\[media\]'"
    ):
        decode_image(stream.getvalue(), key="image")


def test_a_phones_heic_is_read():
    import pillow_heif

    stream = io.BytesIO()
    pillow_heif.from_pillow(picture(1, (40, 30))).save(stream)
    assert decode_image(stream.getvalue(), key="image").size == (40, 30)


@pytest.mark.parametrize(
    ("codec", "container"), [("pcm_s16le", "wav"), ("flac", "flac"), ("libopus", "ogg")]
)
def test_of_5_1_sound_the_voice_is_heard_and_the_deep_effects_are_not(codec, container):
    peaks = [
        np.abs(
            decode_audio(encode(codec, container, layout="5.1", loud=[channel]), key="clip")
        ).max()
        for channel in range(6)  # left, right, centre, effects, two behind
    ]
    # Of the shares 0.71 0.71 1 0 0.5 0.5, which sum to 3.41; half of full scale was encoded.
    expected = [0.5 * share / 3.414 for share in (0.707, 0.707, 1, 0, 0.5, 0.5)]
    assert peaks == pytest.approx(expected, abs=0.02)


def test_a_players_tag_before_flac_changes_nothing():
    content = record({"format": "FLAC"}, 16_000, 1, 0.5)
    tag = b"ID3\x04\x00\x00" + bytes([0, 0, 2, 44]) + bytes(300)
    np.testing.assert_array_equal(
        decode_audio(tag + content, key="tagged"), decode_audio(content, key="clip")
    )
