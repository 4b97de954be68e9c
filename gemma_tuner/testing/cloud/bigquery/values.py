"""Arrow types and values as BigQuery has them, and as its REST interface writes them.

BigQuery knows one integer, one float, one timestamp: a table of whatever Arrow types is kept with
those that BigQuery's columns of that kind have when they are read as Arrow.
Source: https://cloud.google.com/bigquery/docs/reference/storage#arrow_schema_details and the
REST resource ``TableFieldSchema``.
"""

from __future__ import annotations

import base64
import datetime
import math
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from typing import Any

import pyarrow

from gemma_tuner.errors import ConfigError

_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_MICROSECOND = datetime.timedelta(microseconds=1)

NUMERIC = pyarrow.decimal128(38, 9)
BIGNUMERIC = pyarrow.decimal256(76, 38)
TIMESTAMP = pyarrow.timestamp("us", "UTC")
DATETIME = pyarrow.timestamp("us")
TIME = pyarrow.time64("us")

_EXTENSION = b"ARROW:extension:name"
_JSON = {
    _EXTENSION: b"google:sqlType:json",
    b"ARROW:extension:metadata": b'{ "encoding": "json" }',
}
_DATETIME = {_EXTENSION: b"google:sqlType:datetime"}

# The name in REST schemas, which still use the legacy names, and the Arrow type.
ARROW_TYPES: dict[str, pyarrow.DataType] = {
    "STRING": pyarrow.string(),
    "BYTES": pyarrow.binary(),
    "INTEGER": pyarrow.int64(),
    "FLOAT": pyarrow.float64(),
    "BOOLEAN": pyarrow.bool_(),
    "TIMESTAMP": TIMESTAMP,
    "DATE": pyarrow.date32(),
    "TIME": TIME,
    "DATETIME": DATETIME,
    "NUMERIC": NUMERIC,
    "BIGNUMERIC": BIGNUMERIC,
    "JSON": pyarrow.string(),
}
LEGACY_NAMES = {"INT64": "INTEGER", "FLOAT64": "FLOAT", "BOOL": "BOOLEAN", "STRUCT": "RECORD"}
_NAMES = {kind: name for name, kind in ARROW_TYPES.items() if name != "JSON"}


def json_field(name: str) -> pyarrow.Field:
    """Return the Arrow field of a JSON column: text that is marked as JSON."""
    return pyarrow.field(name, pyarrow.string(), metadata=_JSON)


def is_json(field: pyarrow.Field) -> bool:
    """True for a column of BigQuery's type JSON."""
    return (field.metadata or {}).get(_EXTENSION) == _JSON[_EXTENSION]


def normalise(table: pyarrow.Table) -> pyarrow.Table:
    """Cast a table to the types that BigQuery has, without losing a value."""
    schema = pyarrow.schema([_normal_field(field) for field in table.schema])
    columns = []
    for column, field in zip(table.columns, schema, strict=True):
        if pyarrow.types.is_list(field.type) and column.null_count:
            column = pyarrow.chunked_array(  # noqa: PLW2901
                [[value or [] for value in column.to_pylist()]], column.type
            )
        try:
            columns.append(column.cast(field.type))
        except pyarrow.ArrowException as error:
            # Arrow's message would quote a value, and tables hold users' data.
            raise ConfigError(
                f"column {field.name!r} of type {column.type} has a value that does not fit "
                f"BigQuery's {field.type}"
            ) from error
    return pyarrow.table(columns, schema=schema)


def _normal_field(field: pyarrow.Field) -> pyarrow.Field:
    kind = _normal_type(field.type, field.name)
    if kind == DATETIME:
        return pyarrow.field(field.name, kind, field.nullable, _DATETIME)
    metadata = _JSON if is_json(field) else None
    return pyarrow.field(field.name, kind, field.nullable, metadata)


def _normal_type(kind: pyarrow.DataType, column: str) -> pyarrow.DataType:
    types = pyarrow.types
    if types.is_dictionary(kind):
        return _normal_type(kind.value_type, column)
    if types.is_struct(kind):
        return pyarrow.struct([_normal_field(field) for field in kind])
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        item = kind.value_field.with_name("item")
        if types.is_list(_normal_type(item.type, column)):
            raise ConfigError(
                f"column {column!r} is a list of lists, which BigQuery does not have"
            )
        return pyarrow.list_(_normal_field(item))
    if types.is_timestamp(kind):
        return TIMESTAMP if kind.tz else DATETIME
    if types.is_decimal(kind):
        return NUMERIC if kind.precision - kind.scale <= 29 and kind.scale <= 9 else BIGNUMERIC
    checks: tuple[tuple[Callable[[pyarrow.DataType], bool], pyarrow.DataType], ...] = (
        (types.is_integer, pyarrow.int64()),
        (types.is_floating, pyarrow.float64()),
        (types.is_boolean, pyarrow.bool_()),
        (types.is_string, pyarrow.string()),
        (types.is_large_string, pyarrow.string()),
        (types.is_string_view, pyarrow.string()),
        (types.is_null, pyarrow.string()),
        (types.is_binary, pyarrow.binary()),
        (types.is_large_binary, pyarrow.binary()),
        (types.is_date, pyarrow.date32()),
        (types.is_time, TIME),
    )
    for check, normal in checks:
        if check(kind):
            return normal
    raise ConfigError(f"column {column!r} has type {kind}, which BigQuery does not have")


