"""Files that ``tests.fuzz`` found to end in raw errors."""

import io

import av
import numpy as np
import pytest

from gemma_tuner.errors import DataError
from gemma_tuner.media.audio import decode_audio
from gemma_tuner.media.image import decode_image
from tests.fuzz_media import make_png


def test_a_palette_picture_without_its_palette():
    png = make_png(4, 4, colour=3, pixels=bytes(20))
    with pytest.raises(DataError, match="truncated or damaged"):
        decode_image(png, key="a")


def test_a_sphere_header_that_is_no_number():
    head = b"NIST_1A\n   102\0\0" + b"sample_count -i 9 sample_n_bytes -i 2 channel_count -i 1"
    with pytest.raises(DataError, match="cannot be decoded"):
        decode_audio(head + bytes(2000), key="a")


def test_a_track_whose_codec_nobody_knows():
    stream = io.BytesIO()
    with av.open(stream, "w", format="mp4") as opened:
        track = opened.add_stream("aac", rate=16_000, layout="mono")
        noise = np.zeros((1, 4096), np.float32)
        frame = av.AudioFrame.from_ndarray(noise, "fltp", "mono")
        frame.sample_rate = 16_000
        for packet in (*track.encode(frame), *track.encode(None)):
            opened.mux(packet)
    with pytest.raises(DataError, match="truncated or damaged"):
        decode_audio(stream.getvalue().replace(b"stsd", b"xxxx"), key="a")
