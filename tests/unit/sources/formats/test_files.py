"""Rows of files, one format at a time, and what each reader says of damage."""

import gzip
import json
import re
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gemma_tuner.errors import DataError, SourceError
from gemma_tuner.records import StoredObject
from gemma_tuner.sources.columns import Columns
from gemma_tuner.sources.formats.files import LocalFile, list_columns, read_rows, read_text

ANY = Columns("document", {"text": "text"})


def file_of(path):
    return LocalFile(path, f"sub/{path.name}")


def rows_of(path, file_format, columns=ANY) -> list[Any]:
    return list(read_rows(file_of(path), file_format, columns))


def test_json_lines_are_numbered_by_line_and_blank_lines_passed_over(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('\ufeff{"text": "a\u2028b"}\n\n{"text": "c"}', encoding="utf-8")
    assert rows_of(path, "jsonl") == [
        (1, {"text": "a\u2028b"}),
        (3, {"text": "c"}),
    ]


def test_gzipped_json_lines_are_told_by_their_content(tmp_path):
    content = b'{"text": "a"}\n{"text": "b"}\n'
    for name, stored in (
        ("a.jsonl.gz", gzip.compress(content, mtime=0)),
        ("b.jsonl", gzip.compress(content, mtime=0)),  # as a bucket may keep it
        ("c.jsonl.gz", content),
    ):
        (tmp_path / name).write_bytes(stored)
        assert [values["text"] for _, values in rows_of(tmp_path / name, "jsonl")] == ["a", "b"]


def test_a_json_file_may_be_an_array(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "a"}, {"text": "b"}], indent=1))
    assert rows_of(path, "jsonl") == [(1, {"text": "a"}), (2, {"text": "b"})]
    path.write_text('{"text": "a"}\n{"text": "b"}\n')
    assert rows_of(path, "jsonl") == [(1, {"text": "a"}), (2, {"text": "b"})]


def test_csv_with_quotes_line_breaks_a_bom_and_large_fields(tmp_path):
    path = tmp_path / "a.csv"
    large = "x" * 300_000
    path.write_bytes(f'\ufefftext,b\r\n"one,\r\n""two""",1\r\n{large},2\r\n'.encode())
    assert rows_of(path, "csv") == [
        (1, {"text": 'one,\r\n"two"', "b": "1"}),
        (2, {"text": large, "b": "2"}),
    ]
    assert list_columns([file_of(path)], "csv") == ["text", "b"]


def test_parquet_reads_only_the_columns_that_are_needed(tmp_path):
    path = tmp_path / "a.parquet"
    table = pa.table({"text": [f"t{i}" for i in range(150)], "huge": [b"x"] * 150})
    pq.write_table(table, path, row_group_size=40)
    rows = rows_of(path, "parquet")
    assert len(rows) == 150
    assert rows[149] == (150, {"text": "t149"})
    assert list_columns([file_of(path)], "parquet") == ["text", "huge"]


def test_columns_of_json_lines_are_gathered_over_rows_and_files(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "a", "b": 1}\n')
    (tmp_path / "b.jsonl").write_text('{"c": 1}\n')
    files = [file_of(tmp_path / name) for name in ("a.jsonl", "b.jsonl")]
    assert list_columns(files, "jsonl") == ["text", "b", "c"]


