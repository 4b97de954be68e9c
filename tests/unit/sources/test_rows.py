"""A row to an Example: every layout, defaults that are counted, and each fault of a row."""

import math

import pytest

from gemma_tuner.errors import DataError
from gemma_tuner.records import Audio, Example, Image, Text, Turn
from gemma_tuner.sources.columns import recognise_columns
from gemma_tuner.sources.rows import AUDIO_PROMPT, IMAGE_PROMPT, RowReader

MISSING = object()


def read(row, keywords=None, *, like=None):
    reader = RowReader(recognise_columns(list(like or row), keywords or {}))
    return reader.read_example(row, "k")


def user(*parts):
    return Turn("user", tuple(Text(part) if isinstance(part, str) else part for part in parts))


def assistant(text):
    return Turn("assistant", (Text(text),))


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"prompt": "Q", "completion": "A"}, (user("Q"), assistant("A"))),
        (
            {"prompt": "Q", "response": "A", "system": "S"},
            (Turn("system", (Text("S"),)), user("Q"), assistant("A")),
        ),
        ({"prompt": "Q", "response": "A", "system": None}, (user("Q"), assistant("A"))),
        (
            {"instruction": "Add.", "input": "1 2", "output": "3"},
            (user("Add.\n\n1 2"), assistant("3")),
        ),
        ({"instruction": "Add.", "input": "", "output": "3"}, (user("Add."), assistant("3"))),
        ({"image": "a.png", "caption": "A"}, (user(Image("a.png"), IMAGE_PROMPT), assistant("A"))),
        ({"audio": "a.wav", "text": "A"}, (user(Audio("a.wav"), AUDIO_PROMPT), assistant("A"))),
        (
            {"file_name": "a.JPG", "text": "A"},
            (user(Image("a.JPG"), IMAGE_PROMPT), assistant("A")),
        ),
        (
            {"file_name": "a.wav", "text": "A"},
            (user(Audio("a.wav"), AUDIO_PROMPT), assistant("A")),
        ),
        (
            {"image": "a.png", "question": "Q", "answer": "A"},
            (user(Image("a.png"), "Q"), assistant("A")),
        ),
        (
            {"image": "a.png", "prompt": "", "response": "A"},
            (user(Image("a.png")), assistant("A")),
        ),
        (
            {"audio": ["a.wav", "b.wav"], "images": ["a.png"], "prompt": "Q", "response": "A"},
            (user(Image("a.png"), Audio("a.wav"), Audio("b.wav"), "Q"), assistant("A")),
        ),
        (
            {"image": {"bytes": b"1", "path": "a.png"}, "caption": "A"},
            (user(Image(b"1"), IMAGE_PROMPT), assistant("A")),
        ),
        (
            {"image": {"bytes": None, "path": "a.png"}, "caption": "A"},
            (user(Image("a.png"), IMAGE_PROMPT), assistant("A")),
        ),
    ],
)
def test_a_row_becomes_a_conversation(row, turns):
    assert read(row) == Example("k", turns)


def test_text_becomes_a_document():
    assert read({"text": "Once."}) == Example("k", document="Once.")


def test_row_level_media_go_before_the_first_user_text_of_a_chat():
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "A"},
    ]
    example = read({"messages": messages, "image": "a.png", "audio": "a.wav"})
    assert example.turns[1] == user(Image("a.png"), Audio("a.wav"), "Q")


def test_a_system_column_opens_a_chat_and_refuses_a_second_system_turn():
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    assert read({"messages": messages, "system": "S"}).turns[0] == Turn("system", (Text("S"),))
    messages = [{"role": "system", "content": "T"}, *messages]
    with pytest.raises(DataError, match="system=False"):
        read({"messages": messages, "system": "S"})


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"response": ""}, "empty answer"),
        ({"response": None}, "empty answer"),
        ({"response": "  \n"}, "empty answer"),
        ({"response": 3}, "'response' is a number"),
        ({"response": MISSING}, "no column 'response'"),
        ({"prompt": ""}, "empty prompt"),
        ({"prompt": None}, "empty prompt"),
        ({"prompt": 7}, "'prompt' is a number"),
        ({"prompt": {"a": 1}}, "'prompt' is an object"),
        ({"prompt": ["a"]}, "'prompt' is a list"),
        ({"prompt": True}, "'prompt' is true or false"),
        ({"prompt": MISSING}, "no column 'prompt'"),
        ({"system": 1}, "'system' is a number"),
        ({"tools": 1}, "'tools' has a number"),
        ({"tools": "{"}, "'tools' is not valid JSON"),
        ({"image": 5}, "its image is a number"),
        ({"image": ["a.png", None]}, "1 of the 2 items"),
        ({"prompt": "<image>"}, "place for one more image"),
        ({"prompt": "<video>"}, "videos are not read"),
        ({"system": "<image>"}, "media stand in user turns"),
        ({"response": "<audio>"}, "media stand in user turns"),
    ],
)
def test_each_fault_of_a_pair_names_the_key_and_the_column(row, words):
    whole = {"prompt": "Q", "response": "A", "system": "S", "tools": [], "image": None, **row}
    row = {name: value for name, value in whole.items() if value is not MISSING}
    with pytest.raises(DataError, match=words) as caught:
        read(row, like=whole)
    assert caught.value.key == "k"


