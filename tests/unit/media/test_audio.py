"""Sound of every container, rate and channel count, and every kind of damage."""

import io
import math
import os
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_tuner.errors import DataError
from gemma_tuner.media import audio
from gemma_tuner.media.audio import MAX_FRAMES, SAMPLE_RATE_HZ, decode_audio

CONTAINERS = [
    ("WAV", "PCM_16"),
    ("WAV", "FLOAT"),
    ("FLAC", "PCM_16"),
    ("MP3", None),
    ("OGG", "VORBIS"),
    ("OGG", "OPUS"),
]


def make_tone(hz, rate_hz, seconds=1.0, peak=0.5) -> np.ndarray:
    frames = np.arange(round(seconds * rate_hz))
    return (peak * np.sin(2 * np.pi * hz * frames / rate_hz)).astype(np.float32)


def make_noise(num_frames, num_channels=1) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, 0.1, (num_frames, num_channels))
    return noise.astype(np.float32).squeeze(axis=1) if num_channels == 1 else noise


def encode(samples, rate_hz=SAMPLE_RATE_HZ, format="WAV", subtype=None) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate_hz, format=format, subtype=subtype)
    return buffer.getvalue()


def measure_db(samples, peak=0.5) -> float:
    """Level against a sine of that peak, clear of both ends."""
    middle = samples[len(samples) // 8 : -len(samples) // 8].astype(np.float64)
    return 20 * math.log10(np.sqrt(np.mean(middle**2)) * math.sqrt(2) / peak + 1e-12)


@pytest.mark.parametrize("subtype", ["PCM_16", "FLOAT"])
@pytest.mark.parametrize("format", ["WAV", "FLAC"])
def test_16_khz_passes_bit_for_bit(format, subtype, tmp_path):
    if (format, subtype) == ("FLAC", "FLOAT"):
        subtype = "PCM_24"
    samples = np.round(make_noise(5_000) * 32_768) / np.float32(32_768)
    path = tmp_path / "clip"
    path.write_bytes(encode(samples, format=format, subtype=subtype))
    for source in (path, str(path), path.read_bytes()):
        decoded = decode_audio(source, key="a")
        assert decoded.dtype == np.float32
        assert decoded.flags.c_contiguous
        np.testing.assert_array_equal(decoded, samples)


def test_returns_finished_samples_themselves():
    samples = make_noise(100)
    assert decode_audio(samples, key="a", sample_rate_hz=16_000) is samples


@pytest.mark.parametrize(("format", "subtype"), CONTAINERS)
@pytest.mark.parametrize("num_channels", [1, 2])
@pytest.mark.parametrize("rate_hz", [16_000, 48_000])
def test_reads_every_container(format, subtype, num_channels, rate_hz):
    tone = make_tone(440, rate_hz)
    samples = tone if num_channels == 1 else np.stack([tone] * num_channels, axis=1)
    decoded = decode_audio(encode(samples, rate_hz, format, subtype), key="a")
    assert decoded.shape == (16_000,)
    assert decoded.dtype == np.float32
    assert measure_db(decoded) == pytest.approx(0, abs=0.2)
    assert np.argmax(np.abs(np.fft.rfft(decoded))) == 440


def test_channels_are_averaged():
    stereo = np.stack([np.full(800, 0.5), np.full(800, -0.25)], axis=1).astype(np.float32)
    for source, rate_hz in [(encode(stereo, subtype="FLOAT"), None), (stereo, 16_000)]:
        decoded = decode_audio(source, key="a", sample_rate_hz=rate_hz)
        np.testing.assert_array_equal(decoded, np.full(800, 0.125, np.float32))


def test_many_channels_and_blocks_join_without_a_seam(monkeypatch):
    samples = make_noise(1_001, 8)
    whole = decode_audio(encode(samples, subtype="FLOAT"), key="a")
    monkeypatch.setattr(audio, "_BLOCK_SAMPLES", 80)
    np.testing.assert_array_equal(decode_audio(encode(samples, subtype="FLOAT"), key="a"), whole)
    np.testing.assert_allclose(whole, samples.mean(axis=1), atol=1e-6)


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "uint8", "uint16"])
def test_integers_are_scaled_to_full_range(dtype):
    info = np.iinfo(dtype)
    middle = 0 if info.min < 0 else 2 ** (info.bits - 1)
    samples = np.array([info.min, middle, info.max], dtype)
    decoded = decode_audio(samples, key="a", sample_rate_hz=16_000)
    np.testing.assert_allclose(
        decoded, [-1, 0, 1 - 2.0 ** (1 - info.bits)], atol=1e-6
    )  # float32, summed in another order


