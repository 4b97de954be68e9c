"""Whatever happens to the files of a part, what is left of it is the beginning of its stream."""

import io
import tempfile
from pathlib import Path

import pyarrow
from hypothesis import given
from hypothesis import strategies as st

from gemma_tuner.sources.bigquery.parts import Part

SCHEMA = pyarrow.schema([("number", pyarrow.int64()), ("text", pyarrow.string())])
HEADER = SCHEMA.serialize().to_pybytes()


def make_batch(start: int, num_rows: int) -> bytes:
    numbers = range(start, start + num_rows)
    rows = [{"number": number, "text": "x" * (number % 7)} for number in numbers]
    sink = io.BytesIO()
    with pyarrow.ipc.new_stream(sink, SCHEMA) as writer:
        writer.write_batch(pyarrow.RecordBatch.from_pylist(rows, SCHEMA))
    messages = pyarrow.ipc.MessageReader.open_stream(pyarrow.py_buffer(sink.getvalue()))
    messages.read_next_message()
    return messages.read_next_message().serialize().to_pybytes()


def fill(part: Part, sizes: list[int], total: int) -> None:
    """Append the batches that follow what the part holds already."""
    start = 0
    for size in sizes:
        if start >= part.num_rows:
            part.append(make_batch(start, size), size)
        start += size
    part.sync()
    assert part.num_rows == total


def read(part: Part) -> list[int]:
    return [row["number"] for batch in part.read_batches() for row in batch.to_pylist()]


@given(
    sizes=st.lists(st.integers(1, 5), max_size=6),
    file=st.sampled_from(["part-0.arrow", "part-0.index"]),
    place=st.floats(0, 1, exclude_max=True),
    damage=st.sampled_from(["cut", "flip", "append"]),
    bit=st.integers(0, 7),
)
def test_a_damaged_part_is_cut_to_whole_batches_and_filled_again(sizes, file, place, damage, bit):
    total = sum(sizes)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        part = Part(folder, 0, HEADER)
        fill(part, sizes, total)
        part.close()

        content = bytearray((folder / file).read_bytes())
        index = int(place * len(content))
        if damage == "cut":
            del content[index:]
        elif damage == "flip" and content:
            content[index] ^= 1 << bit
        else:
            content += b"\1" * (index + 1)
        (folder / file).write_bytes(content)

        part = Part(folder, 0, HEADER)
        kept = read(part)
        assert kept == list(range(part.num_rows))
        assert part.num_rows in [sum(sizes[:count]) for count in range(len(sizes) + 1)]
        if damage == "append":
            assert part.num_rows == total
        fill(part, sizes, total)
        part.close()

        part = Part(folder, 0, HEADER)
        assert read(part) == list(range(total))
        part.close()