def test_an_empty_document_is_refused():
    with pytest.raises(DataError, match="empty document"):
        read({"text": " "})


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "an empty list"),
        (None, "null"),
        ("nonsense", "not valid JSON"),
        ([{"role": "user", "content": "Q"}], "no turn is the assistant's"),
        (
            [
                {"role": "user", "content": "Q"},
                {"role": "assistant", "content": "A"},
                {"role": "user", "content": "R"},
            ],
            "ends with the user's turn",
        ),
        ([{"role": "user", "content": "Q"}, {"role": "assistant", "content": ""}], "empty answer"),
        (
            [{"role": "user", "content": "Q"}, {"role": "assistant", "content": None}],
            "empty answer",
        ),
        ([{"role": "user", "content": ""}, {"role": "assistant", "content": "A"}], "empty prompt"),
        ([{"role": "narrator", "content": "Q"}], "unknown role 'narrator'"),
    ],
)
def test_each_fault_of_a_chat_is_told(messages, words):
    with pytest.raises(DataError, match=words):
        read({"messages": messages})


def test_a_row_without_media_among_rows_with_media_is_refused_whichever_comes_first():
    with_image = {"image": "a.png", "prompt": "Q", "response": "A"}
    without = {"image": None, "prompt": "Q", "response": "A"}
    words = "nothing in 'image', and other rows have"
    reader = RowReader(recognise_columns(["image", "prompt", "response"], {}))
    reader.read_example(with_image, "a")
    with pytest.raises(DataError, match=words) as caught:
        reader.read_example(without, "b")
    assert caught.value.key == "b"
    reader.refuse_rows_before()
    reader = RowReader(recognise_columns(["image", "prompt", "response"], {}))
    reader.read_example(without, "b")
    reader.refuse_rows_before()
    reader.read_example(with_image, "a")
    with pytest.raises(DataError, match=words) as caught:
        reader.refuse_rows_before()
    assert caught.value.key == "b"


def test_a_row_that_makes_no_example_says_nothing_of_the_set():
    reader = RowReader(recognise_columns(["image", "caption"], {}))
    with pytest.raises(DataError, match="empty prompt"):
        reader.read_example({"image": None, "caption": "A"}, "a")
    reader.read_example({"image": "a.png", "caption": "A"}, "b")
    reader.refuse_rows_before()


def test_rows_may_differ_in_which_media_they_hold():
    reader = RowReader(recognise_columns(["image", "audio", "prompt", "response"], {}))
    for number, media in enumerate(({"image": "a.png"}, {"audio": "a.wav"})):
        row = {"image": None, "audio": None, "prompt": "Q", "response": "A", **media}
        reader.read_example(row, str(number))
    assert reader.read_notes() == {"pictures": 1, "sounds": 1}


def test_a_media_column_named_by_keyword_must_be_filled_in_every_row():
    row = {"image": "", "prompt": "Q", "response": "A"}
    assert read(row).turns[0] == user("Q")
    with pytest.raises(DataError, match="image= says that each row has one"):
        read(row, {"image": "image"})


def test_a_picture_and_a_sound_have_no_default_prompt():
    with pytest.raises(DataError, match="no default prompt"):
        read({"image": "a.png", "audio": "a.wav", "text": "A"})


def test_file_names_of_no_known_medium_are_refused():
    with pytest.raises(DataError, match=r"ending in '\.docx'"):
        read({"file_name": "secret/plan.docx", "text": "A"})


