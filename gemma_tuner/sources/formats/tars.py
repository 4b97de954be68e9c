"""Samples of webdataset tars, without unpacking them: one pass over the headers.

A sample is what lies side by side in the tar under one name up to the first dot of its last part
(``a/0001.jpg``, ``a/0001.txt``), and makes one row:

=============================  ==================================================================
member                         column
=============================  ==================================================================
``.jpg .png .webp ...``        ``image``, a part of the tar that is read when it is needed
``.flac .wav .mp3 ...``        ``audio``
``.txt .text``                 ``text``
``.transcript``, ``.cls``      ``transcript``, ``cls``
``.json``                      one for each of its fields, unless a member makes one of that name
``.<name>.jpg``, ``.<name>.txt``, ``.<name>.json``  ``<name>``: a further column
=============================  ==================================================================

The name up to the dot is the ``id``, unless the json has one. Members of other endings are not
used, and counted. Texts are read in the pass. In a bucket the pass reads what the file's
read-ahead reads: of small members that is the whole tar, once and from beginning to end, and of
members above a few MiB little more than the headers.
"""

from __future__ import annotations

import io
import tarfile
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import groupby, islice
from typing import Any, BinaryIO

from gemma_tuner.errors import DataError, SourceError, quote_name
from gemma_tuner.modalities import MediaKind, kind_of_suffix
from gemma_tuner.records import StoredObject
from gemma_tuner.sources.formats.lines import DataFile, name_last
from gemma_tuner.sources.json_text import describe_type, parse_json

PEEKED_SAMPLES = 100
"""How many samples of the first, middle and last tar decide which columns there are: to look into
each would download a part of each twice."""

_TEXT_COLUMNS = {"txt": "text", "text": "text", "transcript": "transcript", "cls": "cls"}
_MAX_TEXT_BYTES = 16 << 20
_MAX_MEMBERS = 10_000  # of one sample
_MAX_HEADER_BYTES = 1 << 20
_MAX_PADDING_BYTES = 2 << 20  # tar pads to records, of 10 KiB or as the user says
_COMPRESSIONS = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")


@dataclass(frozen=True, slots=True)
class _Member:
    """One file of a tar."""

    key: str  # its name up to the first dot of the last part
    column: str  # the middle of its name, where it has one
    ending: str  # in small letters
    start: int  # of its first byte in the tar
    num_bytes: int

    @property
    def kind(self) -> MediaKind | None:
        return kind_of_suffix(f".{self.ending}")

    @property
    def is_text(self) -> bool:
        return self.ending == "json" or self.ending in _TEXT_COLUMNS


@dataclass(frozen=True, slots=True)
class _Headers:
    """A tar as ``tarfile`` reads it: long names and their like, whose length a file can claim."""

    stream: BinaryIO

    def read(self, num_bytes: int) -> bytes:
        if num_bytes > _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {num_bytes:,} bytes")
        return self.stream.read(num_bytes)

    def seek(self, place: int) -> int:
        return self.stream.seek(place)

    def tell(self) -> int:
        return self.stream.tell()


@dataclass(slots=True)
class TarReader:
    """Reads samples as rows, and counts what it leaves out."""

    counts: Counter[str] = field(default_factory=Counter)

    def read_samples(self, file: DataFile) -> Iterator[tuple[int, Mapping[str, Any] | DataError]]:
        """Read the samples of a tar, in one pass."""
        try:
            stream = file.open()
        except OSError as error:
            raise SourceError(
                f"{name_last(file)!r} cannot be read ({error.strerror}); check that it is "
                "there and readable"
            ) from None
        number = 0
        with stream, closing(self._read_members(stream, file)) as members:
            for _, group in groupby(members, key=lambda item: item[0].key):
                number += 1
                try:
                    origin = f"{file.name}:{number}"
                    row = self._make_row(_collect(group, origin), file, origin)
                except DataError as error:
                    yield number, error
                else:
                    yield number, row

    def _read_members(
        self, stream: BinaryIO, file: DataFile
    ) -> Generator[tuple[_Member, bytes | None]]:
        """Read one header after the other, to the end mark, and texts as they are met."""
        place = "at its first member"
        try:
            _refuse_compressed(stream, file)
            headers: Any = _Headers(stream)
            with tarfile.open(fileobj=headers, mode="r:") as tar:
                while (header := tar.next()) is not None:
                    # It would grow with every member.
                    tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]
                    member = self._choose_member(header)
                    if member is not None:
                        yield member, _read_text(member, stream)
                    place = f"after the member {quote_name(header.name.rpartition('/')[2])}"
                _check_end(stream, tar.offset)
        # ValueError, OverflowError: numbers in damaged headers that tarfile does not check.
        except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError) as error:
            reason = str(error) if isinstance(error, tarfile.TarError) else type(error).__name__
            raise SourceError(
                f"{name_last(file)!r} is damaged or cut off {place} ({reason}); write or fetch it "
                "again"
            ) from None

    def _choose_member(self, header: tarfile.TarInfo) -> _Member | None:
        if header.isdir():
            return None
        folder, slash, last = header.name.removeprefix("./").rpartition("/")
        stem, _, endings = last.partition(".")
        column, _, ending = endings.rpartition(".")
        member = _Member(
            f"{folder}{slash}{stem}", column, ending.lower(), header.offset_data, header.size
        )
        if not header.isreg() or header.issparse():
            self.counts["links and sparse members not used"] += 1
        elif not stem:
            self.counts["members with a hidden name not used"] += 1
        elif member.kind is None and not member.is_text:
            what = f"ending in '.{ending[:20]}'" if ending else "without ending"
            self.counts[f"members {what} not used"] += 1
        else:
            return member
        return None

    def _make_row(
        self, members: Sequence[tuple[_Member, bytes | None]], file: DataFile, origin: str
    ) -> dict[str, Any]:
        """Make one row of the members of a sample and the contents of those that are texts."""
        row: dict[str, Any] = {}
        media: dict[str, list[StoredObject]] = {}
        fields: dict[str, Any] = {}
        for member, content in members:
            if member.kind is not None:
                if member.num_bytes == 0:
                    raise DataError(
                        f"its .{member.ending} is empty (0 bytes); write the tar again", key=origin
                    )
                part = file.cut(member.start, member.num_bytes)
                media.setdefault(member.column or member.kind, []).append(part)
                continue
            text = _decode(member, content, origin)
            if member.ending == "json" and not member.column:
                fields = _parse_fields(text, origin)
                continue
            column = member.column or _TEXT_COLUMNS[member.ending]
            if column in row:
                raise DataError(
                    f"two of its members make the column {column!r}; rename one", key=origin
                )
            row[column] = (
                parse_json(text, f"its .{column}.json", key=origin)
                if member.ending == "json"
                else text
            )
        row |= {column: parts[0] if len(parts) == 1 else parts for column, parts in media.items()}
        for name in fields.keys() & row.keys():
            self.counts[f"json fields {name!r} not used beside a member of that name"] += 1
        return {"id": members[0][0].key} | fields | row


