"""Indexes of pgvector and the search that uses them."""

from __future__ import annotations

import numpy as np
import psycopg
import pytest

from migration_pipelines.errors import DimensionMismatchError
from migration_pipelines.filters import parse
from migration_pipelines.model import CollectionSchema, IdKind, Metric, VectorField
from migration_pipelines_tests.pgvector_tables import one_vector
from migration_pipelines_tests.records import Record, plain_records, plain_schema, to_batch


def load(pg, schema, matrix):
    pg.store.create(schema)
    records = [Record(id=f"r{n}", vectors={"": row}, metadata={"n": n}) for n, row in enumerate(matrix)]
    pg.store.upsert(schema.name, to_batch(records, schema))
    pg.store.finish_load(schema.name)
    return records


def plan_of(pg, table, expression, operator, query):
    with psycopg.connect(pg.url) as connection:
        connection.execute("SET enable_seqscan = off")
        text = f"[{','.join(map(str, query.tolist()))}]"
        rows = connection.execute(
            f"EXPLAIN SELECT id FROM {table} ORDER BY {expression} {operator} '{text}' LIMIT 3"
        ).fetchall()
    return "\n".join(row for (row,) in rows)


@pytest.mark.parametrize(
    ("dimensions", "index", "metric", "expression", "operator", "said"),
    [
        (8, {"type": "hnsw", "m": 8, "ef_construction": 40}, Metric.COSINE, "vector", "<=>", "m='8'"),
        (8, {"type": "ivf", "lists": 7}, Metric.DOT, "vector", "<#>", "lists='7'"),
        (8, {"type": "ivf", "lists": 7}, Metric.MANHATTAN, "vector", "<+>", "hnsw"),
        (2500, {}, Metric.EUCLIDEAN, "(vector::halfvec(2500))", "<->", "halfvec_l2_ops"),
    ],
)
def test_the_index_is_built_after_the_load_and_used(
    pg, name, dimensions, index, metric, expression, operator, said
):
    vector = VectorField(dimensions=dimensions, metric=metric, index=index)
    schema = CollectionSchema(name=name, vectors=(vector,), id_kinds=frozenset({IdKind.STR}))
    matrix = np.random.default_rng(3).standard_normal((200, dimensions)).astype(np.float32)
    records = load(pg, schema, matrix)
    pg.store.finish_load(name)

    (definition,) = pg.store.describe(name).options["indexes"].values()
    assert said in definition
    assert pg.store.describe(name).vectors == schema.vectors
    assert "Index Scan using migration_pipelines_" in plan_of(pg, name, expression, operator, matrix[7])
    if metric is not Metric.DOT:
        assert pg.store.search(name, matrix[7], limit=3)[0][0] == records[7].id


@pytest.mark.parametrize(("dimensions", "metric"), [(8, None), (4500, Metric.COSINE)])
def test_no_index_is_built_without_a_metric_or_beyond_its_dimensions(pg, name, dimensions, metric):
    vector = VectorField(dimensions=dimensions, metric=metric)
    schema = CollectionSchema(name=name, vectors=(vector,), id_kinds=frozenset({IdKind.STR}))
    matrix = np.random.default_rng(3).standard_normal((20, dimensions)).astype(np.float32)
    load(pg, schema, matrix)
    assert "indexes" not in pg.store.describe(name).options
    assert pg.store.search(name, matrix[7], limit=3)[0][0] == "r7"


def test_found_tables_get_no_index(pg, name):
    pg.sql(f"CREATE TABLE {name} (id text PRIMARY KEY, vector vector(2))")
    pg.store.begin_load(name)
    pg.store.finish_load(name)
    assert "indexes" not in pg.store.describe(name).options


def test_search_finds_as_many_as_asked_with_a_filter_or_beyond_what_the_index_gives(pg, name):
    matrix = np.random.default_rng(3).standard_normal((3000, 8)).astype(np.float32)
    load(pg, one_vector(name, dimensions=8), matrix)
    order = np.linalg.norm(matrix.astype(float) - matrix[5], axis=1).argsort()

    assert len(pg.store.search(name, matrix[5], limit=200)) == 200
    assert [found for found, _ in pg.store.search(name, matrix[5], limit=1500)] == [
        f"r{n}" for n in order[:1500]
    ]
    rare = [f"r{n}" for n in order if n % 500 == 0]
    found = pg.store.search(
        name, matrix[5], limit=4, where=parse({"$or": [{"n": n} for n in range(0, 3000, 500)]})
    )
    assert [record_id for record_id, _ in found] == rare[:4]


def test_a_vector_of_other_dimensions_is_told(pg, name):
    schema = plain_schema(name)
    pg.store.create(schema)
    wider = plain_schema(name, dimensions=9)
    with pytest.raises(DimensionMismatchError):
        pg.store.upsert(name, to_batch(plain_records(2, dimensions=9), wider))
    unnamed = schema.model_copy(update={"vectors": (VectorField(name="x", dimensions=8),)})
    with pytest.raises(DimensionMismatchError, match="map"):
        pg.store.upsert(name, to_batch([Record(id="a")], unnamed))