def test_default_prompts_and_unused_message_fields_are_counted():
    reader = RowReader(recognise_columns(["image", "caption"], {}))
    for number in range(3):
        reader.read_example({"image": "a.png", "caption": "A"}, str(number))
    assert reader.read_notes() == {f"default prompt {IMAGE_PROMPT!r}": 3, "pictures": 3}
    reader = RowReader(recognise_columns(["messages"], {}))
    reader.read_example({"messages": [{"role": "gpt", "content": "A", "colour": 0}]}, "k")
    assert reader.read_notes() == {"message field 'colour' not used": 1}


@pytest.mark.parametrize(
    ("value", "key"), [("a/1", "a/1"), (17, "17"), (None, None), ("", None), (1.5, None)]
)
def test_ids_are_text_or_whole_numbers(value, key):
    reader = RowReader(recognise_columns(["id", "text"], {}))
    if key is None:
        with pytest.raises(DataError, match="id=False") as caught:
            reader.read_key({"id": value}, "f:1")
        assert caught.value.key == "f:1"
    else:
        assert reader.read_key({"id": value}, "f:1") == key


def test_errors_hold_nothing_of_the_contents():
    for row in (
        {"prompt": {"secret": "tell no one"}, "response": "A"},
        {"prompt": ["tell no one"], "response": "A"},
        {"prompt": "tell no one", "response": ""},
    ):
        with pytest.raises(DataError) as caught:
            read(row)
        assert "tell no one" not in str(caught.value)
        assert "secret" not in str(caught.value)


SEGMENTS = {"audio": "a.wav", "text": "A"}


@pytest.mark.parametrize(
    ("columns", "segment"),
    [
        ({"offset": 2, "duration": 1.5}, (2.0, 1.5)),
        ({"offset": "2", "duration": "1.5"}, (2.0, 1.5)),
        ({"start": 2.0, "end": 3.5}, (2.0, 1.5)),
        ({"begin_time": 2.0, "end_time": 3.5}, (2.0, 1.5)),
        ({"start_time": 2.0, "end_time": 3.5, "duration": 1.5}, (2.0, 1.5)),
        ({"start_ms": 2000, "end_ms": 3500}, (2.0, 1.5)),
        ({"startMs": 2000, "durationMs": 1500}, (2.0, 1.5)),
        ({"start_seconds": 2, "end_seconds": 3.5}, (2.0, 1.5)),
        ({"duration": 1.5}, (None, 1.5)),
        ({"duration_ms": 1500}, (None, 1.5)),
        ({"offset": None, "duration": 1.5}, (None, 1.5)),
        ({"start": None, "end": ""}, (None, None)),
    ],
)
def test_segments_are_read_in_seconds_whatever_their_columns_are_called(columns, segment):
    (clip,) = read({**SEGMENTS, **columns}).media
    assert clip == Audio("a.wav", None, *segment)


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"offset": "x", "duration": 1}, "'offset' is text, and the start"),
        ({"offset": True, "duration": 1}, "'offset' is true or false"),
        ({"offset": 1, "duration": float("nan")}, "'duration' is a number"),
        ({"start": 2, "end": 1}, "lasts -1"),
        ({"start": -1, "end": 1}, "begins at -1"),
        ({"offset": 2, "duration": None}, "fill in the other"),
        ({"start": None, "end": 2}, "fill in the other"),
        ({"start": 1, "end": 2, "duration": 5}, "1.00 seconds long by start and end"),
        ({"start": 1, "end": 2, "audio": ["a.wav", "b.wav"]}, "holds 2 clips"),
    ],
)
def test_each_fault_of_a_segment_is_told(columns, words):
    with pytest.raises(DataError, match=words):
        read({**SEGMENTS, **columns})


def test_segments_of_a_chat_cut_the_clip_of_its_row():
    messages = [{"role": "user", "content": "<audio>"}, {"role": "assistant", "content": "A"}]
    row = {"messages": messages, "audio": "a.wav", "start": 1, "end": 2}
    assert list(read(row).media) == [Audio("a.wav", None, 1.0, 1.0)]


@pytest.mark.parametrize(
    "history",
    [
        [["Q1", "A1"]],
        '[["Q1", "A1"]]',
        [{"role": "user", "content": "Q1"}, {"role": "assistant", "content": "A1"}],
    ],
)
def test_history_stands_before_the_prompt(history):
    row = {"instruction": "Q", "input": "", "output": "A", "history": history}
    assert read(row).turns == (user("Q1"), assistant("A1"), user("Q"), assistant("A"))


