"""Which column plays which part: by its name, by keyword, or by none, which is an error."""

import pytest

from gemma_tuner.errors import ConfigError, SourceError
from gemma_tuner.sources.columns import recognise_columns

PAIR = "prompt and response"


@pytest.mark.parametrize(
    ("available", "layout", "names"),
    [
        (["messages"], "chat", {"messages": "messages"}),
        (["conversations", "system"], "chat", {"messages": "conversations", "system": "system"}),
        (["messages", "tools"], "chat", {"messages": "messages", "tools": "tools"}),
        (["prompt", "completion"], PAIR, {"prompt": "prompt", "response": "completion"}),
        (["prompt", "response"], PAIR, {"prompt": "prompt", "response": "response"}),
        (["question", "answer"], PAIR, {"prompt": "question", "response": "answer"}),
        (["input", "output"], PAIR, {"prompt": "input", "response": "output"}),
        (
            ["instruction", "input", "output"],
            PAIR,
            {"prompt": "instruction", "context": "input", "response": "output"},
        ),
        (
            ["instruction", "context", "response"],
            PAIR,
            {"prompt": "instruction", "context": "context", "response": "response"},
        ),
        (["instruction", "output"], PAIR, {"prompt": "instruction", "response": "output"}),
        (["text"], "document", {"text": "text"}),
        (["image", "caption"], "caption", {"image": "image", "response": "caption"}),
        (["images", "text"], "caption", {"image": "images", "response": "text"}),
        (["audio", "transcript"], "caption", {"audio": "audio", "response": "transcript"}),
        (["audio", "transcription"], "caption", {"audio": "audio", "response": "transcription"}),
        (["audio", "sentence"], "caption", {"audio": "audio", "response": "sentence"}),
        (["audios", "text"], "caption", {"audio": "audios", "response": "text"}),
        (["file_name", "text"], "caption", {"file": "file_name", "response": "text"}),
        (
            ["image", "question", "answer"],
            PAIR,
            {"image": "image", "prompt": "question", "response": "answer"},
        ),
        (
            ["image", "prompt", "caption"],
            PAIR,
            {"image": "image", "prompt": "prompt", "response": "caption"},
        ),
        (
            ["file_name", "question", "answer", "id", "split"],
            PAIR,
            {
                "file": "file_name",
                "prompt": "question",
                "response": "answer",
                "id": "id",
                "split": "split",
            },
        ),
    ],
)
def test_conventional_names_are_recognised(available, layout, names):
    columns = recognise_columns(available, {})
    assert (columns.layout, columns.names) == (layout, names)
    assert columns.unused == ()


@pytest.mark.parametrize(
    ("available", "layout", "names"),
    [
        (["question", "answer", "context"], PAIR, {"prompt": "question", "context": "context"}),
        (["prompt", "input", "response"], PAIR, {"prompt": "prompt", "context": "input"}),
        (["question", "answers", "passage"], PAIR, {"response": "answers", "context": "passage"}),
        (["instruction", "input", "output", "history"], PAIR, {"history": "history"}),
        (["text", "summary"], PAIR, {"prompt": "text", "response": "summary"}),
        (["article", "highlights"], PAIR, {"prompt": "article", "response": "highlights"}),
        (["dialogue", "summary"], PAIR, {"prompt": "dialogue", "response": "summary"}),
        (["dialogue"], "chat", {"messages": "dialogue"}),
        (["prompt", "messages"], "chat", {"messages": "messages", "prompt": "prompt"}),
        (["conversations", "score"], "chat", {"score": "score"}),
        (["query", "answers", "tools"], PAIR, {"prompt": "query", "tools": "tools"}),
        (["system", "conversation", "functions"], "chat", {"tools": "functions"}),
        (["image", "input", "output"], PAIR, {"prompt": "input", "response": "output"}),
        (["image_file_name", "text"], "caption", {"image": "image_file_name"}),
        (["audio_filepath", "duration", "text"], "caption", {"duration": "duration"}),
        (["audio", "offset", "duration", "text"], "caption", {"start": "offset"}),
        (["audio", "startTime", "endTime", "text"], "caption", {"end": "endTime"}),
        (["Question", "Answer", "Context"], PAIR, {"prompt": "Question", "context": "Context"}),
        (["imagePath", "Caption"], "caption", {"image": "imagePath", "response": "Caption"}),
        (["path", "audio", "sentence"], "caption", {"audio": "audio", "file": "path"}),
    ],
)
def test_habitual_names_are_used_as_they_are_meant(available, layout, names):
    columns = recognise_columns(available, {})
    assert columns.layout == layout
    assert names.items() <= columns.names.items()
    assert columns.unused == ()


