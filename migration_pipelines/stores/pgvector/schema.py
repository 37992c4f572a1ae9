"""The tables that this tool makes, and the extension that they need."""

from __future__ import annotations

from typing import Any

from migration_pipelines.batch import DOCUMENT, ID, METADATA, vector_column
from migration_pipelines.errors import StoreRefusedError, TransientError, UnsupportedOperationError
from migration_pipelines.metadata import dump_metadata
from migration_pipelines.model import CollectionSchema, IdKind, VectorField
from migration_pipelines.stores.pgvector import errors
from migration_pipelines.stores.pgvector.table import COMMENT_KEY, VECTOR_TYPES, check_name, quote, target
from migration_pipelines.stores.pgvector.wire import SPARSE_MAX_DIMENSIONS

# Text sorts by its bytes: an order that no upgrade of the operating system changes.
_ID_TYPES = {IdKind.INT: "bigint", IdKind.UUID: "uuid", IdKind.STR: 'text COLLATE "C"'}
_FIND_EXTENSION = """
SELECT n.nspname FROM pg_catalog.pg_extension e JOIN pg_catalog.pg_namespace n ON n.oid = e.extnamespace
WHERE e.extname = 'vector'
"""


def create_table(connection: Any, schema: CollectionSchema, *, metadata_type: str, where: str) -> None:
    """Create the table of a schema, with its comment, and the extension if it isn't there."""
    namespace, name = target(connection, schema.name)
    check_name(name, what="table")
    extension = extension_schema(connection, where=where, install=True)
    columns = definition(schema, extension=extension, metadata_type=metadata_type)
    table = f"{quote(namespace)}.{quote(name)}" if namespace else quote(name)
    connection.execute(f"CREATE TABLE {table} ({', '.join(columns)})".encode(), [])
    connection.execute(f"COMMENT ON TABLE {table} IS %s".encode(), [comment(schema)])


def extension_schema(connection: Any, *, where: str, install: bool = False) -> str:
    """Return the schema that the extension lives in, installing it if that is asked.

    Raises
    ------
    StoreRefusedError
        It isn't there and can't be installed.
    """
    row = connection.execute(_FIND_EXTENSION).fetchone()
    if row is None and install:
        _install(connection, where)
        row = connection.execute(_FIND_EXTENSION).fetchone()
    if row is None:
        raise StoreRefusedError(
            f"{where}: the extension vector isn't installed in this database; run CREATE EXTENSION vector"
        )
    found: str = row[0]
    return found


def _install(connection: Any, where: str) -> None:
    import psycopg

    try:
        connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
    except psycopg.errors.UniqueViolation as error:
        raise TransientError(f"{where}: another session installs the extension vector") from error
    except psycopg.Error as error:
        if error.sqlstate is None or errors.classify(error.sqlstate)[0] is TransientError:
            raise
        reason = errors.redacted(error.diag.message_primary or "", None)
        raise StoreRefusedError(
            f"{where}: the extension vector isn't in this database and can't be installed: {reason}; "
            "put pgvector on the server and have a superuser run CREATE EXTENSION vector"
        ) from error


def definition(schema: CollectionSchema, *, extension: str, metadata_type: str) -> list[str]:
    """Return the column definitions of a table for a schema.

    Parameters
    ----------
    extension
        Schema that the extension `vector` lives in.

    Raises
    ------
    ConfigurationError, UnsupportedOperationError
    """
    if len(schema.id_kinds) != 1:
        raise UnsupportedOperationError(
            f"pgvector: {schema.name}: a table holds ids of one kind, this collection has "
            f"{', '.join(sorted(schema.id_kinds)) or 'none'}; map the ids to text"
        )
    (id_kind,) = schema.id_kinds
    columns = [f"{quote(ID)} {_ID_TYPES[id_kind]} PRIMARY KEY"]
    for field in schema.vectors:
        name = vector_column(field.name)
        check_name(name, what="vector column")
        columns.append(f"{quote(name)} {_vector_type(field, extension)}")
    if schema.has_documents:
        columns.append(f"{quote(DOCUMENT)} text")
    columns.append(f"{quote(METADATA)} {metadata_type}")
    return columns


def _vector_type(field: VectorField, extension: str) -> str:
    for name, found in VECTOR_TYPES.items():
        if found == (field.kind, field.dtype):
            dimensions = field.dimensions or SPARSE_MAX_DIMENSIONS
            return f"{name}({dimensions})" if name == "bit" else f"{quote(extension)}.{name}({dimensions})"
    raise UnsupportedOperationError(f"pgvector: no column type for {field.kind} vectors of {field.dtype}")


def comment(schema: CollectionSchema) -> str:
    """Return the comment that keeps what columns can't say."""
    kept = schema.model_dump(mode="json", exclude={"name", "properties", "options"})
    return dump_metadata({COMMENT_KEY: {**kept, "properties": dict(schema.properties)}})
