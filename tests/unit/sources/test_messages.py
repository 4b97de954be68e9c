"""Chat messages and media values in the forms people keep them."""

import base64
from collections import Counter

import numpy as np
import pytest

from gemma_tuner.errors import DataError
from gemma_tuner.records import Audio, Image, StoredObject, Text, Turn
from gemma_tuner.sources.messages import read_media, read_media_list, read_turns

PNG = b"\x89PNG not really"
ENCODED = base64.b64encode(PNG).decode()


@pytest.mark.parametrize("kind", ["image", "audio"])
def test_base64_is_read_with_or_without_lines_and_never_shown(kind):
    content = (b"\x89PNG\r\n\x1a\n" if kind == "image" else b"fLaC") + bytes(200)
    part = Image if kind == "image" else Audio
    plain, lines = base64.b64encode(content).decode(), base64.encodebytes(content).decode()
    for text in (plain, lines):
        for value in (text, f"data:{kind}/x;base64,{text}", {"bytes": text}):
            assert read_media(value, kind, key="k") == part(content)
    for value in ("QUJD" * 2000, "words " * 1000, {"bytes": plain + "!"}):
        with pytest.raises(DataError, match="base64") as caught:
            read_media(value, kind, key="k")
        assert len(str(caught.value)) < 250
        assert "QUJD" not in str(caught.value)


def turns_of(messages, media=None):
    return read_turns(messages, key="k", media=media or {}, unused_fields=Counter())[0]


def parts_of(content, media=None):
    return turns_of([{"role": "user", "content": content}], media)[0].parts


def test_several_turns_with_a_system_turn_keep_their_order():
    turns = turns_of(
        [
            {"role": "system", "content": "S"},
            {"role": "user", "content": "Q"},
            {"role": "assistant", "content": "A"},
            {"role": "user", "content": "R"},
            {"role": "assistant", "content": "B"},
        ]
    )
    assert [(turn.role, turn.text) for turn in turns] == [
        ("system", "S"),
        ("user", "Q"),
        ("assistant", "A"),
        ("user", "R"),
        ("assistant", "B"),
    ]


def test_sharegpt_names_are_mapped():
    messages = [
        {"from": "system", "value": "S"},
        {"from": "human", "value": "Q"},
        {"from": "gpt", "value": "A"},
    ]
    assert [turn.role for turn in turns_of(messages)] == ["system", "user", "assistant"]
    assert turns_of(messages)[1].text == "Q"


def test_messages_may_be_json_text():
    assert turns_of('[{"role": "model", "content": "A"}]') == (Turn("assistant", (Text("A"),)),)


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("plain", Text("plain")),
        ({"type": "text", "text": "t", "image": None}, Text("t")),
        ({"type": "image", "image": "a.png"}, Image("a.png")),
        ({"type": "image", "path": "a.png"}, Image("a.png")),
        ({"type": "image", "url": "a.png"}, Image("a.png")),
        ({"type": "image", "bytes": PNG}, Image(PNG)),
        ({"type": "image", "bytes": ENCODED}, Image(PNG)),
        ({"type": "image", "image": {"bytes": PNG, "path": None}}, Image(PNG)),
        ({"type": "image", "image": f"data:image/png;base64,{ENCODED}"}, Image(PNG)),
        ({"type": "image_url", "image_url": "a.png"}, Image("a.png")),
        ({"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}}, Image("a.png")),
        (
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{ENCODED}"}},
            Image(PNG),
        ),
        ({"type": "audio", "audio": "a.wav"}, Audio("a.wav")),
        ({"type": "audio", "path": "a.wav"}, Audio("a.wav")),
        (
            {"type": "input_audio", "input_audio": {"data": ENCODED, "format": "wav"}},
            Audio(PNG),
        ),
        ({"type": "input_audio", "data": ENCODED}, Audio(PNG)),
    ],
)
def test_each_form_of_part_is_read(part, expected):
    assert parts_of([part]) == (expected,)


def test_bare_parts_take_the_rows_media_in_order():
    content = [
        {"type": "image"},
        {"type": "text", "text": "and"},
        {"type": "image", "image": {"bytes": None, "path": None}},
        {"type": "audio"},
    ]
    media = {"image": [Image("1"), Image("2")], "audio": [Audio("3")]}
    assert parts_of(content, media) == (Image("1"), Text("and"), Image("2"), Audio("3"))


def test_tags_within_text_take_the_rows_media_and_their_line_breaks():
    media = {"image": [Image("1"), Image("2")]}
    parts = parts_of("<image>\nWhat is this?\n<image>\nAnd this, <audio>?", media)
    assert parts == (Image("1"), Text("What is this?"), Image("2"), Text("And this, <audio>?"))
    assert parts_of("Write <image> in HTML.") == (Text("Write <image> in HTML."),)


def test_media_that_no_place_asked_for_come_back():
    messages = [{"role": "user", "content": "Q"}]
    _, unplaced = read_turns(
        messages, key="k", media={"image": [Image("1")]}, unused_fields=Counter()
    )
    assert unplaced == [Image("1")]


def test_fields_for_the_template_pass_and_others_are_counted():
    unused = Counter()
    call = {"id": "c", "function": {"name": "f", "arguments": '{"x": 1}'}}
    turns, _ = read_turns(
        [
            {"role": "assistant", "content": None, "tool_calls": [call], "weight": 1},
            {"role": "tool", "content": "2", "tool_call_id": "c", "name": "f"},
            {"role": "assistant", "content": "A", "reasoning_content": "R", "tool_calls": None},
        ],
        key="k",
        media={},
        unused_fields=unused,
    )
    parsed = {"id": "c", "function": {"name": "f", "arguments": {"x": 1}}}
    assert turns[0] == Turn("assistant", (), {"tool_calls": [parsed]})
    assert turns[1].fields == {"tool_call_id": "c", "name": "f"}
    assert turns[2].fields == {"reasoning_content": "R"}
    assert unused == {"weight": 1}