@pytest.mark.parametrize(
    ("available", "words"),
    [
        (
            ["messages", "prompt", "question"],
            "'prompt' may be the prompt.*give messages='messages'",
        ),
        (["role", "text"], "'role' says that each row is one turn.*by keyword"),
        (["role", "text", "parent_id"], "'role' says that each row is one turn"),
        (["speaker", "text", "message_tree_id"], "'speaker' says that each row is one turn"),
        (["conversations", "score", "Score"], "'score' tells good answers.*ignore="),
        (["text", "score"], "'score' tells good answers.*ignore="),
        (["messages", "prompt", "completion"], "'prompt'.*give messages='messages'"),
        (["instruction", "input", "output", "text"], "'text'.*context="),
        (["prompt", "response", "answer"], "'response', 'answer' could each.*response="),
        (["text", "system"], "'system'.*no place.*prompt= and response="),
        (["text", "label"], "'label'.*prompt='text', response='label'.*ignore="),
        (["prompt", "completion", "label"], "'label'.*marks bad answers.*ignore="),
        (["prompt", "chosen", "rejected"], "'chosen' tells good answers.*response="),
        (["question", "choices", "answer"], "'choices'.*into the question"),
        (["prompt", "response", "video"], "'video' holds videos.*image=.*ignore="),
        (["audio", "start", "text"], "'start'.*begins, and none where it ends"),
        (["audio", "end", "text"], "'end'.*ends, and none where it begins"),
        (["start", "end", "text"], "'start' and 'end'.*no column holds clips.*audio="),
        (["image", "image_url", "caption"], "'image', 'image_url'.*image=.*ignore="),
        (["image", "text", "answer"], "'answer'.*response="),
        (["prompt", "text"], "no response.*'text'.*response="),
    ],
)
def test_what_would_be_passed_over_is_refused_with_the_argument_that_decides(available, words):
    with pytest.raises(SourceError, match=words):
        recognise_columns(available, {})


@pytest.mark.parametrize(
    ("available", "keywords", "unused"),
    [
        (["messages", "prompt", "completion"], {"messages": "messages"}, ("completion", "prompt")),
        (
            ["prompt", "response", "answer", "context"],
            {"prompt": "prompt", "response": "response"},
            ("answer", "context"),
        ),
        (["image", "caption", "text"], {"response": "caption"}, ("text",)),
        (["text", "summary"], {"text": "text"}, ("summary",)),
        (["audio", "text", "role"], {}, ("role",)),
        (["text", "label"], {"text": "text", "ignore": ("label",)}, ()),
        (["prompt", "response", "text"], {"text": False}, ("text",)),
        (["prompt", "response", "wav", "start"], {"audio": False}, ("start", "wav")),
        (["prompt", "response", "file"], {"image": False, "audio": False}, ("file",)),
    ],
)
def test_keywords_decide_what_is_left_and_the_report_names_it(available, keywords, unused):
    assert recognise_columns(available, keywords).unused == unused


@pytest.mark.parametrize(
    "strict", ["image_path", "video", "score", "label", "weight", "chosen", "start"]
)
def test_no_layout_by_keyword_passes_over_media_marks_and_weights(strict):
    available = ["prompt", "response", strict]
    keywords = {"prompt": "prompt", "response": "response", "image": "prompt"}
    with pytest.raises(SourceError, match=repr(strict)):
        recognise_columns(available, keywords)
    columns = recognise_columns(available, {**keywords, "ignore": (strict,)})
    assert columns.ignored == (strict,)


def test_a_column_cannot_be_used_and_left_out():
    with pytest.raises(ConfigError, match="'a' is named by prompt= and by ignore="):
        recognise_columns(["a", "response"], {"prompt": "a", "ignore": ("a",)})


@pytest.mark.parametrize(
    ("available", "named"),
    [
        (["messages", "conversations"], ["'messages'", "'conversations'", "messages="]),
        (["prompt", "completion", "response"], ["'completion'", "'response'", "response="]),
        (["prompt", "response", "question", "answer"], ["'prompt'", "'question'", "prompt="]),
        (["image", "images", "caption"], ["'image'", "'images'", "image="]),
        (["image", "caption", "text"], ["'caption'", "'text'", "response="]),
        (["image", "audio", "caption", "transcript"], ["'caption'", "'transcript'", "response="]),
        (["image", "caption", "prompt", "question"], ["'prompt'", "'question'", "prompt="]),
    ],
)
def test_two_columns_for_one_part_are_an_error_that_names_both_and_the_keyword(available, named):
    with pytest.raises(SourceError) as caught:
        recognise_columns(available, {})
    for words in named:
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("available", "named"),
    [
        (["title", "body"], ["no response", "'body', 'title'", "response="]),
        (["prompt"], ["no response", "'prompt'"]),
        (["response"], ["no prompt"]),
        (["image", "answer"], ["no response", "'answer'"]),
    ],
)
def test_columns_that_make_no_example_are_named(available, named):
    with pytest.raises(SourceError) as caught:
        recognise_columns(available, {})
    for words in named:
        assert words in str(caught.value)


