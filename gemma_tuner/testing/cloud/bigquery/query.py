"""Queries of the local BigQuery server: DuckDB over the versions of its tables.

It proves that a query reads what it should from the tables that it should. It does not prove
that BigQuery would accept the query: DuckDB's functions and coercions are its own.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import duckdb
import pyarrow

from gemma_tuner.testing.cloud.bigquery.dialect import translate
from gemma_tuner.testing.cloud.bigquery.tables import (
    Catalogue,
    RefusedError,
    StoredTable,
    TableName,
    Version,
)
from gemma_tuner.testing.cloud.bigquery.values import (
    ARROW_TYPES,
    LEGACY_NAMES,
    NUMERIC,
    is_json,
    json_field,
    normalise,
)

if TYPE_CHECKING:
    import datetime

_MEBIBYTE = 1 << 20
_MAX_VIEWS = 16


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a query would read."""

    schema: pyarrow.Schema  # of its result
    bytes_processed: int  # the columns that it reads, whole, whatever it filters
    num_tables: int

    @property
    def bytes_billed(self) -> int:
        """Whole mebibytes, ten at least for each table."""
        # Source: https://cloud.google.com/bigquery/pricing#on_demand_pricing
        whole = -(-self.bytes_processed // _MEBIBYTE) * _MEBIBYTE
        return max(whole, 10 * _MEBIBYTE * max(self.num_tables, 1)) if whole else 0


class Query:
    """One query, translated and bound to the versions of its tables; closes its connection."""

    def __init__(
        self,
        catalogue: Catalogue,
        sql: str,
        *,
        project: str,  # of tables named without one
        default_dataset: Mapping[str, str] | None = None,  # ``DatasetReference``
        parameters: Sequence[Mapping[str, Any]] = (),  # ``queryParameters`` as REST has them
    ) -> None:
        self._catalogue = catalogue
        self._project = project
        self._default_dataset = default_dataset
        self._versions: dict[str, tuple[StoredTable, Version]] = {}
        self._values: dict[str, Any] = {}
        self._parameters = {
            (parameter.get("name") or f"position_{number}").lower(): parameter
            for number, parameter in enumerate(parameters)
        }
        self._num_views = 0
        self._connection = connect()
        try:
            self.sql = translate(sql, self._bind_table, self._bind_parameter)
        except BaseException:
            self._connection.close()
            raise
        self._used = _list_used(self._values, self.sql)

    def __enter__(self) -> Query:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def estimate(self) -> Estimate:
        """Return what the query would read, without running it."""
        with _refusals():
            relation = self._connection.sql(self.sql, params=self._used)
            schema = _result_schema(relation.limit(0))
            explained = self._connection.execute(
                f"EXPLAIN (FORMAT JSON) {self.sql}", self._used
            ).fetchall()
        read: dict[str, set[str]] = {}
        for column in _list_scanned(json.loads(explained[0][1])):
            source, _, name = column.partition("/")
            if name and source in self._versions:
                read.setdefault(source, set()).add(name)
        sizes = [_count_bytes(self._versions[key][1].content, read[key]) for key in read]
        tables = {stored.name for stored, _ in self._versions.values()}
        return Estimate(schema, sum(sizes), len(tables))

    def run(self) -> pyarrow.Table:
        """Return the result, with BigQuery's types."""
        with _refusals():
            relation = self._connection.sql(self.sql, params=self._used)
            schema = _result_schema(relation)
            return normalise(relation.to_arrow_table().rename_columns(schema.names).cast(schema))

    # --- what the translation asks for ---

    def _bind_table(self, parts: list[str], snapshot: str | None) -> str:
        name = self._complete(parts)
        stored = self._catalogue.find(name)
        if self._catalogue.is_denied(name, "bigquery.tables.getData"):
            raise RefusedError(
                "accessDenied",
                f"Access Denied: Table {name.legacy}: User does not have permission to query "
                f"table {name.legacy}, or perhaps it does not exist. Missing permission: "
                "bigquery.tables.getData.",
            )
        if stored.view_sql is not None:
            return self._make_view(stored)
        version = stored.version_at(self._evaluate(snapshot) if snapshot else None)
        for key, bound in self._versions.items():
            if bound == (stored, version):
                return key
        key = f"t{len(self._versions)}"
        self._versions[key] = (stored, version)
        bind(self._connection, key, version.content)
        return key

    def _complete(self, parts: list[str]) -> TableName:
        if len(parts) == 1:
            default = self._default_dataset
            if default is None:
                raise RefusedError(
                    "invalid",
                    f'Table "{parts[0]}" must be qualified with a dataset (e.g. dataset.table).',
                )
            project = default.get("projectId", self._project)
            return TableName(project, default["datasetId"], parts[0])
        if len(parts) == 2:
            return TableName(self._project, *parts)
        return TableName(".".join(parts[:-2]), parts[-2], parts[-1])

    def _make_view(self, view: StoredTable) -> str:
        self._num_views += 1
        if self._num_views > _MAX_VIEWS:  # one view may stand for another, and in the end itself
            raise RefusedError("invalidQuery", f"Too many nested views: {view.name.legacy}")
        key = f"v{self._num_views}"
        sql = translate(view.view_sql or "", self._bind_table, self._bind_parameter)
        with _refusals():
            self._connection.execute(f"CREATE TEMP VIEW {key} AS {sql}")
        return key

    def _bind_parameter(self, name: str) -> tuple[str, str]:
        if name not in self._parameters:
            raise RefusedError("invalidQuery", f"Query parameter '{name}' not found")
        kind = self._parameters[name]["parameterType"]
        value = self._parameters[name].get("parameterValue", {})
        is_array = kind["type"] == "ARRAY"
        element = kind["arrayType"]["type"] if is_array else kind["type"]
        if LEGACY_NAMES.get(element, element) not in ARROW_TYPES:
            raise RefusedError(
                "notImplemented", f"this server takes no parameters of type {element}"
            )
        texts = value.get("arrayValues", []) if is_array else [value]
        values = [item.get("value") for item in texts]
        if element == "BYTES":
            values = [text and base64.b64decode(text) for text in values]
        self._values[f"p_{name}"] = values if is_array else values[0]
        return f"p_{name}", f"ARRAY<{element}>" if is_array else element

    def _evaluate(self, expression: str) -> datetime.datetime:
        sql = f"SELECT CAST({expression} AS TIMESTAMPTZ) AS moment"
        with _refusals():
            relation = self._connection.sql(sql, params=_list_used(self._values, sql))
            return relation.to_arrow_table()["moment"][0].as_py()


# --- DuckDB ---------------------------------------------------------------------------------


def connect() -> duckdb.DuckDBPyConnection:
    """Open an empty database in memory that cannot leave it."""
    connection = duckdb.connect(
        config={
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
            "enable_external_access": False,
            "python_enable_replacements": False,  # a table's name is never a Python variable's
            "threads": 1,
        }
    )
    connection.execute("SET TimeZone = 'UTC'")
    return connection


def bind(connection: duckdb.DuckDBPyConnection, key: str, content: pyarrow.Table) -> None:
    """Make a table readable as ``key``."""
    # Its columns stand behind a view as ``key/column``, so that a plan, which names only columns,
    # says which table each was read from. The first column is what ``COUNT(*)`` reads.
    names = content.column_names
    data = content.rename_columns([f"{key}/{name}" for name in names])
    data = data.add_column(0, f"{key}/", pyarrow.nulls(content.num_rows))
    connection.register(f"{key}_data", data)
    columns = ", ".join(
        f'"{key}/{field.name}"{"::JSON" if is_json(field) else ""} AS "{field.name}"'
        for field in content.schema
    )
    connection.execute(f"CREATE TEMP VIEW {key} AS SELECT {columns} FROM {key}_data")


def select_rows(content: pyarrow.Table, restriction: str) -> pyarrow.Table:
    """Return the rows for which a ``row_restriction`` holds, in their order."""
    number = "row number"
    numbered = content.append_column(number, pyarrow.array(range(content.num_rows)))
    connection = connect()
    try:
        bind(connection, "t", numbered)
        condition = translate(restriction, _refuse, _refuse, is_query=False)
        with _refusals():
            kept = connection.sql(f'SELECT "{number}" FROM t WHERE {condition} ORDER BY 1')
            return content.take(kept.to_arrow_table()[number])
    finally:
        connection.close()


def _refuse(*_: object) -> NoReturn:
    raise RefusedError("invalidQuery", "a row restriction has no other tables and no parameters")


def _list_used(values: dict[str, Any], sql: str) -> dict[str, Any] | None:
    """The parameters that the text uses: DuckDB refuses more, and an empty mapping too."""
    names = set(re.findall(r"\$(p_\w+)", sql))
    return {name: value for name, value in values.items() if name in names} or None


@contextmanager
def _refusals() -> Iterator[None]:
    """Turn DuckDB's errors into BigQuery's, without the lines that quote the query."""
    try:
        yield
    except duckdb.Error as error:
        raise RefusedError("invalidQuery", str(error).partition("\n")[0]) from error


def _list_scanned(plan: list[dict[str, Any]]) -> Iterator[str]:
    for node in plan:
        if node["name"] == "PYTHON_ARROW_SCAN":
            columns = node["extra_info"].get("Projections", [])
            yield from [columns] if isinstance(columns, str) else columns
        yield from _list_scanned(node["children"])


def _count_bytes(content: pyarrow.Table, paths: set[str]) -> int:
    """Sum the sizes of columns and of struct fields; a path beneath another counts once."""
    num_bytes = 0
    for path in paths:
        steps = path.split(".")
        if any(".".join(steps[:length]) in paths for length in range(1, len(steps))):
            continue
        column = content[steps[0]]
        for step in steps[1:]:
            column = pyarrow.chunked_array(
                [chunk.field(step) for chunk in column.chunks], column.type.field(step).type
            )
        num_bytes += column.nbytes
    return num_bytes


def _result_schema(relation: duckdb.DuckDBPyRelation) -> pyarrow.Schema:
    """Return the result's columns with BigQuery's names and types."""
    arrow = relation.limit(0).to_arrow_table().schema
    fields = []
    for position, (field, kind) in enumerate(zip(arrow, relation.types, strict=True)):
        name = field.name if re.fullmatch(r"[A-Za-z_]\w*", field.name) else f"f{position}_"
        new = json_field(name) if str(kind) == "JSON" else field.with_name(name)
        fields.append(new.with_type(_result_type(new.type)))
    return normalise(pyarrow.schema(fields).empty_table()).schema


def _result_type(kind: pyarrow.DataType) -> pyarrow.DataType:
    """DuckDB sums integers to 128 bits and reads 1.5 as a decimal; BigQuery does neither."""
    if pyarrow.types.is_decimal(kind) and kind != NUMERIC:
        return pyarrow.int64() if kind.scale == 0 else pyarrow.float64()
    if pyarrow.types.is_struct(kind):
        return pyarrow.struct([f.with_type(_result_type(f.type)) for f in kind])
    if pyarrow.types.is_list(kind):
        return pyarrow.list_(_result_type(kind.value_type))
    return kind
