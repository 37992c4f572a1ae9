"""Searching a table: one statement in the order of distance."""

from __future__ import annotations

from typing import Any

import numpy as np

from migration_pipelines.batch import typed_ids
from migration_pipelines.envelope import matching
from migration_pipelines.filters import Filter
from migration_pipelines.model import DType, Metric, VectorField, VectorKind
from migration_pipelines.stores.pgvector import wire
from migration_pipelines.stores.pgvector.copying import copy, received
from migration_pipelines.stores.pgvector.index import METRICS, find_indexes, half_cast
from migration_pipelines.stores.pgvector.rows import Rows, distances
from migration_pipelines.stores.pgvector.schema import extension_schema
from migration_pipelines.stores.pgvector.table import Table, quote
from migration_pipelines.stores.pgvector.wire import SPARSE_MAX_DIMENSIONS

# Bounds of `hnsw.ef_search`, below by its default, and lists that an IVFFlat search looks into.
_MIN_EF_SEARCH, _MAX_EF_SEARCH = 40, 1000
_PROBES = 10
_GROUP_RECORDS = 1000
# How many times more of the nearest are looked at where too few of them match a filter.
_WIDEN = 8


def nearest(
    connection: Any, rows: Rows, field: VectorField, vector: Any, *, limit: int, where: Filter | None
) -> list[tuple[Any, float]]:
    """Return the nearest ids and their distances; with a filter, among ever more of the nearest."""
    query = Query(connection, rows.table, field, extension=extension_schema(connection, where=rows.where))
    query.allow_index(limit=limit, filtered=where is not None)
    more = f", ({query.distance})::float8"
    asked = query.literal(vector)
    candidates = limit
    while True:
        tail = f"WHERE {query.column.quoted} IS NOT NULL ORDER BY {query.distance} LIMIT {int(candidates)}"
        statement = rows.copy_out(tail, vectors=False, more=more)
        found: list[tuple[Any, float]] = []
        seen = 0
        with copy(connection, statement, [asked, asked]) as stream:
            for group in wire.row_groups(received(stream), max_records=_GROUP_RECORDS):
                found += _matching(rows, group, where)
                seen += len(group.sizes)
        if where is None or len(found) >= limit or seen < candidates:
            return found[:limit]
        candidates *= _WIDEN


def _matching(rows: Rows, group: wire.RowGroup, where: Filter | None) -> list[tuple[Any, float]]:
    *fields, far = wire.unpack(group, [*rows.skips(vectors=False), 0])
    part = rows.assemble(fields, vectors=False)
    keep = [True] * part.num_rows if where is None else matching(where, part).to_pylist()
    pairs = zip(typed_ids(part), distances(far).tolist(), keep, strict=True)
    return [(record_id, distance) for record_id, distance, kept in pairs if kept]


class Query:
    """The parts of a statement that searches by one vector.

    Parameters
    ----------
    connection
        In the transaction of the search: what is set there ends with it.
    """

    def __init__(self, connection: Any, table: Table, vector: VectorField, *, extension: str) -> None:
        self.column = table.vectors[vector.name]
        self._connection = connection
        self._vector = vector
        index = find_indexes(connection, table).get(vector.name)
        # An index over a cast answers only what is asked by the same cast.
        cast = index is not None and index.column is None and vector.dimensions
        kind = "halfvec" if cast else self.column.type
        stored = half_cast(self.column, vector.dimensions or 0, extension) if cast else self.column.quoted
        asked = f"%s::{kind}" if kind == "bit" else f"%s::{quote(extension)}.{kind}"
        asked += f"({vector.dimensions})" if vector.dimensions and kind != "sparsevec" else ""
        self.distance = f"({stored}) {_operator_for(vector, extension)} {asked}"

    def allow_index(self, *, limit: int, filtered: bool) -> None:
        """Let an index answer as well as it can; forbid it where it would end before enough is found."""
        if filtered or limit > _MAX_EF_SEARCH:
            self._connection.execute("SET LOCAL enable_indexscan = off")
            return
        search = min(_MAX_EF_SEARCH, max(_MIN_EF_SEARCH, 2 * limit))
        self._connection.execute("SELECT set_config('hnsw.ef_search', %s, true)", [str(search)])
        self._connection.execute("SELECT set_config('ivfflat.probes', %s, true)", [str(_PROBES)])

    def literal(self, vector: Any) -> str:
        """Return the text of a vector to search by."""
        if self._vector.kind is VectorKind.SPARSE:
            pairs = sorted(zip(vector["indices"], vector["values"], strict=True))
            entries = ",".join(f"{int(index) + 1}:{float(value)!r}" for index, value in pairs)
            return f"{{{entries}}}/{self._vector.dimensions or SPARSE_MAX_DIMENSIONS}"
        if self._vector.dtype is DType.BIT:
            bits = np.unpackbits(np.asarray(vector, np.uint8))[: self._vector.dimensions]
            return "".join(map(str, bits.tolist()))
        return f"[{','.join(map(repr, np.asarray(vector, np.float64).tolist()))}]"


def _operator_for(vector: VectorField, extension: str) -> str:
    """Return the SQL operator of a vector's metric; of one without a metric, of the plainest distance."""
    plainest = Metric.HAMMING if vector.dtype is DType.BIT else Metric.EUCLIDEAN
    operator, _ = METRICS[vector.metric or plainest]
    return f"OPERATOR({quote(extension)}.{operator})".replace("%>", "%%>")
