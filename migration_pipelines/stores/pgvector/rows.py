"""Batches to the rows of a table, and back: which column is packed and unpacked in which way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from migration_pipelines import batch as batches
from migration_pipelines.errors import (
    ConfigurationError,
    DimensionMismatchError,
    RecordRejectedError,
    StoreRefusedError,
)
from migration_pipelines.metadata import canonical_texts
from migration_pipelines.model import CollectionSchema, DType, IdKind, VectorField, VectorKind
from migration_pipelines.stores.pgvector import values, wire
from migration_pipelines.stores.pgvector.index import Index, find_indexes
from migration_pipelines.stores.pgvector.schema import extension_schema
from migration_pipelines.stores.pgvector.table import Column, Mapped, Table, find_table, quote

_INT_OCTETS = {"int2": 2, "int4": 4, "int8": 8}
_FLOATS = {"vector": "f4", "halfvec": "f2"}
# Octets of a value before its elements: dimensions and a reserved number, or the number of bits.
_VECTOR_HEAD = {"vector": 4, "halfvec": 4, "bit": 4, "sparsevec": 0}
# After a key's quote this tool's JSON has no white space, PostgreSQL's and Python's own has.
_NOT_CANONICAL = (b'": ', b'" :')


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of a table as batches of a schema. `where` names the collection in errors."""

    table: Table
    schema: CollectionSchema
    where: str
    indexes: Mapping[str, Index] = field(default_factory=dict)

    @property
    def is_sized(self) -> bool:
        """Whether the dimensions of all vectors are known."""
        return all(field.dimensions or field.kind is VectorKind.SPARSE for field in self.schema.vectors)

    def vector(self, name: str) -> VectorField:
        """Return the vector field of that name."""
        for vector in self.schema.vectors:
            if vector.name == name:
                return vector
        raise ConfigurationError(f"{self.where}: no vector {name!r}; there are {sorted(self.table.vectors)}")

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────

    def selected(self, *, vectors: bool) -> str:
        """Return the select list that `unpack` expects."""
        return ", ".join(
            values.expression(column) if column in self.table.fields else column.quoted
            for column in self._columns(vectors=vectors)
        )

    def copy_out(self, condition: str, *, vectors: bool, more: str = "") -> str:
        """Return the statement that reads the rows of a condition, and maybe more columns of them."""
        selected = self.selected(vectors=vectors) + more
        query = f"SELECT {selected} FROM {self.table.quoted} {condition}"  # noqa: S608 - names are quoted
        return f"COPY ({query}) TO STDOUT (FORMAT BINARY)"

    def unpack(self, group: wire.RowGroup, *, vectors: bool) -> pa.RecordBatch:
        """Return the batch of some COPY rows."""
        columns = self._columns(vectors=vectors)
        return self.assemble(wire.unpack(group, self.skips(vectors=vectors)), columns, vectors=vectors)

    def skips(self, *, vectors: bool) -> list[int]:
        """Return how many leading octets of each selected column carry no data."""
        return [self._skip(column) for column in self._columns(vectors=vectors)]

    def assemble(
        self, fields: Sequence[pa.Array], columns: Sequence[Column] | None = None, *, vectors: bool
    ) -> pa.RecordBatch:
        """Return the batch of unpacked fields."""
        found = iter(zip(columns or self._columns(vectors=vectors), fields, strict=False))
        _, ids = next(found)
        length = len(ids)
        result = {
            batches.ID: self._ids(ids),
            batches.ID_TYPE: batches.constant(self.table.id_kind.value, length),
        }
        for vector in self.schema.vectors if vectors else ():
            column, field = next(found)
            result[batches.vector_column(vector.name)] = self._vectors(column, vector, field)
        empty = pa.nulls(length, pa.string())
        result[batches.DOCUMENT] = wire.text_column(next(found)[1]) if self.table.document else empty
        texts = self._json(next(found)[1]) if self.table.metadata else empty
        result[batches.METADATA] = self._with_fields(texts, list(found))
        return pa.RecordBatch.from_arrays(list(result.values()), names=list(result))

    def empty(self, *, vectors: bool) -> pa.RecordBatch:
        """Return a batch without records; a vector of unknown dimensions has none."""
        sized = [
            field
            if field.dimensions or field.kind is VectorKind.SPARSE
            else field.model_copy(update={"dimensions": 0})
            for field in self.schema.vectors
        ]
        schema = self.schema.model_copy(update={"vectors": tuple(sized)})
        return pa.RecordBatch.from_pylist([], batches.arrow_schema(schema, vectors=vectors))

    def _columns(self, *, vectors: bool) -> list[Column]:
        table = self.table
        stored = [table.vectors[field.name] for field in self.schema.vectors] if vectors else []
        return [table.id, *stored, *filter(None, (table.document, table.metadata)), *table.fields]

    def _skip(self, column: Column) -> int:
        if column in self.table.vectors.values():
            return _VECTOR_HEAD[column.type]
        return 1 if column == self.table.metadata and column.type == "jsonb" else 0

    def _ids(self, field: pa.Array) -> pa.Array:
        kind = self.table.id_kind
        if kind is IdKind.INT:
            return wire.int_column(field, _INT_OCTETS[self.table.id.type])
        return wire.uuid_column(field) if kind is IdKind.UUID else wire.text_column(field)

    def _vectors(self, column: Column, vector: VectorField, field: pa.Array) -> pa.Array:
        if vector.kind is VectorKind.SPARSE:
            return wire.sparse_column(field, batches.vector_type(vector))
        if vector.dtype is DType.BIT:
            return wire.dense_column(field, "u1", width=batches.vector_type(vector).list_size)
        dtype = _FLOATS[column.type]
        return wire.dense_column(field, dtype, width=vector.dimensions or _width(field, dtype))

    def _json(self, field: pa.Array) -> pa.Array:
        """Return the canonical text of the JSON column; what this tool wrote as `json` is left as it is."""
        assert self.table.metadata is not None
        if self.table.made is not None and self.table.metadata.type == "json":
            octets = b"" if field.buffers()[2] is None else field.buffers()[2].to_pybytes()
            if not any(mark in octets for mark in _NOT_CANONICAL):
                return wire.text_column(field)
        texts = pa.array(canonical_texts(field.to_pylist()), pa.binary()).view(pa.string())
        # A JSON null has no fields to keep: it is read as no metadata.
        texts = pc.if_else(pc.equal(texts, "null"), pa.scalar(None, pa.string()), texts)
        if not pc.all(pc.starts_with(texts, "{"), min_count=0).as_py():
            raise StoreRefusedError(
                f"{self.where}: the column {self.table.metadata.name!r} holds JSON that is no object; "
                "read it as a field by ?metadata=*"
            )
        return texts

    def _with_fields(self, texts: pa.Array, fields: list[tuple[Column, pa.Array]]) -> pa.Array:
        if not self.table.fields:
            return texts
        has_base = self.table.metadata is not None
        merged = values.read_fields(fields, texts.to_pylist(), has_base=has_base, where=self.where)
        return pa.array(merged, pa.string())

    # ── writing ──────────────────────────────────────────────────────────────────────────────────────

    def written(self) -> str:
        """Return the column list that `pack` fills."""
        return ", ".join(column.quoted for column in self._columns(vectors=True))

    def pack(self, batch: pa.RecordBatch) -> pa.Buffer:
        """Return the COPY rows of a batch.

        Raises
        ------
        RecordRejectedError
        """
        table = self.table
        fields = [self._id_field(batch)]
        fields += [self._vector_field(batch, vector) for vector in self.schema.vectors]
        fields += self._document_field(batch.column(batches.DOCUMENT))
        texts = batch.column(batches.METADATA)
        others: list[pa.Array] = []
        has_base = table.metadata is not None
        if table.fields or not has_base:
            others, texts = values.write_fields(
                table.fields, texts.to_pylist(), has_base=has_base, where=self.where
            )
        if table.metadata is not None:
            fields.append(self._json_field(texts))
        return wire.pack([*fields, *others])

    def check(self, batch: pa.RecordBatch) -> None:
        """Raise where a batch doesn't fit the table as a whole.

        Raises
        ------
        DimensionMismatchError, RecordRejectedError
        """
        extra = set(batches.vector_columns(batch.schema)) - set(
            map(batches.vector_column, self.table.vectors)
        )
        missing = [
            f.name for f in self.schema.vectors if batches.vector_column(f.name) not in batch.schema.names
        ]
        if extra or missing:
            raise DimensionMismatchError(
                f"{self.where}: the table has the vectors {sorted(self.table.vectors)}, the batch has "
                f"{batches.vector_columns(batch.schema)}; map the vectors or name the column by ?vector="
            )
        known = [f for f in self.schema.vectors if f.dimensions or f.kind is VectorKind.SPARSE]
        sized = self.schema.model_copy(update={"vectors": tuple(known)})
        batches.check_dimensions(batch, sized, where=self.where)
        kinds = pc.unique(batch.column(batches.ID_TYPE)).to_pylist()
        if batch.num_rows and kinds != [self.table.id_kind.value]:
            raise RecordRejectedError(
                f"{self.where}: the column {self.table.id.name!r} is of type {self.table.id.type} and can't "
                f"hold ids of kind {', '.join(sorted(kinds))}; map the ids",
                expected=self.table.id_kind.value,
                found=kinds,
            )

    def _id_field(self, batch: pa.RecordBatch) -> pa.Array:
        ids = batch.column(batches.ID)
        kind = self.table.id_kind
        if kind is IdKind.INT:
            return wire.int_field(ids, _INT_OCTETS[self.table.id.type])
        return wire.uuid_field(ids) if kind is IdKind.UUID else wire.text_field(ids)

    def _vector_field(self, batch: pa.RecordBatch, vector: VectorField) -> pa.Array:
        column = batch.column(batches.vector_column(vector.name))
        stored = self.table.vectors[vector.name]
        if vector.kind is VectorKind.SPARSE:
            return wire.sparse_field(column, vector.dimensions or wire.SPARSE_MAX_DIMENSIONS)
        if vector.dtype is DType.BIT:
            assert vector.dimensions is not None
            return wire.bit_field(column, vector.dimensions)
        return wire.float_field(column, _FLOATS[stored.type])

    def _json_field(self, texts: pa.Array) -> pa.Array:
        assert self.table.metadata is not None
        if self.table.metadata.type == "json":
            return wire.text_field(texts)
        if values.would_change_in_jsonb(texts):
            raise RecordRejectedError(
                f"{self.where}: metadata holds -0.0, or a float of 1e16 or more, which the jsonb column "
                f"{self.table.metadata.name!r} would change; make the column json or map the field",
                expected="json",
                found="jsonb",
            )
        return wire.jsonb_field(texts)

    def _document_field(self, column: pa.Array) -> list[pa.Array]:
        if self.table.document is not None:
            return [wire.text_field(column)]
        if column.null_count < len(column):
            raise RecordRejectedError(
                f"{self.where}: the table has no column for documents; name one by ?document= or add "
                "a text column `document`"
            )
        return []


