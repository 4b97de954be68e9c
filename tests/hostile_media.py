"""Media that claim or hold far more than their bytes, and what reading each takes in memory.

    python -m tests.hostile_media CASE

prints the peak above what the process held before, and how it ended.
"""

import io
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import PIL.Image
import soundfile

from tests.fuzz_media import make_png, make_wav, read_audio, read_image


def _png(width, height, *, colour, depth=8, **options):
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    line = 1 + (width * channels * depth + 7) // 8
    return make_png(width, height, colour=colour, depth=depth, lines=(line, height), **options)


def _save(kind, mode, size, **options):
    stream = io.BytesIO()
    PIL.Image.new(mode, size).save(stream, kind, **options)
    return stream.getvalue()


def _animate(kind, frames):
    stream = io.BytesIO()
    pictures = (PIL.Image.new("L", (64, 64), number % 256) for number in range(1, frames))
    PIL.Image.new("L", (64, 64)).save(stream, kind, save_all=True, append_images=pictures)
    return stream.getvalue()


def _silence(kind, rate_hz, seconds, channels=1, **options):
    stream = io.BytesIO()
    with soundfile.SoundFile(stream, "w", rate_hz, channels, format=kind, **options) as sound:
        for _ in range(seconds // 60):
            sound.write(np.zeros((60 * rate_hz, channels), np.float32))
    return stream.getvalue()


IMAGES = {
    "900 million pixels": lambda: make_png(30_000, 30_000),
    "a line of 20 million": lambda: _png(1, 20_000_000, colour=0),
    "a wide strip": lambda: _png(65_535, 1300, colour=2),
    "a tall strip": lambda: _png(4, 65_535, colour=2),
    "the largest, RGB": lambda: _png(9400, 9400, colour=2),
    "the largest, RGBA": lambda: _png(9400, 9400, colour=6),
    "the largest, 16 bits": lambda: _png(9400, 9400, colour=0, depth=16),
    "the largest, palette": lambda: _png(9400, 9400, colour=3, palette=True),
    "the largest, CMYK": lambda: _save("JPEG", "CMYK", (9400, 9400)),
    "the largest, floats": lambda: _save("TIFF", "F", (9400, 9400), compression="tiff_deflate"),
    "33 million, RGBA": lambda: _png(5770, 5770, colour=6),
    "33 million, 16 bits": lambda: _png(5770, 5770, colour=0, depth=16),
    "50 million, palette": lambda: _png(7070, 7070, colour=3, palette=True),
    "65 million, progressive": lambda: _save("JPEG", "RGB", (8060, 8060), progressive=True),
    "89 million, JPEG": lambda: _save("JPEG", "RGB", (9400, 9400)),
    "16 million, WebP": lambda: _save("WEBP", "RGB", (4090, 4090)),
    "16 million, JPEG 2000": lambda: _save("JPEG2000", "RGB", (4090, 4090)),
    "100,000 frames": lambda: _animate("GIF", 100_000),
    "frames that are claimed": lambda: make_png(8, 8, pixels=bytes(200), frames=2**32 - 1),
}
SOUNDS = {
    "an hour of FLAC": lambda: _silence("FLAC", 48_000, 3600),
    "ten hours of FLAC": lambda: _silence("FLAC", 8000, 36_000),
    "an hour of six channels": lambda: _silence("FLAC", 48_000, 3600, 6),
    "an hour of MP3": lambda: _silence("MP3", 48_000, 3600),
    "an hour of Opus": lambda: _silence("OGG", 48_000, 3600, subtype="OPUS"),
    "frames that are claimed": lambda: make_wav(claimed=2**31),
    "a rate of 4 GHz": lambda: make_wav(2**32 - 1),
    "65,535 channels": lambda: make_wav(channels=65_535, data=bytes(131_070 * 20)),
    "a rate below the model's that shares no factor with it": lambda: make_wav(1999),
}
CASES = {
    **{f"image: {name}": (make, read_image) for name, make in IMAGES.items()},
    **{f"sound: {name}": (make, read_audio) for name, make in SOUNDS.items()},
}


def measure(case: str) -> tuple[float, str]:
    """Read a case in a child: MB at the peak above the base, and how it ended."""
    command = [sys.executable, "-m", "tests.hostile_media", case]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=170)
    peak, ended = said.stdout.splitlines()[-1].split(" ", 1)
    return float(peak), ended


def read_status(name):
    """What the kernel says of this process, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) / 1000


def main():
    from gemma_tuner.errors import GemmaTunerError

    make, read = CASES[sys.argv[1]]
    with tempfile.TemporaryDirectory() as folder:
        media = Path(folder) / "media"
        media.write_bytes(
            make_png(64, 64, pixels=bytes(193 * 64)) if read is read_image else make_wav(48_000)
        )
        read(Path(folder))  # imports what is imported late
        media.write_bytes(make())
        Path("/proc/self/clear_refs").write_text("5")
        base, began = read_status("VmRSS"), time.monotonic()
        try:
            read(Path(folder))
            ended = "read"
        except GemmaTunerError as error:
            ended = str(error)
        seconds = time.monotonic() - began
    sys.stdout.write(f"{read_status('VmHWM') - base:.0f} {ended} in {seconds:.1f} s\n")


if __name__ == "__main__":
    main()
