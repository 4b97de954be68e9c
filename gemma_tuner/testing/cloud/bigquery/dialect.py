"""GoogleSQL in DuckDB's SQL, by sqlglot, with this server's tables and parameters put in.

DuckDB refuses what sqlglot hands on as it stands. Known gap: two columns of one name, which
BigQuery refuses, pass as ``id`` and ``id_1``.
"""

from __future__ import annotations

from collections.abc import Callable

import sqlglot
from sqlglot import exp
from sqlglot.errors import ErrorLevel, ParseError, TokenError, UnsupportedError

from gemma_tuner.testing.cloud.bigquery.tables import RefusedError

# DuckDB's types of these names hold less than BigQuery's, and sqlglot does not widen them.
_WIDER_TYPES = {
    exp.DType.INT: "BIGINT",
    exp.DType.FLOAT: "DOUBLE",
    exp.DType.DECIMAL: "DECIMAL(38, 9)",
}

# From a table's path and the SQL of its FOR SYSTEM_TIME AS OF, if any, to its name in DuckDB.
BindTable = Callable[[list[str], str | None], str]
# From a parameter's name (``position_0`` for the first ?) to its name in DuckDB and its type.
BindParameter = Callable[[str], tuple[str, str]]


def translate(
    sql: str, bind_table: BindTable, bind_parameter: BindParameter, *, is_query: bool = True
) -> str:
    """Return a query, or else an expression, in DuckDB's SQL."""
    try:
        tree, *others = sqlglot.parse(_name_positional_parameters(sql), read="bigquery")
        if tree is None or others or (is_query and not isinstance(tree, exp.Query)):
            raise RefusedError("notImplemented", "this server runs one SELECT query, nothing else")
        for parameter in list(tree.find_all(exp.Parameter)):
            key, kind = bind_parameter(parameter.name.lower())
            value = exp.Parameter(this=exp.var(key))
            parameter.replace(exp.cast(value, kind, dialect="bigquery"))
        _keep_meaning(tree)
        ctes = {cte.alias.lower() for cte in tree.find_all(exp.CTE)}
        for table in list(tree.find_all(exp.Table)):
            if table.db or table.name.lower() not in ctes:
                _replace_table(table, bind_table)
        return _write(tree)
    except TokenError as error:
        raise RefusedError("invalidQuery", "Syntax error: Unclosed string literal") from error
    except ParseError as error:
        first = error.errors[0]
        place = f"[{first['line']}:{first['col']}]"
        message = f"Syntax error: {first['description']} at {place}"
        raise RefusedError("invalidQuery", message) from error
    except UnsupportedError as error:
        raise RefusedError("notImplemented", f"this server cannot run it: {error}") from error


def _name_positional_parameters(sql: str) -> str:
    # In the tree they are not in the order of the text.
    tokens = sqlglot.tokenize(sql, read="bigquery")
    places = [token.start for token in tokens if token.token_type == sqlglot.TokenType.PLACEHOLDER]
    for number, place in reversed(list(enumerate(places))):
        sql = f"{sql[:place]}@position_{number}{sql[place + 1 :]}"
    return sql


def _keep_meaning(tree: exp.Expr) -> None:
    """Mend what sqlglot hands on and DuckDB would take in another sense."""
    if any(unnest.args.get("offset") for unnest in tree.find_all(exp.Unnest)):
        raise RefusedError("notImplemented", "this server does not know WITH OFFSET")
    for kind in list(tree.find_all(exp.DataType)):
        if kind.this in _WIDER_TYPES and not kind.expressions:
            kind.replace(exp.DataType.build(_WIDER_TYPES[kind.this], dialect="duckdb"))
    for moment in list(tree.find_all(exp.UnixToTime)):  # DuckDB's has no time zone
        moment.replace(exp.cast(moment.copy(), exp.DType.TIMESTAMPTZ))


def _replace_table(table: exp.Table, bind_table: BindTable) -> None:
    if isinstance(table.this, exp.Func):
        message = "a table must be qualified with a dataset; this server has no table functions"
        raise RefusedError("invalidQuery", message)
    version = table.args.get("version")
    snapshot = _write(version.expression) if version else None
    key = bind_table([part.name for part in table.parts], snapshot)
    if not table.alias:
        table.set("alias", exp.TableAlias(this=exp.to_identifier(table.name)))
    for name, value in (("this", exp.to_identifier(key)), ("db", None), ("catalog", None)):
        table.set(name, value)
    table.set("version", None)


def _write(tree: exp.Expr) -> str:
    # Every name is quoted: DuckDB reserves words that GoogleSQL does not.
    return tree.sql("duckdb", identify=True, comments=False, unsupported_level=ErrorLevel.RAISE)
