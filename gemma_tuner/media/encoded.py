"""Opening encoded media: a local file, or bytes.

Only a file's name gets into a message, never its folder, and nothing of a URI but its scheme:
paths tell about the user's machine, and signed URLs carry their signature.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
from pathlib import Path
from typing import BinaryIO, Literal

from gemma_tuner.errors import DataError, quote_name
from gemma_tuner.modalities import MediaKind

# Two letters at least, so that a Windows drive (C:\...) is a path.
_URI = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+)://|^(data):", re.ASCII)

# What encoded media begin with. Source: Wikipedia's list of file signatures, and for the brands
# behind "ftyp" ISO/IEC 14496-12.
_MAGIC: tuple[tuple[bytes, Literal["image", "audio", "video"]], ...] = (
    *((magic, "image") for magic in (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF8")),
    *((magic, "image") for magic in (b"II*\0", b"MM\0*", b"\0\0\0\x0cjP  ")),
    *((magic, "audio") for magic in (b"fLaC", b"OggS", b"ID3", b"\xff\xfb", b"\xff\xf3")),
    *((magic, "audio") for magic in (b"\xff\xfa", b"\xff\xf2", b"\xff\xf1", b"\xff\xf9")),
    (b"\x1a\x45\xdf\xa3", "video"),
)
_FORMS = {b"WAVE": "audio", b"AIFF": "audio", b"AIFC": "audio", b"WEBP": "image", b"AVI ": "video"}
_STILLS = (b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1")
_BASE64 = re.compile(r"[A-Za-z0-9+/\r\n]{64}")


def sniff_media(content: bytes) -> Literal["image", "audio", "video"] | None:
    """Tell encoded media by their first bytes; None for anything else."""
    for magic, kind in _MAGIC:
        if content.startswith(magic):
            return kind
    if content[:4] in (b"RIFF", b"RIFX", b"RF64", b"FORM"):
        return _FORMS.get(content[8:12])  # pyright: ignore[reportReturnType]
    if content[4:8] == b"ftyp":
        brand = content[8:12]
        return "image" if brand in _STILLS else "audio" if brand == b"M4A " else "video"
    is_bmp = content[:2] == b"BM" and content[6:10] == bytes(4) and len(content) > 26
    return "image" if is_bmp else None


def read_base64_media(text: str) -> bytes | None:
    """Decode media that are given as base64 text, in one line or many; None for other text."""
    if not _BASE64.match(text) or not sniff_media(_decode_start(text)):
        return None
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        return None


def _decode_start(text: str) -> bytes:
    start = "".join(text[:64].split())
    return base64.b64decode(start[: len(start) // 4 * 4])


def read_uri_scheme(source: object) -> str | None:
    """Return the scheme of a URI (``gs``, ``https``, ``data``), or None for anything else."""
    match = _URI.match(source) if isinstance(source, str) else None
    return (match[1] or match[2]).lower() if match else None


def describe_source(source: object, kind: MediaKind) -> str:
    """Name a source in an error message: a file's name without its folder, or the sort of data."""
    if isinstance(source, str | Path):
        name = Path(source).name
        return f"{kind} {quote_name(name)}"
    if isinstance(source, bytes):
        return f"{kind} of {len(source):,} encoded bytes"
    return f"{kind} given as {type(source).__name__}"


def open_encoded(source: str | Path | bytes, *, key: str, kind: MediaKind) -> BinaryIO:
    """Open encoded media for reading from its first byte."""
    name = describe_source(source, kind)
    scheme = read_uri_scheme(source)
    if scheme is not None:
        raise DataError(
            f"its {kind} is a {scheme}: URI, and decoding fetches nothing; read the example "
            "through a stream, which fetches its media first, or give a local path or the bytes",
            key=key,
        )
    if isinstance(source, bytes):
        stream: BinaryIO = io.BytesIO(source)
    elif isinstance(source, str | Path):
        try:
            stream = Path(source).open("rb")  # noqa: SIM115 (the caller closes it)
        except FileNotFoundError:
            raise DataError(
                f"{name} does not exist; put it back, or check the column that names it and the "
                "folder that relative paths start from",
                key=key,
            ) from None  # whose message holds the path
        except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
            raise DataError(
                f"{name} cannot be opened ({name_reason(error)}); it must be a readable file",
                key=key,
            ) from None
    else:
        raise DataError(
            f"its {kind} is a {type(source).__name__}; give a local path, the encoded bytes or "
            "the decoded form",
            key=key,
        )
    if stream.seek(0, io.SEEK_END) == 0:
        stream.close()
        raise DataError(f"{name} is empty (0 bytes); fetch it again or drop it", key=key)
    stream.seek(0)
    return stream


def name_reason(error: OSError | ValueError) -> str:
    """Say why without the path that the system's own message ends with."""
    return (error.strerror if isinstance(error, OSError) else None) or type(error).__name__
