"""Rows of files, one format at a time, and what each reader says of damage."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gemma_tuner.errors import DataError, SourceError
from gemma_tuner.sources.columns import Columns
from gemma_tuner.sources.files import list_columns, read_rows

ANY = Columns("document", {"text": "text"})


def rows_of(path, file_format, columns=ANY):
    rows = read_rows([path], file_format, path.parent, columns)
    return [(row.origin, dict(row.values)) for row in rows]


def test_json_lines_are_numbered_by_line_and_blank_lines_passed_over(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('\ufeff{"text": "a\u2028b"}\n\n{"text": "c"}', encoding="utf-8")
    assert rows_of(path, "jsonl") == [
        ("a.jsonl:1", {"text": "a\u2028b"}),
        ("a.jsonl:3", {"text": "c"}),
    ]


def test_gzipped_json_lines_are_read(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n{"text": "b"}\n'))
    assert [values["text"] for _, values in rows_of(path, "jsonl")] == ["a", "b"]


def test_a_json_file_may_be_an_array(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "a"}, {"text": "b"}], indent=1))
    assert rows_of(path, "jsonl") == [("a.json:1", {"text": "a"}), ("a.json:2", {"text": "b"})]
    path.write_text('{"text": "a"}\n{"text": "b"}\n')
    assert rows_of(path, "jsonl") == [("a.json:1", {"text": "a"}), ("a.json:2", {"text": "b"})]


def test_csv_with_quotes_line_breaks_a_bom_and_large_fields(tmp_path):
    path = tmp_path / "a.csv"
    large = "x" * 300_000
    path.write_bytes(f'\ufefftext,b\r\n"one,\r\n""two""",1\r\n{large},2\r\n'.encode())
    assert rows_of(path, "csv") == [
        ("a.csv:1", {"text": 'one,\r\n"two"', "b": "1"}),
        ("a.csv:2", {"text": large, "b": "2"}),
    ]
    assert list_columns([path], "csv") == ["text", "b"]


def test_parquet_reads_only_the_columns_that_are_needed(tmp_path):
    path = tmp_path / "a.parquet"
    table = pa.table({"text": [f"t{i}" for i in range(150)], "huge": [b"x"] * 150})
    pq.write_table(table, path, row_group_size=40)
    rows = rows_of(path, "parquet")
    assert len(rows) == 150
    assert rows[149] == ("a.parquet:150", {"text": "t149"})
    assert list_columns([path], "parquet") == ["text", "huge"]


def test_columns_of_json_lines_are_gathered_over_rows_and_files(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "a", "b": 1}\n')
    (tmp_path / "b.jsonl").write_text('{"c": 1}\n')
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    assert list_columns(files, "jsonl") == ["text", "b", "c"]


def test_captions_are_read_beside_their_media(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.jpg").write_bytes(b"x")
    (tmp_path / "sub" / "a.txt").write_text("A frog.\n")
    (row,) = read_rows([tmp_path / "sub" / "a.jpg"], "captions", tmp_path, ANY)
    assert (row.origin, row.folder) == ("sub/a.jpg", tmp_path / "sub")
    assert row.values == {"file_name": "a.jpg", "text": "A frog."}
    (tmp_path / "sub" / "a.txt").unlink()
    with pytest.raises(DataError, match=r"no 'a\.txt' beside it") as caught:
        list(read_rows([tmp_path / "sub" / "a.jpg"], "captions", tmp_path, ANY))
    assert caught.value.key == "sub/a.jpg"


@pytest.mark.parametrize(
    ("name", "content", "key", "words"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": "secret"\n', "a.jsonl:2", "not valid JSON"),
        ("a.jsonl", b'{"text": "a"}\n["b"]\n', "a.jsonl:2", "a list and not an object"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl:1", "not valid JSON"),
        ("a.json", b'[{"text": "a"}, 3]', "a.json:2", "a number and not an object"),
        ("a.csv", b"text,b\n1,2\n1,2,3\n", "a.csv:2", "3 fields and the header 2"),
    ],
)
def test_a_row_that_cannot_be_read_is_named_by_file_and_number(
    tmp_path, name, content, key, words
):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        rows_of(path, "csv" if name.endswith("csv") else "jsonl")
    assert caught.value.key == key
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "not UTF-8 at line 2, byte 11"),
        ("a.csv", b"text\na\n\xe4\n", "not UTF-8 at line 3"),
        ("a.csv", b"", "no header"),
        ("a.csv", b"text,text\n1,2\n", "'text' twice"),
        ("a.csv", b'text\n"open\n', "not valid CSV"),
        ("a.json", b'[{"text": ', "not valid JSON"),
        ("a.jsonl.gz", b"not gzip", "cannot be read"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 1000)[:-20], "cannot be read"),
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
        list_columns([path], "jsonl")
