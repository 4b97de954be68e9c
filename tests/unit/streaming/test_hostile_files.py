"""What fuzzing found: files that claim, repeat or nest what no writer writes."""

import io
import json
import tarfile

import pyarrow
import pyarrow.ipc
import pytest

from gemma_tuner.errors import SourceError
from gemma_tuner.streaming.opening import stream_local

SECRET = "Rosebud, the sled; and more"


def refuse(path, tmp_path):
    with pytest.raises(SourceError) as caught:
        list(stream_local(path, cache_dir=tmp_path / "cache"))
    message = str(caught.value)
    assert SECRET not in message
    return message


@pytest.mark.parametrize(
    "document",
    [
        {"images": [{"id": [1]}], "annotations": [{"image_id": 1, "caption": "a"}]},
        {"data": [{"paragraphs": ["text"]}]},
        {"data": [{"paragraphs": [{"qas": ["text"]}]}]},
        {"data": [{"paragraphs": 5}]},
    ],
    ids=str,
)
def test_a_known_layout_in_part_alone_is_refused(tmp_path, document):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(document))
    assert "in part alone" in refuse(path, tmp_path)


def test_rows_nested_without_end_are_refused_one_by_one(tmp_path):
    path = tmp_path / "rows.jsonl"
    deep = "[" * 300 + "]" * 300
    path.write_text(f'{{"prompt": "a", "response": "b", "x": {deep}}}\n')
    with pytest.raises(Exception, match="deeper than 64") as caught:
        list(stream_local(path, cache_dir=tmp_path / "cache"))
    assert "rows.jsonl:1" in str(caught.value)


def test_two_columns_of_one_name_are_refused(tmp_path):
    table = pyarrow.table({"prompt": ["a"], "response": ["b"]})
    table = table.append_column("prompt", table.column(0))
    path = tmp_path / "rows.arrow"
    with pyarrow.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)
    assert "several columns named 'prompt'" in refuse(path, tmp_path)


def test_a_column_whose_name_is_no_text_is_refused(tmp_path):
    sink = io.BytesIO()
    table = pyarrow.table({"prompt": ["a"], "responsé": ["b"]})
    with pyarrow.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    path = tmp_path / "rows.arrow"
    path.write_bytes(sink.getvalue().replace("é".encode(), b"\xff\xfe"))
    assert "cannot be read as Arrow" in refuse(path, tmp_path)


def test_values_of_split_that_are_no_names_are_not_repeated(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "a", "response": "b", "split": SECRET}) + "\n")
    assert "characters" in refuse(path, tmp_path)


def test_a_header_of_a_tar_is_bounded_before_it_is_read(tmp_path):
    header = tarfile.TarInfo("x")
    header.type = tarfile.XHDTYPE
    header.size = 1 << 32
    path = tmp_path / "rows.tar"
    path.write_bytes(header.tobuf(tarfile.PAX_FORMAT))
    with path.open("r+b") as file:  # sparse
        file.truncate(1 << 33)
    assert "a header of 4,294,967,296 bytes" in refuse(path, tmp_path)


def test_the_name_of_a_members_is_told_only_if_it_reads_as_one(tmp_path):
    path = tmp_path / "rows.tar"
    with tarfile.open(path, "w") as tar:
        tar.addfile(tarfile.TarInfo(f"{SECRET}.txt"))
    path.write_bytes(path.read_bytes()[:600])
    assert "damaged or cut off" in refuse(path, tmp_path)
