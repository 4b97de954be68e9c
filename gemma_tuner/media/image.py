"""Encoded images of any kind to upright 8-bit RGB.

Colours are taken as they are stored: embedded ICC profiles are not applied, as the models' own
processors do not apply them either. The first frame of an animation is used. Pictures of more than
25 million pixels are halved, each pixel the mean of four, before anything is made of them: models
see a few million at most, and every step from a file to them takes memory for all.
"""

from __future__ import annotations

import math
import operator
import struct
import zlib
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import PIL.Image
import PIL.ImageFile

from gemma_tuner.errors import DataError
from gemma_tuner.log import logger
from gemma_tuner.media.encoded import describe_source, open_encoded

# As many are taken whole, as phones' 24 million are: the processor then takes 0.3 GB.
_MAX_WHOLE_PIXELS = 25_000_000
# What decoders may take for a picture: more than for the largest of phones, 50 million as HEIC.
_MAX_DECODED_BYTES = 256 * 2**20
# Of a pixel, where it is not Pillow's four, as measured: what decoders hold beside, and what
# pictures of some modes become before they are halved.
_DECODER_BYTES = {"JPEG2000": 16, "WEBP": 16, "AVIF": 8}
_MODE_BYTES = {"1": 5, "P": 5, "PA": 8, "I;16": 8, "L": 1, "LA": 8, "RGBA": 8}

# Formats that Pillow recognises by a signature and decodes by itself. Left out: EPS and WMF, which
# run other programs, and formats without a signature, which take any bytes for an image.
# A phone's MPO opens as JPEG; HEIF is read where pillow-heif is installed.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "JPEG2000", "PPM", "ICO", "HEIF")

# Source: ISO/IEC 23008-12, of HEVC alone: AVIF is Pillow's own.
_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")

# What Pillow's decoders raise on damaged input; Warning, where the user has made them errors.
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    AssertionError,
    MemoryError,
    AttributeError,
    LookupError,
    ArithmeticError,
    RuntimeError,
    EOFError,
    struct.error,
    zlib.error,
    Warning,
)
_MAX_SIDE = 65_535  # JPEG's own; longer and thin, processors take gigabytes to resize it
_BOMBS = (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning)

# EXIF orientation -> what turns the stored pixels upright; 1 is upright.
# Source: CIPA DC-008 (EXIF 2.32), tag 0x0112.
_ORIENTATION_TAG = 0x0112
_SIDEWAYS = range(5, 9)
_TRANSPOSITIONS = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}


def decode_image(
    source: str | Path | bytes | PIL.Image.Image,
    *,
    key: str,
    is_blank: bool = False,
) -> PIL.Image.Image:
    """Decode an image to upright RGB."""
    # Transparency is laid on white. Greyscale of more than 8 bits is scaled, not clipped: 16-bit
    # images over their whole range; 32-bit and float images, whose files do not say what white
    # is, to the least of 1 (float only), 255, 65,535 and 2³¹-1 that none of their pixels exceeds.
    # A damaged EXIF block is logged and the image taken as upright. A blank image is of the size
    # that the header says, and its pixels are not read.
    name = describe_source(source, "image")
    try:
        if isinstance(source, PIL.Image.Image):
            return _finish(source, name, key, is_blank=is_blank)
        with open_encoded(source, key=key, kind="image") as stream:
            _register_heif(stream, name, key)
            # Pillow imports its format plugins on demand: all of them must be known to choose.
            PIL.Image.init()
            formats = [known for known in _FORMATS if known in PIL.Image.OPEN]
            with PIL.Image.open(stream, formats=formats) as image:
                return _finish(image, name, key, is_blank=is_blank)
    except DataError:
        raise
    except PIL.UnidentifiedImageError:
        raise DataError(
            f"{name} is not a picture of a known format; give JPEG, PNG, WebP, GIF, TIFF, BMP, "
            "AVIF or HEIC",
            key=key,
        ) from None  # whose message holds the path
    except _BOMBS as error:
        raise DataError(
            f"{name} exceeds Pillow's own limit against decompression bombs ({error}); make it "
            "smaller",
            key=key,
        ) from error
    except _DECODER_ERRORS as error:
        # Beside an OSError's, messages may quote the file's bytes.
        reason = str(error) if isinstance(error, OSError) else type(error).__name__
        raise DataError(
            f"{name} is truncated or damaged ({reason}); fetch it again or drop it", key=key
        ) from None


def _register_heif(stream: BinaryIO, name: str, key: str) -> None:
    """Let Pillow open a phone's HEIC, where the package is there that can."""
    head = stream.read(12)
    stream.seek(0)
    if head[4:8] != b"ftyp" or head[8:12] not in _HEIF_BRANDS or "HEIF" in PIL.Image.OPEN:
        return
    try:
        import pillow_heif
    except ImportError:
        raise DataError(
            f"{name} is HEIC, which needs the package pillow-heif: pip install "
            "'gemma_tuner[media]'; or save it as JPEG",
            key=key,
        ) from None
    pillow_heif.register_heif_opener()


