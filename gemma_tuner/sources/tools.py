"""Tool declarations, calls and responses in the forms people keep them, to one form for templates.

::

    declaration  {"type": "function", "function": {"name": …, "parameters": {"type": "object", …}}}
    call         {"id": …, "type": "function", "function": {"name": …, "arguments": {…}}}
    response     a tool turn with the ``tool_call_id`` and the ``name`` of its call
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from gemma_tuner.errors import DataError
from gemma_tuner.records import Turn
from gemma_tuner.sources.json_text import describe_type, parse_json, refuse_depth

_ARGUMENTS = ("arguments", "parameters", "input", "args", "kwargs")
_CALL_FIELDS = ("name", "id", "call_id", "type", "index", "description", *_ARGUMENTS)


def read_declarations(value: Any, what: str, *, key: str) -> tuple[Mapping[str, Any], ...]:
    """Read the tools that a row declares, wrapped or flat, as a list or its JSON."""
    return tuple(_read_declaration(tool, what, key) for tool in _list_objects(value, what, key))


def read_calls(value: Any, where: str, *, key: str) -> list[dict[str, Any]]:
    """Read the calls of a message, wrapped or flat, with arguments as an object or its JSON."""
    return [_read_call(call, where, key) for call in _list_objects(value, where, key)]


def pair_responses(turns: Sequence[Turn], *, key: str) -> tuple[Turn, ...]:
    """Give each tool turn the id and the name of the call that it responds to."""
    # By its own id, else by its name, else by its place. Templates that find two calls without an
    # id name every response after the last.
    paired: list[Turn] = []
    waiting: dict[str, str] | None = None  # of the calls without a response, from id to name
    names: dict[str, str] = {}
    for number, turn in enumerate(turns, 1):
        where = f"turn {number} ({turn.role})"
        if turn.role == "tool":
            if waiting is None:
                raise DataError(
                    f"{where} responds to no call; put it right after the assistant turn with the "
                    "tool_calls",
                    key=key,
                )
            call_id = _find_call(turn, waiting, where, key)
            fields = {**turn.fields, "tool_call_id": call_id, "name": waiting.pop(call_id)}
            paired.append(replace(turn, fields=fields))
            continue
        if waiting:
            all_or_some = "a response" if waiting == names else "a response to each"
            raise DataError(
                f"{where} follows a tool call without {all_or_some}; add the tool turn, or end "
                "the conversation with the call",
                key=key,
            )
        waiting = None
        if turn.fields.get("tool_calls"):
            named = [
                {"id": f"call_{number}_{place}", **call}
                for place, call in enumerate(
                    read_calls(turn.fields["tool_calls"], where, key=key), 1
                )
            ]
            names = {call["id"]: call["function"]["name"] for call in named}
            if len(names) < len(named):
                raise DataError(f"{where} has two calls with one id; number them", key=key)
            waiting = {} if turn.fields.get("tool_responses") else dict(names)
            turn = replace(turn, fields={**turn.fields, "tool_calls": named})  # noqa: PLW2901
        paired.append(turn)
    if waiting and waiting != names:
        raise DataError(
            f"the conversation ends with {len(names) - len(waiting)} responses to {len(names)} "
            "calls; add the missing ones",
            key=key,
        )
    return tuple(paired)


def _find_call(turn: Turn, waiting: Mapping[str, str], where: str, key: str) -> str:
    given_id, name = turn.fields.get("tool_call_id"), turn.fields.get("name")
    for call_id, called in waiting.items():
        # A number in one place may be text in the other.
        is_given = given_id in (None, "") or str(given_id) == str(call_id)
        if is_given and name in (None, "", called):
            return call_id
    raise DataError(
        f"{where} responds to no call that waits for it: its id or name is another's, or that "
        "call has its response; correct tool_call_id and name, or leave both out to go by order",
        key=key,
    )


def _list_objects(value: Any, what: str, key: str) -> Iterator[Mapping[str, Any]]:
    """Yield the objects of a list, of one object, or of the JSON of either."""
    if isinstance(value, str):
        value = parse_json(value, what, key=key) if value.strip() else []
    if not isinstance(value, Mapping | Sequence):
        raise DataError(f"{what} has {describe_type(value)} where tools are due", key=key)
    for item in [value] if isinstance(value, Mapping) else value:
        each = parse_json(item, what, key=key) if isinstance(item, str) else item
        if not isinstance(each, Mapping):
            raise DataError(
                f"{what} has {describe_type(each)} where a tool's object is due", key=key
            )
        if "function_declarations" in each:  # Google's form
            yield from _list_objects(each["function_declarations"], what, key)
        else:
            yield each


def _read_declaration(tool: Mapping[str, Any], what: str, key: str) -> Mapping[str, Any]:
    inner = tool.get("function")
    is_wrapped = isinstance(inner, Mapping)
    given = inner if isinstance(inner, Mapping) else {**tool, "type": None}
    function = {name: value for name, value in given.items() if value is not None}
    _need_name(function, what, key)
    parameters = function.pop("input_schema", None) or function.get("parameters")
    if isinstance(parameters, str):
        parameters = parse_json(parameters, f"the parameters in {what}", key=key)
    if parameters:
        parameters = _read_pairs(parameters, f"the parameters in {what}", key)
        properties = parameters.get("properties")
        if properties is None and all(isinstance(v, Mapping) for v in parameters.values()):
            parameters, properties = {}, parameters  # they stand alone
        elif properties is None and not parameters.keys() & {"type", "$ref"}:
            raise DataError(
                f"the parameters in {what} are no JSON schema; give "
                '{"type": "object", "properties": {…}}',
                key=key,
            )
        if properties:
            properties = _read_pairs(properties, f"the properties in {what}", key)
            parameters = {
                **parameters,
                "type": parameters.get("type") or "object",
                # Null is no schema: a parameter that only other tools of the file have.
                "properties": {n: v for n, v in properties.items() if v is not None},
            }
        function["parameters"] = parameters
    refuse_depth(function, f"the declarations in {what}", key=key)
    return {**(tool if is_wrapped else {"type": "function"}), "function": function}


def _read_call(call: Mapping[str, Any], where: str, key: str) -> dict[str, Any]:
    inner = call.get("function")
    function: Mapping[str, Any] = inner if isinstance(inner, Mapping) else call
    _need_name(function, where, key)
    found = [function[name] for name in _ARGUMENTS if function.get(name) is not None]
    unknown = any(
        value not in (None, "") for name, value in function.items() if name not in _CALL_FIELDS
    )
    if len(found) > 1 or (not found and unknown):
        raise DataError(
            f"{where} has a call whose arguments stand "
            f"{'under two names' if found else 'under no known name'}; give one of "
            f"{', '.join(_ARGUMENTS)}",
            key=key,
        )
    given = found[0] if found else None
    if isinstance(given, str):
        given = parse_json(given, "a tool call's arguments", key=key) if given.strip() else {}
    arguments = _read_pairs({} if given is None else given, "a tool call's arguments", key)
    refuse_depth(arguments, "a tool call's arguments", key=key)
    given_id = call.get("id", call.get("call_id"))
    outer = {**call, "id": given_id}
    if not isinstance(inner, Mapping):
        outer = {"type": "function", "id": given_id}
    kept = {name: value for name, value in outer.items() if value not in (None, "")}
    if not isinstance(kept.get("id", ""), str | int):
        raise DataError(f"{where} has a call whose id is neither text nor a number", key=key)
    return {**kept, "function": {"name": function["name"], "arguments": arguments}}


def _need_name(function: Mapping[str, Any], where: str, key: str) -> None:
    name = function.get("name")
    if not isinstance(name, str) or not name.strip():
        raise DataError(
            f"{where} has a tool whose name is {'empty' if name == '' else describe_type(name)}; "
            'a tool is {"name": …, "parameters": …}, alone or under "function"',
            key=key,
        )


def _read_pairs(value: Any, what: str, key: str) -> dict[str, Any]:
    """Read an object, also as the list of keys and values that stands for one in tables."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, list) and all(
        isinstance(item, Mapping) and item.keys() == {"key", "value"} for item in value
    ):
        return {str(item["key"]): item["value"] for item in value}
    raise DataError(f"{what} are {describe_type(value)} and not an object", key=key)
