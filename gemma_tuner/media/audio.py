"""Encoded audio of any rate and channel count to 16 kHz mono float samples."""

from __future__ import annotations

import functools
import io
import math
import operator
import re
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal, NoReturn

import numpy as np
import soundfile

from gemma_tuner.errors import DataError
from gemma_tuner.media.containers import name_container, read_container
from gemma_tuner.media.encoded import describe_source, open_encoded
from gemma_tuner.media.mp3 import declare_length

if TYPE_CHECKING:
    from torchaudio.transforms import Resample

SAMPLE_RATE_HZ = 16_000
"""The rate that Gemma's audio towers hear.

Source: Gemma4AudioFeatureExtractor and Gemma3nAudioFeatureExtractor, sampling_rate.
"""

MAX_SECONDS = 3600.0
"""The longest clip decoded: an hour, though the models hear only 30 seconds of it."""

MAX_FRAMES = 3600 * 48_000
"""The most frames decoded, 0.7 GB of mono float32: an hour at 48 kHz, half of one at 96 kHz."""

# Rates outside these are damaged headers, not recordings.
_MIN_RATE_HZ, _MAX_RATE_HZ = 1_000, 768_000

# Samples may pass ±1 (a loud mix, a lossy coder's overshoot). 40 dB above full scale they are
# integers that nobody divided, which would shift every log-mel feature.
_MAX_PEAK = 100.0

# How far the end of a segment may lie behind that of the recording: both are often rounded.
_ROUNDING_SECONDS = 0.1

_BLOCK_SAMPLES = 1 << 20  # decoded at once, all channels together: 4 MB

_IN_BLOCKS = frozenset({"GSM610", "IMA_ADPCM", "MS_ADPCM"})  # whose last is filled up

_UNKNOWN_FRAMES = 2**63 - 1  # what libsndfile says of a FLAC stream without a length

# Rates that share no factor with 16,000 (44,099) would need a kernel of gigabytes, with one phase
# for each sample of a second. They are resampled by the nearest ratio of this many phases: the
# common rates exactly, the worst (a few Hz beside a round ratio) 0.24 ms off in each second.
_MAX_PHASES = 2048

# How much of each channel of 5.1 sound is heard in one; the deep effects are not. Arrays of
# microphones and others of many channels, whose files say nothing of places, are the mean of all.
# Source: ITU-R BS.775-4, annex 4, both sides together; the orders of WAVE_FORMAT_EXTENSIBLE and
# FLAC, and of Vorbis and Opus (Vorbis I specification, 4.3.9).
_SIDE, _SURROUND = 2**-0.5, 0.5
_ORDER = (_SIDE, _SIDE, 1.0, 0.0, _SURROUND, _SURROUND)
_OGG_ORDER = (_SIDE, 1.0, _SIDE, _SURROUND, _SURROUND, 0.0)
_SHARES_OF_5_1 = {"WAVEX": _ORDER, "FLAC": _ORDER, "OGG": _OGG_ORDER}

_HEAD_BYTES = 8192  # that tell how long a file is
_FILTER_WIDTH, _ROLLOFF = 64, 0.9475937167399596


