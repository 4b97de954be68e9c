"""Opening encoded media: a local file, or bytes.

Only a file's name gets into a message, never its folder, and nothing of a URI but its scheme:
paths tell about the user's machine, and signed URLs carry their signature.
"""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import BinaryIO

from gemma_tuner.errors import DataError, quote_name
from gemma_tuner.modalities import MediaKind

# Two letters at least, so that a Windows drive (C:\...) is a path.
_URI = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+)://|^(data):", re.ASCII)


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
