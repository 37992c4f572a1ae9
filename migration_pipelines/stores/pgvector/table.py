"""Tables: what the catalog says of one, and which column plays which role.

A tool-made table has the columns of a batch (`id`, `vector`, `vector:<name>`, `document`, `metadata`) and a
comment, JSON with the key `migration_pipelines`, that keeps what columns can't say: metrics, index
parameters, properties. Its roles are found as in any other table.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError as ShapeError

from migration_pipelines.batch import ID
from migration_pipelines.errors import CollectionNotFoundError, ConfigurationError
from migration_pipelines.metadata import load_metadata
from migration_pipelines.model import CollectionSchema, DType, IdKind, VectorField, VectorKind
from migration_pipelines.stores.pgvector.wire import SPARSE_MAX_DIMENSIONS

COMMENT_KEY = "migration_pipelines"
# NAMEDATALEN - 1: a longer name is cut by the server, and two names may become one.
MAX_NAME_BYTES = 63
# Stands in `metadata=*` for "every other column is a field".
ALL_COLUMNS = "*"

_ID_KINDS = {
    "int2": IdKind.INT,
    "int4": IdKind.INT,
    "int8": IdKind.INT,
    "uuid": IdKind.UUID,
    "text": IdKind.STR,
    "varchar": IdKind.STR,
}
VECTOR_TYPES = {
    "vector": (VectorKind.DENSE, DType.FLOAT32),
    "halfvec": (VectorKind.DENSE, DType.FLOAT16),
    "sparsevec": (VectorKind.SPARSE, DType.FLOAT32),
    "bit": (VectorKind.DENSE, DType.BIT),
}
_TEXT_TYPES = {"text", "varchar", "citext"}
_JSON_TYPES = {"json", "jsonb"}
# A shorter bit string is flags, not a vector.
_MIN_BIT_DIMENSIONS = 8
_DEFAULT_VECTORS = ("vector", "embedding")
_DOCUMENTS = ("document", "content", "text", "page_content", "body")
_METADATA = ("metadata", "cmetadata", "meta", "langchain_metadata")
_PART = r'"(?:[^"]|"")+"|[^".]+'
_QUALIFIED = re.compile(rf"({_PART})\.({_PART})")

_FIND_TABLE = """
SELECT c.oid, n.nspname, c.relname, c.relkind, obj_description(c.oid, 'pg_class')
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind = ANY('{r,p,v,m,f}') AND c.relname = %s
  AND CASE WHEN %s::text IS NULL THEN pg_catalog.pg_table_is_visible(c.oid) ELSE n.nspname = %s END
"""
_FIND_COLUMNS = """
SELECT a.attname, t.typname, t.oid, a.attnotnull,
       CASE WHEN d.typtype = 'd' THEN d.typtypmod ELSE a.atttypmod END,
       ARRAY(SELECT c.relname::text FROM pg_catalog.pg_index i
             JOIN pg_catalog.pg_class c ON c.oid = i.indexrelid
             WHERE i.indrelid = a.attrelid AND i.indisunique AND i.indisvalid AND i.indnkeyatts = 1
               AND i.indkey[0] = a.attnum AND i.indpred IS NULL),
       EXISTS (SELECT FROM pg_catalog.pg_index i WHERE i.indrelid = a.attrelid AND i.indisprimary
               AND i.indnkeyatts = 1 AND i.indkey[0] = a.attnum)
FROM pg_catalog.pg_attribute a
JOIN pg_catalog.pg_type d ON d.oid = a.atttypid
JOIN pg_catalog.pg_type t ON t.oid = CASE WHEN d.typtype = 'd' THEN d.typbasetype ELSE d.oid END
WHERE a.attrelid = %s AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = ''
ORDER BY a.attnum
"""
_LIST_TABLES = """
SELECT n.nspname, c.relname, n.nspname = current_schema()
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind = ANY('{r,p,v,m,f}') AND NOT c.relispartition
  AND n.nspname <> 'information_schema' AND n.nspname !~ '^pg_'
  AND has_schema_privilege(n.oid, 'USAGE') AND has_table_privilege(c.oid, 'SELECT')
  AND (obj_description(c.oid, 'pg_class') LIKE %s OR EXISTS (
    SELECT FROM pg_catalog.pg_attribute a JOIN pg_catalog.pg_type t ON t.oid = a.atttypid
    WHERE a.attrelid = c.oid AND a.attnum > 0 AND t.typname = ANY('{vector,halfvec,sparsevec}')))
