"""Pictures of every mode, orientation and kind of damage."""

import io
import logging
import struct
import time
import tracemalloc
import zlib

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_tuner.errors import DataError
from gemma_tuner.media.image import decode_image


def encode(image, format="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def make_picture(width=23, height=17) -> PIL.Image.Image:
    """A picture without any symmetry."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [x * 255 // (width - 1), y * 255 // (height - 1), (x * y) % 256]
    return PIL.Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def make_png_header(width, height) -> bytes:
    """A PNG that claims a size and holds almost no pixels."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99))
    )


@pytest.fixture
def picture():
    return make_picture()


def pixels(image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM"])
def test_reads_lossless_formats_exactly_from_bytes_path_and_string(format, picture, tmp_path):
    path = tmp_path / "picture"  # without an ending: the contents decide
    path.write_bytes(encode(picture, format))
    for source in (path.read_bytes(), path, str(path)):
        np.testing.assert_array_equal(pixels(decode_image(source, key="a")), pixels(picture))


@pytest.mark.parametrize("format", ["JPEG", "WEBP", "GIF", "JPEG2000", "AVIF", "ICO"])
def test_reads_other_formats(format):
    smooth = PIL.Image.new("RGB", (32, 32), (200, 60, 20))
    decoded = pixels(decode_image(encode(smooth, format), key="a")).astype(int)
    assert np.abs(decoded - [200, 60, 20]).max() <= 6


def test_returns_a_plain_picture_itself(picture):
    assert decode_image(picture, key="a") is picture


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "LAB", "HSV", "RGBX"])
def test_converts_opaque_modes(mode):
    white = PIL.Image.new("RGB", (4, 4), "white")
    source = (
        PIL.Image.new("LAB", (4, 4), (255, 128, 128)) if mode == "LAB" else white.convert(mode)
    )
    decoded = pixels(decode_image(source, key="a"))
    assert decoded.shape == (4, 4, 3)
    assert decoded.min() >= 254


def test_cmyk_jpeg_keeps_its_colours():
    red = PIL.Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    decoded = pixels(decode_image(encode(red, "JPEG", quality=95), key="a")).astype(int)
    assert np.abs(decoded - [255, 0, 0]).max() <= 8


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "La", "PA", "P"])
def test_lays_transparency_on_white(mode):
    rgba = PIL.Image.new("RGBA", (2, 1), (0, 0, 0, 255))
    rgba.putpixel((1, 0), (0, 0, 0, 0))
    if mode == "La":
        source = rgba.convert("LA").convert("La")
    elif mode == "P":
        source = PIL.Image.new("P", (2, 1))
        source.putpalette([0, 0, 0, 9, 9, 9])
        source.putpixel((1, 0), 1)
        source = PIL.Image.open(io.BytesIO(encode(source, "PNG", transparency=1)))
        assert source.mode == "P"
    elif mode == "PA":
        source = PIL.Image.frombytes("PA", (2, 1), b"\0\xff\0\0")
        source.putpalette([0, 0, 0])
    else:
        source = rgba.convert(mode)
    np.testing.assert_array_equal(
        pixels(decode_image(source, key="a")), [[[0, 0, 0], [255, 255, 255]]]
    )


def test_half_transparent_black_is_grey():
    source = PIL.Image.new("RGBA", (1, 1), (0, 0, 0, 128))
    assert pixels(decode_image(source, key="a"))[0, 0, 0] == 127


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_scales_16_bit_grey_instead_of_clipping(format):
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16)
    decoded = pixels(decode_image(encode(PIL.Image.fromarray(levels * 257), format), key="a"))
    np.testing.assert_array_equal(decoded[..., 0], levels)
    np.testing.assert_array_equal(decoded[..., 2], levels)


