"""Search indexes: those that a table has, and the one to build for a vector.

Limits: https://github.com/pgvector/pgvector#indexing, and the operator classes of the extension.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import xxhash

from migration_pipelines.model import Metric, VectorField, VectorKind
from migration_pipelines.stores.pgvector.pool import Pool
from migration_pipelines.stores.pgvector.table import Column, Table, quote

# operator, word in the names of operator classes
METRICS = {
    Metric.COSINE: ("<=>", "cosine"),
    Metric.DOT: ("<#>", "ip"),
    Metric.EUCLIDEAN: ("<->", "l2"),
    Metric.MANHATTAN: ("<+>", "l1"),
    Metric.HAMMING: ("<~>", "hamming"),
    Metric.JACCARD: ("<%>", "jaccard"),
}
# Dimensions that HNSW and IVFFlat index; of a sparse vector they count non-zero entries, 1,000 at most.
_MAX_DIMENSIONS = {"vector": 2000, "halfvec": 4000, "bit": 64_000, "sparsevec": math.inf}
# What IVFFlat has operator classes for.
_IVF = {
    ("vector", "l2"), ("vector", "ip"), ("vector", "cosine"),
    ("halfvec", "l2"), ("halfvec", "ip"), ("halfvec", "cosine"), ("bit", "hamming"),
}  # fmt: skip
_METHODS = {"hnsw": "hnsw", "ivfflat": "ivf"}
_DEFAULT_M = 16
_MIN_BUILD_BYTES = 64 << 20

_FIND_INDEXES = """
SELECT a.attname, c.relname, m.amname, o.opcname, c.reloptions, pg_get_indexdef(i.indexrelid)
FROM pg_catalog.pg_index i
JOIN pg_catalog.pg_class c ON c.oid = i.indexrelid
JOIN pg_catalog.pg_am m ON m.oid = c.relam AND m.amname = ANY('{hnsw,ivfflat}')
JOIN pg_catalog.pg_opclass o ON o.oid = i.indclass[0]
LEFT JOIN pg_catalog.pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0] AND a.attnum > 0
WHERE i.indrelid = %s AND i.indisvalid
ORDER BY c.relname
"""


@dataclass(frozen=True, kw_only=True)
class Index:
    """An index that is there. `column` is None where it is over an expression."""

    column: str | None
    name: str
    method: str
    operator_class: str
    options: dict[str, int] = field(default_factory=dict)
    definition: str = ""

    @property
    def metric(self) -> Metric | None:
        """The distance that it answers."""
        for metric, (_, word) in METRICS.items():
            if self.operator_class.endswith(f"_{word}_ops"):
                return metric
        return None

    def in_common_words(self) -> dict[str, Any]:
        """The index as a `VectorField` says it."""
        return {"type": _METHODS[self.method], **self.options}


@dataclass(frozen=True, kw_only=True)
class Planned:
    """An index to build: over `expression`, of at most about `build_bytes` while it is built."""

    name: str
    method: str
    expression: str
    operator_class: str
    options: dict[str, int]
    build_bytes: int

    def statement(self, table: Table) -> str:
        """The statement that builds it, unless it is there."""
        options = ", ".join(f"{key} = {int(value)}" for key, value in self.options.items())
        return (
            f"CREATE INDEX IF NOT EXISTS {quote(self.name)} ON {table.quoted} "
            f"USING {self.method} ({self.expression} {self.operator_class})"
            + (f" WITH ({options})" if options else "")
        )


def find_indexes(connection: Any, table: Table) -> dict[str, Index]:
    """Return the index of each vector that has one, over its column or over the cast that this tool makes."""
    rows = connection.execute(_FIND_INDEXES, [table.oid]).fetchall()
    indexes = [
        Index(
            column=column,
            name=name,
            method=method,
            operator_class=operator_class,
            options={key: int(value) for key, _, value in (item.partition("=") for item in options or ())},
            definition=definition,
        )
        for column, name, method, operator_class, options, definition in rows
    ]
    found: dict[str, Index] = {}
    for name, column in table.vectors.items():
        for index in indexes:
            if index.column == column.name or index.name == index_name(table, column):
                found.setdefault(name, index)
    return found


def index_name(table: Table, column: Column) -> str:
    """Return a name that is the same every time, within the server's 63 bytes."""
    key = "\0".join((table.schema, table.name, column.name)).encode()
    return f"migration_pipelines_{xxhash.xxh3_64_hexdigest(key)}"