def test_integers_agree_with_the_same_sound_in_a_file():
    samples = (make_noise(500) * 32_768).astype(np.int16)
    np.testing.assert_array_equal(
        decode_audio(samples, key="a", sample_rate_hz=16_000),
        decode_audio(encode(samples), key="a"),
    )


@pytest.mark.parametrize("dtype", ["float16", "float64", ">f4"])
def test_other_floats_become_float32(dtype):
    decoded = decode_audio(np.array([0.5, -0.25], dtype), key="a", sample_rate_hz=16_000)
    assert decoded.dtype == np.float32
    assert decoded.dtype.isnative
    np.testing.assert_array_equal(decoded, [0.5, -0.25])


def test_peaks_beyond_full_scale_are_kept():
    samples = np.array([1.5, -2.0, 0.5], np.float32)
    np.testing.assert_array_equal(decode_audio(encode(samples, subtype="FLOAT"), key="a"), samples)
    unscaled = make_noise(10) * np.float32(32_768)
    with pytest.raises(DataError, match="divide them by their full range"):
        decode_audio(unscaled, key="a", sample_rate_hz=16_000)


@pytest.mark.parametrize("rate_hz", [44_100, 48_000, 44_099, 96_000])
def test_passes_7_khz_and_stops_9_khz(rate_hz):
    passed = decode_audio(make_tone(7_000, rate_hz), key="a", sample_rate_hz=rate_hz)
    stopped = decode_audio(make_tone(9_000, rate_hz), key="a", sample_rate_hz=rate_hz)
    assert abs(measure_db(passed)) < 0.1
    assert measure_db(stopped) <= -55


@pytest.mark.parametrize(
    "rate_hz", [8_000, 11_025, 22_050, 24_000, 32_000, 44_100, 48_000, 96_000]
)
def test_resamples_to_the_same_tone_in_place(rate_hz):
    resampled = decode_audio(make_tone(440, rate_hz), key="a", sample_rate_hz=rate_hz)
    assert resampled.flags.c_contiguous
    np.testing.assert_allclose(resampled[800:-800], make_tone(440, 16_000)[800:-800], atol=2e-5)


@pytest.mark.parametrize(
    ("num_frames", "rate_hz", "expected"),
    # ceil(frames * 16000 / rate): written out, not computed.
    [
        (44_100, 44_100, 16_000),
        (44_101, 44_100, 16_001),
        (100, 44_100, 37),
        (1, 48_000, 1),
        (4, 48_000, 2),
        (2_384, 8_000, 4_768),
        (11_025, 11_025, 16_000),
        (96_000, 96_000, 16_000),
        (44_099, 44_099, 16_000),
    ],
)
def test_resampled_lengths(num_frames, rate_hz, expected):
    samples = np.zeros(num_frames, np.float32)
    assert decode_audio(samples, key="a", sample_rate_hz=rate_hz).shape == (expected,)


@pytest.mark.parametrize("rate_hz", [44_099, 7_999, 15_999, 16_001, 191_999, 1_000, 768_000])
def test_odd_rates_keep_pitch_within_bounded_memory(rate_hz):
    build = audio._build_resampler
    build.cache_clear()
    resampled = decode_audio(make_tone(300, rate_hz), key="a", sample_rate_hz=rate_hz)
    assert len(resampled) == pytest.approx(16_000, abs=4)  # 0.24 ms
    assert np.argmax(np.abs(np.fft.rfft(resampled, 16_000))) == 300
    fraction = audio.Fraction(16_000, rate_hz).limit_denominator(2048)
    if fraction != 1:  # 1 Hz off is taken as 16 kHz
        assert build(fraction).get_buffer("kernel").nbytes < 64e6


def test_read_only_samples_resample_without_a_warning(recwarn):
    samples = make_tone(440, 8_000)
    samples.flags.writeable = False
    decode_audio(samples, key="a", sample_rate_hz=8_000)
    assert not [warning for warning in recwarn if "writable" in str(warning.message)]


