"""Parquet and data sets pad structs with nulls: they train what JSON lines train."""

import json

import datasets
import pyarrow
import pyarrow.parquet
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_tuner.sources.json_text import drop_padding
from gemma_tuner.streaming.opening import stream_local

NAMES = ("city", "unit", "a", "b")
LEAVES = {"city": st.text("xyz"), "unit": st.lists(st.sampled_from("cf"), min_size=1)}
inner = st.fixed_dictionaries({}, optional={"low": st.integers(0, 9), "high": st.booleans()})
arguments = st.fixed_dictionaries(
    {}, optional={**LEAVES, "a": inner, "b": st.lists(inner, min_size=1)}
)


def row(given_arguments, number):
    function = {
        "name": f"f{number}",
        "description": "d",
        "parameters": {
            "type": "object",
            "properties": {name: {"type": "string"} for name in given_arguments},
        },
    }
    call = {"type": "function", "function": {"name": f"f{number}", "arguments": given_arguments}}
    if number % 2:
        call["id"] = f"c{number}"
    asked: dict = {"role": "user", "content": [{"type": "text", "text": "go"}]}
    return {
        "messages": [asked, {"role": "assistant", "content": None, "tool_calls": [call]}],
        "tools": [{"type": "function", "function": function}],
    }


def read(path, cache):
    stream = stream_local(path, shuffle=False, cache_dir=cache)
    return [
        (example.turns, list(example.tools))
        for example in map(stream.__getitem__, range(len(stream)))
    ]


FULL = {
    "city": "x",
    "unit": ["c"],
    "a": {"low": 1, "high": True},
    "b": [{"low": 1}, {"high": False}],
}


@settings(max_examples=15, deadline=None)
@given(st.lists(arguments, min_size=1, max_size=3))
def test_parquet_reads_the_calls_and_declarations_of_json_lines(tmp_path_factory, drawn):
    folder = tmp_path_factory.mktemp("rows")
    rows = [row(one, number) for number, one in enumerate([FULL, *drawn])]
    (folder / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "rows.parquet")
    right = read(folder / "rows.jsonl", folder / "cache")
    assert read(folder / "rows.parquet", folder / "cache") == right


def test_a_data_set_reads_as_json_lines(tmp_path):
    rows = [row(FULL, 0), row({"city": "x"}, 1), row({}, 2)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    assert read(tmp_path / "rows.parquet", tmp_path / "c") == read(
        tmp_path / "rows.jsonl", tmp_path / "c"
    )


def test_maps_of_arrow_are_objects_at_any_depth(tmp_path):
    schema = pyarrow.schema(
        [("value", pyarrow.list_(pyarrow.map_(pyarrow.string(), pyarrow.int64())))]
    )
    table = pyarrow.Table.from_pylist([{"value": [[("a", 1), ("b", None)]]}], schema=schema)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    (values,) = pyarrow.parquet.read_table(tmp_path / "a.parquet").to_pylist()
    assert drop_padding(values["value"]) == [{"a": 1, "b": None}]  # a map can say what it lacks


@settings(max_examples=40)
@given(
    st.recursive(
        st.none() | st.integers() | st.text(),
        lambda t: st.lists(t) | st.dictionaries(st.text(), t),
    )
)
def test_no_field_is_null_and_nothing_else_is_lost(value):
    def has_null_field(item):
        if isinstance(item, dict):
            return any(inner is None or has_null_field(inner) for inner in item.values())
        return isinstance(item, list) and any(map(has_null_field, item))

    dropped = drop_padding(value)
    assert not has_null_field(dropped)
    assert drop_padding(dropped) == dropped
    if not has_null_field(value):
        assert dropped == value


def test_a_null_that_json_lines_write_is_kept(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row({"city": None}, 1)))
    ((turns, _),) = read(tmp_path / "rows.jsonl", tmp_path / "cache")
    assert turns[1].fields["tool_calls"][0]["function"]["arguments"] == {"city": None}
