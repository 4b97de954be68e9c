"""Chat messages and media values in the forms people keep them."""

import base64
import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_tuner.errors import DataError
from gemma_tuner.records import Audio, Image, StoredObject, Text, Turn
from gemma_tuner.sources.messages import read_media, read_media_list, read_turns
from gemma_tuner.sources.places import Places

PNG = b"\x89PNG not really"
ENCODED = base64.b64encode(PNG).decode()


def turns_of(messages, media=None, letters=()):
    places = Places(media or {}, "k", letters)
    turns = read_turns(messages, places, unused_fields=Counter())
    assert places.list_unplaced() == []
    return turns


def parts_of(content, media=None, letters=(), role="user"):
    return turns_of([{"role": role, "content": content}], media, letters)[0].parts


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
    media = {"image": [Image("1"), Image("2")], "audio": [Audio("3")]}
    parts = parts_of("<image>\nWhat is this?\n<image>\nAnd this, <audio>?", media)
    assert parts == (
        *(Image("1"), Text("What is this?"), Image("2"), Text("And this, ")),
        *(Audio("3"), Text("?")),
    )


TAGS = ("<image>", "<Image>", "<|image|>", "<image_1>", "<image 1>", "<image1>", "<|image_1|>")
HABITS = ("<image_placeholder>", "<|image_pad|>", "<start_of_image>", "<image_soft_token>")
FORMS = {
    "text": lambda text: text,
    "list of text": lambda text: [text],
    "text part": lambda text: [{"type": "text", "text": text}],
    "input text": lambda text: [{"type": "input_text", "text": text}],
}


@pytest.mark.parametrize("tag", TAGS + HABITS)
@pytest.mark.parametrize("kind", ["image", "audio"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_each_form_of_a_tag_is_bound_or_refused_and_letters_where_the_user_says_so(
    tag, kind, form
):
    text = f"What is {tag}?".replace("image", kind).replace("Image", kind.title())
    item = Image("1") if kind == "image" else Audio("1")
    assert parts_of(form(text), {kind: [item]}) == (Text("What is "), item, Text("?"))
    assert parts_of(form(text), letters={kind}) == (Text(text),)
    with pytest.raises(
        DataError, match=f"the {kind} column, name it by {kind}=|none of the row's 0"
    ):
        parts_of(form(text))
    for role in ("system", "assistant"):
        with pytest.raises(DataError, match="media stand in user turns"):
            parts_of(form(text), {kind: [item]}, role=role)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_tag_of_a_video_is_refused(form):
    for media in ({}, {"image": [Image("1")]}):
        with pytest.raises(DataError, match="videos are not read"):
            parts_of(form("<video>What is it?"), media)
    assert parts_of(form("The <video> tag"), letters={"image"}) == (Text("The <video> tag"),)


@given(
    st.permutations(range(4)), st.lists(st.sampled_from(["tag", "index"]), min_size=4, max_size=4)
)
def test_numbers_and_indices_bind_the_item_that_they_name(order, forms):
    media = {"image": [Image(str(index)) for index in range(4)]}
    content = [
        {"type": "image", "index": index} if form == "index" else f"<image {index + 1}>"
        for index, form in zip(order, forms, strict=True)
    ]
    assert parts_of(content, media) == tuple(Image(str(index)) for index in order)
    with pytest.raises(DataError, match="a second place for item"):
        parts_of([*content, f"<image_{order[0] + 1}>"], media)
    with pytest.raises(DataError, match="none of the row's 4"):
        parts_of([*content, {"type": "image", "image_index": 4}], media)


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"type": "image", "index": "0"}, "none of the row's 1"),
        ({"type": "image", "index": -1}, "none of the row's 1"),
        ({"type": "image", "index": True}, "none of the row's 1"),
        ({"type": "image", "index": 0, "image_index": 0}, "keep one"),
        ({"type": "image", "index": 0, "path": "a.png"}, "keep one"),
        ("<image 0>", "none of the row's 1"),
        ("<image 2>", "none of the row's 1"),
    ],
)
def test_an_index_that_names_no_item_is_told(part, words):
    with pytest.raises(DataError, match=words):
        parts_of([part], {"image": [Image("1")]})


def test_media_that_no_place_asked_for_come_back():
    places = Places({"image": [Image("1")]}, "k")
    read_turns([{"role": "user", "content": "Q"}], places, unused_fields=Counter())
    assert places.list_unplaced() == [Image("1")]