def _collect(
    group: Iterator[tuple[_Member, bytes | None]], origin: str
) -> list[tuple[_Member, bytes | None]]:
    """Take the members of one sample, of which neither the number nor the texts may go on."""
    members: list[tuple[_Member, bytes | None]] = []
    num_left = 2 * _MAX_TEXT_BYTES
    for member, content in group:
        num_left -= len(content or b"")
        if num_left < 0 or len(members) == _MAX_MEMBERS:
            raise DataError(
                f"it has more than {_MAX_MEMBERS:,} members, or {2 * _MAX_TEXT_BYTES:,} bytes of "
                "text; make several samples of it",
                key=origin,
            )
        members.append((member, content))
    return members


def list_tar_columns(files: Sequence[DataFile]) -> list[str]:
    """List the columns of tars, in the order in which they appear."""
    names: dict[str, None] = {}
    reader = TarReader()
    for place in sorted({0, len(files) // 2, len(files) - 1}):
        for _, values in islice(reader.read_samples(files[place]), PEEKED_SAMPLES):
            if not isinstance(values, DataError):
                names.update(dict.fromkeys(values))
    if not names:
        found = "; ".join(f"{what}: {count:,}" for what, count in reader.counts.items())
        raise SourceError(
            f"the tars hold no samples ({found or 'nothing at all'}); a sample is an image, "
            "clip or text and what lies beside it under the same name"
        )
    return list(names)


def _refuse_compressed(stream: BinaryIO, file: DataFile) -> None:
    if stream.read(6).startswith(_COMPRESSIONS):
        raise SourceError(
            f"{name_last(file)!r} is compressed, so that nothing in it can be found without "
            "unpacking what comes before it; unpack it to a plain .tar (images and clips are "
            "compressed already)"
        )
    stream.seek(0)


def _check_end(stream: BinaryIO, offset: int) -> None:
    """Tell an end mark from damage, at which tarfile ends as well, and from a second tar."""
    stream.seek(offset)
    end = stream.read(tarfile.BLOCKSIZE)
    if len(end) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError("there is no end mark")
    if any(end):
        raise tarfile.ReadError("the next header is damaged")
    num_bytes = stream.seek(0, io.SEEK_END) - stream.seek(offset)
    if num_bytes > _MAX_PADDING_BYTES or any(stream.read(num_bytes)):
        raise tarfile.ReadError("more follows its end mark: a hole, or two tars joined")


def _read_text(member: _Member, stream: BinaryIO) -> bytes | None:
    if not member.is_text or member.num_bytes > _MAX_TEXT_BYTES:
        return None
    stream.seek(member.start)
    content = stream.read(member.num_bytes)
    if len(content) < member.num_bytes:
        raise tarfile.ReadError("unexpected end of data")
    return content


def _decode(member: _Member, content: bytes | None, origin: str) -> str:
    what = f"its .{member.ending}"
    if content is None:
        raise DataError(
            f"{what} has {member.num_bytes:,} bytes, and at most {_MAX_TEXT_BYTES:,} are read as "
            "text; shorten it",
            key=origin,
        )
    try:
        return content.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{what} is not UTF-8 at byte {error.start + 1}; save it as UTF-8", key=origin
        ) from None


def _parse_fields(text: str, origin: str) -> dict[str, Any]:
    fields = parse_json(text, "its .json", key=origin)
    if not isinstance(fields, dict):
        raise DataError(
            f"its .json is {describe_type(fields)} and not an object of columns", key=origin
        )
    return fields
