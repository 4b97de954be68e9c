"""What lies on disk while a BigQuery table is read: a part for each stream, and one record.

A part is an Arrow IPC stream, the schema and the record batches as BigQuery sent them. Its index
has an entry for each batch; what does not agree with its entry is cut off together with all that
follows, and read again.

::

    record.json    table, snapshot time, session, streams that are whole: no rows, no credentials
    part-0.arrow   schema, batch, batch, ...
    part-0.index   (end of the batch in bytes, rows up to there, CRC-32 of both and the batch), ...
    lock           held while a process reads or writes here
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import BinaryIO

import pyarrow
import pyarrow.ipc
from filelock import FileLock, Timeout

from gemma_tuner.errors import SourceError
from gemma_tuner.log import logger

_ENTRY = struct.Struct("<QQI")
_ENDS = struct.Struct("<QQ")
_BYTES_BETWEEN_SYNCS = 64 << 20


@dataclass(slots=True)
class Column:
    """A column of the table: its name, and type and mode as BigQuery's REST schemas call them."""

    name: str
    kind: str
    mode: str


@dataclass(slots=True)
class ReadSession:
    """What is needed to go on with a session of the Storage Read API."""

    streams: list[str]  # full names; a stream's place here is the number of its part
    schema: str  # the Arrow schema as an IPC message, in base 16
    expires: str  # ISO 8601; empty where BigQuery did not say
    num_rows: int  # BigQuery's estimate
    num_bytes: int  # BigQuery's estimate of what it reads
    whole: dict[str, int] = field(default_factory=dict)  # rows of parts that are complete


@dataclass(slots=True)
class Record:
    """How far the reading of one table came."""

    identity: str  # what was asked for, hashed
    snapshot_time: str = ""  # ISO 8601; empty for a query's result
    job: list[str] = field(default_factory=list)  # id and location, from before the query begins
    table: str = ""  # ``project.dataset.table``; empty until the query has run
    columns: list[Column] = field(default_factory=list)  # all of the table
    num_rows: int | None = None  # that it holds at least; None where BigQuery cannot know
    is_exact: bool = False  # it holds no more rows than those
    num_billed_bytes: int = 0  # by the query
    session: ReadSession | None = None
    num_expired: int = 0  # sessions that ended before they were read
    num_repeats: int = 0  # reads that broke off and were continued


class DamagedBatchError(Exception):
    """What came is no record batch of as many rows as was said."""


class Part:
    """The batches of one stream, open for appending from one thread."""

    # ``schema`` is the Arrow schema as an IPC message.
    def __init__(self, folder: Path, number: int, schema: bytes) -> None:
        self._schema = schema
        self._arrow_schema = pyarrow.ipc.read_schema(pyarrow.py_buffer(schema))
        self._ends: list[tuple[int, int]] = []
        self._path = folder / f"part-{number}.arrow"
        self._content = _open_private(self._path)
        self._index = _open_private(self._path.with_suffix(".index"))
        self._num_unsynced_bytes = 0
        if self._content.read(len(schema)) == schema:
            self._find_whole_batches()
        else:
            self._content.seek(0)
            self._content.write(schema)
            self._index.truncate(0)
        self._content.truncate(self._end)
        self._content.seek(self._end)

    @property
    def num_rows(self) -> int:
        """Rows of all batches: the offset from which the stream goes on."""
        return self._ends[-1][1] if self._ends else 0

    @property
    def _end(self) -> int:
        return self._ends[-1][0] if self._ends else len(self._schema)

    def append(self, batch: bytes, num_rows: int) -> None:
        """Keep one record batch, once it is known to be one."""
        if (decoded := _decode(pyarrow.py_buffer(batch), self._arrow_schema)) is None or (
            decoded.num_rows != num_rows
        ):
            raise DamagedBatchError
        self._content.write(batch)
        self._content.flush()
        self._ends.append((self._end + len(batch), self.num_rows + num_rows))
        ends = _ENDS.pack(*self._ends[-1])
        self._index.write(ends + zlib.crc32(batch, zlib.crc32(ends)).to_bytes(4, "little"))
        self._index.flush()
        self._num_unsynced_bytes += len(batch)
        if self._num_unsynced_bytes >= _BYTES_BETWEEN_SYNCS:
            self.sync()

    def sync(self) -> None:
        """Wait until the disk has everything."""
        for file in (self._content, self._index):
            file.flush()
            os.fsync(file.fileno())
        self._num_unsynced_bytes = 0

    def read_batches(self) -> Iterator[pyarrow.RecordBatch]:
        """Read the batches from the first, decoded, one at a time."""
        start, num_rows_before = len(self._schema), 0
        with pyarrow.OSFile(str(self._path)) as file:
            for end, num_rows in self._ends:
                file.seek(start)
                batch = _decode(file.read_buffer(end - start), self._arrow_schema)
                if batch is None or batch.num_rows != num_rows - num_rows_before:
                    raise SourceError(
                        f"the rows kept after row {num_rows_before:,} cannot be read any more; "
                        f"delete the folder {self._path.parent.name!r}, and start again"
                    )
                yield batch
                start, num_rows_before = end, num_rows

    def close(self) -> None:
        """Close the files."""
        self._content.close()
        self._index.close()

    def _find_whole_batches(self) -> None:
        """Go to the end of the last batch that agrees with its entry."""
        size = os.fstat(self._content.fileno()).st_size
        while len(entry := self._index.read(_ENTRY.size)) == _ENTRY.size:
            end, num_rows, checksum = _ENTRY.unpack(entry)
            if not self._end < end <= size or num_rows <= self.num_rows:
                break
            batch = self._content.read(end - self._end)
            if zlib.crc32(batch, zlib.crc32(entry[: _ENDS.size])) != checksum:
                break
            self._ends.append((end, num_rows))
        self._index.seek(len(self._ends) * _ENTRY.size)
        self._index.truncate()