def test_scales_big_endian_16_bit_grey():
    source = PIL.Image.frombytes("I;16B", (2, 1), b"\x80\x00\xff\xff")
    np.testing.assert_array_equal(pixels(decode_image(source, key="a"))[0, :, 0], [128, 255])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 128, 255]], np.int32), [0, 128, 255]),
        (np.array([[0, 32_768, 65_535]], np.int32), [0, 128, 255]),
        (np.array([[0, 2**30, 2**31 - 1]], np.int32), [0, 128, 255]),
        (np.array([[0, 0.5, 1]], np.float32), [0, 128, 255]),
        (np.array([[0, 128, 255]], np.float32), [0, 128, 255]),
    ],
)
def test_scales_32_bit_grey_by_the_white_level_that_holds_it(values, expected):
    image = PIL.Image.fromarray(values)
    for source in (image, encode(image, "TIFF")):
        np.testing.assert_array_equal(pixels(decode_image(source, key="a"))[0, :, 1], expected)


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf"), 1e6])
def test_refuses_float_pixels_without_a_place(bad):
    source = PIL.Image.fromarray(np.array([[0, bad]], np.float32))
    with pytest.raises(DataError, match="rescale them to 0"):
        decode_image(source, key="a")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_applies_every_orientation_once(orientation, format):
    # 16-pixel blocks keep JPEG's colours clean.
    blocks = make_picture(3, 2).resize((48, 32), PIL.Image.Resampling.NEAREST)
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100} if format == "JPEG" else {"lossless": True}
    encoded = encode(blocks, format, exif=exif, **(options if format != "TIFF" else {}))
    decoded = decode_image(encoded, key="a")
    # Pillow's own routine says what upright is.
    expected = PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(encoded)))
    assert decoded.size == ((32, 48) if orientation >= 5 else (48, 32))
    np.testing.assert_array_equal(pixels(decoded), np.asarray(expected.convert("RGB")))
    assert decode_image(decoded, key="a") is decoded
    assert not decoded.getexif()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_broken_exif_block_does_not_lose_the_picture(picture):
    # A little-endian TIFF header whose directory lies far outside the block.
    broken = b"Exif\0\0II*\0\xff\xff\xff\x7f"
    decoded = decode_image(encode(picture, "JPEG", exif=broken), key="a")
    assert decoded.size == picture.size
    for junk in (b"Exif\0\0", b"Exif\0\0XX", b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12"):
        assert decode_image(encode(picture, "JPEG", exif=junk), key="a").size == picture.size


def test_an_unreadable_exif_block_is_logged(picture, caplog):
    encoded = encode(picture, "JPEG", exif=b"Exif\0\0XXXXXXXXXXXX")
    with caplog.at_level(logging.WARNING):
        decode_image(encoded, key="set/7")
    assert "set/7" in caplog.text
    assert "upright" in caplog.text


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_takes_the_first_frame(format):
    frames = [PIL.Image.new("RGB", (8, 8), colour) for colour in ("#f00", "#0f0", "#00f")]
    options = {"lossless": True} if format == "WEBP" else {}
    encoded = encode(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert decode_image(encoded, key="a").getpixel((3, 3)) == (255, 0, 0)


@pytest.mark.parametrize("side", [12_000, 32_768, 2_000_000_000])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_refuses_a_gigapixel_from_its_header(side):
    encoded = make_png_header(side, side)
    limit = PIL.Image.MAX_IMAGE_PIXELS
    tracemalloc.start()
    start = time.perf_counter()
    with pytest.raises(DataError, match="smaller") as caught:
        decode_image(encoded, key="set/3")
    assert time.perf_counter() - start < 0.5
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()
    assert caught.value.key == "set/3"
    assert limit == PIL.Image.MAX_IMAGE_PIXELS


@pytest.mark.filterwarnings("error")
def test_a_bomb_warning_turned_into_an_error_is_translated():
    with pytest.raises(DataError, match="decompression bombs"):
        decode_image(make_png_header(10_000, 10_000), key="a")


@pytest.mark.parametrize(
    ("container", "mode", "options"),
    [
        ("JPEG", "RGB", {}),
        ("JPEG", "L", {"progressive": True}),
        ("JPEG", "CMYK", {}),
        ("PNG", "RGB", {}),
        ("PNG", "RGBA", {}),
        ("PNG", "P", {"transparency": 0}),
        ("PNG", "I;16", {}),
        ("PNG", "1", {}),
        ("TIFF", "F", {}),
    ],
)
def test_pictures_larger_than_cameras_take_are_halved(container, mode, options, monkeypatch):
    """The same whatever the format: each pixel is the mean of four, and the size is known."""
    picture = PIL.Image.linear_gradient("L").resize((41, 30)).convert("L")
    picture = (
        PIL.Image.fromarray(np.asarray(picture).astype(np.uint16) * 257)
        if mode == "I;16"
        else picture.convert(mode)
    )
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    options |= {} if container == "TIFF" else {"exif": exif}
    encoded = encode(picture, container, **options)
    whole = decode_image(encoded, key="a")
    monkeypatch.setattr("gemma_tuner.media.image._MAX_WHOLE_PIXELS", 41 * 30 - 1)
    halved = decode_image(encoded, key="a")
    assert halved.size == ((whole.width + 1) // 2, (whole.height + 1) // 2)
    assert decode_image(encoded, key="a", is_blank=True).size == halved.size
    expected = np.asarray(whole.reduce(2), dtype=int)
    assert np.abs(np.asarray(halved, dtype=int) - expected).mean() < 3
    monkeypatch.setattr("gemma_tuner.media.image._MAX_WHOLE_PIXELS", 41 * 30)
    assert decode_image(encoded, key="a") == whole


@pytest.mark.parametrize(
    ("container", "size", "megabytes"),
    [("PNG", (9000, 9000), 324), ("WEBP", (4500, 4500), 324), ("JPEG", (9400, 9400), 353)],
)
def test_what_decoders_would_need_is_bounded_by_the_header(container, size, megabytes):
    options = {"progressive": True} if container == "JPEG" else {}
    encoded = encode(PIL.Image.new("RGB", size), container, **options)
    tracemalloc.start()
    with pytest.raises(DataError, match=f"takes {megabytes} MB to decode, and the limit is 268"):
        decode_image(encoded, key="a")
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_refuses_truncated_pictures(format):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    encoded = encode(PIL.Image.fromarray(noise), format)
    with pytest.raises(DataError, match=r"fetch it again|not a picture"):
        decode_image(encoded[: len(encoded) // 2], key="a")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"", r"empty \(0 bytes\)"),
        (b"not a picture at all", "not a picture of a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
        (PIL.Image.new("RGB", (0, 5)), "0x5 pixels"),
        ({"bytes": b""}, "dict"),
        (None, "NoneType"),
        ("gs://bucket/secret.png?token=1", "gs: URI"),
        ("a\0b.png", "cannot be opened"),
    ],
)
def test_refusals_name_the_example_and_a_remedy(source, message):
    with pytest.raises(DataError, match=message) as caught:
        decode_image(source, key="set/9")
    assert caught.value.key == "set/9"
    assert "set/9" in str(caught.value)
    assert "token" not in str(caught.value)


def test_file_errors_name_the_file_and_not_its_folder(tmp_path):
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "folder.png").mkdir()
    for name, message in [
        ("text.png", "not a picture"),
        ("folder.png", "cannot be opened"),
        ("none.png", "does not exist"),
    ]:
        with pytest.raises(DataError, match=message) as caught:
            decode_image(tmp_path / name, key="a")
        assert repr(name) in str(caught.value)
        assert tmp_path.name not in str(caught.value)


@given(st.data())
@settings(max_examples=150, deadline=None)
@pytest.mark.filterwarnings("ignore")
def test_damage_anywhere_gives_a_picture_or_a_data_error(data):
    container = data.draw(
        st.sampled_from(["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "ICO"])
    )
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"
    options = {"exif": exif} if container in ("JPEG", "PNG", "WEBP") else {}
    encoded = bytearray(encode(make_picture(), container, **options))
    for _ in range(data.draw(st.integers(1, 4))):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    encoded = encoded[: data.draw(st.integers(0, len(encoded)))]
    try:
        decoded = decode_image(bytes(encoded), key="a")
    except DataError:
        return
    assert decoded.mode == "RGB"


@pytest.mark.parametrize("size", [(1, 65_536), (65_536, 1), (2, 1_000_000)])
def test_an_image_longer_than_processors_can_resize_is_refused_by_its_header(size):
    file = io.BytesIO()
    PIL.Image.new("L", size).save(file, "PNG")
    with pytest.raises(DataError, match="no side may be longer than 65,535"):
        decode_image(file.getvalue(), key="k")


def test_a_long_image_is_read():
    file = io.BytesIO()
    PIL.Image.new("L", (2, 65_535)).save(file, "PNG")
    assert decode_image(file.getvalue(), key="k").size == (2, 65_535)