@pytest.mark.parametrize("history", [None, [], "", " "])
def test_a_history_may_be_empty(history):
    row = {"instruction": "Q", "output": "A", "history": history}
    assert read(row).turns == (user("Q"), assistant("A"))


@pytest.mark.parametrize(
    ("history", "words"),
    [
        ("x", "'history' is not valid JSON"),
        ([["Q1"]], "message 1 is a list"),
        ([["Q1", 2]], "message 1 is a list"),
        ([{"role": "user", "content": "Q1"}], "'history' does not end with an answer"),
        ([["Q1", "A1"]], "'history' belongs to a row with media"),
    ],
)
def test_each_fault_of_a_history_is_told(history, words):
    media = {"image": "a.png"} if "media" in words else {}
    with pytest.raises(DataError, match=words):
        read({"prompt": "Q", "response": "A", "history": history, **media})


BESIDE = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]


@pytest.mark.parametrize(
    "beside",
    [
        *(
            {"prompt": "Q"},
            {"prompt": " Q\n"},
            {"question": "Q"},
            {"prompt": None},
            {"prompt": ""},
        ),
        *({"score": 5}, {"score": 0.5}, {"score": "4.5"}, {"score": None}),
    ],
)
def test_what_repeats_or_grades_a_conversation_is_read(beside):
    assert read({"messages": BESIDE, **beside}).turns == (user("Q"), assistant("A"))


@pytest.mark.parametrize(
    ("beside", "words"),
    [
        *(({"prompt": value}, "'prompt' is not what.*ignore=") for value in ("q", ["Q"], 3)),
        *(
            ({"score": value}, "'score' is no number above 0.*ignore=")
            for value in (0, -1, True, "good", [5], math.nan)
        ),
    ],
)
def test_what_contradicts_a_conversation_is_refused(beside, words):
    with pytest.raises(DataError, match=words):
        read({"messages": BESIDE, **beside})


@pytest.mark.parametrize(
    ("column", "answers", "chosen"),
    [
        ("answers", ["dog"], "dog"),
        ("answers", ["a dog", "dog"], "a dog"),
        ("answers", ["a dog", "dog", "dog"], "dog"),
        ("answers", [{"answer": "a"}, {"answer": "b"}, {"answer": "b"}], "b"),
        ("answers", [{"text": "Oslo", "answer_start": 3}], "Oslo"),
        ("captions", ["one dog", "a dog"], "one dog"),
        ("answer", ["a", "b"], '["a", "b"]'),
        ("answers", [1, 2], "[1, 2]"),
    ],
)
def test_of_several_right_answers_the_most_frequent_is_learned_else_the_first(
    column, answers, chosen
):
    row = {
        "question": "Q",
        column: answers,
        **({"image": "a.png"} if column == "captions" else {}),
    }
    assert read(row).turns[-1] == assistant(chosen)
    with pytest.raises(DataError, match=f"empty answer|'{column}' is a list"):
        read({**row, column: []})


def test_answers_as_squad_keeps_them_are_the_first():
    answers = {"text": ["Oslo", "in Oslo"], "answer_start": [0, 3]}
    row = {"question": "Q", "context": "C", "answers": answers}
    assert read(row).turns == (user("Q\n\nC"), assistant("Oslo"))
    with pytest.raises(DataError, match="empty answer"):
        read({**row, "answers": {"text": [], "answer_start": []}})


@pytest.mark.parametrize(
    ("audio", "path", "is_same"),
    [
        ({"bytes": b"1", "path": "x/a.wav"}, "/data/a.wav", True),
        ({"bytes": b"1", "path": None}, "/data/a.wav", True),
        ({"bytes": b"1", "path": None}, "/data/a.png", False),
        ("a.wav", "clips/a.wav", True),
        ("a.wav", "clips\\a.wav", True),
        ("a.wav", "b.wav", False),
        ("a.wav", None, True),
    ],
)
def test_a_file_beside_media_is_one_of_them_or_refused(audio, path, is_same):
    row = {"audio": audio, "path": path, "sentence": "A"}
    if is_same:
        assert len(list(read(row).media)) == 1
    else:
        with pytest.raises(DataError, match=r"'path' names another file.*'audio'.*ignore="):
            read(row)
