"""MP3s with and without a header that says how long they are: every frame is heard."""

import io
import itertools

import numpy as np
import pytest
import soundfile

from gemma_tuner.media.audio import SAMPLE_RATE_HZ, decode_audio
from gemma_tuner.media.mp3 import _find_frames

RATES_HZ = (8_000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000)
DELAY_SECONDS = 0.150  # of encoder and decoder, and the last frame's rest: 1152 samples each


def encode(rate_hz, num_channels, mode, seconds=3.0):
    """Noise, then a faint tone: its first second takes most of the bits of a variable rate."""
    random = np.random.default_rng(rate_hz)
    frames = np.arange(round(seconds * rate_hz))
    samples = 0.01 * np.sin(2 * np.pi * 440 * frames / rate_hz)
    samples[:rate_hz] = random.normal(0, 0.2, rate_hz)
    stream = io.BytesIO()
    samples = np.tile(samples[:, None], num_channels)
    soundfile.write(
        stream, samples, rate_hz, format="MP3", bitrate_mode=mode, compression_level=0.5
    )
    return stream.getvalue()


def without_header(content):
    """As `lame -t` and pipes write it: the frame that holds the header is not there."""
    start, length = next(_find_frames(content))
    assert b"Xing" in content[start : start + length] or b"Info" in content[start : start + length]
    return content[start + length :]


@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE", "AVERAGE"])
@pytest.mark.parametrize(("rate_hz", "num_channels"), [*itertools.product(RATES_HZ, (1, 2))])
def test_every_frame_is_heard(rate_hz, num_channels, mode):
    content = encode(rate_hz, num_channels, mode)
    whole = decode_audio(content, key="whole")
    assert len(whole) == pytest.approx(3.0 * SAMPLE_RATE_HZ, abs=0.02 * SAMPLE_RATE_HZ)
    bare = without_header(content)
    samples_a_frame = 1152 if rate_hz >= 32_000 else 576
    seconds = len(list(_find_frames(bare))) * samples_a_frame / rate_hz
    heard = decode_audio(bare, key="bare")
    # Of the frames that are there, less the decoder's own delay of 529 samples.
    expected = seconds - 529 / rate_hz
    assert len(heard) == pytest.approx(expected * SAMPLE_RATE_HZ, abs=0.02 * SAMPLE_RATE_HZ)
    assert abs(len(heard) - len(whole)) < (DELAY_SECONDS + 3 * 1152 / rate_hz) * SAMPLE_RATE_HZ


def test_a_tag_of_a_player_before_or_behind_is_no_sound():
    bare = without_header(encode(44_100, 1, "VARIABLE"))
    heard = decode_audio(bare, key="bare")
    size = 300
    before = b"ID3\x04\x00\x00" + bytes([0, 0, size >> 7, size & 127]) + bytes(size)
    behind = b"TAG" + bytes(125)
    for content in (before + bare, bare + behind, before + bare + behind):
        np.testing.assert_array_equal(decode_audio(content, key="tagged"), heard)


def test_bytes_that_only_look_like_a_frame_are_none():
    noise = np.random.default_rng(1).integers(0, 256, 200_000, dtype=np.uint8).tobytes()
    assert len(list(_find_frames(noise))) < 3