"""


@dataclass(frozen=True, kw_only=True)
class Mapped:
    """The columns that an address names; None finds the role, "" leaves it empty."""

    id: str | None = None
    vector: str | None = None
    document: str | None = None
    metadata: str | None = None


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column. `modifier` is the type's: of a vector its dimensions, -1 where it has none."""

    name: str
    type: str
    oid: int
    modifier: int = -1
    not_null: bool = False
    unique_indexes: tuple[str, ...] = ()
    primary: bool = False

    @property
    def quoted(self) -> str:
        """The name as SQL."""
        return quote(self.name)

    @property
    def is_vector(self) -> bool:
        """Whether the type is one that holds vectors."""
        if self.type == "bit":
            return self.modifier >= _MIN_BIT_DIMENSIONS
        return self.type in VECTOR_TYPES


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table and the roles of its columns; `made` is what this tool's own comment says."""

    oid: int
    schema: str
    name: str
    is_view: bool
    id: Column
    vectors: Mapping[str, Column]
    document: Column | None
    metadata: Column | None
    fields: tuple[Column, ...]
    made: CollectionSchema | None

    @property
    def quoted(self) -> str:
        """The qualified name as SQL."""
        return f"{quote(self.schema)}.{quote(self.name)}"

    @property
    def id_kind(self) -> IdKind:
        """The one kind of its ids."""
        return _ID_KINDS[self.id.type]

    def vector_field(self, name: str, **changes: Any) -> VectorField:
        """Return one vector field: the comment's, as long as it fits the column, or what the column says."""
        column = self.vectors[name]
        kind, dtype = VECTOR_TYPES[column.type]
        dimensions = column.modifier if column.modifier > 0 else None
        if kind is VectorKind.SPARSE and dimensions == SPARSE_MAX_DIMENSIONS:
            dimensions = None
        found = VectorField(name=name, kind=kind, dtype=dtype, dimensions=dimensions)
        for field in self.made.vectors if self.made else ():
            if field.name == name and (field.kind, field.dtype, field.dimensions) == (
                kind,
                dtype,
                dimensions,
            ):
                found = field
        return found.model_copy(update=changes)


# ── names ────────────────────────────────────────────────────────────────────────────────────────────


def quote(name: str) -> str:
    """Return a name as SQL. Its percent signs are doubled: every statement here runs with parameters."""
    return '"' + name.replace('"', '""').replace("%", "%%") + '"'


def check_name(name: str, *, what: str) -> None:
    """Raise where the server would refuse a name, or cut it.

    Raises
    ------
    ConfigurationError
    """
    if not name or "\0" in name or len(name.encode()) > MAX_NAME_BYTES:
        raise ConfigurationError(
            f"pgvector: {what} {name!r} can't be a name in PostgreSQL: expected 1 to {MAX_NAME_BYTES} bytes "
            "without NUL; choose another name",
            expected=MAX_NAME_BYTES,
            found=len(name.encode()),
        )


def name_parts(collection: str) -> tuple[str | None, str]:
    """Return the schema, if the collection names one, and the table.

    `schema.table`, each part as it is or quoted as in SQL; a name of any other form is a table's.
    """
    match = _QUALIFIED.fullmatch(collection)
    if match is not None:
        return _unquoted(match[1]), _unquoted(match[2])
    return None, _unquoted(collection)


def _unquoted(part: str) -> str:
    if re.fullmatch(r'"(?:[^"]|"")+"', part):
        return part[1:-1].replace('""', '"')
    return part


def target(connection: Any, collection: str) -> tuple[str | None, str]:
    """Return schema and table; a dot divides only where there is a schema of that name.

    So a collection called `docs.v1` elsewhere keeps its name here.
    """
    schema, name = name_parts(collection)
    if schema is not None and not collection.startswith('"'):
        found = connection.execute("SELECT FROM pg_catalog.pg_namespace WHERE nspname = %s", [schema])
        if not found.rowcount:
            return None, collection
    return schema, name


def list_tables(connection: Any) -> list[str]:
    """Return the names of the tables that have a vector column or were made by this tool, sorted."""
    rows = connection.execute(_LIST_TABLES, [f'%"{COMMENT_KEY}":%']).fetchall()
    return sorted(
        _spelled(table) if here else f"{_spelled(schema)}.{_spelled(table)}" for schema, table, here in rows
    )


def _spelled(name: str) -> str:
    """Return a name so that `name_parts` reads it back."""
    plain = name_parts(name) == (None, name) and "." not in name
    return name if plain else '"' + name.replace('"', '""') + '"'


# ── the catalog ──────────────────────────────────────────────────────────────────────────────────────


def find_table(connection: Any, collection: str, mapped: Mapped, *, where: str) -> Table:
    """Return a table with its roles.

    Raises
    ------
    CollectionNotFoundError
    ConfigurationError
        A role is missing or could be played by several columns.
    """
    schema, name = target(connection, collection)
    row = connection.execute(_FIND_TABLE, [name, schema, schema]).fetchone()
    if row is None:
        raise not_found(where, list_tables(connection))
    oid, schema, name, kind, comment = row
    columns = [
        Column(
            name=column,
            type=kind_of_value,
            oid=type_oid,
            not_null=not_null,
            modifier=modifier,
            unique_indexes=tuple(indexes),
            primary=primary,
        )
        for column, kind_of_value, type_oid, not_null, modifier, indexes, primary in connection.execute(
            _FIND_COLUMNS, [oid]
        )
    ]
    made = _read_comment(comment, collection)
    roles = _Roles(columns, mapped, where, is_view=kind in "vmf", made=made is not None)
    return Table(oid=oid, schema=schema, name=name, is_view=kind in "vf", made=made, **roles.find())


