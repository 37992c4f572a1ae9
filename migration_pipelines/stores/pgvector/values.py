"""Metadata fields that have a column of their own: a column's type to a metadata value, and back.

An SQL NULL is a field that isn't there. A column of a type without a metadata value (an enum, a range, an
interval) is read as its text and can't be written.
"""

from __future__ import annotations

import datetime as dt
import decimal
import re
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa

from migration_pipelines.errors import RecordRejectedError, StoreRefusedError
from migration_pipelines.metadata import dump_metadata, load_json, load_metadata, value_kinds
from migration_pipelines.model import ValueKind
from migration_pipelines.stores.pgvector.table import Column

_JSON = {"json", "jsonb"}
_SCALARS = {
    "bool", "int2", "int4", "int8", "float4", "float8", "numeric", "text", "varchar", "bpchar", "uuid",
    "date", "time", "timestamp", "timestamptz", "bytea",
}  # fmt: skip
_NATIVE = _SCALARS | {f"_{name}" for name in _SCALARS}
CHANGED_BY_JSONB = frozenset({ValueKind.NEGATIVE_ZERO, ValueKind.INTEGRAL_FLOAT})
_SUSPECT = re.compile(r"-0\.0(?!\d)|\de\+\d")
_DIGITS_TO_ZEROS = bytes.maketrans(b"123456789", b"000000000")
_ROUNDED = {"numeric", "time", "timestamp", "timestamptz"}


def expression(column: Column) -> str:
    """Return what to select for a field."""
    native = column.type in _NATIVE or column.type in _JSON
    return column.quoted if native else f"{column.quoted}::text"


def read_fields(
    fields: Sequence[tuple[Column, pa.Array]], base: Sequence[str | None], *, has_base: bool, where: str
) -> list[str | None]:
    """Return metadata as canonical text: the fields of each record, added to what its JSON column holds.

    Parameters
    ----------
    base
        Canonical text of the JSON column, all None where there is none.
    has_base
        Whether there is a JSON column: with one, a record with neither JSON nor fields has no metadata.

    Raises
    ------
    StoreRefusedError
        A value is none in Python (a date of the year 20000), or a key is in JSON and in a column.
    """
    rows: list[dict[str, Any]] = [{} if text is None else load_metadata(text) for text in base]
    for column, values in fields:
        load = _loader(column)
        for row, octets in zip(rows, values.to_pylist(), strict=True):
            if octets is None:
                continue
            if column.name in row:
                raise StoreRefusedError(
                    f"{where}: the field {column.name!r} is in the JSON column and in a column of its own; "
                    "name the JSON column alone by ?metadata="
                )
            try:
                row[column.name] = load(octets)
            except Exception as error:
                raise StoreRefusedError(
                    f"{where}: a value of column {column.name!r} ({column.type}) can't be read: {error}"
                ) from error
    return [
        None if has_base and text is None and not row else dump_metadata(row)
        for text, row in zip(base, rows, strict=True)
    ]


def write_fields(
    columns: Sequence[Column], metadata: Sequence[str | None], *, has_base: bool, where: str
) -> tuple[list[pa.Array], pa.Array]:
    """Return the COPY fields of the columns, and what is left of the metadata for the JSON column.

    Raises
    ------
    RecordRejectedError
        A field has neither a column nor a JSON column, or its column would change the value.
    """
    rows = [None if text is None else load_metadata(text) for text in metadata]
    fields = [_column_field(column, rows, where) for column in columns]
    names = {column.name for column in columns}
    rest: list[str | None] = []
    for row in rows:
        left = None if row is None else {key: item for key, item in row.items() if key not in names}
        if not has_base:
            _refuse_rest(left, where, names)
        alone = row and not left  # fields in columns only: JSON stays NULL
        rest.append(None if left is None or alone else dump_metadata(left))
    return fields, pa.array(rest, pa.string())