def decode_audio(
    source: str | Path | bytes | np.ndarray,
    *,
    key: str,
    sample_rate_hz: int | None = None,
    start_seconds: float | None = None,
    duration_seconds: float | None = None,
    is_blank: bool = False,
) -> np.ndarray:
    """Decode a clip, or a segment of it, to 16 kHz mono; 5.1 sound is mixed as ITU says."""
    # WAV, FLAC, MP3 and OGG (Vorbis, Opus) among others, as libsndfile reads them. Samples beyond
    # ±1 in float data are kept: clipping them would distort. A clip cut short is refused where
    # its container says how long it is: WAV, AIFF, FLAC, OGG, and MP3 with a Xing or Info header;
    # other MP3s are heard as far as they have frames.
    # A blank clip is silence as long as the header says; nothing is decoded.
    # source: A local path, encoded bytes, or samples ``[frames]`` or ``[frames, channels]``:
    # float, or integers of 8, 16 or 32 bits, which are scaled from full range to ±1.
    # Returns: Samples ``[frames]`` float32 at 16 kHz, contiguous; ``source`` itself where it is
    # that.
    name = describe_source(source, "audio")
    segment = (start_seconds, duration_seconds)
    if isinstance(source, np.ndarray):
        rate_hz = _check_rate(sample_rate_hz, name, key)
        if source.ndim in (1, 2) and len(source) and duration_seconds is not None:
            source = source[_find_segment(len(source), rate_hz, segment, name, key)]
        mono = _mix_array(source, rate_hz, name, key)
        samples = _finish(mono, rate_hz, name, key, is_blank=is_blank)
    else:
        with open_encoded(source, key=key, kind="audio") as stream:
            container = name_container(stream)
            if container is None:
                _check_whole(stream, name, key)
                samples, rate_hz = _read_stream(stream, segment, name, key, is_blank=is_blank)
            else:
                mono, rate_hz = read_container(stream, container, name, key, MAX_FRAMES)
                if duration_seconds is not None:
                    mono = mono[_find_segment(len(mono), rate_hz, segment, name, key)]
                _check_length(len(mono), _check_rate(rate_hz, name, key), 1, name, key)
                samples = _finish(mono, rate_hz, name, key, is_blank=is_blank)
        if sample_rate_hz not in (None, rate_hz):
            raise DataError(
                f"{name} is recorded at {rate_hz} Hz, and {sample_rate_hz} Hz is given beside "
                "it; leave sample_rate_hz out for encoded audio",
                key=key,
            )
    return samples


def _finish(mono: np.ndarray, rate_hz: int, name: str, key: str, *, is_blank: bool) -> np.ndarray:
    if is_blank:
        return _make_blank(len(mono), rate_hz)
    _check_samples(mono, rate_hz, name, key)
    return mono if rate_hz == SAMPLE_RATE_HZ else _resample([mono], len(mono), rate_hz)


def _make_blank(num_frames: int, rate_hz: int) -> np.ndarray:
    return np.zeros(math.ceil(num_frames * Fraction(SAMPLE_RATE_HZ, rate_hz)), np.float32)


def _read_stream(
    stream: BinaryIO,
    segment: tuple[float | None, float | None],
    name: str,
    key: str,
    *,
    is_blank: bool,
) -> tuple[np.ndarray, int]:
    """Decode a stream to 16 kHz mono ``[frames]`` float32; the rate returned is its own."""
    try:
        with soundfile.SoundFile(declare_length(stream), mode="r") as file:
            rate_hz = _check_rate(file.samplerate, name, key)
            num_all = _read_fact(stream) if file.subtype in _IN_BLOCKS else None
            num_all = min(num_all or file.frames, file.frames)
            chosen = slice(0, num_all)
            if segment[1] is not None and 0 < num_all < _UNKNOWN_FRAMES:
                chosen = _find_segment(num_all, rate_hz, segment, name, key)
            num_frames = chosen.stop - chosen.start
            _check_length(num_frames, rate_hz, file.channels, name, key)
            if chosen.start:
                file.seek(chosen.start)
            if is_blank:
                return _make_blank(num_frames, rate_hz), rate_hz
            pieces = _read_pieces(file, num_frames, name, key)
            return _resample(pieces, num_frames, rate_hz), rate_hz
    except DataError:
        raise
    except (soundfile.SoundFileError, OSError, TypeError, ValueError) as error:
        # TypeError: soundfile takes a file named *.raw for samples without a header.
        said = (getattr(error, name, None) for name in ("error_string", "strerror"))
        reason = next(filter(None, said), "no header")
        raise DataError(
            f"{name} cannot be decoded ({reason}); if it plays elsewhere, convert it to WAV, "
            "FLAC, MP3 or OGG, for example through: ffmpeg -i INPUT -ac 1 -ar 16000 OUTPUT.flac",
            key=key,
        ) from None  # whose message holds the path


