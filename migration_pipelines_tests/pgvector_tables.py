"""What the tests of PostgreSQL share: a store with connections of its own, schemas, reading a whole table."""

from __future__ import annotations

from typing import Any

from migration_pipelines.model import CollectionSchema, IdKind, Metric, Span, VectorField
from migration_pipelines.stores.pgvector import PgVectorStore
from migration_pipelines_tests.harnesses.pgvector import PgVectorHarness
from migration_pipelines_tests.records import Record, from_batches

EVERYTHING = Span(records=0)


def fresh(pg: PgVectorHarness, **columns: str) -> PgVectorStore:
    """A new store with connections of its own."""
    fields = {field: getattr(pg.store, field) for field in PgVectorStore.model_fields}
    return PgVectorStore(**{**fields, **{f"{role}_column": column for role, column in columns.items()}})


def read(store: PgVectorStore, table: str, **options: Any) -> list[Record]:
    """Every record of a table, read through the connector as one span."""
    return from_batches(store.scan(table, EVERYTHING, batch_records=1000, **options))


def one_vector(name: str, **field: Any) -> CollectionSchema:
    """A schema of one vector field and text ids: three dimensions and euclidean unless said otherwise."""
    vector = VectorField(**{"dimensions": 3, "metric": Metric.EUCLIDEAN, **field})
    return CollectionSchema(name=name, vectors=(vector,), id_kinds=frozenset({IdKind.STR}))