def test_fields_for_the_template_pass_and_others_are_counted():
    unused = Counter()
    call = {"id": "c", "function": {"name": "f", "arguments": {"x": 1}}}
    turns = read_turns(
        [
            {"role": "user", "content": "Q", "weight": 1, "annotations": []},
            {"role": "assistant", "content": None, "tool_calls": [call], "weight": 1},
            {"role": "tool", "content": "2", "tool_call_id": "c", "name": "f"},
            {"role": "assistant", "content": "A", "reasoning_content": "R", "tool_calls": None},
        ],
        Places({}, "k"),
        unused_fields=unused,
    )
    assert turns[1] == Turn("assistant", (), {"tool_calls": [call]})
    assert turns[2].fields == {"tool_call_id": "c", "name": "f"}
    assert turns[3].fields == {"reasoning_content": "R"}
    assert unused == {"annotations": 1, "weight": 1}


@pytest.mark.parametrize(
    "name", ["weight", "loss_weight", "trainable", "train", "training", "loss"]
)
def test_each_mark_says_whether_an_answer_is_trained_on(name):
    def read(value, **more):
        (turn,) = turns_of([{"role": "assistant", "content": "A", name: value, **more}])
        assert turn.fields == {}
        return turn.is_trained

    for value in (0, 0.0, False):
        assert not read(value)
    for value in (1, 1.0, True, None):
        assert read(value)
    for value in (0.5, 2, "0", "false", [], {}):
        with pytest.raises(DataError, match="neither 0 nor 1"):
            read(value)
    with pytest.raises(DataError, match="differ"):
        read(0, **{"train" if name != "train" else "loss": 1})


def test_a_mask_is_refused_since_it_means_both():
    for value in (True, False):
        with pytest.raises(DataError, match="has a mask"):
            turns_of([{"role": "assistant", "content": "A", "mask": value}])


@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
def test_content_that_is_an_object_is_its_json(role):
    value = {"city": "Ås", "t": [1, None]}
    assert parts_of(value, role=role) == (Text('{"city": "Ås", "t": [1, null]}'),)
    assert parts_of({"type": "text", "text": "t"}, role=role) == (Text("t"),)


@pytest.mark.parametrize("value", [[{"city": "Oslo"}], [1, 2], [], 42, True, ["a", 1]])
def test_what_a_tool_returned_is_its_json(value):
    assert parts_of(value, role="tool") == ((Text(json.dumps(value)),) if value != [] else ())


@pytest.mark.parametrize(
    ("messages", "media", "words"),
    [
        ("[", {}, "not valid JSON"),
        ([3], {}, "message 1 is a number"),
        ([{"content": "Q"}], {}, "unknown role null"),
        ([{"role": "narrator", "content": "Q"}], {}, "unknown role 'narrator'"),
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
        (
            [{"role": "assistant", "function_call": {"name": "f"}, "tool_calls": [{"name": "f"}]}],
            {},
            "keep one form",
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


@pytest.mark.parametrize(
    "fields",
    [
        *({name: 0} for name in ("loss_mask", "is_trained", "train_on", "compute_loss", "Weight")),
        *({name: True} for name in ("masked", "skip", "no_loss")),
        {"label": False},
        {"images": ["a.png"]},
        {"imagePath": "x"},
        {"audio": {"path": "a.wav"}},
        {"attachments": [{"file": "a.png"}]},
        {"tools": "[]"},
        {"functions": [{"name": "f"}]},
    ],
)
@pytest.mark.parametrize("role", ["user", "assistant"])
def test_a_field_of_a_message_that_means_something_is_never_passed_over(fields, role):
    with pytest.raises(DataError, match=next(iter(fields))):
        turns_of([{"role": role, "content": "Q", **fields}])


@pytest.mark.parametrize(
    "fields", [{"score": 0.5}, {"images": []}, {"label": True}, {"tools": None}, {"id": "1.0"}]
)
def test_a_field_of_a_message_that_changes_nothing_is_counted(fields):
    turns_of([{"role": "assistant", "content": "A", **fields}])


@pytest.mark.parametrize("field", ["thinking", "thought", "reasoning"])
def test_a_thought_has_several_names(field):
    (turn,) = turns_of([{"role": "assistant", "content": "A", field: "T"}])
    assert turn.fields == {"reasoning": "T"}


@pytest.mark.parametrize(
    "part",
    [
        {"type": "text", "text": "W", "train": False},
        {"type": "image", "image": "a.png", "bbox": [0, 0, 5, 5]},
        {"type": "image", "image": {"path": "a.png", "crop": [0, 0, 5, 5]}},
        {"type": "image", "source": {"data": ENCODED}},
        {"type": "audio", "audio": "a.wav", "start": 1, "end": 2},
        {"type": "audio", "audio": {"path": "a.wav", "offset": 0, "duration": 1}},
    ],
)
def test_a_part_that_says_more_than_is_read_is_refused(part):
    with pytest.raises(DataError, match=r"field|form"):
        parts_of([part], media={"image": [Image("other.png")]})


def test_a_url_may_stand_under_the_name_of_its_kind():
    assert parts_of([{"type": "audio", "audio_url": "a.wav"}]) == (Audio("a.wav"),)
