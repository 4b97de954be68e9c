"""What separates and quotes the fields of a table, and whether its first line is a header."""

import csv
import io
import itertools

import pytest

from gemma_tuner.errors import SourceError
from gemma_tuner.sources.formats.delimited import list_csv_columns, read_csv
from gemma_tuner.sources.formats.files import LocalFile

VALUES = ("plain", "a, b; c", 'say "x"', '"quoted" at first', "two\nlines", "", "Ähnlich")


def file_of(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return LocalFile(path, path.name)


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_what_the_csv_module_writes_is_read_back(tmp_path, delimiter, encoding, end):
    rows = [list(pair) for pair in itertools.product(VALUES, repeat=2)]
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter=delimiter, lineterminator=end)
    writer.writerows([["prompt", "response"], *rows])
    file = file_of(tmp_path / "a.csv", stream.getvalue().encode(encoding))
    assert list_csv_columns(file) == ["prompt", "response"]
    assert [list(values.values()) for _, values in read_csv(file)] == rows


@pytest.mark.parametrize("delimiter", ["\t", "|"])
def test_quotes_that_nobody_meant_are_letters(tmp_path, delimiter):
    lines = [
        ("sentence", "n"),
        ('"Hello," he said.', "1"),
        ('"Go" and "stay"', "2"),
        ('5" x 4"', "3"),
    ]
    text = "".join(delimiter.join(line) + "\n" for line in lines)
    rows = [tuple(row.values()) for _, row in read_csv(file_of(tmp_path / "a.tsv", text))]
    assert rows == lines[1:]


@pytest.mark.parametrize(
    "line",
    [
        "what is secret?,a secret answer",
        "1,secret,2",
        "secret.wav,hello",
        "a secret of very many words indeed and more,b",
        f"{'secret' * 20};b",
    ],
)
def test_a_table_without_header_is_refused_and_its_words_are_not_repeated(tmp_path, line):
    with pytest.raises(SourceError, match="has no header: field") as caught:
        list_csv_columns(file_of(tmp_path / "a.csv", f"{line}\n{line}\n"))
    assert "secret" not in str(caught.value)


def test_a_header_that_is_a_question_is_one_where_the_user_names_it(tmp_path):
    file = file_of(tmp_path / "form.csv", "What is your name?,And why?\nAnn,Because.\n")
    assert list_csv_columns(file, ["What is your name?"]) == ["What is your name?", "And why?"]


def test_ljspeech_is_known_by_its_form_and_speakers_are_no_speech(tmp_path):
    rows = 'LJ001-0001|In 1900|In nineteen hundred\nLJ001-0002|"So," he said|"So," he said\n'
    file = file_of(tmp_path / "metadata.csv", rows)
    assert list_csv_columns(file) == ["id", "audio", "text"]
    assert [(number, row["audio"], row["text"]) for number, row in read_csv(file)] == [
        (1, "wavs/LJ001-0001.wav", "In nineteen hundred"),
        (2, "wavs/LJ001-0002.wav", '"So," he said'),
    ]
    speakers = file_of(tmp_path / "a.csv", "a1|a long sentence that is said|p1\n" * 3)
    assert list_csv_columns(speakers, ["a1"]) != ["id", "audio", "text"]


def test_fields_in_single_quotes_are_refused(tmp_path):
    file = file_of(tmp_path / "a.csv", "'prompt','response'\n'Q','A'\n")
    with pytest.raises(SourceError, match="quotes its fields by '"):
        list_csv_columns(file)