@pytest.mark.parametrize(("format", "subtype"), [*CONTAINERS, ("AIFF", "PCM_16")])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_refuses_truncated_files(format, subtype, share):
    encoded = encode(make_noise(32_000), format=format, subtype=subtype)
    with pytest.raises(DataError, match=r"fetch it again|cannot be decoded|is empty") as caught:
        decode_audio(encoded[: int(len(encoded) * share)], key="set/1")
    assert caught.value.key == "set/1"


@pytest.mark.parametrize("size", [b"\0\0\0\0", b"\xff\xff\xff\xff"])
def test_reads_wav_written_to_a_pipe(size):
    """Such writers cannot go back to fill in the lengths."""
    samples = make_noise(1_000)
    encoded = bytearray(encode(samples, subtype="PCM_16"))
    encoded[4:8] = size
    if size != b"\0\0\0\0":
        encoded[40:44] = size
    assert len(decode_audio(bytes(encoded), key="a")) == 1_000


def test_refuses_flac_without_a_length():
    encoded = bytearray(encode(make_noise(1_000), format="FLAC"))
    encoded[21] &= 0xF0
    encoded[22:26] = bytes(4)
    with pytest.raises(DataError, match="does not say how long it is"):
        decode_audio(bytes(encoded), key="a")


def test_refuses_flac_that_promises_more_than_it_holds():
    encoded = bytearray(encode(make_noise(1_000), format="FLAC"))
    encoded[22:26] = (5_000).to_bytes(4, "big")
    with pytest.raises(DataError, match=r"cannot be decoded|of its 5,000 frames"):
        decode_audio(bytes(encoded), key="a")


def test_refuses_a_long_sound_from_its_header():
    """Silence packs to nothing: two hours of it must not be unpacked to find out."""
    encoded = bytearray(encode(np.zeros(1_000, np.int16), format="FLAC"))
    encoded[22:26] = (7_200 * 16_000).to_bytes(4, "big")
    tracemalloc.start()
    with pytest.raises(DataError, match=r"7,200\.0 seconds of 1 channels at 16000 Hz"):
        decode_audio(bytes(encoded), key="a")
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()


def test_limits_hold_for_arrays_and_for_frames():
    hour = np.broadcast_to(np.float32(0), (3_600 * 1_000 + 1,))
    with pytest.raises(DataError, match=r"3,600\.0 seconds.*cut it into clips"):
        decode_audio(hour, key="a", sample_rate_hz=1_000)
    frames = np.broadcast_to(np.float32(0), (MAX_FRAMES + 1,))
    with pytest.raises(DataError, match="172,800,000 frames"):
        decode_audio(frames, key="a", sample_rate_hz=96_000)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_refuses_samples_that_are_not_finite(bad):
    samples = make_noise(1_600)
    samples[[3, 5]] = bad
    for source, rate_hz in [(encode(samples, subtype="FLOAT"), None), (samples, 16_000)]:
        with pytest.raises(DataError, match=r"2 samples that are not finite.*0\.10 seconds"):
            decode_audio(source, key="a", sample_rate_hz=rate_hz)


@pytest.mark.parametrize(
    ("source", "rate_hz", "message"),
    [
        (np.zeros(9, np.float32), None, "no sample rate; give sample_rate_hz"),
        (np.zeros(9, np.float32), 0, "sample rate of 0 Hz"),
        (np.zeros(9, np.float32), -16_000, "sample rate of -16000 Hz"),
        (np.zeros(9, np.float32), 16_000.5, r"16000\.5 Hz"),
        (np.zeros(9, np.float32), 10**9, "1000000000 Hz"),
        (np.zeros(0, np.float32), 16_000, r"empty: 0\.0 seconds, 1 channels at 16000 Hz"),
        (np.zeros((0, 2), np.float32), 16_000, "empty"),
        (np.zeros((2, 900), np.float32), 16_000, r"shape \(2, 900\).*transpose"),
        (np.zeros(()), 16_000, r"shape \(\)"),
        (np.zeros((4, 1, 1), np.float32), 16_000, r"shape \(4, 1, 1\)"),
        (np.zeros(9, np.int64), 16_000, "int64 samples"),
        (np.zeros(9, bool), 16_000, "bool samples"),
        (np.zeros(9, complex), 16_000, "complex128 samples"),
        (b"", None, r"empty \(0 bytes\)"),
        (b"hello, this is no sound", None, "cannot be decoded.*ffmpeg"),
        (encode(np.zeros(0, np.int16)), None, "0.0 seconds"),
        (encode(np.zeros(9, np.int16), 8_000), 16_000, "recorded at 8000 Hz, and 16000 Hz"),
        ([0.0, 0.1], 16_000, "list"),
        ("https://host/clip.wav?secret=1", None, "https: URI"),
    ],
)
def test_refusals_name_the_example_the_value_and_a_remedy(source, rate_hz, message):
    with pytest.raises(DataError, match=message) as caught:
        decode_audio(source, key="set/9", sample_rate_hz=rate_hz)
    assert caught.value.key == "set/9"
    assert "secret" not in str(caught.value)