def test_a_local_file_knows_its_folder_and_its_parts(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\ufeffA frog.\n", encoding="utf-8")
    file = file_of(path)
    assert read_text(file) == "A frog.\n"
    assert file.folder == tmp_path
    assert file.cut(3, 4) == StoredObject("sub/a.txt", start=3, num_bytes=4)


@pytest.mark.parametrize(
    ("name", "content", "key", "words"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": "secret"\n', "sub/a.jsonl:2", "not valid JSON"),
        ("a.jsonl", b'{"text": "a"}\n["b"]\n', "sub/a.jsonl:2", "a list and not an object"),
        ("a.jsonl", b"[" * 100_000, "sub/a.jsonl:1", "not valid JSON"),
        ("a.json", b'[{"text": "a"}, 3]', "sub/a.json:2", "a number and not an object"),
        ("a.csv", b"text,b\n1,2\n1,2,3\n", "sub/a.csv:2", "3 fields and the header 2"),
    ],
)
def test_a_row_that_cannot_be_read_comes_as_an_error_in_its_place(
    tmp_path, name, content, key, words
):
    path = tmp_path / name
    path.write_bytes(content)
    rows = rows_of(path, "csv" if name.endswith("csv") else "jsonl")
    ((number, error),) = [row for row in rows if isinstance(row[1], DataError)]
    assert error.key == key == f"sub/{name}:{number}"
    assert re.search(words, str(error))
    assert "secret" not in str(error)


def test_rows_after_a_bad_one_are_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\nnonsense\n{"text": "c"}\n')
    first, bad, last = rows_of(path, "jsonl")
    assert (first, last) == ((1, {"text": "a"}), (3, {"text": "c"}))
    assert isinstance(bad[1], DataError)
    assert list_columns([file_of(path)], "jsonl") == ["text"]
    path.write_text('nonsense\n{"text": "c"}\n')
    with pytest.raises(DataError, match="not valid JSON"):
        list_columns([file_of(path)], "jsonl")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "not UTF-8 at line 2, byte 11"),
        ("a.csv", b"text\na\n\xe4\n", "not UTF-8 at line 3"),
        ("a.csv", b"", "no header"),
        ("a.csv", b"text,text\n1,2\n", "'text' twice"),
        ("a.csv", b'text\n"open\n', "not valid CSV"),
        ("a.json", b'[{"text": ', "not valid JSON"),
        ("a.jsonl.gz", gzip.compress(b"x", mtime=0)[:5] + b"not gzip", "cannot be read"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 1000, mtime=0)[:-20], "cannot be read"),
        ("a.parquet", b"PAR1 nothing", "Parquet"),
    ],
)
def test_a_file_that_cannot_be_read_is_told_with_the_place(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content)
    file_format = "parquet" if "parquet" in name else "csv" if "csv" in name else "jsonl"
    with pytest.raises(SourceError, match=words):
        rows_of(path, file_format)


def test_damage_inside_a_parquet_file_is_told(tmp_path):
    path = tmp_path / "a.parquet"
    rows = [f"{i} {'lorem' * (i % 7)}" for i in range(20_000)]
    pq.write_table(pa.table({"text": rows}), path, row_group_size=1000, compression="zstd")
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 200] = bytes(200)
    path.write_bytes(content)
    with pytest.raises(SourceError, match="damaged after row"):
        rows_of(path, "parquet")


def test_files_without_rows_are_told(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n")
    with pytest.raises(SourceError, match="holds no rows"):
        list_columns([file_of(path)], "jsonl")


def write_strings(texts: list[bytes]) -> pa.Array:
    """Text as it is given, as writers of Parquet do not check it."""
    offsets = np.cumsum([0, *map(len, texts)], dtype=np.int32)
    buffers = [None, pa.py_buffer(offsets.tobytes()), pa.py_buffer(b"".join(texts))]
    return pa.Array.from_buffers(pa.string(), len(texts), buffers)


@pytest.mark.parametrize("place", [0, 63, 64, 99])
def test_a_value_that_python_cannot_hold_costs_its_row_alone(tmp_path, place):
    texts = [b"good"] * 100
    texts[place] = b"caf\xe9"
    days = pa.array([0] * 100, pa.int32())
    days = days.to_pylist()
    days[50] = 2**31 - 1  # five million years from now
    table = pa.table({"text": write_strings(texts), "day": pa.array(days, pa.date32())})
    pq.write_table(table, tmp_path / "a.parquet")
    columns = Columns("document", {"text": "text", "id": "day"})
    file = LocalFile(tmp_path / "a.parquet", "a.parquet")
    rows = list(read_rows(file, "parquet", columns))
    assert [number for number, _ in rows] == list(range(1, 101))
    bad = {number: error for number, error in rows if isinstance(error, DataError)}
    assert bad.keys() == {place + 1, 51}
    assert "not UTF-8" in str(bad[place + 1])
    assert "caf" not in str(bad[place + 1])
    assert bad[51].key == "a.parquet:51"


@pytest.mark.parametrize(
    "row", ['{"text": "a", "text": "b"}', '{"text": "a", "x": [{"y": 1, "y": 2}]}']
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_an_object_with_one_name_twice_is_refused(tmp_path, row, name):
    (tmp_path / name).write_text(f"[{row}]" if name == "a.json" else row)
    try:
        ((_, outcome),) = rows_of(tmp_path / name, "jsonl")
    except SourceError as error:
        outcome = error
    assert "one name twice" in str(outcome)


@pytest.mark.parametrize(
    ("name", "split"), [("test", "test"), ("valid", "valid"), ("train", None)]
)
def test_rows_under_the_name_of_a_split_are_of_it(tmp_path, name, split):
    (tmp_path / "a.json").write_text(json.dumps({name: [{"text": "a"}], "version": 1}))
    ((_, row),) = rows_of(tmp_path / "a.json", "jsonl")
    assert row.get("split") == split
