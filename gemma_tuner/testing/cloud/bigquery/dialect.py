"""GoogleSQL as DuckDB writes it: the part of the dialect that reading training data needs.

A query is cut into tokens, nested by their brackets; table names, parameters, literals and the
few constructs that differ are replaced, and all else is handed on as it stands. What neither
knows, DuckDB refuses. Known gaps: ``WITH OFFSET``, ``PIVOT``, typed constructors
(``STRUCT<...>(...)``), scripts, legacy SQL. Two columns of one name, which BigQuery refuses, pass
as ``id`` and ``id_1``.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from dataclasses import dataclass

from gemma_tuner.testing.cloud.bigquery.tables import RefusedError

# GoogleSQL's functions that DuckDB has under another name. (name, parameters, DuckDB's form)
MACROS = (
    ("regexp_contains", "s, p", "regexp_matches(s, p)"),
    ("safe_divide", "a, b", "a / nullif(b, 0)"),
    ("to_json_string", "x", "CAST(to_json(x) AS VARCHAR)"),
    ("json_value", "j, p", "json_extract_string(j, p)"),
    ("json_query", "j, p", "CAST(json_extract(j, p) AS VARCHAR)"),
    ("timestamp_sub", "t, i", "t - i"),
    ("timestamp_add", "t, i", "t + i"),
    ("timestamp_millis", "x", "make_timestamptz(x * 1000)"),
    ("timestamp_seconds", "x", "make_timestamptz(x * 1000000)"),
    ("timestamp_micros", "x", "make_timestamptz(x)"),
    ("rand", "", "random()"),
    ("generate_uuid", "", "CAST(uuid() AS VARCHAR)"),
)

# GoogleSQL's types, and REST's legacy names, as DuckDB's.
DUCKDB_TYPES = {
    "INT64": "BIGINT",
    "INTEGER": "BIGINT",
    "FLOAT64": "DOUBLE",
    "FLOAT": "DOUBLE",
    "BOOL": "BOOLEAN",
    "BOOLEAN": "BOOLEAN",
    "STRING": "VARCHAR",
    "BYTES": "BLOB",
    "TIMESTAMP": "TIMESTAMPTZ",
    "DATETIME": "TIMESTAMP",
    "DATE": "DATE",
    "TIME": "TIME",
    "NUMERIC": "DECIMAL(38,9)",
    "JSON": "JSON",
}

_TOKEN = re.compile(
    r"""
    (?P<space>   \s+ | --[^\n]* | \#[^\n]* | /\*.*?\*/ )
  | (?P<string>  [rRbB]{0,2} (?: '{3}.*?'{3} | "{3}.*?"{3}
                               | '(?:\\.|[^'\\\n])*' | "(?:\\.|[^"\\\n])*" ) )
  | (?P<name>    `[^`]+` | [A-Za-z_]\w* )
  | (?P<parameter> @\w+ | \? )
  | (?P<number>  \d+ (?:\.\d*)? (?:[eE][+-]?\d+)? | \.\d+ )
  | (?P<sign>    <> | != | <= | >= | \|\| | . )
    """,
    re.VERBOSE | re.DOTALL,
)
# Words that DuckDB reserves and GoogleSQL does not, so that columns have these names unquoted.
_FREE_WORDS = {
    "ANALYSE", "ANALYZE", "ANTI", "ASOF", "ASYMMETRIC", "AUTHORIZATION", "BINARY", "BOTH",
    "CHECK", "COLLATION", "COLUMN", "CONCURRENTLY", "CONSTRAINT", "DEFERRABLE", "DESCRIBE",
    "DO", "FOREIGN", "FREEZE", "GLOB", "ILIKE", "INITIALLY", "ISNULL", "LAMBDA", "LEADING",
    "NOTNULL", "ONLY", "OVERLAPS", "PLACING", "POSITIONAL", "PRIMARY", "REFERENCES",
    "RETURNING", "SEMI", "SHOW", "SIMILAR", "SUMMARIZE", "SYMMETRIC", "TABLE", "TRAILING",
    "UNIQUE", "UNPACK", "VARIADIC", "VERBOSE",
}  # fmt: skip
_CLAUSES = {"WHERE", "GROUP", "ORDER", "HAVING", "LIMIT", "QUALIFY", "WINDOW", "UNION", "SELECT"}
_JOINS = {"JOIN", "INNER", "LEFT", "RIGHT", "FULL", "CROSS", "ON", "USING"}
_NOT_ALIASES = _CLAUSES | _JOINS | {"FOR", "AS", "WITH", "TABLESAMPLE", "EXCEPT", "INTERSECT"}


@dataclass(slots=True)
class _Token:
    kind: str
    text: str

    @property
    def word(self) -> str:
        """The keyword that this may be, in capitals; empty for anything quoted."""
        return self.text.upper() if self.kind in ("name", "sign") else ""


@dataclass(slots=True)
class _Group:
    open: str
    items: list[_Token | _Group]
    word = ""
    kind = "group"


_Item = _Token | _Group
_CLOSING = {"(": ")", "[": "]"}

# What a table's name, and the text of its FOR SYSTEM_TIME AS OF, become in DuckDB.
ResolveTable = Callable[[list[str], str | None], str]
# What a parameter becomes in DuckDB: its name, or None for the next positional one.
ResolveParameter = Callable[[str | None], str]


def translate(sql: str, table: ResolveTable, parameter: ResolveParameter) -> str:
    """Return a GoogleSQL query, or an expression, as DuckDB writes it."""
    return _Translation(table, parameter, _list_ctes(sql)).run(_nest(_cut(sql)))


def _cut(sql: str) -> list[_Token]:
    tokens = []
    for match in _TOKEN.finditer(sql.strip().removesuffix(";")):
        kind = match.lastgroup or "sign"
        if kind == "space":
            continue
        if kind == "sign" and match.group() in "'\"`":
            raise RefusedError("invalidQuery", "Syntax error: Unclosed string literal")
        tokens.append(_Token(kind, match.group()))
    return tokens


def _nest(tokens: list[_Token]) -> list[_Item]:
    stack: list[_Group] = [_Group("", [])]
    for token in tokens:
        if token.text in _CLOSING and token.kind == "sign":
            stack.append(_Group(token.text, []))
        elif token.text in (")", "]") and token.kind == "sign":
            group = stack.pop()
            if _CLOSING.get(group.open) != token.text:
                raise RefusedError("invalidQuery", f'Syntax error: Unexpected "{token.text}"')
            stack[-1].items.append(group)
        else:
            stack[-1].items.append(token)
    if len(stack) > 1:
        raise RefusedError(
            "invalidQuery",
            f'Syntax error: Expected "{_CLOSING[stack[-1].open]}" but got end of script',
        )
    return stack[0].items


def _list_ctes(sql: str) -> set[str]:
    """The names that WITH clauses may define: whatever stands before ``AS (``."""
    return {name.lower() for name in re.findall(r"(?i)`?\b(\w+)\b`?\s+AS\s*\(", sql)}


class _Translation:
    def __init__(self, table: ResolveTable, parameter: ResolveParameter, ctes: set[str]) -> None:
        self._table = table
        self._parameter = parameter
        self._ctes = ctes

    def run(self, items: list[_Item], function: str = "") -> str:
        """Translate the tokens of one bracket; ``function`` is the word before it."""
        out: list[str] = []
        in_from = expects_table = False
        at = 0
        while at < len(items):
            item = items[at]
            word = item.word
            if word in ("FROM", "JOIN") and function not in ("EXTRACT", "TRIM"):
                in_from = expects_table = True
            elif word in _CLAUSES:
                in_from = expects_table = False
            elif word == "," and in_from:
                expects_table = True
            elif expects_table and item.kind == "name" and word not in ("UNNEST", "LATERAL"):
                at = self._add_table(items, at, out)
                expects_table = False
                continue
            elif word == "UNNEST" and expects_table and _is_group(items, at + 1):
                at = self._add_unnest(items, at, out)
                expects_table = False
                continue
            elif item.kind == "group":
                expects_table = False
            at = self._add(items, at, out)
        return " ".join(out)

    def _add(self, items: list[_Item], at: int, out: list[str]) -> int:
        """Translate what begins at ``at``; return where the next thing begins."""
        item, word = items[at], items[at].word
        following = items[at + 1] if at + 1 < len(items) else None
        before = items[at - 1].word if at else ""
        if isinstance(item, _Group):
            out.append(self._write_group(item, before))
        elif item.kind == "string":
            out.append(_write_string(item.text))
        elif item.kind == "parameter":
            out.append(self._parameter(None if item.text == "?" else item.text[1:].lower()))
        elif word == "STRUCT" and isinstance(following, _Group):
            out.append(self._write_struct(following))
            return at + 2
        elif word == "IN" and _is_group(items, at + 2) and items[at + 1].word == "UNNEST":
            out.append(f"IN (SELECT {self._write_call('unnest', items[at + 2])})")
            return at + 3
        elif word == "CURRENT_TIMESTAMP":
            out.append("current_timestamp")
            return at + (2 if _is_group(items, at + 1) else 1)
        else:
            out.append(_write_word(item.text, word, before, following))
        return at + 1

    def _write_group(self, group: _Group, before: str) -> str:
        first = group.items[0].word if group.items else ""
        if group.open == "[" and first in ("OFFSET", "SAFE_OFFSET"):  # from 0; DuckDB's from 1
            return f"[1 + {self.run(group.items[1:])}]"
        if group.open == "[" and first in ("ORDINAL", "SAFE_ORDINAL"):
            return f"[{self.run(group.items[1:])}]"
        return group.open + self.run(group.items, before) + _CLOSING[group.open]

    def _write_call(self, function: str, group: _Item) -> str:
        return function + self._write_group(group, "") if isinstance(group, _Group) else ""

    def _write_struct(self, group: _Group) -> str:
        """``STRUCT(a AS x, y)`` is ``struct_pack(x := a, y := y)``."""
        fields: list[list[_Item]] = [[]]
        for item in group.items:
            if item.word == ",":
                fields.append([])
            else:
                fields[-1].append(item)
        written = []
        for position, field in enumerate(fields, 1):
            name, value = f"_field_{position}", field
            if len(field) > 2 and field[-2].word == "AS":
                name, value = _strip(field[-1]), field[:-2]
            elif field and field[-1].kind == "name":
                name = _strip(field[-1])
            written.append(f'"{name}" := {self.run(value)}')
        return f"struct_pack({', '.join(written)})"

    def _add_unnest(self, items: list[_Item], at: int, out: list[str]) -> int:
        """``FROM UNNEST(x) AS a``: in BigQuery ``a`` is the element, in DuckDB the table."""
        out.append(self._write_call("unnest", items[at + 1]))
        at += 2
        if at < len(items) and items[at].word == "AS":
            at += 1
        if at < len(items) and items[at].kind == "name" and items[at].word not in _NOT_ALIASES:
            alias = _strip(items[at])
            out.append(f'AS "{alias}"("{alias}")')
            at += 1
        return at

    def _add_table(self, items: list[_Item], at: int, out: list[str]) -> int:
        parts, at = _read_path(items, at)
        if len(parts) == 1 and parts[0].lower() in self._ctes:
            out.append(f'"{parts[0]}"')
            return at
        alias = parts[-1]
        start = at
        if at < len(items) and items[at].word == "AS":
            start = at + 1
        if (
            start < len(items)
            and items[start].kind == "name"
            and items[start].word not in _NOT_ALIASES
        ):
            alias, at = _strip(items[start]), start + 1
        snapshot = None
        words = [item.word for item in items[at : at + 4]]
        if words == ["FOR", "SYSTEM_TIME", "AS", "OF"]:
            end = at = at + 4
            while end < len(items) and items[end].word not in {*_CLAUSES, *_JOINS, "AS", ","}:
                end += 1
            snapshot = self.run(items[at:end])
            at = end
            if at + 1 < len(items) and items[at].word == "AS":
                alias, at = _strip(items[at + 1]), at + 2
        out.append(f'{self._table(parts, snapshot)} AS "{alias}"')
        return at


def _is_group(items: list[_Item], at: int) -> bool:
    return at < len(items) and isinstance(items[at], _Group)


def _strip(item: _Item) -> str:
    return item.text.strip("`") if isinstance(item, _Token) else ""


def _read_path(items: list[_Item], at: int) -> tuple[list[str], int]:
    """Read a dotted name; a project's name may hold dashes without being quoted."""
    text = _strip(items[at])
    at += 1
    while (
        at + 1 < len(items)
        and items[at].word in (".", "-")
        and items[at + 1].kind
        in (
            "name",
            "number",
        )
    ):
        text += items[at].word + _strip(items[at + 1])
        at += 2
    return text.split("."), at


def _write_string(text: str) -> str:
    """Write a GoogleSQL literal as DuckDB's; its escapes are Python's."""
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError) as error:
        raise RefusedError("invalidQuery", "Syntax error: Illegal escape sequence") from error
    if isinstance(value, bytes):
        return "'" + "".join(f"\\x{byte:02X}" for byte in value) + "'::BLOB"
    return "'" + value.replace("'", "''") + "'"


def _write_word(text: str, word: str, before: str, following: _Item | None) -> str:
    if text.startswith("`"):
        return '"' + text.strip("`").replace(".", '"."') + '"'
    if word in _FREE_WORDS and not isinstance(following, _Group):
        return f'"{text}"'
    if word == "SAFE_CAST":
        return "TRY_CAST"
    if word == "EXCEPT" and before == "*":
        return "EXCLUDE"
    is_call = isinstance(following, _Group)
    if word == "TIMESTAMP" and is_call:
        return "to_timestamptz"
    if word in DUCKDB_TYPES:
        # A type's name is only a type in CAST(x AS TYPE) and before a literal: columns may be
        # called `timestamp` or `date`.
        is_literal = following is not None and following.kind == "string"
        if is_literal or (before == "AS" and following is None):
            return DUCKDB_TYPES[word]
    return text
