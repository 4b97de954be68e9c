"""Opening encoded media, and what its errors may say."""

from pathlib import Path

import pytest

from gemma_tuner.errors import DataError
from gemma_tuner.media.encoded import describe_source, open_encoded, read_uri_scheme


@pytest.mark.parametrize(
    ("source", "scheme"),
    [
        ("gs://bucket/a.png", "gs"),
        ("HTTPS://host/a.png", "https"),
        ("data:image/png;base64,AAAA", "data"),
        ("file:///a.png", "file"),
        ("a.png", None),
        ("/a/b.png", None),
        ("C:/pictures/a.png", None),
        ("C:\\pictures\\a.png", None),
        ("a:b.png", None),
        (b"gs://", None),
        (None, None),
    ],
)
def test_tells_uris_from_paths(source, scheme):
    assert read_uri_scheme(source) == scheme


def test_names_no_folder_and_no_contents():
    assert describe_source("/home/ann/cat.png", "image") == "image 'cat.png'"
    assert describe_source(Path("/home/ann/cat.png"), "image") == "image 'cat.png'"
    assert describe_source(b"x" * 1_234, "audio") == "audio of 1,234 encoded bytes"
    assert describe_source("U2VjcmV0" * 40, "image") == "image (a text of 320 characters)"
    with pytest.raises(DataError) as caught:
        open_encoded("U2VjcmV0" * 40, key="a", kind="image")
    assert "U2VjcmV0" not in str(caught.value)


def test_reads_from_the_first_byte(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    for source in (b"abc", tmp_path / "a", str(tmp_path / "a")):
        with open_encoded(source, key="a", kind="image") as stream:
            assert stream.read() == b"abc"
