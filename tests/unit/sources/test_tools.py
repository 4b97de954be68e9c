"""Tool rows in the forms people keep them: declarations, calls, responses and their calls."""

import itertools
import json
from collections import Counter

import pytest

from gemma_tuner.errors import DataError
from gemma_tuner.records import Example, Text, Turn
from gemma_tuner.sources.columns import recognise_columns
from gemma_tuner.sources.messages import read_turns
from gemma_tuner.sources.places import Places
from gemma_tuner.sources.rows import RowReader
from gemma_tuner.sources.tools import pair_responses, read_calls, read_declarations

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
FUNCTION = {"name": "w", "description": "d", "parameters": SCHEMA}
WRAPPED = {"type": "function", "function": FUNCTION}
ARGUMENTS = {"city": "Oslo"}
CALL = {"type": "function", "function": {"name": "w", "arguments": ARGUMENTS}}
PAIRS = [{"key": "city", "value": "Oslo"}]


def read(row):
    return RowReader(recognise_columns(list(row), {})).read_example(row, "k")


@pytest.mark.parametrize(
    "tool",
    [
        WRAPPED,
        FUNCTION,
        {"type": "function", **FUNCTION},
        {"name": "w", "description": "d", "input_schema": SCHEMA},
        {"name": "w", "description": "d", "parameters": SCHEMA["properties"]},
        {"name": "w", "description": "d", "parameters": {"properties": SCHEMA["properties"]}},
        {**FUNCTION, "parameters": json.dumps(SCHEMA)},
        {
            **FUNCTION,
            "parameters": {
                "type": "object",
                "properties": [{"key": "city", "value": {"type": "string"}}],
            },
        },
        {
            **FUNCTION,
            "parameters": {**SCHEMA, "properties": {"city": {"type": "string"}, "a": None}},
        },
        {"function_declarations": [FUNCTION]},
        {**FUNCTION, "strict": None},
    ],
)
def test_each_form_of_a_declaration_is_wrapped(tool):
    for value in ([tool], tool, json.dumps([tool]), json.dumps(tool), [json.dumps(tool)]):
        assert read_declarations(value, "it", key="k") == (WRAPPED,)
    assert read_declarations([WRAPPED], "it", key="k") == (WRAPPED,)


@pytest.mark.parametrize("tool", [3, [3], [{}], [{"name": ""}], [{"function": {}}], "{", [None]])
def test_what_declares_no_tool_is_refused(tool):
    with pytest.raises(DataError, match=r"tool|JSON"):
        read_declarations(tool, "it", key="k")


@pytest.mark.parametrize(
    "call",
    [
        CALL,
        {"name": "w", "arguments": ARGUMENTS},
        {"name": "w", "arguments": json.dumps(ARGUMENTS)},
        {"name": "w", "arguments": PAIRS},
        {"name": "w", "parameters": ARGUMENTS, "id": None},
        {"type": "tool_use", "name": "w", "input": ARGUMENTS},
    ],
)
def test_each_form_of_a_call_is_wrapped(call):
    for value in ([call], call, json.dumps([call]), [json.dumps(call)]):
        assert read_calls(value, "it", key="k") == [CALL]


def test_a_call_without_arguments_has_none():
    for nothing in ({}, {"arguments": None}, {"arguments": ""}, {"arguments": "{}"}):
        (call,) = read_calls([{"name": "w", **nothing}], "it", key="k")
        assert call["function"] == {"name": "w", "arguments": {}}


@pytest.mark.parametrize("arguments", [3, "3", '"x"', "[1]", [1], "{"])
def test_arguments_that_are_no_object_are_refused(arguments):
    with pytest.raises(DataError, match="arguments"):
        read_calls([{"name": "w", "arguments": arguments}], "it", key="k")


ASK, DONE = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}