def _finish(image: PIL.Image.Image, name: str, key: str, *, is_blank: bool) -> PIL.Image.Image:
    """Check the size in the header, then load, turn upright and convert."""
    width, height = image.size
    if width * height == 0:
        raise DataError(f"{name} is {width}x{height} pixels; drop it", key=key)
    if max(width, height) > _MAX_SIDE:
        raise DataError(
            f"{name} is {width}x{height}, and no side may be longer than {_MAX_SIDE:,}; crop it",
            key=key,
        )
    is_halved = width * height > _MAX_WHOLE_PIXELS
    if is_halved and image.format == "JPEG":
        image.draft(None, (width // 2, height // 2))  # decodes a quarter
    if (num_bytes := _count_decoded_bytes(image, (width, height))) > _MAX_DECODED_BYTES:
        raise DataError(
            f"{name} is {width}x{height} and takes {num_bytes / 1e6:,.0f} MB to decode, and the "
            f"limit is {_MAX_DECODED_BYTES / 1e6:,.0f}; make it smaller",
            key=key,
        )
    if is_blank:
        if is_halved:
            width, height = (width + 1) // 2, (height + 1) // 2
        is_sideways = _read_orientation(image, key) in _SIDEWAYS
        return PIL.Image.new("RGB", (height, width) if is_sideways else (width, height))
    image.load()  # TIFF turns itself upright here, and PNG may carry EXIF after its pixels
    transposition = _TRANSPOSITIONS.get(_read_orientation(image, key))
    is_file = isinstance(image, PIL.ImageFile.ImageFile)
    is_halved = image.width * image.height > _MAX_WHOLE_PIXELS
    if image.mode == "RGB" and not (transposition or is_file or is_halved):
        return image
    upright = _convert_to_rgb(_halve(image, name, key) if is_halved else image, name, key)
    if transposition is not None:
        upright = upright.transpose(transposition)
    # Pixels that are upright must not carry the tag that would turn them once more.
    upright.info = {}
    return upright


def _count_decoded_bytes(image: PIL.Image.Image, size: tuple[int, int]) -> int:
    """Count the bytes that a picture of a size takes while it is decoded."""
    if image.format == "JPEG" and image.info.get("progressive"):
        # libjpeg holds its coefficients, of 16 bits, as many as the channels' sampling says.
        _, across, down, _ = zip(*cast("Any", image).layer, strict=True)
        blocks = sum(map(operator.mul, across, down)) / (max(across) * max(down))
        return math.ceil(2 * size[0] * size[1] * blocks) + 4 * image.width * image.height
    of_pixel = _DECODER_BYTES.get(image.format or "") or _MODE_BYTES.get(image.mode[:4], 4)
    return image.width * image.height * of_pixel


def _halve(image: PIL.Image.Image, name: str, key: str) -> PIL.Image.Image:
    if image.mode in ("1", "P", "PA"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    elif image.mode.startswith("I;16"):
        image = _convert_to_rgb(image, name, key)
    return image.reduce(2)


def _read_orientation(image: PIL.Image.Image, key: str) -> int:
    """Return the EXIF orientation, 1 (upright) where there is none or it cannot be read."""
    try:
        exif = image.getexif()
        orientation = exif.get(_ORIENTATION_TAG, 1)
    except _DECODER_ERRORS:
        exif, orientation = None, 1
    # Pillow may have met the damage on opening, and shows an empty block from then on.
    if not exif and image.info.get("exif"):
        logger.warning(
            "example %r: no tag in its EXIF block can be read; the image is taken as upright",
            key,
        )
    return orientation if isinstance(orientation, int) else 1


def _convert_to_rgb(image: PIL.Image.Image, name: str, key: str) -> PIL.Image.Image:
    """Convert any mode to a new image in RGB."""
    if image.mode.startswith("I;16"):
        levels = (np.arange(2**16, dtype=np.uint32) + 128) // 257  # 65,535 = 255 x 257
        return _make_grey(levels.astype(np.uint8)[np.asarray(image)])
    if image.mode in ("I", "F"):
        return _make_grey(_scale_to_white(np.asarray(image), name, key))
    if image.has_transparency_data:
        if image.mode == "La":  # premultiplied grey, which has no direct way to RGBA
            image = image.convert("LA")
        canvas = PIL.Image.new("RGBA", image.size, "white")
        return PIL.Image.alpha_composite(canvas, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _scale_to_white(values: np.ndarray, name: str, key: str) -> np.ndarray:
    """Scale 32-bit grey ``[height, width]`` to 0..255 by the white level that holds it."""
    whites = (255, 65_535, 2**31 - 1) if values.dtype.kind == "i" else (1, 255, 65_535)
    low, high = float(values.min()), float(values.max())  # NaN anywhere makes both NaN
    white = next((level for level in whites if low >= 0 and high <= level), None)
    if white is None:
        raise DataError(
            f"{name} has {values.dtype} pixels from {low:g} to {high:g}, and no white level is "
            f"known for them; rescale them to 0..{whites[0]}",
            key=key,
        )
    return np.rint(values * (255.0 / white))


def _make_grey(levels: np.ndarray) -> PIL.Image.Image:
    """Make an RGB image of grey levels 0..255 ``[height, width]``."""
    return PIL.Image.fromarray(levels.astype(np.uint8, copy=False)).convert("RGB")