def plan_index(table: Table, vector: VectorField, *, rows: int, extension: str) -> Planned | None:
    """Return the index to build for a vector, None where its metric or its dimensions allow none."""
    column = table.vectors[vector.name]
    if vector.metric is None or (vector.kind is VectorKind.DENSE and not vector.dimensions):
        return None
    _, word = METRICS[vector.metric]
    kind, expression = column.type, column.quoted
    dimensions = vector.dimensions or 0
    if kind == "vector" and dimensions > _MAX_DIMENSIONS["vector"]:
        kind, expression = "halfvec", f"({half_cast(column, dimensions, extension)})"
    if dimensions > _MAX_DIMENSIONS[kind] and kind != "sparsevec":
        return None
    if (kind == "bit") != (word in ("hamming", "jaccard")):
        return None
    method = "ivfflat" if vector.index.get("type") == "ivf" and (kind, word) in _IVF else "hnsw"
    return Planned(
        name=index_name(table, column),
        method=method,
        expression=expression,
        operator_class=f"{quote(extension)}.{kind}_{word}_ops",
        options=_options(vector, method, rows),
        build_bytes=_build_bytes(vector, kind, rows),
    )


def build(pool: Pool, table: Table, planned: Planned, *, max_memory_mb: int, workers: int) -> None:
    """Build an index, without workers where the server has no shared memory for them (a small /dev/shm).

    A sparse vector with more entries than an index takes is left without one.
    """
    import psycopg

    memory_mb = min(max_memory_mb, 1 + (planned.build_bytes >> 20))
    for parallel in (workers, 0):
        try:
            with pool.transaction() as connection:
                connection.execute(
                    "SELECT set_config('maintenance_work_mem', %s, true), "
                    "set_config('max_parallel_maintenance_workers', %s, true)",
                    [f"{memory_mb}MB", str(parallel)],
                )
                connection.execute(planned.statement(table).encode(), [])
        except psycopg.errors.DiskFull:
            if not parallel:
                raise
        except psycopg.errors.ProgramLimitExceeded:
            return
        else:
            return


def half_cast(column: Column, dimensions: int, extension: str) -> str:
    """Return the expression that is indexed in place of a vector of more dimensions than an index takes."""
    return f"{column.quoted}::{quote(extension)}.halfvec({dimensions})"


def _options(vector: VectorField, method: str, rows: int) -> dict[str, int]:
    if method == "ivfflat":
        # The rule of pgvector's README: rows / 1000, above a million the square root.
        usual = rows // 1000 if rows <= 1_000_000 else math.isqrt(rows)
        return {"lists": int(vector.index.get("lists", max(1, usual)))}
    return {key: int(vector.index[key]) for key in ("m", "ef_construction") if key in vector.index}


def _build_bytes(vector: VectorField, kind: str, rows: int) -> int:
    """Estimate what an HNSW build keeps in memory: vectors, heads, 2m neighbours at the lowest level."""
    each = {"vector": 4.0, "halfvec": 2.0, "bit": 1 / 8, "sparsevec": 0.0}[kind] * (vector.dimensions or 0)
    neighbours = 2 * int(vector.index.get("m", _DEFAULT_M)) * 16 * 1.1
    return max(_MIN_BUILD_BYTES, int(1.2 * rows * (each + neighbours + 256)))