class PartFolder:
    """A folder of parts and their record, used by one process at a time.

    What it holds for another ``identity`` is deleted.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        self.folder = folder
        for path in (folder.parent, folder):  # parents made on the way are everybody's to read
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        # Preserved: no soft lock takes its place, which would outlive a killed process.
        self._lock = FileLock(folder / "lock", mode=0o600, preserve_lock_file=True)
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            raise SourceError(
                "the same BigQuery data is being read already, here or by another process; wait "
                "for it to end, or choose another folder by cache_dir="
            ) from None
        self.record = self._load_record(identity)

    def __enter__(self) -> PartFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def save_record(self) -> None:
        """Replace the record on disk by the present one."""
        temporary = self.folder / "record.new"
        with _open_private(temporary) as file:
            file.truncate(0)
            file.write(json.dumps(asdict(self.record)).encode())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.folder / "record.json")

    def open_parts(self) -> list[Part]:
        """Open a part for each stream of the session, cut to what is whole."""
        session = self.record.session
        if session is None:
            return []
        schema = bytes.fromhex(session.schema)
        return [Part(self.folder, number, schema) for number in range(len(session.streams))]

    def drop_session(self) -> None:
        """Forget the session and delete its parts."""
        self.record.session = None
        self.save_record()
        self._delete_parts()

    def reset(self) -> None:
        """Forget all that the first start fixed, and delete the parts."""
        self.record = Record(self.record.identity)
        self.save_record()
        self._delete_parts()

    def delete(self) -> None:
        """Delete all that is kept here, and the folder where it holds nothing else."""
        self._delete_parts()
        for name in ("record.json", "record.new", "lock"):
            (self.folder / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def _delete_parts(self) -> None:
        for path in [*self.folder.glob("part-*.arrow"), *self.folder.glob("part-*.index")]:
            path.unlink(missing_ok=True)

    def _load_record(self, identity: str) -> Record:
        try:
            values = json.loads((self.folder / "record.json").read_bytes())
            record = Record(**values)
            record.columns = [Column(**column) for column in values["columns"]]
            record.session = ReadSession(**values["session"]) if values["session"] else None
        except FileNotFoundError:
            record = None
        except (ValueError, TypeError, KeyError):
            logger.warning("the record in %s is damaged; BigQuery is asked anew", self.folder.name)
            record = None
        if record is None or record.identity != identity:
            self._delete_parts()
            return Record(identity)
        return record


def _decode(message: pyarrow.Buffer, schema: pyarrow.Schema) -> pyarrow.RecordBatch | None:
    try:
        batch = pyarrow.ipc.read_record_batch(message, schema)
        batch.validate(full=True)  # unchecked, offsets that lead anywhere end the process
    except (pyarrow.ArrowException, EOFError, MemoryError, OSError):
        return None
    return batch


def _open_private(path: Path) -> BinaryIO:
    """Open a file for reading and writing, made for the user alone where it is not there."""
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+b")