@pytest.mark.parametrize(
    ("call", "response"),
    [
        ({"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "4"}),
        (
            {"role": "assistant", "content": None, "function_call": CALL["function"]},
            {"role": "function", "name": "w", "content": "4"},
        ),
        (
            {"from": "function_call", "value": json.dumps(CALL["function"])},
            {"from": "observation", "value": "4"},
        ),
        ({"from": "tool_call", "value": [CALL]}, {"from": "tool_response", "value": "4"}),
        ({"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": 4}),
    ],
)
def test_each_habit_of_calls_and_responses_makes_one_conversation(call, response):
    fields = {"tool_calls": [{"id": "call_2_1", **CALL}]}
    answered = {"tool_call_id": "call_2_1", "name": "w"}
    turns = (
        Turn("user", (Text("Q"),)),
        Turn("assistant", (), fields),
        Turn("tool", (Text("4"),), answered),
        Turn("assistant", (Text("A"),)),
    )
    for column in ("tools", "functions"):
        row = {"messages": [ASK, call, response, DONE], column: json.dumps([FUNCTION])}
        assert read(row) == Example("k", turns, tools=(WRAPPED,))


def conversation(calls, responses):
    return (
        Turn("assistant", (), {"tool_calls": calls}),
        *(Turn("tool", (Text(str(i)),), fields) for i, fields in enumerate(responses)),
        Turn("assistant", (Text("A"),)),
    )


def names_of(turns):
    """The name that each response stands for, once its id says the same."""
    calls = {call["id"]: call["function"]["name"] for call in turns[0].fields["tool_calls"]}
    responses = [turn.fields for turn in turns if turn.role == "tool"]
    assert [calls[fields["tool_call_id"]] for fields in responses] == [
        f["name"] for f in responses
    ]
    return [fields["name"] for fields in responses]


def calls_named(*names, ids=None):
    return [
        {"name": name, "arguments": {}} | ({"id": ids[i]} if ids else {})
        for i, name in enumerate(names)
    ]


@pytest.mark.parametrize("order", list(itertools.permutations("abc")))
def test_parallel_responses_find_their_calls_by_id_name_or_order(order):
    with_ids, without = calls_named(*"abc", ids="123"), calls_named(*"abc")
    ids = dict(zip("abc", "123", strict=True))
    for calls, responses in (
        (with_ids, [{"tool_call_id": ids[name]} for name in order]),
        (with_ids, [{"name": name} for name in order]),
        (without, [{"name": name} for name in order]),
    ):
        paired = pair_responses(conversation(calls, responses), key="k")
        assert names_of(paired) == list(order)
        assert pair_responses(paired, key="k") == paired
    for calls in (with_ids, without):
        assert names_of(pair_responses(conversation(calls, [{}] * 3), key="k")) == list("abc")


@pytest.mark.parametrize(
    ("calls", "responses", "words"),
    [
        (calls_named("a", "b"), [{}], "without a response to each"),
        (calls_named("a", "b"), [{}, {}, {}], "responds to no call that waits"),
        (calls_named("a", "b"), [{"name": "c"}, {}], "responds to no call that waits"),
        (calls_named("a", "b"), [{"name": "a"}, {"name": "a"}], "responds to no call that waits"),
        (calls_named("a", ids="1"), [{"tool_call_id": "2"}], "responds to no call that waits"),
        (calls_named("a", ids="1"), [{"tool_call_id": "1", "name": "b"}], "responds to no call"),
        (calls_named("a", "b", ids="11"), [{}, {}], "two calls with one id"),
        (calls_named("a", ids=[{}]), [{}], "neither text nor a number"),
    ],
)
def test_responses_that_answer_no_call_are_refused(calls, responses, words):
    with pytest.raises(DataError, match=words):
        pair_responses(conversation(calls, responses), key="k")


def test_messages_in_the_columns_of_a_pair_are_a_conversation():
    prompt = [ASK, {"role": "assistant", "content": "B"}, {"role": "user", "content": "R"}]
    turns = (
        Turn("user", (Text("Q"),)),
        Turn("assistant", (Text("B"),), {}, is_trained=False),
        Turn("user", (Text("R"),)),
        Turn("assistant", (Text("A"),)),
    )
    for answer in ([DONE], DONE, "A"):
        assert read({"prompt": prompt, "completion": answer}) == Example("k", turns)
    call = {"role": "assistant", "tool_calls": [CALL]}
    example = read({"prompt": [ASK], "completion": [call, {"role": "tool", "content": "4"}, DONE]})
    assert [turn.role for turn in example.turns] == ["user", "assistant", "tool", "assistant"]


@pytest.mark.parametrize("answer", [{"a": 1, "b": [None, "ü"]}, ["x", {"y": 2}]])
def test_an_object_or_a_list_as_an_answer_is_its_json(answer):
    text = json.dumps(answer, ensure_ascii=False)
    row = {"prompt": "Q", "response": answer}
    assert read(row).turns[1] == Turn("assistant", (Text(text),))


def test_a_conversation_without_a_trained_answer_is_refused():
    with pytest.raises(DataError, match="marked as not trained"):
        read({"messages": [ASK, {**DONE, "weight": 0}]})


@pytest.mark.parametrize("field", ["tool_call_id", "call_id", "toolCallId", "tool_use_id"])
@pytest.mark.parametrize("as_given", [str, int])
def test_responses_find_their_call_by_id_under_each_name_and_type(field, as_given):
    calls = [{"id": n, "name": "w", "arguments": {"n": n}} for n in (1, 2)]
    messages = [ASK, {"role": "assistant", "tool_calls": calls}]
    messages += [{"role": "tool", "content": str(n), field: as_given(n)} for n in (2, 1)]
    turns = read_turns([*messages, DONE], Places({}, "k"), unused_fields=Counter())
    paired = pair_responses(turns, key="k")
    assert [turn.fields["tool_call_id"] for turn in paired[2:4]] == [2, 1]


@pytest.mark.parametrize(
    "call",
    [
        {"name": "w", "tool_args": {"n": 1}},
        {"name": "w", "arguments": {}, "parameters": {"n": 1}},
        {"function": {"name": "w", "inputs": "{}"}},
    ],
)
def test_arguments_under_unknown_names_are_not_lost(call):
    with pytest.raises(DataError, match="arguments"):
        read_calls([call], "it", key="k")


def test_parameters_that_are_no_schema_are_refused():
    with pytest.raises(DataError, match="schema"):
        read_declarations([{"name": "w", "parameters": {"city": "string"}}], "it", key="k")