@pytest.mark.parametrize(
    ("messages", "media", "words"),
    [
        ("[", {}, "not valid JSON"),
        ([3], {}, "message 1 is a number"),
        ([{"content": "Q"}], {}, "unknown role null"),
        ([{"role": "function", "content": "Q"}], {}, "unknown role 'function'"),
        ([{"role": "user", "content": 3}], {}, "a number as content"),
        ([{"role": "user", "content": [{"type": "video"}]}], {}, "part of type 'video'"),
        ([{"role": "user", "content": [{"type": "text", "text": 3}]}], {}, "part of type 'text'"),
        ([{"role": "user", "content": [3]}], {}, "part of type null"),
        ([{"role": "user", "content": [{"type": "image"}]}], {}, "one more image than"),
        ([{"role": "user", "content": "<image> <image>"}], {"image": [Image("1")]}, "one more"),
        (
            [{"role": "user", "content": "<image>"}],
            {"image": [Image("1"), Image("2")]},
            "places for 1 of its 2 image",
        ),
        ([{"role": "assistant", "tool_calls": "f()"}], {}, "tool_calls are text"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]}],
            {},
            "arguments is not valid JSON",
        ),
    ],
)
def test_messages_that_cannot_be_read_are_told(messages, media, words):
    with pytest.raises(DataError, match=words) as caught:
        turns_of(messages, media)
    assert caught.value.key == "k"


def test_samples_with_their_rate_become_audio():
    part = read_media({"array": [0.0, 0.5], "sampling_rate": 8000, "path": "a"}, "audio", key="k")
    assert isinstance(part, Audio)
    assert part.sample_rate_hz == 8000
    assert isinstance(part.source, np.ndarray)
    assert part.source.dtype == np.float32
    assert part.source.tolist() == [0.0, 0.5]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"array": [0.0]}, "sampling_rate"),
        ({"array": [0.0], "sampling_rate": 0}, "sampling_rate"),
        ({"array": [], "sampling_rate": 8000}, "shape"),
        ({"array": [[0.0], [0.0]], "sampling_rate": 8000}, "shape"),
        ({"array": [[0.0], 0.0], "sampling_rate": 8000}, "shape"),
        ({"array": [1, 2], "sampling_rate": 8000}, "int64"),
        ("data:audio/wav;base64,???", "base64"),
        ({"data": "???"}, "base64"),
        (3, "a number"),
        ([], "a list"),
    ],
)
def test_media_values_that_cannot_be_read_are_told(value, words):
    with pytest.raises(DataError, match=words):
        read_media(value, "audio", key="k")


@pytest.mark.parametrize(
    "value",
    [
        {"src": "https://host/a.png", "height": 64},
        {"path": None, "src": "a.png"},
        {"uri": "gs://bucket/a.png"},
        {"array": [0.0]},
    ],
)
def test_objects_of_another_form_are_refused(value):
    with pytest.raises(DataError, match=r'another form; known .*{"bytes"}.*image=') as caught:
        read_media(value, "image", key="k")
    assert "a.png" not in str(caught.value)


@pytest.mark.parametrize(
    "value",
    [
        None,
        "",
        b"",
        {},
        {"bytes": None, "path": None},
        {"src": None},
        {"url": "", "detail": "low"},
        {"bytes": None, "sampling_rate": 16_000},
    ],
)
def test_values_that_hold_nothing_are_none(value):
    assert read_media(value, "image", key="k") is None
    assert read_media_list(value, "image", key="k") == []


def test_lists_of_media_keep_their_order():
    assert read_media_list(["a", b"b"], "image", key="k") == [Image("a"), Image(b"b")]
    assert read_media_list([], "image", key="k") == []


OBJECT_REF = {
    "uri": "gs://bucket/a.png",
    "version": "1700000000000001",
    "authorizer": None,
    "details": '{"gcs_metadata": {"content_type": "image/png", "md5_hash": "x", "size": 1234}}',
}


def test_an_object_ref_is_a_stored_object_in_its_version():
    stored = StoredObject("gs://bucket/a.png", generation=1700000000000001, num_bytes=1234)
    assert read_media(OBJECT_REF, "image", key="k") == Image(stored)
    details = {"gcs_metadata": {"size": "1234"}}
    assert read_media({**OBJECT_REF, "details": details}, "image", key="k") == Image(stored)
    bare = {"uri": "gs://bucket/a.png", "version": None, "authorizer": None, "details": None}
    assert read_media(bare, "image", key="k") == Image(StoredObject("gs://bucket/a.png"))
    assert read_media(stored, "audio", key="k") == Audio(stored)
    two = read_media_list([OBJECT_REF, bare], "image", key="k")
    assert [part.source.generation for part in two] == [1700000000000001, None]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"uri": 3}, "uri is a number"),
        ({"uri": "https://host/a.png"}, "no gs:// URI"),
        ({"version": "new"}, "version is text"),
        ({"details": "{"}, "not valid JSON"),
    ],
)
def test_an_object_ref_that_cannot_be_read_is_told(change, words):
    with pytest.raises(DataError, match=words):
        read_media({**OBJECT_REF, **change}, "image", key="k")


@pytest.mark.parametrize("details", [None, "null", "[]", {"gcs_metadata": None}, {"errors": []}])
def test_an_object_ref_without_metadata_has_no_known_size(details):
    part = read_media({**OBJECT_REF, "details": details}, "image", key="k")
    assert part.source.num_bytes is None
