"""Sound in containers that libsndfile does not read: MP4 (M4A), WebM and Matroska, AAC, WMA, AMR.

PyAV reads them where it is installed. The demuxer is chosen by signature here, so that FFmpeg
never takes a file for a playlist that names others.
"""

from __future__ import annotations

from typing import BinaryIO

import numpy as np

from gemma_tuner.errors import MALFORMED, DataError

# Decoders leave out or add a frame at the ends: the longest of AAC and Opus, at 16 kHz.
_TOLERANCE_SECONDS = 0.128


def name_container(stream: BinaryIO) -> str | None:
    """Tell a container by its signature, as FFmpeg names its demuxer; None for any other."""
    head = stream.read(16)
    stream.seek(0)
    if head[4:8] == b"ftyp":
        return "mov"
    if head[:2] in (b"\xff\xf1", b"\xff\xf9"):  # ADTS: MPEG-4 or MPEG-2, no checksum
        return "aac"
    signatures = {b"\x1aE\xdf\xa3": "matroska", b"0&\xb2u\x8ef\xcf\x11": "asf", b"#!AMR": "amr"}
    return next((kind for mark, kind in signatures.items() if head.startswith(mark)), None)


def read_container(
    stream: BinaryIO, container: str, name: str, key: str, max_frames: int
) -> tuple[np.ndarray, int]:
    """Decode the first sound track to mono samples ``[frames]`` float32 and their rate."""
    try:
        import av
        import av.error
    except ImportError:
        raise DataError(
            f"{name} is of a container ({container}) that needs the package av: pip install "
            "'gemma_tuner[media]'; or convert it, for example through: ffmpeg -i INPUT -ac 1 "
            "-ar 16000 OUTPUT.flac",
            key=key,
        ) from None
    blocks: list[np.ndarray] = []
    num_frames = 0
    try:
        with av.open(stream, "r", format=container, metadata_errors="ignore") as opened:
            if not opened.streams.audio:
                raise DataError(f"{name} holds no sound; name a clip, or drop it", key=key)
            track = opened.streams.audio[0]
            rate_hz = track.rate or 0
            promised = float((track.duration or 0) * (track.time_base or 0))
            promised = promised or (opened.duration or 0) / av.time_base
            floats = av.AudioResampler(format="fltp")
            for frame in opened.decode(track):
                for part in floats.resample(frame):
                    blocks.append(part.to_ndarray().mean(axis=0))
                    num_frames += len(blocks[-1])
                if num_frames > max_frames:
                    raise DataError(
                        f"{name} is longer than {max_frames:,} frames; cut it into clips", key=key
                    )
    except (av.error.FFmpegError, *MALFORMED) as error:  # a track of no known codec, say
        raise DataError(
            f"{name} is truncated or damaged ({type(error).__name__}); fetch it again or drop it",
            key=key,
        ) from None
    seconds = num_frames / rate_hz if rate_hz else 0.0
    if seconds < promised - _TOLERANCE_SECONDS:
        raise DataError(
            f"{name} is truncated or damaged: {seconds:.2f} of the {promised:.2f} seconds that it "
            "promises can be decoded; fetch it again or drop it",
            key=key,
        )
    return np.concatenate(blocks) if blocks else np.empty(0, np.float32), rate_hz