def describe(schema: Iterable[pyarrow.Field]) -> list[dict[str, Any]]:
    """Return the REST form (``TableFieldSchema``) of normalised Arrow fields."""
    return [_describe_field(field) for field in schema]


def _describe_field(field: pyarrow.Field) -> dict[str, Any]:
    kind, mode = field.type, "NULLABLE" if field.nullable else "REQUIRED"
    if pyarrow.types.is_list(kind):
        item = _describe_field(kind.value_field)
        return {**item, "name": field.name, "mode": "REPEATED"}
    if pyarrow.types.is_struct(kind):
        return {"name": field.name, "type": "RECORD", "mode": mode, "fields": describe(kind)}
    name = "JSON" if is_json(field) else _NAMES[kind]
    return {"name": field.name, "type": name, "mode": mode}


def arrow_schema(fields: Iterable[dict[str, Any]]) -> pyarrow.Schema:
    """Return the Arrow schema of REST fields, the inverse of :func:`describe`."""
    return pyarrow.schema([_arrow_field(field) for field in fields])


def _arrow_field(field: dict[str, Any]) -> pyarrow.Field:
    mode = field.get("mode", "NULLABLE")
    name = LEGACY_NAMES.get(field["type"], field["type"])
    if mode == "REPEATED":
        item = _arrow_field({**field, "name": "item", "mode": "NULLABLE"})
        return pyarrow.field(field["name"], pyarrow.list_(item))
    if name == "RECORD":
        kind = pyarrow.struct([_arrow_field(child) for child in field["fields"]])
    elif name in ARROW_TYPES:
        kind = ARROW_TYPES[name]
    else:
        raise ConfigError(
            f"column {field['name']!r} has type {name}; this server knows "
            f"{', '.join(ARROW_TYPES)} and RECORD"
        )
    metadata = _JSON if name == "JSON" else _DATETIME if name == "DATETIME" else None
    return pyarrow.field(field["name"], kind, mode != "REQUIRED", metadata)


# --- rows as REST writes them ----------------------------------------------------------------


def write_rows(table: pyarrow.Table, *, int64_timestamps: bool) -> list[dict[str, Any]]:
    """Return rows as ``tabledata.list`` gives them: ``{"f": [{"v": ...}, ...]}``."""
    columns = [
        [_write(value, field.type, int64_timestamps) for value in column.to_pylist()]
        for field, column in zip(table.schema, table.columns, strict=True)
    ]
    return [{"f": [{"v": value} for value in row]} for row in zip(*columns, strict=True)]


def _write(value: Any, kind: pyarrow.DataType, int64_timestamps: bool) -> Any:  # noqa: FBT001
    if value is None:
        return None
    if pyarrow.types.is_list(kind):
        return [{"v": _write(item, kind.value_type, int64_timestamps)} for item in value]
    if pyarrow.types.is_struct(kind):
        return {
            "f": [{"v": _write(value[field.name], field.type, int64_timestamps)} for field in kind]
        }
    if kind == TIMESTAMP:
        microseconds = (value - _EPOCH) // _MICROSECOND
        return str(microseconds) if int64_timestamps else repr(microseconds / 1e6)
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, Decimal):
        return format(value.normalize(), "f")
    return str(value)


def read_rows(rows: Sequence[dict[str, Any]], schema: pyarrow.Schema) -> pyarrow.Table:
    """Return a table of the JSON rows that ``insertAll`` brings."""
    columns = []
    for field in schema:
        try:
            values = [_read(row.get(field.name), field.type) for row in rows]
            columns.append(pyarrow.array(values, field.type))
        except (TypeError, ValueError, ArithmeticError, pyarrow.ArrowException) as error:
            raise ValueError(f"a value of column {field.name!r} is not {field.type}") from error
    return pyarrow.table(columns, schema=schema)


def _read(value: Any, kind: pyarrow.DataType) -> Any:
    if pyarrow.types.is_list(kind):
        return [_read(item, kind.value_type) for item in value or []]
    if value is None:
        return None
    if pyarrow.types.is_struct(kind):
        return {field.name: _read(value.get(field.name), field.type) for field in kind}
    if kind == TIMESTAMP:
        return _read_timestamp(value)
    readers: dict[pyarrow.DataType, Callable[[Any], Any]] = {
        pyarrow.int64(): int,
        pyarrow.float64(): float,
        pyarrow.binary(): base64.b64decode,
        pyarrow.bool_(): lambda text: text if isinstance(text, bool) else text == "true",
        pyarrow.date32(): datetime.date.fromisoformat,
        TIME: datetime.time.fromisoformat,
        DATETIME: datetime.datetime.fromisoformat,
        NUMERIC: lambda text: Decimal(str(text)),
        BIGNUMERIC: lambda text: Decimal(str(text)),
        pyarrow.string(): str,
    }
    return readers[kind](value)


def _read_timestamp(value: Any) -> datetime.datetime:
    """Read a timestamp: text with a zone (UTC if none), or seconds since 1970."""
    if isinstance(value, int | float):
        return _EPOCH + datetime.timedelta(seconds=value)
    moment = datetime.datetime.fromisoformat(value.removesuffix(" UTC"))
    return moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)
