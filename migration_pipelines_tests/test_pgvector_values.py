"""Metadata, ids and vectors in the column types of PostgreSQL."""

from __future__ import annotations

import uuid

import numpy as np
import pytest

from migration_pipelines import batch as batches
from migration_pipelines.errors import RecordRejectedError
from migration_pipelines.model import DType, IdKind, Metric, VectorKind
from migration_pipelines_tests.pgvector_tables import one_vector, read
from migration_pipelines_tests.records import Record, by_id, from_batches, plain_schema, to_batch


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ({}, "jsonb"),
        ({"a": {"text": 3, "float": 1}}, "jsonb"),
        ({"a": {"negative-zero": 0}}, "jsonb"),
        ({"a": {"text": 3}, "b": {"negative-zero": 1}}, "json"),
        ({"a": {"integral-float": 1}}, "json"),
        ({"a": {"nul-text": 1}}, "json"),
        ({"a\0": {"text": 1}}, "json"),
    ],
)
def test_metadata_is_jsonb_unless_that_would_change_a_value(pg, kinds, expected):
    assert pg.store.adapt(plain_schema("x"), kinds).options == {"metadata_type": expected}


def test_numbers_that_jsonb_changes_come_back_from_json_and_are_refused_by_jsonb(pg, name):
    values = [{"a": -0.0}, {"a": [1e22]}, {"a": {"b": 1.7976931348623157e308}}, {"a": "a\0b"}]
    records = [
        Record(id=f"r{n}", vectors={"": np.ones(8, np.float32)}, metadata=m) for n, m in enumerate(values)
    ]
    harmless = Record(id="ok", metadata={"a": "-0.0 and 1e+22", "b": -0.05, "c": 1e-7})
    for kind in ("json", "jsonb"):
        schema = plain_schema(f"{name}_{kind}").model_copy(update={"options": {"metadata_type": kind}})
        pg.store.create(schema)
        pg.store.upsert(schema.name, to_batch([harmless], schema))
        for record in records:
            if kind == "json":
                pg.store.upsert(schema.name, to_batch([record], schema))
            else:
                with pytest.raises(RecordRejectedError):
                    pg.store.upsert(schema.name, to_batch([record], schema))
        expected = [harmless, *records] if kind == "json" else [harmless]
        found = [Record(id=r.id, metadata=r.metadata) for r in read(pg.store, schema.name)]
        assert by_id(found) == by_id([Record(id=r.id, metadata=r.metadata) for r in expected])


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ({"dtype": DType.FLOAT16}, [np.float16([0.1, -0.0, 6e-8]), None, np.float16([65504, 1, 2])]),
        (
            {"dtype": DType.BIT, "dimensions": 11, "metric": Metric.HAMMING},
            [np.uint8([0b10110111, 0b10100000]), None],
        ),
        (
            {"kind": VectorKind.SPARSE, "dimensions": 100},
            [{"indices": [0, 99], "values": [0.5, -2.0]}, None, {"indices": [], "values": []}],
        ),
        (
            {"kind": VectorKind.SPARSE, "dimensions": None},
            [{"indices": [3, 999_999_999], "values": [1e-30, 0.1]}],
        ),
    ],
    ids=["halfvec", "bit", "sparsevec", "sparsevec-unbounded"],
)
def test_vectors_of_every_type_come_back_bit_for_bit(pg, name, field, values):
    schema = one_vector(name, **field)
    records = [Record(id=f"r{n}", vectors={"": value}) for n, value in enumerate(values)]
    pg.store.create(schema)
    pg.store.upsert(name, to_batch(records, schema))
    pg.store.finish_load(name)

    assert pg.store.describe(name).vectors == schema.vectors
    found = from_batches([pg.store.fetch(name, to_batch(records, schema))])
    assert by_id(found) == by_id(from_batches([to_batch(records, schema)]))
    assert by_id(pg.read(name)) == by_id(from_batches([to_batch(records, schema)]))
    assert pg.store.search(name, values[0], limit=1)[0] == ("r0", 0.0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ({"dtype": DType.BIT, "dimensions": 11}, np.uint8([0, 1])),
        ({"kind": VectorKind.SPARSE, "dimensions": 9}, {"indices": [9], "values": [1.0]}),
        ({"kind": VectorKind.SPARSE, "dimensions": 9}, {"indices": [1, 1], "values": [1.0, 2.0]}),
        ({"kind": VectorKind.SPARSE, "dimensions": 9}, {"indices": [1, 2], "values": [1.0, 0.0]}),
        ({}, np.float32([1, np.nan, 3])),
        ({}, np.float32([1, np.inf, 3])),
    ],
)
def test_a_vector_that_its_column_would_change_is_refused(pg, name, field, value):
    schema = one_vector(name, **{"metric": None, **field})
    pg.store.create(schema)
    with pytest.raises(RecordRejectedError):
        pg.store.upsert(name, to_batch([Record(id="a", vectors={"": value})], schema))
    assert pg.store.count(name) == 0