def test_refuses_a_header_without_a_rate():
    encoded = bytearray(encode(make_noise(100)))
    encoded[24:28] = bytes(4)
    with pytest.raises(DataError, match="cannot be decoded"):
        decode_audio(bytes(encoded), key="a")


def test_file_errors_name_the_file_and_not_its_folder(tmp_path):
    (tmp_path / "text.wav").write_text("hello")
    (tmp_path / "samples.raw").write_bytes(bytes(100))
    (tmp_path / "folder.wav").mkdir()
    for name, message in [
        ("text.wav", "cannot be decoded"),
        ("samples.raw", "no header"),
        ("folder.wav", "cannot be opened"),
        ("none.wav", "does not exist"),
    ]:
        with pytest.raises(DataError, match=message) as caught:
            decode_audio(tmp_path / name, key="a")
        assert repr(name) in str(caught.value)
        assert tmp_path.name not in str(caught.value)


def test_torch_is_not_imported_until_a_rate_must_change():
    code = (
        "import sys, numpy; from gemma_tuner.media.load import load_media;"
        "from gemma_tuner.media.audio import decode_audio;"
        "decode_audio(numpy.zeros(9, 'f4'), key='a', sample_rate_hz=16000);"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=dict(os.environ))


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_damage_anywhere_gives_samples_or_a_data_error(data):
    container, subtype = data.draw(st.sampled_from(CONTAINERS))
    encoded = bytearray(encode(make_noise(2_000), format=container, subtype=subtype))
    for _ in range(data.draw(st.integers(1, 4))):
        encoded[data.draw(st.integers(0, min(len(encoded), 400) - 1))] = data.draw(
            st.integers(0, 255)
        )
    encoded = encoded[: data.draw(st.integers(len(encoded) // 2, len(encoded)))]
    try:
        decoded = decode_audio(bytes(encoded), key="a")
    except DataError:
        return
    assert decoded.dtype == np.float32
    assert np.isfinite(decoded).all()


@given(
    st.integers(1, 3_000),
    st.sampled_from([8_000, 11_025, 22_050, 44_100, 48_000]),
    st.integers(1, 3),
)
@settings(max_examples=40, deadline=None)
def test_length_is_the_duration_for_any_clip(num_frames, rate_hz, num_channels):
    num_channels = min(num_channels, num_frames)
    samples = np.zeros((num_frames, num_channels), np.float32)
    decoded = decode_audio(samples, key="a", sample_rate_hz=rate_hz)
    assert len(decoded) == -(-num_frames * 16_000 // rate_hz)


@pytest.mark.parametrize("rate_hz", [8_000, 11_025, 22_050, 44_100, 48_000, 44_099, 96_000])
@pytest.mark.parametrize("extra", [0, 1, 7])
def test_long_clips_in_blocks_are_as_in_one(rate_hz, extra, monkeypatch):
    samples = make_noise(90_000 + extra)
    whole = decode_audio(samples, key="whole", sample_rate_hz=rate_hz)
    monkeypatch.setattr(audio, "_BLOCK_SAMPLES", 20_000)
    blocks = decode_audio(samples, key="blocks", sample_rate_hz=rate_hz)
    np.testing.assert_allclose(blocks, whole, atol=1e-6)  # float32, summed in another order
    assert len(blocks) == len(whole)


@pytest.mark.parametrize("container", ["WAV", "WAVEX", "AIFF", "AU", "CAF", "W64", "RF64", "NIST"])
def test_what_is_cut_is_refused_in_each_container_and_the_whole_is_heard(container):
    content = io.BytesIO()
    soundfile.write(content, np.zeros(16_000), 16_000, format=container, subtype="PCM_16")
    assert len(decode_audio(content.getvalue(), key="k")) == 16_000
    with pytest.raises(DataError, match="truncated"):
        decode_audio(content.getvalue()[:-8_000], key="k")