def find_rows(connection: Any, collection: str, mapped: Mapped, *, where: str) -> Rows:
    """Return the rows of a table, looked up in the catalog."""
    table = find_table(connection, collection, mapped, where=where)
    indexes = find_indexes(connection, table)
    fields = [_sized(connection, table, table.vector_field(name), where) for name in table.vectors]
    schema = CollectionSchema(
        name=collection,
        vectors=tuple(_with_index(field, indexes.get(field.name)) for field in fields),
        id_kinds=frozenset({table.id_kind}),
        has_documents=table.document is not None,
        properties=table.made.properties if table.made else {},
    )
    return Rows(table=table, schema=schema, where=where, indexes=indexes)


def _with_index(vector: VectorField, index: Index | None) -> VectorField:
    """Return a vector field that, if nothing else says by what distance it is searched, says its index's."""
    if index is None or vector.metric is not None:
        return vector
    return vector.model_copy(update={"metric": index.metric, "index": index.in_common_words()})


def _sized(connection: Any, table: Table, field: VectorField, where: str) -> VectorField:
    """Return a vector field whose dimensions, where the column has none, are the first record's."""
    if field.dimensions or field.kind is VectorKind.SPARSE:
        return field
    column, extension = table.vectors[field.name].quoted, extension_schema(connection, where=where)
    row = connection.execute(
        f"SELECT {quote(extension)}.vector_dims({column}) FROM {table.quoted} "  # noqa: S608 - quoted
        f"WHERE {column} IS NOT NULL LIMIT 1".encode(),
        [],
    ).fetchone()
    return table.vector_field(field.name, dimensions=row[0] if row else None)