def test_a_column_without_dimensions_refuses_none_and_says_so(pg, name):
    pg.sql(f"CREATE TABLE {name} (id text PRIMARY KEY, vector vector)")
    store = pg.store
    assert store.describe(name).vectors[0].dimensions is None
    assert store.fetch(name, batches.id_batch(["a"])).num_rows == 0
    schema = plain_schema(name).model_copy(update={"has_documents": False})
    store.upsert(name, to_batch([Record(id="a", vectors={"": np.ones(8, np.float32)})], schema))
    assert store.describe(name).vectors[0].dimensions == 8


def test_the_longest_id_that_is_declared_is_held(pg, name):
    size = pg.store.capabilities.max_id_bytes
    # Random text: what compresses would fit at any length.
    text = np.random.default_rng(1).integers(97, 123, size, np.uint8).tobytes().decode()
    schema = plain_schema(name)
    pg.store.create(schema)
    pg.store.upsert(name, to_batch([Record(id=text)], schema))
    assert [record.id for record in read(pg.store, name)] == [text]
    with pytest.raises(RecordRejectedError):
        pg.store.upsert(name, to_batch([Record(id=text + text)], schema))


def test_ids_of_another_kind_or_range_are_refused_in_writing_and_not_there_in_reading(pg, name):
    schema = plain_schema(name, id_kind=IdKind.INT)
    pg.store.create(schema)
    pg.store.upsert(name, to_batch([Record(id=-(2**63)), Record(id=2**63 - 1)], schema))
    for wrong in ("1", 2**63, uuid.uuid4()):
        with pytest.raises(RecordRejectedError):
            pg.store.upsert(name, to_batch([Record(id=wrong)], schema))
        assert pg.store.fetch(name, batches.id_batch([wrong])).num_rows == 0
        pg.store.delete(name, batches.id_batch([wrong]))
    assert {record.id for record in read(pg.store, name)} == {-(2**63), 2**63 - 1}


def test_another_constraint_of_the_table_rejects_records_and_is_no_reason_to_delete(pg, name):
    pg.sql(
        f"CREATE TABLE {name} (id text PRIMARY KEY, vector vector(2), slug text UNIQUE, n int CHECK (n < 10))"
    )
    schema = pg.store.describe(name)

    def put(record_id, **metadata):
        pg.store.upsert(name, to_batch([Record(id=record_id, metadata=metadata)], schema))

    put("a", slug="x", n=1)
    for record_id, metadata in (("b", {"slug": "x"}), ("b", {"slug": "y", "n": 10})):
        with pytest.raises(RecordRejectedError):
            put(record_id, **metadata)
    put("a", slug="z")
    with pytest.raises(RecordRejectedError):
        put("c", slug="z")
    assert pg.sql(f"SELECT id, slug, n FROM {name}") == [("a", "z", None)]