def test_keywords_win_over_conventions():
    available = ["prompt", "response", "frage", "antwort", "bild", "image"]
    keywords = {"prompt": "frage", "response": "antwort", "image": "bild", "ignore": ("image",)}
    columns = recognise_columns(available, keywords)
    assert columns.names == {"prompt": "frage", "response": "antwort", "image": "bild"}
    assert columns.by_keyword == {"prompt", "response", "image"}
    assert columns.unused == ("prompt", "response")


@pytest.mark.parametrize(
    ("available", "keywords", "layout", "names"),
    [
        (["a", "b"], {"prompt": "a", "response": "b"}, PAIR, {"prompt": "a", "response": "b"}),
        (["a", "answer"], {"prompt": "a"}, PAIR, {"prompt": "a", "response": "answer"}),
        (["question", "b"], {"response": "b"}, PAIR, {"prompt": "question", "response": "b"}),
        (["a"], {"text": "a"}, "document", {"text": "a"}),
        (["a", "prompt", "response"], {"messages": "a"}, "chat", {"messages": "a"}),
        (["a", "caption"], {"image": "a"}, "caption", {"image": "a", "response": "caption"}),
        (["image", "b"], {"response": "b"}, "caption", {"image": "image", "response": "b"}),
        (["prompt", "response", "id"], {"id": False}, PAIR, {"prompt": "prompt"}),
        (["prompt", "response", "image"], {"image": False}, PAIR, {"prompt": "prompt"}),
        (["messages", "text"], {"messages": False}, "document", {"text": "text"}),
        (
            ["instruction", "input", "output"],
            {"prompt": "instruction", "response": "output"},
            PAIR,
            {"prompt": "instruction", "response": "output"},
        ),
    ],
)
def test_what_keywords_leave_open_goes_by_convention(available, keywords, layout, names):
    columns = recognise_columns(available, keywords)
    assert columns.layout == layout
    assert names.items() <= columns.names.items()
    for part, column in keywords.items():
        if column is False:
            assert part not in columns.names
    if layout == PAIR and "context" not in names:
        assert "context" not in columns.names


def test_a_keyword_that_names_no_column_is_answered_with_the_nearest():
    with pytest.raises(SourceError, match=r"'qestion', .* \(did you mean 'question'\?\)$"):
        recognise_columns(["question", "answer"], {"prompt": "qestion"})
    with pytest.raises(SourceError, match=r"'x', .*: give one of them$"):
        recognise_columns(["question", "answer"], {"prompt": "x"})


def test_a_keyword_that_names_no_column_lists_the_columns():
    with pytest.raises(SourceError, match=r"prompt= names the column 'frage'.*'answer', 'ask'"):
        recognise_columns(["ask", "answer"], {"prompt": "frage"})


@pytest.mark.parametrize(
    "keywords",
    [
        {"messages": "a", "prompt": "b"},
        {"messages": "a", "text": "b"},
        {"text": "a", "response": "b"},
        {"text": "a", "image": "b"},
        {"text": "a", "system": "b"},
    ],
)
def test_keywords_that_exclude_each_other_are_refused(keywords):
    with pytest.raises(ConfigError) as caught:
        recognise_columns(["a", "b"], keywords)
    for part in keywords:
        assert f"{part}=" in str(caught.value)


def test_documents_beside_media_are_an_error_that_offers_both_ways_out():
    with pytest.raises(SourceError, match=r"response=.*image=False"):
        recognise_columns(["image", "text"], {"text": "text"})
    assert recognise_columns(["image", "text"], {"text": "text", "image": False}).names == {
        "text": "text"
    }


def test_documents_have_no_place_for_a_system_column_whoever_named_theirs():
    for keywords in ({"system": "sys"}, {"system": "sys", "text": "text"}):
        with pytest.raises(ConfigError, match=r"'text' makes plain documents.*system="):
            recognise_columns(["text", "sys"], keywords)


@pytest.mark.parametrize("name", ["role", "from", "speaker"])
@pytest.mark.parametrize("text", ["text", "content", "value", "prompt"])
def test_one_turn_a_row_is_refused_with_the_remedy(name, text):
    available = ["conversation_id", name, text]
    with pytest.raises(SourceError, match="each row is one turn; group the rows"):
        recognise_columns(available, {})
    assert recognise_columns(available, {"text": text}).layout == "document"


def test_whose_voice_it_is_says_nothing_of_turns():
    assert recognise_columns(["audio", "text", "speaker"], {}).layout == "caption"
