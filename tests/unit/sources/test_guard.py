"""Media under a name that says nothing: refused in every form and format, at the first that is."""

import base64
import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from PIL import Image

from gemma_tuner.errors import SourceError
from gemma_tuner.sources.bigquery.parts import Column
from gemma_tuner.sources.bigquery.rows import check_kinds
from gemma_tuner.sources.columns import recognise_columns
from gemma_tuner.sources.guard import LOOKED_AT
from gemma_tuner.sources.local import LocalSource

PAIR = {"prompt": "Q", "response": "A"}


def encode(kind, suffix):
    content = io.BytesIO()
    if kind == "image":
        Image.new("RGB", (16, 16), "red").save(content, suffix)
    else:
        soundfile.write(content, np.zeros(800, np.float32), 16_000, format=suffix)
    return content.getvalue()


ENCODED = {
    **{suffix: ("image", encode("image", suffix)) for suffix in ("png", "jpeg", "gif", "webp")},
    **{suffix: ("image", encode("image", suffix)) for suffix in ("tiff", "bmp", "avif")},
    **{suffix: ("audio", encode("audio", suffix)) for suffix in ("wav", "flac", "ogg", "mp3")},
    "aiff": ("audio", encode("audio", "aiff")),
}


def write(path, rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=5)
    elif path.suffix == ".csv":
        fields = "\n".join(",".join(map(str, row.values())) for row in rows)
        path.write_text(f"{','.join(rows[0])}\n{fields}\n")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def refuse(path, rows, words, **keywords):
    with pytest.raises(SourceError, match=words):
        list(LocalSource(write(path, rows), keywords=keywords))
    free = {**keywords, "ignore": ("xyz",)}
    assert len(list(LocalSource(path, keywords=free))) == len(rows)


@pytest.mark.parametrize("suffix", ENCODED)
def test_a_column_of_media_is_refused_in_every_form_that_values_have(tmp_path, suffix):
    kind, content = ENCODED[suffix]
    (tmp_path / f"a.{suffix}").write_bytes(content)
    text = base64.b64encode(content).decode()
    forms = [f"a.{suffix}", [f"a.{suffix}"], {"path": f"a.{suffix}"}, text]
    forms += [base64.encodebytes(content).decode(), f"data:{kind}/{suffix};base64,{text}"]
    for value in forms:
        refuse(tmp_path / "a.jsonl", [{**PAIR, "xyz": value}], f"'xyz' holds {kind}.*{kind}=")
    for value in (content, {"bytes": content, "path": None}, [content]):
        refuse(tmp_path / "a.parquet", [{**PAIR, "xyz": value}], f"'xyz' holds {kind}.*{kind}=")


@pytest.mark.parametrize("file_format", ["jsonl", "csv", "parquet"])
def test_rows_that_hold_nothing_put_the_decision_off(tmp_path, file_format):
    (tmp_path / "a.png").write_bytes(ENCODED["png"][1])
    empty = "" if file_format == "csv" else None
    rows = [{**PAIR, "xyz": value} for value in [empty] * (3 * LOOKED_AT) + ["a.png"]]
    refuse(tmp_path / f"a.{file_format}", rows, "'xyz' holds image")


@pytest.mark.parametrize("part", ["prompt", "response", "text"])
def test_files_where_text_is_due_are_refused(tmp_path, part):
    (tmp_path / "a.wav").write_bytes(ENCODED["wav"][1])
    row = {"text": "a.wav"} if part == "text" else {**PAIR, part: "a.wav"}
    with pytest.raises(
        SourceError, match=f"'{part}' holds audio files, and would be read as text"
    ):
        list(LocalSource(write(tmp_path / "a.jsonl", [row])))


def test_names_of_files_that_are_elsewhere_are_media_unless_the_row_has_some(tmp_path):
    for value in ("images/1.jpg", "https://example.org/1.jpg", "gs://b/1.wav"):
        refuse(tmp_path / "a.jsonl", [{**PAIR, "xyz": value}], "'xyz' holds")
    (tmp_path / "a.png").write_bytes(ENCODED["png"][1])
    rows = [{**PAIR, "image": "a.png", "xyz": "IMG_1.jpg"}]
    assert len(list(LocalSource(write(tmp_path / "b.jsonl", rows)))) == 1


@pytest.mark.parametrize(
    "value", ["about a.png files", "1.5", 3, {"a": 1}, ["cat"], "RIFF", "a" * 200, "x.py", None]
)
def test_what_is_no_media_is_passed_over_and_named(tmp_path, value):
    source = LocalSource(write(tmp_path / "a.jsonl", [{**PAIR, "xyz": value}]))
    assert len(list(source)) == 1
    assert source.read_summary()["unused"] == ["xyz"]


def test_what_is_left_out_is_named_and_has_to_be_there(tmp_path):
    path = write(tmp_path / "a.jsonl", [{**PAIR, "score": 1, "wav": "a.wav"}])
    source = LocalSource(path, keywords={"ignore": ("wav", "score")})
    assert len(list(source)) == 1
    assert source.read_summary()["notes"] == ["columns left out by ignore=: 'score', 'wav'"]
    with pytest.raises(SourceError, match="ignore= names what is not there: 'waf'"):
        list(LocalSource(path, keywords={"ignore": ("wav", "score", "waf")}))


def test_bytes_of_a_table_are_refused_by_its_schema():
    available = [Column("prompt", "STRING", ""), Column("response", "STRING", "")]
    available.append(Column("xyz", "BYTES", ""))
    names = [column.name for column in available]
    with pytest.raises(SourceError, match=r"'xyz' is BYTES.*image= or audio="):
        check_kinds(available, recognise_columns(names, {}))
    check_kinds(available, recognise_columns(names, {"ignore": ("xyz",)}))
    check_kinds(available, recognise_columns(names, {"image": "xyz"}))


@pytest.mark.parametrize(
    "value", [{"image": "a.png"}, {"x": {"y": [{"picture": "a.png"}]}}, [{"of": {"it": "a.png"}}]]
)
def test_media_deep_in_a_column_is_found(value, tmp_path):
    (tmp_path / "a.png").write_bytes(ENCODED["png"][1])
    (tmp_path / "a.jsonl").write_text(json.dumps({**PAIR, "extra": value}))
    with pytest.raises(SourceError, match="'extra' holds image"):
        list(LocalSource(tmp_path / "a.jsonl"))


def test_words_deep_in_a_column_are_none(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({**PAIR, "meta": {"of": "gone.png", "n": [1]}}))
    assert len(list(LocalSource(tmp_path / "a.jsonl"))) == 1
