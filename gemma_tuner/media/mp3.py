"""MP3s that do not say how long they are: their frames are counted, and a header says it.

libsndfile decodes no further than a length that it guesses from the file's size and the bit rate
of its first frame, unless a Xing, Info or VBRI header tells it how many frames there are. Web
radios, splitters and encoders that write to a pipe leave that header out.

Source: ISO/IEC 11172-3 section 2.4.2.3 (frame headers); the Xing header as mpg123 reads it.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import BinaryIO

# By MPEG version (the header's two bits): 3 is MPEG-1, 2 MPEG-2, 0 MPEG-2.5.
_RATES_HZ = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}
_KBIT_MPEG1 = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
_KBIT_MPEG2 = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
_HEAD_BYTES = 1 << 16  # in which the first frame is sought
_OTHERS = (b"fLaC", b"RIFF", b"OggS")
_TAGS = (b"Xing", b"Info", b"VBRI")


def declare_length(stream: BinaryIO) -> BinaryIO:
    """Put a header that counts the frames before a layer III stream that has none."""
    stream.seek(0)
    tag_bytes = _measure_tag(stream.read(10))
    stream.seek(tag_bytes)
    head = stream.read(_HEAD_BYTES)
    stream.seek(0)
    start, length = next(_find_frames(head), (0, 0))
    # A player's tag may stand before FLAC too; and what says how long it is needs no header.
    is_other = head.startswith(_OTHERS) or not (tag_bytes or head.startswith(b"\xff"))
    if is_other or not length or any(tag in head[start : start + length] for tag in _TAGS):
        return stream
    content = stream.read()
    stream.seek(0)
    frames = list(_find_frames(content))
    start = frames[0][0]
    header = bytearray(content[start : start + 4])
    is_mpeg1 = header[1] >> 3 & 3 == 3
    is_mono = header[3] >> 6 == 3
    header[1] |= 1  # no checksum
    header[2] = (9 if is_mpeg1 else 8) << 4 | header[2] & 0x0C  # 128 or 64 kbit/s, no padding
    # The side information, of which a Xing header stands behind as many zeros.
    side_bytes = (17 if is_mono else 32) if is_mpeg1 else (9 if is_mono else 17)
    tag = b"Xing" + (1).to_bytes(4, "big") + len(frames).to_bytes(4, "big")
    frame = bytes(header) + bytes(side_bytes) + tag
    frame += bytes((_measure_frame(header) or len(frame)) - len(frame))
    return io.BytesIO(frame + content[start:])


def _find_frames(content: bytes) -> Iterator[tuple[int, int]]:
    """Yield where each frame begins, and its bytes; a last one that is cut short is none."""
    place = _measure_tag(content[:10])
    while 0 <= place <= len(content) - 4:
        length = _measure_frame(content[place : place + 4])
        following = place + (length or 0)
        is_last = following == len(content) or content[following : following + 3] == b"TAG"
        # What looks like a header amid other bytes is none unless another follows it.
        if length and (is_last or _measure_frame(content[following : following + 4])):
            yield place, length
            place = following
        elif length and following > len(content):
            return
        else:
            place = content.find(b"\xff", place + 1)


def _measure_tag(head: bytes) -> int:
    """Bytes of a player's tag before the sound; sizes in it have seven bits a byte."""
    if head[:3] != b"ID3" or len(head) < 10:
        return 0
    size = 0
    for byte in head[6:10]:
        size = size << 7 | byte & 0x7F
    return 10 + size


def _measure_frame(header: bytes | bytearray) -> int | None:
    """Bytes of the layer III frame that a header of four bytes begins; None if it is no header."""
    if len(header) < 4 or header[0] != 0xFF or header[1] >> 5 != 7:
        return None
    version, layer = header[1] >> 3 & 3, header[1] >> 1 & 3
    rate, bits = header[2] >> 2 & 3, header[2] >> 4
    if version not in _RATES_HZ or layer != 1 or rate == 3 or not 0 < bits < 15:
        return None
    kbit, factor = (_KBIT_MPEG1[bits], 144) if version == 3 else (_KBIT_MPEG2[bits], 72)
    return factor * kbit * 1000 // _RATES_HZ[version][rate] + (header[2] >> 1 & 1)