def _width(field: pa.Array, dtype: str) -> int:
    """Return how many elements the first vector has; 0 where there is none."""
    sizes = pc.binary_length(field).drop_null()
    return sizes[0].as_py() // np.dtype(dtype).itemsize if len(sizes) else 0


def id_literal(ids: pa.RecordBatch, table: Table) -> str:
    """Return the text of an SQL array of those ids that the table could hold."""
    ids = ids.filter(pc.equal(ids.column(batches.ID_TYPE), table.id_kind.value))
    texts = ids.column(batches.ID)
    if table.id_kind is IdKind.STR:
        texts = texts.filter(pc.invert(pc.match_substring(texts, "\0")))
        escaped = pc.replace_substring(pc.replace_substring(texts, "\\", "\\\\"), '"', '\\"')
        return "{" + ",".join(f'"{text}"' for text in escaped.to_pylist()) + "}"
    held = texts.to_pylist()
    if table.id_kind is IdKind.INT:
        half = 1 << (8 * _INT_OCTETS[table.id.type] - 1)
        held = [text for text in held if -half <= int(text) < half]
    return "{" + ",".join(held) + "}"


def distances(field: pa.Array) -> npt.NDArray[np.float64]:
    """Return float64[n_records] of an unpacked field of double precision."""
    return np.frombuffer(field.buffers()[2] or b"", ">f8", len(field)).astype(np.float64)