def not_found(where: str, there: Sequence[str]) -> CollectionNotFoundError:
    """Return the error that names what is there instead."""
    return CollectionNotFoundError(
        f"{where}: no such table; tables with vectors there: {', '.join(there) or 'none'}", found=list(there)
    )


class _Roles:
    """Which column is what."""

    def __init__(
        self, columns: list[Column], mapped: Mapped, where: str, *, is_view: bool, made: bool
    ) -> None:
        self.columns = columns
        self.mapped = mapped
        self.where = where
        self.is_view = is_view
        self.made = made

    def find(self) -> dict[str, Any]:
        chosen = self._id()
        vectors = self._vectors()
        document = self._one("document", _DOCUMENTS, _TEXT_TYPES, "a text column", taken=chosen)
        everything = self.mapped.metadata == ALL_COLUMNS
        metadata = (
            None if everything else self._one("metadata", _METADATA, _JSON_TYPES, "a json or jsonb column")
        )
        taken = {chosen.name, *(column.name for column in vectors.values())}
        taken |= {column.name for column in (document, metadata) if column}
        others = everything or self.mapped.metadata is None
        fields = tuple(column for column in self.columns if column.name not in taken) if others else ()
        return {
            "id": chosen,
            "vectors": vectors,
            "document": document,
            "metadata": metadata,
            "fields": fields,
        }

    def _id(self) -> Column:
        if self.mapped.id is not None:
            column = self._named("id", self.mapped.id)
        else:
            keys = [c for c in self.columns if c.primary]
            keys = keys or [c for c in self.columns if c.name == ID and c.unique_indexes and c.not_null]
            if not keys:
                raise self._error(
                    "no column can be the id: no primary key of one column, no unique not-null `id`", "id"
                )
            column = keys[0]
        if column.type not in _ID_KINDS:
            expected = "smallint, integer, bigint, uuid, text or varchar"
            raise self._error(f"the id column {column.name!r} is of type {column.type}, not {expected}", "id")
        if not self.is_view and not (column.unique_indexes and (column.not_null or column.primary)):
            raise self._error(
                f"the id column {column.name!r} isn't unique and not null: give it a primary key", "id"
            )
        return column

    def _vectors(self) -> dict[str, Column]:
        found = [column for column in self.columns if column.is_vector]
        default: Column | None
        if self.mapped.vector is not None:
            default = self._named("vector", self.mapped.vector)
            if not default.is_vector:
                raise self._error(
                    f"the column {default.name!r} is of type {default.type}, no vector", "vector"
                )
        elif not found and not self.made:
            raise self._error("no column is of type vector, halfvec, sparsevec or bit", "vector")
        else:
            default = self._default_vector(found)
        named = {_vector_name(column.name): column for column in found if column is not default}
        return ({"": default} if default else {}) | named

    def _default_vector(self, found: list[Column]) -> Column | None:
        named = [column for column in found if column.name in _DEFAULT_VECTORS]
        if len(named) > 1:
            raise self._error(
                f"{' and '.join(c.name for c in named)} could both be the default vector", "vector"
            )
        if named:
            return named[0]
        alone = len(found) == 1 and not found[0].name.startswith("vector:")
        return found[0] if alone else None

    def _one(
        self, role: str, names: Sequence[str], types: set[str], expected: str, *, taken: Column | None = None
    ) -> Column | None:
        wanted = getattr(self.mapped, role)
        if wanted == "":
            return None
        if wanted is not None:
            column = self._named(role, wanted)
            if column.type not in types:
                raise self._error(f"the column {wanted!r} is of type {column.type}, not {expected}", role)
            return column
        free = [column for column in self.columns if column is not taken]
        found = [column for column in free if column.name in names and column.type in types]
        if len(found) > 1:
            raise self._error(f"{' and '.join(c.name for c in found)} could both be the {role}", role)
        return found[0] if found else None

    def _named(self, role: str, name: str) -> Column:
        for column in self.columns:
            if column.name == name:
                return column
        raise self._error(f"there is no column {name!r}", role)

    def _error(self, problem: str, option: str) -> ConfigurationError:
        there = ", ".join(f"{column.name} ({column.type})" for column in self.columns)
        return ConfigurationError(
            f"{self.where}: {problem}; columns found: {there}; name the column by ?{option}=",
            found=[column.name for column in self.columns],
            option=option,
        )


def _vector_name(column: str) -> str:
    return column.removeprefix("vector:")


def _read_comment(text: str | None, collection: str) -> CollectionSchema | None:
    """Return the schema in a table's comment; None where the comment is somebody else's."""
    try:
        found = load_metadata(text or "{}")
        if not isinstance(found, Mapping) or COMMENT_KEY not in found:
            return None
        return CollectionSchema(**{**found[COMMENT_KEY], "name": collection})
    except (json.JSONDecodeError, ShapeError, TypeError):
        return None