def would_change_in_jsonb(texts: pa.Array) -> bool:
    """Whether some canonical metadata text holds a number that jsonb gives back as another.

    It keeps numbers as decimals: -0.0 becomes 0.0, and a float of 1e16 or more, which alone is written with a
    positive exponent, an integer. A search for such octets spares nearly every batch a closer look.
    """
    data = b"\n".join(text for text in texts.cast(pa.binary()).to_pylist() if text is not None)
    if b"-0.0" not in data and b"0e+" not in data.translate(_DIGITS_TO_ZEROS):
        return False
    suspects = (text for text in texts.to_pylist() if text and _SUSPECT.search(text))
    return any(CHANGED_BY_JSONB.intersection(value_kinds(load_json(text))) for text in suspects)


def _refuse_rest(left: dict[str, Any] | None, where: str, names: set[str]) -> None:
    if left:
        raise RecordRejectedError(
            f"{where}: no column for the field {min(left)!r}, and no JSON column; columns: "
            f"{', '.join(sorted(names)) or 'none'}; add a column or map the field",
            found=sorted(left),
        )
    if (left is None) is bool(names):
        raise RecordRejectedError(
            f"{where}: without a JSON column no metadata and empty metadata are the same; add a "
            "jsonb column `metadata`"
        )


def _column_field(column: Column, rows: Sequence[dict[str, Any] | None], where: str) -> pa.Array:
    dump = _dumper(column, where)
    return pa.array(
        [dump(row[column.name]) if row and column.name in row else None for row in rows], pa.binary()
    )


def _loader(column: Column) -> Callable[[bytes], Any]:
    if column.type == "json":
        return _load_json
    if column.type == "jsonb":
        return lambda octets: _load_json(octets[1:])
    if column.type not in _NATIVE:
        return lambda octets: octets.decode()
    load = _transformer().get_loader(column.oid, 1).load
    if column.type.endswith("timestamptz"):
        return lambda octets: _in_utc(load(octets))
    return load  # type: ignore[no-any-return]


def _load_json(octets: bytes) -> Any:
    return load_metadata(f'{{"value":{octets.decode()}}}')["value"]


def _in_utc(value: Any) -> Any:
    if isinstance(value, list):
        return [_in_utc(item) for item in value]
    return None if value is None else value.astimezone(dt.UTC)


def _dumper(column: Column, where: str) -> Callable[[Any], bytes]:
    """Return what encodes a value, and refuses one that would come back changed."""
    load = _loader(column)

    def dump(value: Any) -> bytes:
        try:
            octets = _encode(column, value)
            unchanged = dump_metadata({"": load(octets)}) == dump_metadata({"": value})
        except Exception as error:
            raise _refusal(column, value, where) from error
        if not unchanged or (value is not None and _is_rounded(column, value)):
            raise _refusal(column, value, where)
        return octets

    return dump


def _encode(column: Column, value: Any) -> bytes:
    if column.type == "jsonb" and CHANGED_BY_JSONB.intersection(value_kinds(value)):
        raise ValueError(column.type)
    if column.type in _JSON:
        text = dump_metadata({"": value})[4:-1].encode()
        return b"\x01" + text if column.type == "jsonb" else text
    if column.type not in _NATIVE or value is None:
        raise TypeError(column.type)
    if column.type == "uuid":
        return bytes.fromhex(value.replace("-", ""))
    transformer = _transformer()
    transformer.set_dumper_types([column.oid], 1)
    (octets,) = transformer.dump_sequence([value], [_binary_format()])
    return bytes(octets)


def _is_rounded(column: Column, value: Any) -> bool:
    """Whether the server would round the value to the column's declared precision."""
    if column.modifier < 0 or column.type not in _ROUNDED:
        return False
    if isinstance(value, decimal.Decimal):
        exponent = value.as_tuple().exponent
        return exponent != -((column.modifier - 4) & 0x7FF)
    return bool(value.microsecond % 10 ** (6 - column.modifier))


def _refusal(column: Column, value: Any, where: str) -> RecordRejectedError:
    return RecordRejectedError(
        f"{where}: the column {column.name!r} ({column.type}) would change or refuse a value of type "
        f"{type(value).__name__}; change the column's type or map the field",
        field=column.name,
        expected=column.type,
        found=type(value).__name__,
    )


def _transformer() -> Any:
    from psycopg.adapt import Transformer

    return Transformer()


def _binary_format() -> Any:
    from psycopg.adapt import PyFormat

    return PyFormat.BINARY