def _read_pieces(
    file: soundfile.SoundFile, num_frames: int, name: str, key: str
) -> Iterator[np.ndarray]:
    """Read frames as mono, in blocks: neither channels nor rates are in memory at full length."""
    num_read, rate_hz = 0, file.samplerate
    shares = _SHARES_OF_5_1.get(file.format, ()) if file.channels == 6 else ()
    weights = np.array(shares, np.float32) / (sum(shares) or 1)
    # SoundFile.blocks would hand out uninitialised memory where a file ends too early.
    block_frames = max(1, _BLOCK_SAMPLES // file.channels)
    while num_read < num_frames:
        wanted = min(block_frames, num_frames - num_read)
        if not len(block := file.read(wanted, dtype="float32", always_2d=True)):
            _refuse_truncated(
                f"{num_read:,} of its {num_frames:,} frames at {rate_hz} Hz can be read", name, key
            )
        num_read += len(block)
        mono = block @ weights if shares else block.mean(axis=1)
        _check_samples(mono, rate_hz, name, key)
        yield mono


def _find_segment(
    num_frames: int, rate_hz: int, segment: tuple[float | None, float | None], name: str, key: str
) -> slice:
    """Return the frames of a segment; with no start, all of them if they last as long as said."""
    start, duration = segment[0], segment[1] or 0.0
    length = num_frames / rate_hz
    if start is None:
        rounding = 0.5 if duration == round(duration) else _ROUNDING_SECONDS
        if abs(length - duration) <= max(rounding, 0.01 * length):
            return slice(0, num_frames)
        raise DataError(
            f"{name} has {length:,.2f} seconds, and its row says {duration:,.2f}; give a "
            "start too where a part is meant, or leave out what is said of its length",
            key=key,
        )
    if start < 0 or duration <= 0 or start + duration > length + _ROUNDING_SECONDS:
        raise DataError(
            f"{name} has {length:,.2f} seconds, and its row means those from {start:,.2f} to "
            f"{start + duration:,.2f}; correct that or remove the row, or where the clip is that "
            "part already, leave the columns of its start and end out by ignore=",
            key=key,
        )
    first = min(round(start * rate_hz), num_frames)
    return slice(first, min(round((start + duration) * rate_hz), num_frames))


def _read_fact(stream: BinaryIO) -> int | None:
    """Read how many frames a WAV says that it has, beside what its blocks hold."""
    before, place, found = stream.tell(), 12, None  # libsndfile reads on from where it was
    stream.seek(place)
    while len(head := stream.read(8)) == 8 and head[:4] != b"data" and found is None:
        found = int.from_bytes(stream.read(4), "little") if head[:4] == b"fact" else None
        place += 8 + int.from_bytes(head[4:], "little")
        stream.seek(place)
    stream.seek(before)
    return found


def _mix_array(samples: np.ndarray, rate_hz: int, name: str, key: str) -> np.ndarray:
    """Return samples ``[frames]`` or ``[frames, channels]`` as mono float32 ``[frames]``."""
    shape = samples.shape
    if samples.ndim not in (1, 2) or (samples.ndim == 2 and shape[1] > shape[0] > 0):
        raise DataError(
            f"{name} has shape {shape}; give [frames] or [frames, channels] (transpose "
            "[channels, frames])",
            key=key,
        )
    _check_length(shape[0], rate_hz, shape[1] if samples.ndim == 2 else 1, name, key)
    kind, size = samples.dtype.kind, samples.dtype.itemsize
    if kind == "f":
        floats = samples.astype(np.float32, copy=False)
    elif kind in "iu" and size in (1, 2, 4):
        half_range = 2.0 ** (8 * size - 1)
        # Unsigned samples are centred on half their range.
        offset = half_range if kind == "u" else 0.0
        floats = ((samples - np.float64(offset)) / half_range).astype(np.float32)
    else:
        raise DataError(
            f"{name} has {samples.dtype} samples; give float samples within ±1, or integers of "
            "8, 16 or 32 bits",
            key=key,
        )
    return np.ascontiguousarray(floats if floats.ndim == 1 else floats.mean(axis=1))


def _resample(pieces: Iterable[np.ndarray], num_frames: int, rate_hz: int) -> np.ndarray:
    """Resample pieces of so many frames to ``[ceil(num_frames * 16000 / rate_hz)]`` float32."""
    low, high = sorted((SAMPLE_RATE_HZ, rate_hz))
    exact = Fraction(low, high).limit_denominator(_MAX_PHASES)  # both parts are bounded by it
    ratio = exact if rate_hz > SAMPLE_RATE_HZ else 1 / exact
    resampled = np.empty(math.ceil(num_frames * ratio), np.float32)
    if ratio == 1:
        place = 0
        for piece in pieces:
            resampled[place : place + len(piece)] = piece
            place += len(piece)
        return resampled
    # Imported here because streaming, which never imports torch, imports this module.
    import torch

    resampler = _build_resampler(ratio)
    step = ratio.denominator
    # torchaudio unfolds its input to seven times its size, so that long clips go in blocks, each
    # with as much before and behind as the filter reaches.
    reach = step * math.ceil(2 + _FILTER_WIDTH / _ROLLOFF * max(1, 1 / ratio) / step)
    block = step * max(1, _BLOCK_SAMPLES // step)
    coming, held, first = iter(pieces), np.empty(0, np.float32), 0  # held from ``first`` on
    for start in range(0, num_frames, block):
        held, first = held[max(0, start - reach - first) :], max(0, start - reach)
        wanted = min(num_frames, start + block + reach) - first
        while len(held) < wanted:
            held = np.concatenate([held, next(coming)]) if len(held) else next(coming)
        piece = np.require(held[:wanted], requirements="W")  # torch warns
        outcome = resampler(torch.from_numpy(piece)).numpy()[int((start - first) * ratio) :]
        place = int(start * ratio)
        size = min(int(block * ratio), len(resampled) - place)
        resampled[place : place + size] = outcome[:size]
    return resampled


@functools.lru_cache(maxsize=8)
def _build_resampler(ratio: Fraction) -> Resample:
    """Build the filter of one ratio of rates, kept because it costs more than a short clip."""
    # Source: "kaiser_best" in torchaudio's resampling tutorial. torchaudio's own defaults let a 9
    # kHz tone alias to 7 kHz at -17 dB; these at -118 dB and below (both measured).
    # Returns: A module from ``[frames]`` to ``[ceil(frames * ratio)]`` float32.
    from torchaudio.transforms import Resample

    return Resample(
        ratio.denominator,
        ratio.numerator,
        resampling_method="sinc_interp_kaiser",
        lowpass_filter_width=_FILTER_WIDTH,
        rolloff=_ROLLOFF,
        beta=14.769656459379492,
    )


def _check_whole(stream: BinaryIO, name: str, key: str) -> None:
    """Refuse files that are cut short, which libsndfile decodes without a word."""
    # Source: RFC 3533 section 6.
    num_bytes = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    head = stream.read(_HEAD_BYTES)
    # One byte of padding may be missing.
    if (declared := _read_declared_bytes(head)) > num_bytes + 1:
        _refuse_truncated(f"{num_bytes:,} of its {declared:,} bytes are there", name, key)
    elif head[:4] == b"OggS":
        stream.seek(max(0, num_bytes - 65_307))  # the largest page
        tail = stream.read()
        page = tail[max(0, tail.rfind(b"OggS")) :]
        lengths = page[27 : 27 + page[26]] if len(page) > 26 else b""
        is_complete = bool(lengths) and len(page) >= 27 + len(lengths) + sum(lengths)
        is_last = len(page) > 5 and bool(page[5] & 4)
        if not (is_complete and is_last):
            _refuse_truncated("its end of stream is missing", name, key)
    stream.seek(0)


def _read_declared_bytes(head: bytes) -> int:
    """Return how long a file is by its own header; 0 where that does not say."""
    # Source: RIFF and EA IFF 85 (8 bytes of header not counted), EBU Tech 3306 (RF64), Sony's W64,
    # Sun's AU, Apple's CAF, NIST's SPHERE. Writers to a pipe leave 0 or the maximum.
    if head[:4] in (b"RIFF", b"RIFX", b"FORM", b".snd"):
        is_au = head[:4] == b".snd"
        order: Literal["little", "big"] = "little" if head[:4] == b"RIFF" else "big"
        declared = int.from_bytes(head[8:12] if is_au else head[4:8], order)
        before = int.from_bytes(head[4:8], "big") if is_au else 8
        return 0 if declared == 0xFFFFFFFF else declared + before
    if head[:4] == b"RF64" and head[12:16] == b"ds64":
        return int.from_bytes(head[20:28], "little") + 8
    if head[:8] == b"riff\x2e\x91\xcf\x11":
        return int.from_bytes(head[16:24], "little")
    if head[:4] == b"caff":
        place = 8
        while place + 12 <= len(head):
            declared = int.from_bytes(head[place + 4 : place + 12], "big", signed=True)
            if head[place : place + 4] == b"data":
                return place + 12 + declared if declared > 0 else 0
            place += 12 + max(0, declared)
    if head[:8] == b"NIST_1A\n":
        counts = dict(re.findall(rb"(\w+) -i (\d+)", head[:1024]))
        names = (b"sample_count", b"sample_n_bytes", b"channel_count")
        size = head[8:16].strip()
        if all(name in counts for name in names) and size.isdigit() and b"shorten" not in head:
            return int(size) + math.prod(int(counts[name]) for name in names)
    return 0


def _check_rate(rate_hz: int | None, name: str, key: str) -> int:
    """Return a plausible whole rate."""
    if rate_hz is None:
        raise DataError(
            f"{name} has no sample rate; give sample_rate_hz beside the samples", key=key
        )
    try:
        whole_hz = operator.index(rate_hz)
    except TypeError:
        whole_hz = 0
    if not _MIN_RATE_HZ <= whole_hz <= _MAX_RATE_HZ:
        raise DataError(
            f"{name} has a sample rate of {rate_hz!r} Hz; it must be a whole number from "
            f"{_MIN_RATE_HZ:,} to {_MAX_RATE_HZ:,}",
            key=key,
        )
    return whole_hz


def _check_length(num_frames: int, rate_hz: int, num_channels: int, name: str, key: str) -> None:
    """Refuse no frames, an unknown number, and more than fit, before any is decoded."""
    if num_frames == _UNKNOWN_FRAMES:
        raise DataError(
            f"{name} does not say how long it is; write it to a new file, for example through: "
            "ffmpeg -i INPUT -c:a flac OUTPUT.flac",
            key=key,
        )
    if num_frames == 0:
        raise DataError(
            f"{name} is empty: 0.0 seconds, {num_channels} channels at {rate_hz} Hz; drop it",
            key=key,
        )
    if num_frames > MAX_FRAMES or num_frames > MAX_SECONDS * rate_hz:
        raise DataError(
            f"{name} is {num_frames / rate_hz:,.1f} seconds of {num_channels} channels at "
            f"{rate_hz} Hz; the limits are {MAX_SECONDS:,.0f} seconds and {MAX_FRAMES:,} frames: "
            "cut it into clips",
            key=key,
        )


def _check_samples(mono: np.ndarray, rate_hz: int, name: str, key: str) -> None:
    """Refuse what no recording holds: NaN, infinity, or integers that nobody scaled."""
    low, high = float(mono.min()), float(mono.max())  # NaN anywhere makes both NaN
    about = f"{len(mono) / rate_hz:.2f} seconds at {rate_hz} Hz"
    if not (np.isfinite(low) and np.isfinite(high)):
        num_bad = int(np.count_nonzero(~np.isfinite(mono)))
        raise DataError(
            f"{name} has {num_bad:,} samples that are not finite numbers in its {about}; "
            "record or convert it anew",
            key=key,
        )
    peak = max(-low, high)
    if peak > _MAX_PEAK:
        raise DataError(
            f"{name} peaks at {peak:,.0f} times full scale in its {about}: integer samples kept "
            "as floats; divide them by their full range (32,768 for 16 bits)",
            key=key,
        )


def _refuse_truncated(evidence: str, name: str, key: str) -> NoReturn:
    raise DataError(
        f"{name} is truncated or damaged: {evidence}; fetch it again or drop it", key=key
    )
